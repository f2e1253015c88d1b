"""logs, cancel, retry and follow as users see them, on a pretended Slurm and on real jobs."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from fake_slurm import FakeSlurm, finished, install, submitted
from tiny import replaced, tiny

from colddiff.config import GenerationConfig, RunConfig
from colddiff.interruption import StopRequest
from colddiff.ranks import Ranks
from colddiff.run_folder import RunFolder
from jobs import environment
from jobs.cluster import Submitted
from jobs.follow import follow
from jobs.ledger import Entry, Ledger
from jobs.planning import Planned, plan
from jobs.reproduce import _by_dependency
from jobs.slurm import SlurmError, elements
from jobs.states import living_jobs
from jobs.status import row
from jobs.survey import survey
from jobs.tasks import EvaluateTask, GenerateTask, ReportTask, TrainTask, claim, from_dict
from jobs.watch import Cancel, Logs, Retry, Status, Sync

ROOT = Path(__file__).parent.parent
CONFIG = replaced(tiny(steps=12, validate_every=6), "evaluation", samples=20, images=12)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return install(tmp_path, monkeypatch)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Without a GPU or other users' queues; no process outlives the test."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield tmp_path
    left = [
        process
        for process in psutil.process_iter(["cmdline"])
        if str(tmp_path) in " ".join(process.info["cmdline"] or ()) and process.pid != os.getpid()
    ]
    for process in left:
        process.kill()
    psutil.wait_procs(left, timeout=10)


def make(runs: Path, seed: int = 0, config: RunConfig = CONFIG) -> RunFolder:
    return RunFolder.create(runs, replaced(config, "training", seed=seed))


def until(true: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def running(job: str) -> str:
    return f"{job}|RUNNING|None|c2|2026-11-23T18:41:00|2026-11-23T18:40:57"


def pending(job: str, reason: str) -> str:
    return f"{job}|PENDING|{reason}||N/A|2026-11-23T18:40:57"


def ended(job: str, state: str, code: str = "1:0", reason: str = "None") -> str:
    return f"{job}|{state}|{code}|c3|00:00:50|100M|04:00:00|{reason}"


def rank_log(entry: Entry, rank: int) -> Path:
    return Path(entry.stderr.replace("_0_log", f"_{rank}_log"))


# logs


def test_logs_of_all_ranks(
    runs: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make(runs)
    entry = submitted(folder, "12_1")
    submitted(make(runs, 1), "12_11")
    for rank in range(12):
        rank_log(entry, rank).write_text("".join(f"rank {rank} line {n}\n" for n in range(3)))
    Path(entry.stdout).write_text("standard output\n")
    slurm.queue(running("12_1"))
    assert Logs(runs=runs, name=folder.path.name[:30], lines=2)() == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown == [
        line
        for rank in range(12)
        for line in (
            f"==> {rank_log(entry, rank)} <==",
            f"rank {rank} line 1",
            f"rank {rank} line 2",
        )
    ]
    assert Logs(runs=runs, name=str(folder.path), out=True)() == 0
    assert capsys.readouterr().out == f"==> {entry.stdout} <==\nstandard output\n"
    with pytest.raises(ValueError, match="--lines -1 is not allowed"):
        Logs(runs=runs, name=folder.path.name, lines=-1)()


def test_logs_that_are_not_there(
    runs: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make(runs)
    with pytest.raises(ValueError, match="has no job.*--cluster debug"):
        Logs(runs=runs, name=folder.path.name)()
    submitted(folder)
    slurm.queue(pending("12", "AssocGrpGRES"))
    assert Logs(runs=runs, name=folder.path.name)() == 0
    assert "queued as 12 (AssocGrpGRES); it has not started" in capsys.readouterr().out
    slurm.queue()
    slurm.account("12|CANCELLED by 0|0:0|None assigned|00:00:00|100M|04:00:00|Priority")
    assert Logs(runs=runs, name=folder.path.name)() == 0
    assert "job 12 did not start" in capsys.readouterr().out
    with pytest.raises(ValueError, match="'absent' names no run"):
        Logs(runs=runs, name="absent")()


def test_logs_follow_a_job_over_a_requeue_to_its_end(
    runs: Path,
    slurm: FakeSlurm,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("jobs.watch.ASK_S", 0.1)
    monkeypatch.setattr("jobs.watch.LOOK_S", 0.02)
    folder = make(runs)
    entry = submitted(folder)
    slurm.queue(pending("12", "Resources"))
    following = threading.Thread(target=Logs(runs=runs, name=folder.path.name, follow=True))
    following.start()
    seen = ""

    def shows(text: str) -> None:
        nonlocal seen

        def there() -> bool:
            nonlocal seen
            seen += capsys.readouterr().out
            return text in seen

        until(there)

    log = Path(entry.stderr)
    shows("(Resources); it has not started")
    slurm.queue(running("12"))
    log.write_text("first line\nhalf a ")
    shows("first line\n")
    slurm.queue(pending("12", "BeginTime"))
    with log.open("a") as file:
        file.write("line\n")
    shows("half a line\n")
    until(lambda: any("JobId=12 StartTime=now" in call for call in slurm.calls("scontrol")))
    slurm.queue(running("12"))
    with log.open("a") as file:
        file.write("second attempt\nValueError: at last\n")
    slurm.queue()
    slurm.account(ended("12", "TIMEOUT"))
    following.join(timeout=30)
    assert not following.is_alive()
    seen += capsys.readouterr().out
    assert seen.count("first line") == 1 and seen.count(f"==> {log} <==") == 1
    assert seen.index("second attempt") < seen.index("job 12 has ended; timeout")


# cancel


def test_cancel_by_name(runs: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [make(runs, seed) for seed in range(3)]
    for index, folder in enumerate(folders):
        submitted(folder, f"12_{index}")
    slurm.queue(running("12_0"), pending("12_1", "Priority"), running("12_2"))
    names = [folder.path.name for folder in folders]
    assert Cancel(runs=runs, names=tuple(names[:2]))() == 0
    assert slurm.calls("scancel") == ["12_0 12_1"]
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"{names[0]}: train running as 12_0 on c2, cancelled: it saves and ends",
        f"{names[1]}: train queued as 12_1 (Priority), cancelled",
    ]
    events = {name: Ledger(runs).latest()[name, "train"].event for name in names}
    assert list(events.values()) == ["cancelled", "cancelled", "submitted"]
    slurm.queue(running("12_2"))
    slurm.account(ended("12_0", "CANCELLED by 0", "0:0"), ended("12_1", "CANCELLED by 0", "0:0"))
    lines = Status(runs=runs).text().splitlines()[1:]
    states = {line.split()[0]: line.split()[2] for line in lines}
    assert states == dict(zip(names, ["cancelled", "cancelled", "running"], strict=True))
    assert Cancel(runs=runs, names=(names[0],))() == 0
    assert capsys.readouterr().out == f"{names[0]}: nothing to cancel\n"
    assert len(slurm.calls("scancel")) == 1


def test_cancel_finds_both_generations_of_a_run(runs: Path, slurm: FakeSlurm) -> None:
    folder = make(runs)
    tasks = [GenerateTask(str(folder.path), settings=GenerationConfig(n=n)) for n in (64, 128)]
    for index, task in enumerate(tasks):
        submitted(folder, f"1{index}", kind="generate", task=task.to_dict())
    slurm.queue(pending("10", "Priority"), running("11"))
    finished(folder, CONFIG)
    planned = plan(tasks, living_jobs(runs, [folder.path.name]))
    assert [(each.wanted, each.found.split(" ")[0]) for each in planned] == [
        (False, "queued"),
        (False, "running"),
    ]
    assert Cancel(runs=runs, names=(folder.path.name,))() == 0
    assert slurm.calls("scancel") == ["10 11"]
    # Of those that are gone only the last one tells how the run stands.
    slurm.queue()
    assert [job.entry.job_id for job in survey(runs).jobs] == ["11"]


def test_runs_of_another_folder_are_refused(runs: Path, slurm: FakeSlurm, tmp_path: Path) -> None:
    """They may have the names of runs here, and jobs of their own."""
    make(runs)
    other = make(tmp_path / "other")
    submitted(make(runs))
    slurm.queue(running("12"))
    with pytest.raises(ValueError, match=f"give --runs {tmp_path / 'other'}"):
        Cancel(runs=runs, names=(str(other.path),))()
    assert slurm.calls("scancel") == []
    assert Cancel(runs=runs, names=(str(runs / other.path.name),))() == 0
    assert slurm.calls("scancel") == ["12"]


def test_elements_cancelled_before_their_start_are_not_retried(
    runs: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    """Slurm keeps one line for all of them."""
    for index in range(3):
        submitted(make(runs, index), f"12_{index}")
    never = "0:0|None assigned|00:00:00|100M|04:00:00|None"
    slurm.account(ended("12_0", "CANCELLED by 0", "0:0"), f"12_[1-2%1]|CANCELLED by 0|{never}")
    assert Retry(runs=runs)() == 0
    assert capsys.readouterr().out.count("no: name it to take it up again") == 3
    assert not slurm.calls("sbatch")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("12", ["12"]),
        ("12_3", ["12_3"]),
        ("12_[3]", ["12_3"]),
        ("12_[0,4-6%2]", ["12_0", "12_4", "12_5", "12_6"]),
        ("12.batch", ["12.batch"]),
    ],
)
def test_names_of_array_elements(name: str, expected: list[str]) -> None:
    assert elements(name) == expected


def test_ctrl_c_on_local_jobs_leaves_those_on_slurm_alone(
    runs: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(runs)
    submitted(folder, "12")
    slurm.queue(running("12"))

    def interrupted(self: object, now: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr("jobs.follow._Following.rows", interrupted)
    assert follow(runs, [folder.path.name], "local") == 130
    assert slurm.calls("scancel") == []


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_job_cancelled_while_it_saves_is_not_requeued(
    runs: Path, monkeypatch: pytest.MonkeyPatch, cancelled: bool
) -> None:
    entry = submitted(make(runs), "12_3")
    if cancelled:
        Ledger(runs).append([dataclasses.replace(entry, event="cancelled")])
    requeued: list[int] = []
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    monkeypatch.setattr(environment, "in_submitit", lambda: True)
    monkeypatch.setattr(environment, "process", lambda: {"job_id": "12_3"})
    monkeypatch.setattr(environment, "ranks", lambda: Ranks())
    monkeypatch.setattr(environment, "_remove_torn_pickle", lambda: None)
    stop = StopRequest()
    stop.previous[signal.SIGUSR2] = lambda signum, frame: requeued.append(signum)
    with pytest.raises(SystemExit) as left:
        environment.leave(stop, signal.SIGUSR2, runs)
    assert requeued == ([] if cancelled else [signal.SIGUSR2])
    assert left.value.code == 128 + (signal.SIGTERM if cancelled else signal.SIGUSR2)


def test_evaluations_wait_for_their_own_training(runs: Path) -> None:
    """Of a whole array element by element; of a part of one each for its own."""
    folders = [make(runs, seed) for seed in range(3)]
    tasks = [EvaluateTask(str(folder.path)) for folder in folders]
    jobs = {
        (task.run, "train"): Submitted(f"50_{index}", Path(), Path())
        for index, task in enumerate(tasks)
    }
    whole = [Planned(task, "after training", wanted=True) for task in tasks]
    assert _by_dependency(whole, jobs, {}) == {"aftercorr:50": whole}
    part = [dataclasses.replace(whole[0], wanted=False), *whole[1:]]
    assert _by_dependency(part, jobs, {}) == {
        "afterok:50_1": [whole[1]],
        "afterok:50_2": [whole[2]],
    }


def test_cancel_all_and_what_is_refused(
    runs: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong in (Cancel(runs=runs), Cancel(runs=runs, names=("x",), all=True)):
        with pytest.raises(ValueError, match="or give --all"):
            wrong()
    assert Cancel(runs=runs, all=True)() == 0
    assert "nothing to cancel" in capsys.readouterr().out
    assert not runs.exists()
    submitted(make(runs))
    with pytest.raises(ValueError, match="'absent' names no run"):
        Cancel(runs=runs, names=("absent",))()
    assert Cancel(runs=runs, all=True)() == 0
    assert "nothing to cancel: no job is queued or runs" in capsys.readouterr().out
    slurm.queue(running("12"))
    assert Cancel(runs=runs, all=True)() == 0
    assert slurm.calls("scancel") == ["12"]
    slurm.fail("squeue", "Unable to contact slurm controller")
    with pytest.raises(SlurmError, match="Unable to contact"):
        Cancel(runs=runs, all=True)()


def test_cancel_says_who_works_on_a_run_that_has_no_job(
    runs: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make(runs)
    submitted(folder)
    (folder.path / "process.json").write_text('{"pid": 4711, "host": "here", "kind": "train"}')
    with claim(folder):
        assert Cancel(runs=runs, names=(folder.path.name,))() == 0
    assert "process 4711 on here works on it: end it there" in capsys.readouterr().out


# retry


def table_of(said: str) -> dict[str, str]:
    """What is said of each run, without the columns' spaces."""
    lines = [line for line in said.splitlines() if line.startswith("digits")]
    return {line.split()[0]: " ".join(line.split()[1:]) for line in lines}


def test_retry_submits_what_failed_and_nothing_else(
    runs: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [make(runs, seed) for seed in range(8)]
    names = [folder.path.name for folder in folders]
    for index, folder in enumerate(folders):
        submitted(folder, f"12_{index}")
    finished(folders[0], folders[0].config, evaluated=True)
    folders[4].write_status("running", 5, 12)  # and nobody knows its job any more
    cancelled = Ledger(runs).latest()[names[5], "train"]
    Ledger(runs).append([dataclasses.replace(cancelled, event="cancelled")])
    log = Path(Ledger(runs).latest()[names[7], "train"].stderr)
    log.write_text("Traceback (most recent call last):\n  frame\nValueError: bad\n")
    slurm.queue(running("12_1"), pending("12_2", "BeginTime"))
    slurm.account(
        ended("12_0", "COMPLETED", "0:0"),
        ended("12_3", "OUT_OF_MEMORY"),
        ended("12_5", "CANCELLED by 0", "0:0"),
        ended("12_6", "TIMEOUT"),
        ended("12_7", "FAILED"),
    )
    assert Retry(runs=runs, dry_run=True)() == 0
    preview = table_of(capsys.readouterr().out)
    assert list(preview) == names[3:8]
    assert not slurm.calls("sbatch") and not (runs / ".code").exists()
    assert Retry(runs=runs)() == 0
    said = table_of(capsys.readouterr().out)
    assert said == {
        names[3]: f"train out of memory as 901_0; likely to fail again: retry {names[3]} --mem 64G",
        names[4]: "train its job is gone without a word: killed, or the machine was restarted "
        "as 901_1",
        names[5]: "train cancelled no: name it to take it up again",
        names[6]: f"train timeout as 901_2; likely to fail again: retry {names[6]} --time 8:00:00",
        names[7]: "train ValueError: bad as 901_3",
    }
    (script,) = slurm.scripts()
    assert "#SBATCH --array=0-3%4" in script and "#SBATCH --mem=32G" in script
    latest = Ledger(runs).latest()
    for name, index in ((names[3], 0), (names[4], 1), (names[6], 2), (names[7], 3)):
        entry = latest[name, "train"]
        assert (entry.job_id, entry.event) == (f"901_{index}", "submitted")
        assert from_dict(entry.task) == TrainTask(str(runs / name))
        assert (
            json.loads((runs / name / "submission-train.json").read_text())["job_id"]
            == entry.job_id
        )
    slurm.queue(running("12_1"), pending("12_2", "BeginTime"), *map(running, job_ids(901)))
    assert Retry(runs=runs)() == 0
    assert list(table_of(capsys.readouterr().out)) == [names[5]]
    assert Retry(runs=runs, names=(names[0], names[1], names[5]))() == 0
    said = table_of(capsys.readouterr().out)
    assert said == {
        names[0]: "train complete no",
        names[1]: "train running as 12_1 on c2 no",
        names[5]: "train cancelled as 902",
    }


def job_ids(array: int) -> list[str]:
    return [f"{array}_{index}" for index in range(4)]


def test_retry_with_other_resources(
    runs: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = make(runs, 0), make(runs, 1)
    entry = submitted(first, "12")
    submitted(second, "13", profile={**entry.profile, "partition": "long"})
    slurm.account(ended("12", "OUT_OF_MEMORY"), ended("13", "OUT_OF_MEMORY"))
    for options, message in (
        ({"mem": "lots"}, "mem = 'lots'"),
        ({"time": "soon"}, "time = 'soon'"),
        ({"sbatch": ("array=3",)}, "array"),
    ):
        for dry_run in (True, False):
            with pytest.raises(ValueError, match=message):
                Retry(runs=runs, dry_run=dry_run, **options)()  # type: ignore[arg-type]
    assert not slurm.calls("sbatch")
    assert Retry(runs=runs, mem="64G", time="2-0", sbatch=("qos=high", "comment=again"))() == 0
    assert "likely" not in capsys.readouterr().out
    scripts = slurm.scripts()
    assert len(scripts) == 2  # their partitions differ
    for script in scripts:
        for line in ("--mem=64G", "--time=2880", "--qos=high", "--comment=again"):
            assert f"#SBATCH {line}\n" in script
    assert "#SBATCH --partition=long\n" in scripts[1]
    latest = Ledger(runs).latest()
    assert latest[second.path.name, "train"].profile["mem"] == "64G"
    assert latest[second.path.name, "train"].profile["partition"] == "long"


def test_retry_says_what_was_submitted_when_slurm_refuses_the_rest(
    runs: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = make(runs, 0), make(runs, 1)
    entry = submitted(first, "12")
    submitted(second, "13", profile={**entry.profile, "partition": "gone"})
    slurm.account(ended("12", "NODE_FAIL"), ended("13", "NODE_FAIL"))
    sbatch = slurm.state.parent / "bin" / "sbatch"
    refusal = 'for last; do :; done; grep -q "partition=gone" "$last" && '
    refusal += 'echo "sbatch: error: invalid partition specified: gone" >&2 && exit 1'
    sbatch.write_text(sbatch.read_text().replace("#!/bin/sh\n", f"#!/bin/sh\n{refusal}\n"))
    with pytest.raises(SlurmError, match="invalid partition specified: gone"):
        Retry(runs=runs)()
    said = table_of(capsys.readouterr().out)
    assert said[first.path.name].endswith("as 901")
    assert said[second.path.name].endswith("not yet")
    assert Ledger(runs).latest()[second.path.name, "train"].job_id == "13"


def test_retry_takes_up_a_whole_chain(
    runs: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [make(runs, 0), make(runs, 1)]
    for index, folder in enumerate(folders):
        submitted(folder, f"12_{index}", task=TrainTask(str(folder.path), evaluate=False).to_dict())
    for index, folder in enumerate(folders):
        task = EvaluateTask(str(folder.path), evaluation=CONFIG.evaluation).to_dict()
        submitted(folder, f"13_{index}", kind="evaluate", task=task)
    report = ReportTask("report-x", "", "x", "tiny", "out").to_dict()
    submitted(folders[0], "14", run="report-x", kind="report", task=report)
    finished(folders[1], folders[1].config, evaluated=True)
    never = "0:0|None assigned|00:00:00|100M|04:00:00"
    slurm.account(
        ended("12_0", "NODE_FAIL"),
        ended("12_1", "COMPLETED", "0:0"),
        f"13_0|CANCELLED by 0|{never}|DependencyNeverSatisfied",
        ended("13_1", "COMPLETED", "0:0"),
        f"14|CANCELLED|{never}|Dependency",
    )
    assert Retry(runs=runs)() == 0
    said = capsys.readouterr().out.splitlines()[1:]
    assert [" ".join(line.split()) for line in said] == [
        f"{folders[0].path.name} train node failure as 901",
        f"{folders[0].path.name} evaluate dependency as 902",
        "report-x report dependency as 903",
    ]
    train, evaluate, last = slurm.scripts()
    assert "dependency" not in train
    assert "#SBATCH --dependency=afterok:901\n" in evaluate
    assert "#SBATCH --dependency=afterok:901:902\n" in last


def test_retry_leaves_an_evaluation_whose_training_is_cancelled(
    runs: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make(runs)
    entry = submitted(folder, "12", task=TrainTask(str(folder.path), evaluate=False).to_dict())
    Ledger(runs).append([dataclasses.replace(entry, event="cancelled")])
    task = EvaluateTask(str(folder.path), evaluation=CONFIG.evaluation).to_dict()
    submitted(folder, "13", kind="evaluate", task=task)
    slurm.account(
        ended("12", "CANCELLED by 0", "0:0"),
        "13|CANCELLED by 0|0:0|None assigned|00:00:00|1M|04:00:00|DependencyNeverSatisfied",
    )
    assert Retry(runs=runs)() == 0
    said = capsys.readouterr().out
    assert "name it to take it up again" in said and "the run is not trained" in said
    assert not slurm.calls("sbatch")
    assert Retry(runs=runs, names=(folder.path.name,))() == 0
    assert len(slurm.scripts()) == 2


def test_retry_without_slurm_or_work(
    runs: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Retry(runs=runs)() == 0
    assert capsys.readouterr().out == "nothing to retry\n"
    assert not runs.exists()
    folder = make(runs)
    submitted(folder)
    # A sweep's worker is not a run: resume looks after it.
    worker = {"kind": "worker", "study": "blur"}
    Ledger(runs).append([Entry("blur-worker-0", "worker", "slurm", "11", task=worker)])
    slurm.queue(running("12"))
    assert Retry(runs=runs)() == 0
    assert capsys.readouterr().out == "nothing to retry\n"
    slurm.fail("squeue", "Unable to contact slurm controller")
    with pytest.raises(SlurmError, match="Unable to contact"):
        Retry(runs=runs)()
    slurm.recover("squeue")
    slurm.queue()
    with claim(folder):  # somebody took it up here
        assert Retry(runs=runs)() == 0
    assert capsys.readouterr().out == "nothing to retry\n"
    assert not slurm.calls("sbatch")


# follow, on Slurm


def following(runs: Path, names: list[str]) -> tuple[threading.Thread, list[int]]:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(follow(runs, names, "slurm")))
    thread.start()
    return thread, codes


def test_follow_tells_changes_and_the_diagnosis(
    runs: Path,
    slurm: FakeSlurm,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(__import__("jobs.follow").follow.POLL_S, "slurm", 0.1)
    first, second = make(runs, 0), make(runs, 1)
    for index, folder in enumerate((first, second)):
        submitted(folder, f"12_{index}")
    slurm.queue(pending("12_0", "Priority"), pending("12_1", "Priority"))
    names = [first.path.name, second.path.name]
    thread, codes = following(runs, names)
    seen = ""

    def shows(text: str) -> None:
        def there() -> bool:
            nonlocal seen
            seen += capsys.readouterr().out
            return text in seen

        until(there)

    shows("2 queued; step 0/24")
    slurm.queue(running("12_0"), pending("12_1", "Priority"))
    first.write_status("running", 6, 12)
    shows(f"{names[0]}: running 6/12\n")
    slurm.fail("squeue", "Unable to contact slurm controller")
    shows("Unable to contact slurm controller")
    slurm.recover("squeue")
    shows("Slurm answers again")
    slurm.queue(pending("12_0", "BeginTime"), running("12_1"))
    shows(f"{names[0]}: queued (started now)")
    assert not codes
    finished(first, first.config, evaluated=True)
    slurm.queue()
    slurm.account(ended("12_0", "COMPLETED", "0:0"), ended("12_1", "OUT_OF_MEMORY"))
    thread.join(timeout=30)
    assert codes == [1]
    seen += capsys.readouterr().out
    assert seen.count("Unable to contact") == 1
    assert f"{names[1]}: out of memory: out of memory on c3; it had asked for 32G" in seen
    assert f"try: retry {names[1]} --mem 64G" in seen
    assert f"{names[0]}: out of memory" not in seen
    assert follow(runs, names[:1], "slurm") == 0


def test_follow_waits_for_the_disk_of_a_job_that_succeeded(
    runs: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("jobs.follow").follow.POLL_S, "slurm", 0.1)
    folder = make(runs)
    submitted(folder)
    slurm.account(ended("12", "COMPLETED", "0:0"))
    thread, codes = following(runs, [folder.path.name])
    time.sleep(0.5)
    assert not codes
    finished(folder, folder.config, evaluated=True)
    thread.join(timeout=30)
    assert codes == [0]
    monkeypatch.setattr("jobs.follow.LAG_S", 0.2)
    folder.evaluation.unlink()
    assert follow(runs, [folder.path.name], "slurm") == 1


# real jobs of this machine

FOLLOW = (
    "import sys; from pathlib import Path; from jobs.follow import follow;"
    "sys.exit(follow(Path(sys.argv[1]), sys.argv[2:], 'local'))"
)


def launch(runs: Path, *configs: RunConfig) -> list[RunFolder]:
    """Queue the training of runs."""
    from jobs.options import Launch

    folders = [RunFolder.create(runs, config) for config in configs]
    tasks = [TrainTask(str(folder.path), evaluate=False) for folder in folders]
    assert Launch(runs=runs, offline=True).launch(tasks) == 0
    return folders


def test_local_jobs_to_their_end(machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = machine / "runs"
    bad = replaced(CONFIG, "training", batch_size=10_000)  # more than there are images
    good, broken = launch(runs, CONFIG, bad)
    names = [good.path.name, broken.path.name]
    capsys.readouterr()
    assert follow(runs, names, "local") == 1
    said = capsys.readouterr().out
    assert f"{names[1]}: exception: ValueError: " in said and "Traceback" not in said
    assert f"{names[0]}: exception" not in said
    assert follow(runs, names[:1], "local") == 0
    now = survey(runs)
    assert [row(folder, now).state for folder in (good, broken)] == ["trained", "failed"]
    assert [row(folder, now).job[-1] for folder in (good, broken)] == ["0", "1"]
    capsys.readouterr()
    assert Logs(runs=runs, name=names[0], follow=True)() == 0
    said = capsys.readouterr().out
    assert said.count("step 12/12") == 1 and "has ended; done" in said
    with pytest.raises(ValueError, match="are for Slurm"):
        Retry(runs=runs, mem="64G")()
    assert Retry(runs=runs, wait=True)() == 1
    said = capsys.readouterr().out
    assert list(table_of(said.split("\n", 2)[1])) == [names[1]]
    assert Ledger(runs).latest()[names[1], "train"].job_id != now.of(names[1])[0].entry.job_id


def test_ctrl_c_while_following_saves_and_retry_goes_on(
    machine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = machine / "runs"
    long = replaced(CONFIG, "training", steps=100_000, checkpoint_every=100_000)
    first, second = launch(runs, long, replaced(long, "training", seed=1))
    process = subprocess.Popen(
        [sys.executable, "-c", FOLLOW, str(runs), first.path.name, second.path.name],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    until(lambda: (status := first.status()) and status.step > 0)
    assert process.stdout is not None and process.stdout.readline()  # it follows
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "cancelling: running jobs save first" in said and "takes it up again" in said
    status = first.status()
    assert status is not None and status.state == "interrupted"
    assert list(first.checkpoints.glob(f"step-*{status.step}.*"))
    now = survey(runs)
    assert [row(folder, now).state for folder in (first, second)] == ["cancelled", "cancelled"]
    assert second.status() is None
    capsys.readouterr()
    assert Retry(runs=runs, names=(first.path.name,))() == 0
    until(lambda: (again := first.status()) and again.step > status.step)
    assert Cancel(runs=runs, all=True)() == 0
    assert "running as local-" in capsys.readouterr().out
    until(lambda: not any(job.is_living for job in survey(runs).jobs))
    attempts = json.loads(first.environment.read_text())["attempts"]
    assert [attempt["resumed_from_step"] for attempt in attempts] == [0, status.step]


def test_a_killed_local_job_was_interrupted_and_sync_says_so(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    monkeypatch.chdir(machine)
    runs = machine / "runs"
    (folder,) = launch(runs, replaced(CONFIG, "training", steps=100_000))
    until(lambda: (status := folder.status()) and status.step > 0)
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or ())
        if str(runs) in line and process.pid != os.getpid():
            process.kill()
    until(lambda: not any(job.is_living for job in survey(runs).jobs))
    shown = row(folder, survey(runs))
    assert shown.state == "interrupted" and "gone without a word" in shown.paragraph()
    assert folder.status().state == "running"  # type: ignore[union-attr]
    uri = f"sqlite:///{machine}/mlflow.db"
    capsys.readouterr()
    assert Sync(runs=runs, tracking_uri=uri)() == 0
    assert folder.status().state == "interrupted"  # type: ignore[union-attr]
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("colddiff")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "KILLED"
    assert capsys.readouterr().out.startswith(folder.path.name)
