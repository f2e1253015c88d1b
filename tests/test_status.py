"""What ``status`` shows: a run's folder merged with what the schedulers say of its jobs."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm, finished, install, submitted
from tiny import tiny

from colddiff.files import write_json
from colddiff.journal import read_records
from colddiff.run_folder import RunFolder
from jobs.ledger import Ledger
from jobs.slurm import job_states
from jobs.standing import settle
from jobs.status import BLOCK, find_names, last_values, row, rows, table
from jobs.survey import survey
from jobs.tasks import EvaluateTask, GenerateTask, ReportTask, claim
from jobs.watch import Status

ROOT = Path(__file__).parent.parent


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return install(tmp_path, monkeypatch)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "runs", tiny())


def pending(job: str, reason: str, start: str = "N/A") -> str:
    return f"{job}|PENDING|{reason}||{start}|2026-11-23T18:40:57"


def running(job: str, node: str = "c2") -> str:
    return f"{job}|RUNNING|None|{node}|2026-11-23T18:41:00|2026-11-23T18:40:57"


def ended(job: str, state: str, code: str = "0:0", reason: str = "None") -> str:
    return f"{job}|{state}|{code}|c3|00:00:50|100M|04:00:00|{reason}"


def state_of(folder: RunFolder) -> str:
    """The state's cell in the table."""
    return row(folder, survey(folder.path.parent)).cells()[2]


def test_a_pending_job_says_why_and_when(folder: RunFolder, slurm: FakeSlurm) -> None:
    submitted(folder, "12_3")
    slurm.queue(pending("12_1", "None"), pending("12_3", "Priority", "2099-01-02T03:04:05"))
    assert state_of(folder) == "queued (Priority, starts 2099-01-02 03:04)"
    today = time.strftime("%Y-%m-%d")
    slurm.queue(pending("12_3", "Resources", f"{today}T03:04:05"))
    assert state_of(folder) == "queued (Resources, starts 03:04)"
    slurm.queue(pending("12_3", "None"))
    assert state_of(folder) == "queued"


def test_a_job_of_another_node_runs_although_no_lock_is_seen(
    folder: RunFolder, slurm: FakeSlurm
) -> None:
    submitted(folder)
    slurm.queue(running("12", "node[3-4]"))
    assert state_of(folder) == "running"  # it is starting: the folder is new
    folder.write_status("running", 10, 30)
    line = {"step": 10, "timestamp_ms": 1, "metrics": {"speed/images_per_second": 0.5}}
    folder.journal.write_text(json.dumps(line) + "\n")
    shown = row(folder, survey(folder.path.parent))
    assert shown.cells()[:6] == (folder.path.name, "12", "running", "10/30", "0", "5min")
    assert shown.node == "node[3-4]"
    folder.write_status("finished", 30, 30)
    folder.weights.write_bytes(b"")
    assert state_of(folder) == "evaluating"


@pytest.mark.parametrize("known", ["", ended("12", "RUNNING")])
def test_a_run_whose_job_is_gone_was_interrupted(
    folder: RunFolder, slurm: FakeSlurm, known: str
) -> None:
    """sacct may say RUNNING for ever of a job that a crash of Slurm lost."""
    submitted(folder)
    folder.write_status("running", 10, 30)
    slurm.fail("squeue", "slurm_load_jobs error: Invalid job id specified")
    slurm.account(*([known] if known else []))
    assert state_of(folder) == "interrupted"
    settle(folder, survey(folder.path.parent))
    status = folder.status()
    assert status is not None and (status.state, status.step) == ("interrupted", 10)


def test_settling_leaves_alone_what_slurm_says_is_alive(
    folder: RunFolder, slurm: FakeSlurm
) -> None:
    submitted(folder)
    folder.write_status("running", 10, 30)
    for line in (running("12"), pending("12", "BeginTime")):
        slurm.queue(line)
        settle(folder, survey(folder.path.parent))
        assert folder.status().state == "running"  # type: ignore[union-attr]
    slurm.fail("squeue", "Unable to contact slurm controller")
    settle(folder, survey(folder.path.parent))
    assert folder.status().state == "running"  # type: ignore[union-attr]
    slurm.recover("squeue")
    slurm.queue()
    settle(folder, survey(folder.path.parent))
    assert folder.status().state == "interrupted"  # type: ignore[union-attr]


def test_slurm_is_believed_before_the_lock_of_its_own_job(
    folder: RunFolder, slurm: FakeSlurm
) -> None:
    """A network disk may keep a dead node's lock for a while."""
    submitted(folder)
    folder.write_status("running", 10, 30)
    slurm.account(ended("12", "NODE_FAIL"))
    write_json(folder.path / "process.json", {"pid": 1, "host": "c3", "job_id": "12"})
    with claim(folder):
        assert state_of(folder) == "failed (node failure)"
        write_json(folder.path / "process.json", {"pid": 1, "host": "here", "kind": "train"})
        assert state_of(folder) == "running"  # somebody took it up on this machine


@pytest.mark.parametrize(
    ("state", "code", "shown"),
    [
        ("OUT_OF_MEMORY", "0:125", "failed (out of memory)"),
        ("TIMEOUT", "0:0", "failed (timeout)"),
        ("PREEMPTED", "0:0", "failed (preempted)"),
        ("NODE_FAIL", "0:0", "failed (node failure)"),
        ("FAILED", "1:0", "failed (unknown)"),
        ("CANCELLED by 1000", "0:0", "cancelled"),
    ],
)
def test_ends_of_jobs(
    folder: RunFolder, slurm: FakeSlurm, state: str, code: str, shown: str
) -> None:
    submitted(folder)
    folder.write_status("running", 10, 30)
    slurm.account(ended("12", state, code))
    assert state_of(folder) == shown


def test_what_is_done_is_done_however_its_job_ended(folder: RunFolder, slurm: FakeSlurm) -> None:
    entry = submitted(folder)
    finished(folder, tiny())
    slurm.account(ended("12", "NODE_FAIL"))
    assert state_of(folder) == "failed (node failure)"  # the evaluation is missing
    submitted(folder, task=entry.task | {"evaluate": False})
    assert state_of(folder) == "trained"
    submitted(folder)
    finished(folder, tiny(), evaluated=True)
    shown = row(folder, survey(folder.path.parent))
    assert shown.state == "evaluated" and shown.diagnosis is None
    assert shown.metrics == pytest.approx(
        {"direct RMSE": 0.1, "direct SSIM": 0.9, "sampled RMSE": 0.1, "sampled SSIM": 0.9}
    )


def test_a_cancelled_run_and_one_that_was_taken_up_without_a_job(
    folder: RunFolder, slurm: FakeSlurm
) -> None:
    entry = submitted(folder)
    Ledger(folder.path.parent).append([dataclasses.replace(entry, event="cancelled")])
    slurm.queue(running("12"))
    assert state_of(folder) == "cancelled (saving)"
    slurm.queue()
    assert state_of(folder) == "cancelled"
    assert row(folder, survey(folder.path.parent)).paragraph() == ""
    write_json(folder.path / "process.json", {"pid": 1, "host": "here", "kind": "train"})
    folder.write_status("failed", 7, 30, "ValueError: broken")
    shown = row(folder, survey(folder.path.parent))
    assert (shown.state, shown.job) == ("failed", "")
    assert "ValueError: broken" in shown.paragraph()


def test_requeued_jobs_start_now(folder: RunFolder, slurm: FakeSlurm) -> None:
    entry = submitted(folder, "12_0")
    slurm.queue(pending("12_0", "BeginTime", "2099-01-02T03:04:05"))
    Path(entry.stderr).write_text("of the first attempt\n")
    shown = Status(runs=folder.path.parent).text()
    assert "requeued (started now)" in shown
    (call,) = slurm.calls("scontrol")
    assert call.startswith("update JobId=12_0 StartTime=now")
    # Told again and again, it would start never.
    soon = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 3))
    slurm.queue(pending("12_0", "BeginTime", soon))
    assert "requeued (BeginTime, starts" in Status(runs=folder.path.parent).text()
    # A job that is to begin later by its profile does so.
    later = pending("12_0", "BeginTime", "2099-01-02T03:04:05")
    slurm.queue(later)
    submitted(folder, "12_0", profile={**entry.profile, "sbatch": {"begin": "2099-01-02"}})
    Status(runs=folder.path.parent).text()
    # A refusal (the job is completing still) is no promise.
    assert len(slurm.calls("scontrol")) == 1
    submitted(folder, "12_0")
    slurm.fail("scontrol", "Requested operation is presently disabled for job 12")
    assert "requeued (BeginTime, starts" in Status(runs=folder.path.parent).text()
    assert len(slurm.calls("scontrol")) == 2


def test_a_chain_shows_its_first_failure(folder: RunFolder, slurm: FakeSlurm) -> None:
    train = submitted(folder, "12")
    config = tiny()
    task = EvaluateTask(str(folder.path), evaluation=config.evaluation).to_dict()
    submitted(folder, "13", kind="evaluate", task=task)
    report = ReportTask("report-x", "", "x", "tiny", "out").to_dict()
    submitted(folder, "14", run="report-x", kind="report", task=report)
    slurm.queue(running("12"), pending("13", "Dependency"), pending("14", "Dependency"))
    assert state_of(folder) == "running"
    Path(train.stderr).write_text("Traceback (most recent call last):\nValueError: bad data\n")
    slurm.queue()
    never = "0:0|None assigned|00:00:00|100M|04:00:00"
    slurm.account(
        ended("12", "FAILED", "1:0"),
        f"13|CANCELLED by 0|{never}|DependencyNeverSatisfied",
        f"14|CANCELLED|{never}|Dependency",
    )
    shown = Status(runs=folder.path.parent).text()
    assert "failed (exception)" in shown and "ValueError: bad data" in shown
    assert "failed (dependency)" in shown and "what it was to follow did not succeed" in shown
    slurm.account(ended("12", "COMPLETED"), ended("13", "COMPLETED"), ended("14", "COMPLETED"))
    finished(folder, config, evaluated=True)
    lines = Status(runs=folder.path.parent).text().splitlines()
    assert [line.split()[2] for line in lines] == ["state", "evaluated", "finished"]


def test_a_failed_generation_does_not_spoil_a_good_run(folder: RunFolder, slurm: FakeSlurm) -> None:
    finished(folder, tiny(), evaluated=True)
    task = GenerateTask(str(folder.path))
    submitted(folder, "15", kind="generate", task=task.to_dict())
    slurm.account(ended("15", "OUT_OF_MEMORY"))
    assert state_of(folder) == "evaluated (generate: out of memory)"
    record = {"step": 30, "quality": {"blank_rate": 0.0}}
    write_json(folder.samples / f"{task.settings.slug}.json", record)
    assert state_of(folder) == "evaluated"


def test_when_slurm_does_not_answer_the_folders_speak(
    folder: RunFolder, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(folder)
    folder.write_status("running", 10, 30)
    slurm.fail("squeue", "slurm_load_jobs error: Unable to contact slurm controller")
    assert Status(runs=folder.path.parent)() == 0
    said = capsys.readouterr().out
    warning, *shown = said.splitlines()
    assert "Slurm cannot be asked" in warning and "Unable to contact slurm controller" in warning
    assert "running (as its folder says)" in shown[1] and "10/30" in shown[1]
    folder.write_status("interrupted", 10, 30)  # nobody can say that its job is gone
    assert Status(runs=folder.path.parent, json=True)() == 0
    captured = capsys.readouterr()
    (shown_run,) = json.loads(captured.out)
    assert (shown_run["state"], shown_run["diagnosis"]) == ("interrupted", None)
    assert "Slurm cannot be asked" in captured.err


def test_without_accounting_the_queue_remembers_for_a_while(
    folder: RunFolder, slurm: FakeSlurm
) -> None:
    submitted(folder)
    slurm.fail("sacct", "Slurm accounting storage is disabled")
    slurm.queue("12|FAILED|NonZeroExitCode|c2|2026-11-23T18:40:58|2026-11-23T18:40:57")
    assert job_states(["12"])["12"].state == "FAILED"
    assert job_states(["12"], ended=False) == {}
    assert state_of(folder) == "failed (unknown)"
    slurm.queue()
    assert state_of(folder) == "new"


def test_without_accounting_a_report_is_found_by_what_it_made(
    folder: RunFolder, slurm: FakeSlurm, tmp_path: Path
) -> None:
    out = tmp_path / "reports"
    report = ReportTask("report-x", "", "x", "tiny", str(out)).to_dict()
    submitted(folder, "14", run="report-x", kind="report", task=report, time_ms=0)
    slurm.fail("sacct", "Slurm accounting storage is disabled")
    assert "report-x" in Status(runs=folder.path.parent).text()
    assert "finished" not in Status(runs=folder.path.parent).text()
    out.mkdir()
    (out / "figure3.md").touch()
    assert "finished" in Status(runs=folder.path.parent).text()


def test_one_question_for_many_runs(tmp_path: Path, slurm: FakeSlurm) -> None:
    folders = [RunFolder.create(tmp_path / "runs", tiny(seed=seed)) for seed in range(100)]
    for index, folder in enumerate(folders):
        submitted(folder, f"12_{index}")
    slurm.queue(*(running(f"12_{index}") for index in range(50)))
    slurm.account(*(ended(f"12_{index}", "TIMEOUT") for index in range(50, 100)))
    states = [each.state for each in rows(folders, survey(tmp_path / "runs"))]
    assert states == ["running"] * 50 + ["failed"] * 50
    assert (len(slurm.calls("squeue")), len(slurm.calls("sacct"))) == (1, 1)


def test_an_unreadable_run_does_not_hide_the_others(folder: RunFolder) -> None:
    for text in ('{"no": "configuration"}', "[]", "{"):
        other = folder.path.with_name("other")
        other.mkdir(exist_ok=True)
        (other / "config.json").write_text(text)
        shown = {each.run: each.state for each in rows([RunFolder(other), folder], survey(other))}
        assert shown == {"other": "unreadable", folder.path.name: "new"}


def test_attempts_and_json(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(folder.environment, {"attempts": [{}, {}, {}]})
    folder.write_status("failed", 8, 30, "NonFiniteError: the loss is nan")
    line = '{"step":8,"timestamp_ms":1,"metrics":{"train/loss":NaN,"speed/images_per_second":9.0}}'
    folder.journal.write_text(line + "\n")
    assert Status(runs=folder.path.parent, json=True)() == 0

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is no JSON")

    (shown,) = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert shown["attempts"] == 3 and shown["metrics"] == {"loss": None}
    assert (shown["step"], shown["steps"], shown["state"]) == (8, 30, "failed")
    assert shown["diagnosis"]["cause"] == "exception"
    assert shown["diagnosis"]["text"] == "NonFiniteError: the loss is nan"
    below = table([row(folder)]).split("\n\n")[1]
    assert folder.path.name in below and "NonFiniteError" in below


def test_no_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Status(runs=tmp_path)() == 0
    assert capsys.readouterr().out == f"no runs below {tmp_path}\n"
    with pytest.raises(ValueError, match="--watch 0 is not allowed"):
        Status(runs=tmp_path, watch=0)()


def test_watching_ends_with_ctrl_c(folder: RunFolder) -> None:
    code = (
        "import sys; from pathlib import Path; from jobs.watch import Status;"
        "sys.exit(Status(runs=Path(sys.argv[1]), watch=0.05)())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder.path.parent)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    seen = [process.stdout.readline() for _ in range(4)]
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")
    assert [line.split()[0] for line in seen] == ["run", folder.path.name] * 2


def journal_of(folder: RunFolder, count: int, *, validate_every: int) -> None:
    with folder.journal.open("w") as file:
        for step in range(1, count + 1):
            metrics = {"train/loss": 1 / step, "speed/images_per_second": step / 7}
            if step % validate_every == 0:
                metrics |= {"validation/rmse": 2 / step, "validation/ssim": 3 / step}
            file.write(json.dumps({"step": step, "timestamp_ms": step, "metrics": metrics}) + "\n")


@pytest.mark.parametrize(("count", "validate_every"), [(1, 1), (700, 700), (5000, 1999)])
@pytest.mark.parametrize("torn", ["", '{"step":5001,"timestamp_ms":1,"metrics":{"train/loss":7'])
def test_last_values_are_those_of_reading_the_whole_journal(
    folder: RunFolder, count: int, validate_every: int, torn: str
) -> None:
    keys = {"train/loss", "speed/images_per_second", "validation/rmse", "validation/ssim", "absent"}
    journal_of(folder, count, validate_every=validate_every)
    with folder.journal.open("a") as file:
        file.write(torn)
    expected: dict[str, float] = {}
    for record in read_records(folder.journal)[0]:
        expected |= record.metrics
    assert last_values(folder.journal, keys) == expected


@pytest.mark.parametrize("cut", range(0, 130, 3))
def test_a_line_may_lie_across_two_blocks(folder: RunFolder, cut: int) -> None:
    line = '{"step":1,"timestamp_ms":1,"metrics":{"validation/rmse":0.25,"train/loss":0.75}}\n'
    after = '{"step":2,"timestamp_ms":1,"metrics":{"train/loss":0.5}}\n'
    filler = " " * (BLOCK - cut - len(after) - 1) + "\n"
    folder.journal.write_text(line + filler + after)
    keys = {"validation/rmse", "train/loss"}
    assert last_values(folder.journal, keys) == {"validation/rmse": 0.25, "train/loss": 0.5}


def test_only_the_end_of_a_journal_is_read(folder: RunFolder) -> None:
    journal_of(folder, 100, validate_every=50)
    end = folder.journal.read_bytes()
    with folder.journal.open("wb") as file:
        file.truncate(2**40)  # a hole of a terabyte: reading it would take many minutes
        file.seek(0, 2)
        file.write(b"\n" + end)
    found = last_values(folder.journal, {"train/loss", "validation/rmse"})
    assert found == {"train/loss": 1 / 100, "validation/rmse": 2 / 100}


def test_names_are_those_of_runs_and_of_reports(folder: RunFolder, slurm: FakeSlurm) -> None:
    runs, name = folder.path.parent, folder.path.name
    report = ReportTask("report-x", "", "x", "tiny", "out").to_dict()
    submitted(folder, "14", run="report-x", kind="report", task=report)
    assert find_names(runs, [name[:10], "report-x", str(folder.path)]) == [name, "report-x"]
    assert find_names(runs, []) == sorted([name, "report-x"])
    with pytest.raises(ValueError, match="'report-y' names no run"):
        find_names(runs, ["report-y"])


def test_a_run_that_only_restores_directly_has_no_sampled_numbers(
    folder: RunFolder, slurm: FakeSlurm
) -> None:
    finished(folder, tiny(), evaluated=True)
    record = json.loads(folder.evaluation.read_text())
    del record["kinds"]["sampled"]
    folder.evaluation.write_text(json.dumps(record))
    assert "direct RMSE" in Status(runs=folder.path.parent).text()
    assert state_of(folder) == "evaluated"
