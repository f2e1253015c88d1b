"""The test cluster is what the other tests take it for."""

from __future__ import annotations

from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster
from slurm_files import NODES
from slurm_processes import is_alive, wait

REPORT = 'echo "$SLURMD_NODENAME ${SLURM_RESTART_COUNT:-0}"'


def submit(slurm: SlurmCluster, output: Path, script: str, *options: str) -> str:
    log = ("--open-mode=append", f"--output={output}")
    return slurm.run("sbatch", "--parsable", "--mem=200", *log, *options, f"--wrap={script}")


def history(slurm: SlurmCluster, job: str) -> list[str]:
    """State and exit code of each incarnation, the oldest first."""
    fields = ("--noheader", "--parsable2", "--format=State,ExitCode")
    return slurm.run("sacct", "-X", "--duplicates", "-j", job, *fields).splitlines()


def wait_history(slurm: SlurmCluster, job: str, *states: str, seconds: float = 20) -> None:
    wait(lambda: history(slurm, job) == list(states), seconds)
    assert history(slurm, job) == list(states)


def wait_written(path: Path, lines: int = 1) -> list[str]:
    def written() -> list[str]:
        return path.read_text().splitlines() if path.exists() else []

    assert wait(lambda: len(written()) >= lines, 20), f"{path}: {written()}"
    return written()


def start_now(slurm: SlurmCluster, job: str) -> None:
    """Skip the two minutes that a requeued job waits; earlier than this the update is lost."""
    reason = ("squeue", "--noheader", "--jobs", job, "--format=%T %r")
    assert wait(lambda: slurm.run(*reason) == "PENDING BeginTime", 20), slurm.run(*reason)
    slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now+2")


def test_a_step_runs_on_three_nodes(slurm: SlurmCluster) -> None:
    said = slurm.run("srun", "--nodes=3", "bash", "-c", "echo $SLURMD_NODENAME")
    assert sorted(said.split()) == list(NODES)


def test_jobs_on_one_node_get_different_gpus(slurm: SlurmCluster, tmp_path: Path) -> None:
    for number in ("first", "second"):
        script = "echo $CUDA_VISIBLE_DEVICES; sleep 20"
        submit(slurm, tmp_path / f"{number}.out", script, "--gres=gpu:1", "--nodelist=c1")
    seen = [wait_written(tmp_path / f"{number}.out") for number in ("first", "second")]
    assert sorted(seen) == [["0"], ["1"]]
    assert len(slurm.running_jobs()) == 2


def test_accounting_has_the_exit_code(slurm: SlurmCluster, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path / "job.out", "exit 3")
    wait_history(slurm, job, "FAILED|3:0")


def test_only_the_account_of_the_tests_is_accepted(slurm: SlurmCluster, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="Invalid account"):
        submit(slurm, tmp_path / "job.out", "true", "--account=other")


def test_a_greedy_job_is_killed(slurm: SlurmCluster, tmp_path: Path) -> None:
    greedy = "exec python3 -c 'import time; x = bytearray(400 << 20); time.sleep(60)'"
    job = submit(slurm, tmp_path / "job.out", greedy)
    wait_history(slurm, job, "FAILED|0:9")
    assert "exceeded memory limit" in (tmp_path / "job.out").read_text()


def test_scancel_sends_a_signal_to_the_step(slurm: SlurmCluster, tmp_path: Path) -> None:
    log = tmp_path / "job.out"
    script = "srun bash -c 'trap \"exit 7\" USR2; echo ready; while sleep 0.1; do :; done'"
    job = submit(slurm, log, script)
    wait_written(log)
    slurm.run("scancel", "--signal=USR2", job)
    wait_history(slurm, job, "FAILED|7:0")


def test_a_low_job_is_preempted_and_runs_again(slurm: SlurmCluster, tmp_path: Path) -> None:
    log = tmp_path / "low.out"
    script = f'{REPORT}; [ -n "$SLURM_RESTART_COUNT" ] || sleep 60'
    job = submit(slurm, log, script, "--nodelist=c1", "--exclusive")
    wait_written(log)
    place = ("--partition=high", "--nodelist=c1", "--exclusive")
    high = submit(slurm, tmp_path / "high.out", "true", *place)
    wait_history(slurm, high, "COMPLETED|0:0")
    wait_history(slurm, job, "PREEMPTED|0:0", "PENDING|0:0")
    start_now(slurm, job)
    wait_history(slurm, job, "PREEMPTED|0:0", "COMPLETED|0:0")
    assert [line for line in log.read_text().splitlines() if line[0] == "c"] == ["c1 0", "c1 1"]


def test_a_dead_node_is_noticed_and_its_job_moves(slurm: SlurmCluster, tmp_path: Path) -> None:
    log, pid = tmp_path / "job.out", tmp_path / "pid"
    script = f'{REPORT}; [ -n "$SLURM_RESTART_COUNT" ] || {{ echo $$ > {pid}; exec sleep 300; }}'
    job = submit(slurm, log, script)
    process = int(wait_written(pid)[0])
    node = log.read_text().split()[0]
    assert is_alive(process)
    slurm.kill_node(node)
    assert not is_alive(process)
    wait_history(slurm, job, "NODE_FAIL|0:0", "PENDING|0:0", seconds=60)
    assert slurm.node_state(node) == "DOWN+NOT_RESPONDING"
    start_now(slurm, job)
    wait_history(slurm, job, "NODE_FAIL|0:0", "COMPLETED|0:0")
    (first, _), (second, restart) = map(str.split, log.read_text().splitlines())
    assert first == node and second != node and restart == "1"


def test_no_second_cluster_is_started(slurm: SlurmCluster, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=f"already(.|\n)*configuration is {slurm.conf}"):
        SlurmCluster(tmp_path / "other").start()
    assert slurm.node_state("c1") == "IDLE"
