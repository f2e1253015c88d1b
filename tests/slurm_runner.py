"""A Slurm of shell scripts that really runs a batch script, one process, on this machine."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

COMMANDS = {
    "sbatch": """
test "$1" = --test-only && {{ cat {state}/test-only >&2; exit $(cat {state}/test-only.rc); }}
echo "Submitted batch job 901"
test -f {state}/full && exit 0
export SLURM_JOB_ID=901 SLURM_NTASKS=1 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0
export SLURM_JOB_NUM_NODES=1 SLURM_JOB_NODELIST=n1 SLURMD_NODENAME=n1
setsid sh "$1" >{state}/job.log 2>&1 </dev/null &
echo $! > {state}/pid
""",
    # The last words of the line are the job's command; its options are Slurm's.
    "srun": """
while ! command -v "$1" >/dev/null || test "$1" = "${{1#/}}"; do
  case "$1" in --output) out=$(echo "$2" | sed s/%j/901/g\\;s/%t/0/g);;
  --error) err=$(echo "$2" | sed s/%j/901/g\\;s/%t/0/g);; esac
  shift
done
exec "$@" >"$out" 2>"$err"
""",
    "squeue": """
test -f {state}/full && test ! -f {state}/cancelled \
  && echo "901|PENDING|Resources||2030-01-02T03:04:05|2030-01-01T00:00:00"
test -f {state}/pid && kill -0 $(cat {state}/pid) 2>{state}/kill.log \
  && echo "901|RUNNING|None|n1|2030-01-02T03:04:05|2030-01-01T00:00:00"
exit 0
""",
    "scancel": """
touch {state}/cancelled
echo "$*" >> {state}/scancel.calls
test -f {state}/pid && kill -- -$(cat {state}/pid) 2>{state}/kill.log
exit 0
""",
    "scontrol": """
echo "$*" >> {state}/scontrol.calls
case "$*" in
  *partition*) cat {state}/partitions;;
  *config*) cat {state}/config;;
esac
""",
    "sacct": "exit $(cat {state}/sacct.rc)",
    "sinfo": "echo 'main*|infinite'",
}
CONFIG = """Configuration data as of 2030-01-01T00:00:00
ClusterName             = hpc
JobRequeue              = 1
KillWait                = 30 sec
MaxArraySize            = 1001
PreemptMode             = REQUEUE
PreemptType             = preempt/partition_prio
SLURM_VERSION           = 23.11.4
"""
PARTITIONS = (
    "PartitionName=main AllowGroups=ALL Default=YES GraceTime=0 PreemptMode=REQUEUE State=UP\n"
    "PartitionName=free AllowGroups=ALL Default=NO GraceTime=60 PreemptMode=CANCEL State=UP\n"
)


class SlurmRunner:
    """What the scripts answer; change it by writing the files of ``state``."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        programs, self.state = folder / "bin", folder / "slurm"
        programs.mkdir(parents=True)
        self.state.mkdir()
        for name, script in COMMANDS.items():
            program = programs / name
            program.write_text("#!/bin/sh" + "\n" * (script[0] != "\n"))
            program.write_text(program.read_text() + script.format(state=self.state))
            program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(programs), prepend=":")
        self.write("config", CONFIG)
        self.write("partitions", PARTITIONS)
        self.write("test-only", "sbatch: Job 901 to start at 2030-01-02T03:04:05 on nodes n1\n")
        self.write("test-only.rc", "0")
        self.write("sacct.rc", "0")

    def write(self, name: str, text: str) -> None:
        (self.state / name).write_text(text)

    def set(self, **changes: str) -> None:
        """Change values of ``scontrol show config``."""
        lines = [
            f"{name} = {changes[name]}"
            if (name := line.partition("=")[0].strip()) in changes
            else line
            for line in CONFIG.splitlines()
        ]
        self.write("config", "\n".join(lines) + "\n")

    def calls(self, command: str) -> list[str]:
        path = self.state / f"{command}.calls"
        return path.read_text().splitlines() if path.exists() else []
