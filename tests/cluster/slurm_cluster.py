"""A disposable Slurm of three pretend nodes: real daemons, one folder of state.

Also a command, to try things by hand (as root):

    python tests/cluster/slurm_cluster.py start
    export SLURM_CONF=/tmp/colddiff-slurm/etc/slurm.conf
    srun -N3 hostname; squeue
    python tests/cluster/slurm_cluster.py stop

Keys, database, configuration, spool and logs lie in the folder of state, and the daemons listen on
free ports of this machine. Nothing outside the folder is written.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

from slurm_files import NODES, write_files
from slurm_processes import end, files_of, is_alive, name_of, processes, variables_of, wait

PROGRAMS = {  # what is needed, and the Debian package that has it
    "munged": "munge",
    "mariadbd": "mariadb-server",
    "mariadb-install-db": "mariadb-server",
    "slurmdbd": "slurmdbd",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
}
SLURM_DAEMONS = ("munged", "slurmdbd", "slurmctld", "slurmd", "slurmstepd")
STOP_ORDER = ("slurmctld", "slurmdbd", "mariadbd", "munged")
MARIADB = (
    "--no-defaults --user=root --innodb-log-file-size=8M --innodb-flush-log-at-trx-commit=0 "
    "--innodb-lock-wait-timeout=900 --performance-schema=OFF --skip-name-resolve"
).split()
ACCOUNTS = ("cluster colddiff", "account colddiff", "user root account=colddiff")


class SlurmCluster:
    """Nodes c1 to c3, each of two cores, two pretend GPUs and 6000 MB, in one folder of state.

    Partitions are ``low`` (the default, preempted by requeue) and ``high`` (at most two hours).
    A job gets 1000 MB a core unless it asks, and is killed within seconds when it takes more. Only
    the account ``colddiff`` exists.
    """

    def __init__(self, state: Path) -> None:
        self.state = state.absolute()
        self.conf = self.state / "etc" / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        """What a command needs to find this cluster, and nothing of a job that it may run in."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))}
        return {**kept, "PATH": search_path(), "SLURM_CONF": str(self.conf)}

    def __enter__(self) -> SlurmCluster:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start everything and wait until all nodes are idle, or leave nothing behind."""
        if reason := obstacle():
            raise RuntimeError(reason)
        if len(str(self.state)) > 80:
            raise ValueError(f"too long for the path of a socket: {self.state}")
        if self.state.exists() and any(self.state.iterdir()) and not self.conf.exists():
            raise ValueError(f"{self.state} is not empty, and not the folder of a test cluster")
        self.stop()
        refuse_second_slurm()
        with ExitStack() as on_error:
            on_error.callback(self.stop)
            self._start_daemons(write_files(self.state))
            self.wait_ready()
            on_error.pop_all()

    def stop(self) -> None:
        """End jobs and daemons, however they are; the configuration and logs stay."""
        end(partial(self._processes_of, *NODES))
        for daemon in STOP_ORDER:
            end(partial(self._daemons, daemon), grace=10)
        shutil.rmtree(self.state / "mariadb", ignore_errors=True)

    def wait_ready(self, seconds: float = 60) -> None:
        """Wait until every node is idle."""
        if not wait(lambda: all(self.node_state(node) == "IDLE" for node in NODES), seconds):
            states = {node: self.node_state(node) for node in NODES}
            raise TimeoutError(f"not idle after {seconds} s: {states}; see {self.state}/log")

    def node_state(self, node: str) -> str:
        """Such as ``IDLE``, ``MIXED`` or ``DOWN+NOT_RESPONDING``; empty without an answer."""
        words = self.run("scontrol", "--oneliner", "show", "node", node, check=False).split()
        return next((w.removeprefix("State=") for w in words if w.startswith("State=")), "")

    def kill_node(self, node: str) -> None:
        """The node fails: its daemon and all that runs on it are gone at once.

        Slurm notices about 26 s later: ``node_state`` is ``DOWN+NOT_RESPONDING``, its jobs requeue.
        """
        end(partial(self._processes_of, node))

    def resume_node(self, node: str) -> None:
        """The node is repaired, if it was dead: wait until it can run jobs."""
        if not self._is_running(node):
            self._launch(node, "slurmd", "-N", node)
        wait(lambda: "NOT_RESPONDING" not in self.node_state(node), 30)
        if "DOWN" in self.node_state(node):
            self.run("scontrol", "update", f"NodeName={node}", "State=RESUME")
        if not wait(lambda: self.node_state(node) in ("IDLE", "MIXED", "ALLOCATED"), 30):
            raise TimeoutError(f"{node} is {self.node_state(node)}:\n{self.log(node)}")

    def running_jobs(self) -> list[str]:
        """As ``squeue`` names them, elements of an array as ``12_3``."""
        return self.run("squeue", "--noheader", "--states=RUNNING", "--format=%i").split()

    def cancel_all(self, seconds: float = 60) -> None:
        """Cancel every job and wait until none is left."""
        if jobs := self.run("squeue", "--noheader", "--format=%A").split():
            self.run("scancel", *jobs, check=False)  # one may have ended by itself
        if not wait(lambda: not self.run("squeue", "--noheader"), seconds):
            raise TimeoutError(f"jobs are left:\n{self.run('squeue')}")

    def run(self, *command: str, check: bool = True, timeout: float = 60) -> str:
        """The output of a command that talks to this cluster, without space around it."""
        done = subprocess.run(
            command, env=self.environment, text=True, capture_output=True, timeout=timeout
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr or done.stdout}")
        return done.stdout.strip()

    def log(self, daemon: str, lines: int = 40) -> str:
        """The end of the log of ``slurmctld``, ``slurmdbd``, ``mariadb``, ``munged`` or a node."""
        path = self.state / "log" / f"{daemon}.log"
        text = path.read_text(errors="replace") if path.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    def _start_daemons(self, ports: dict[str, int]) -> None:
        state = self.state
        self._launch(
            "munged",
            *("munged", "--force"),  # else it minds a folder that is closed to other users
            *(f"--key-file={state}/munge/key", f"--seed-file={state}/munge/seed"),
            *(f"--socket={state}/munge/socket", f"--pid-file={state}/run/munged.pid"),
            f"--log-file={state}/log/munged.log",
        )
        mariadb = (*MARIADB, f"--datadir={state}/mariadb")
        self.run("mariadb-install-db", *mariadb, "--skip-test-db")
        self._launch(
            "mariadb",
            *("setsid", "--fork", "mariadbd", *mariadb, f"--init-file={state}/etc/database.sql"),
            *("--bind-address=127.0.0.1", f"--port={ports['mariadb']}"),
            *(f"--socket={state}/run/mariadb.socket", f"--pid-file={state}/run/mariadb.pid"),
        )
        self._launch("slurmdbd", "slurmdbd")
        if not wait(lambda: bool(self.run("sacctmgr", "show", "tres", check=False)), 30):
            raise TimeoutError(f"slurmdbd does not answer:\n{self.log('slurmdbd')}")
        for words in ACCOUNTS:
            self.run("sacctmgr", "--immediate", "add", *words.split())
        self._launch("slurmctld", "slurmctld")
        for node in NODES:
            self._launch(node, "slurmd", "-N", node)

    def _launch(self, name: str, *command: str) -> None:
        """Start a daemon, which leaves the foreground and writes ``run/NAME.pid``."""
        out = self.state / "log" / f"{name}.out"
        with out.open("a") as stream:
            done = subprocess.run(
                command, env=self.environment, stdout=stream, stderr=stream, timeout=60
            )
        if done.returncode or not wait(lambda: self._is_running(name), 30):
            raise RuntimeError(f"{name} did not start:\n{out.read_text()}{self.log(name)}")

    def _is_running(self, name: str) -> bool:
        with suppress(OSError, ValueError):
            pid = int((self.state / "run" / f"{name}.pid").read_text())
            return is_alive(pid) and self._is_ours(pid)
        return False

    def _is_ours(self, pid: int) -> bool:
        return f"SLURM_CONF={self.conf}" in variables_of(pid)

    def _daemons(self, program: str) -> list[int]:
        return [pid for pid in processes() if name_of(pid) == program and self._is_ours(pid)]

    def _processes_of(self, *nodes: str) -> list[int]:
        """The daemons, job steps and jobs on these nodes.

        A slurmstepd overwrites its environment, but keeps its node's log open.
        """
        logs = {str(self.state / "log" / f"{node}.log") for node in nodes}
        names = {f"SLURMD_NODENAME={node}" for node in nodes}

        def is_on_node(pid: int) -> bool:
            if name_of(pid) in ("slurmd", "slurmstepd"):
                return not logs.isdisjoint(files_of(pid))
            return not names.isdisjoint(variables_of(pid)) and self._is_ours(pid)

        return [pid for pid in processes() if is_on_node(pid)]


def search_path() -> str:
    """PATH, with the folders of daemons."""
    return os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin"))


def obstacle() -> str | None:
    """Why no cluster can be started here, if so."""
    path = search_path()
    missing = {package for name, package in PROGRAMS.items() if not shutil.which(name, path=path)}
    if missing:
        return f"needs the Debian packages {' '.join(sorted(missing))}: make test-slurm gets them"
    if os.geteuid() != 0:
        return "only root can start a test cluster: run make test-slurm as root"
    return None


def refuse_second_slurm() -> None:
    """Two on one machine could be taken for one another."""
    found = [pid for pid in processes() if name_of(pid) in SLURM_DAEMONS]
    if found:
        variables = sorted(set.union(*map(variables_of, found)))
        confs = [v.partition("=")[2] for v in variables if v.startswith("SLURM_CONF=")]
        raise RuntimeError(
            "no test cluster is started on a machine that runs a Slurm or munge already: "
            + ", ".join(f"{name_of(pid)} ({pid})" for pid in found)
            + "".join(f"\nIts configuration is {conf}." for conf in confs)
            + "\nA test cluster is stopped by: slurm_cluster.py stop --state FOLDER (etc's parent)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="A disposable Slurm, to test with")
    parser.add_argument("command", choices=["start", "stop", "status"])
    parser.add_argument("--state", type=Path, default=Path("/tmp/colddiff-slurm"))
    arguments = parser.parse_args()
    cluster = SlurmCluster(arguments.state)
    try:
        if arguments.command == "start":
            cluster.start()
            sys.stdout.write(f"export SLURM_CONF={cluster.conf}\n")
        elif arguments.command == "stop":
            cluster.stop()
        else:
            nodes, jobs = cluster.run("sinfo", "--Node", "--long"), cluster.run("squeue")
            sys.stdout.write(f"{nodes}\n\n{jobs}\n")
    except (RuntimeError, ValueError, TimeoutError) as error:
        sys.exit(f"slurm_cluster.py: {error}")


if __name__ == "__main__":
    main()
