"""The drill: real interruptions on this machine, and every way in which one can go wrong."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from slurm_runner import SlurmRunner

from colddiff.checkpoint import load_checkpoint, load_weights, save_checkpoint, save_weights
from colddiff.files import read_json, write_json
from colddiff.journal import Journal, read_records
from colddiff.restorer import build_restorer
from colddiff.run_folder import RunFolder
from colddiff.training import train
from jobs import slurm
from jobs.cluster import Submitted
from jobs.drill import command, runs
from jobs.drill.command import Drill, DrillTask, drill_config, verdict
from jobs.drill.comparison import differences
from jobs.drill.hosts import DrillError, Sight, SlurmHost
from jobs.drill.runs import DrilledRun, Hit, TooQuickError
from jobs.launch import main
from jobs.local.slots import find_slots, hold
from jobs.profiles import Profile
from jobs.scratch import scratch_folder, shortened
from jobs.tasks import AnyTask

# On this machine


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine without GPUs, and without other users' launches; no process outlives the test."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield tmp_path / "runs"
    ours = [p for p in psutil.process_iter() if str(tmp_path) in " ".join(command_line(p))]
    for process in ours:
        process.kill()
    psutil.wait_procs(ours, timeout=10)
    assert ours == []


def command_line(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def test_a_drill_on_this_machine(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compared: list[tuple[Any, Any, int]] = []

    def watched(reference: RunFolder, drilled: RunFolder, hits: list[Hit]) -> int:
        """The verdict, with what the folders say of how the runs came about."""
        starts = [read_json(f.environment)["attempts"] for f in (reference, drilled)]
        steps = [[each["resumed_from_step"] for each in attempts] for attempts in starts]
        compared.append((steps[0], steps[1], len(hits)))
        assert reference.weights.read_bytes() == drilled.weights.read_bytes()
        return verdict(reference, drilled, hits)

    monkeypatch.setattr(command, "STEPS", (600, 2_400))
    monkeypatch.setattr(command, "verdict", watched)
    assert main(["drill", "--runs", str(place)]) == 0
    out = capsys.readouterr().out
    ((reference, drilled, hits),) = compared
    assert reference == [0] and hits == 2
    # Nothing but the signals saved: three processes, each from where the one before it was hit.
    assert len(drilled) == 3 and 0 < drilled[1] < drilled[2]
    assert "IDENTICAL: 2 interruptions changed nothing" in out and "cost no step" in out
    assert f"signal USR2 at step {drilled[1]}: saved after" in out
    assert f"resubmission at step {drilled[2]}: saved after" in out
    assert [path.name for path in place.iterdir()] == [".code"]


def test_patience_ends_and_nothing_is_left(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (slot,) = find_slots()
    descriptor = hold(slot.used)
    try:
        assert Drill(runs=place, patience=0.02)() == 1
    finally:
        os.close(descriptor)
    out = capsys.readouterr().out
    assert "queued as local-" in out and "--patience" in out and "nothing is proven" in out
    assert [path.name for path in place.iterdir()] == [".code"]


def test_ctrl_c_leaves_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: DrilledRun, step: int) -> None:
        self.wait(lambda: self.step > 0, "its first step")
        raise KeyboardInterrupt

    monkeypatch.setattr(DrilledRun, "reach", interrupted)
    monkeypatch.setattr(command, "STEPS", (10_000,))
    assert main(["drill", "--runs", str(place)]) == 130
    assert [path.name for path in place.iterdir()] == [".code"]


def test_mistakes_are_the_users(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["drill", "--patience", "0"]) == 2
    assert "--patience 0" in capsys.readouterr().err


# Comparison


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = RunFolder.create(tmp_path_factory.mktemp("finished"), drill_config(60, 1))
    train(folder)
    write_json(folder.path / "gpus.json", [""])
    return folder


@pytest.fixture
def pair(finished: RunFolder, tmp_path: Path) -> tuple[RunFolder, RunFolder]:
    """A run and its copy, for a test to alter."""
    shutil.copytree(finished.path, tmp_path / "copy")
    return finished, RunFolder(tmp_path / "copy")


def alter_weights(folder: RunFolder) -> None:
    tensors, config, step = load_weights(folder.weights)
    network = build_restorer(config)
    network.load_state_dict(tensors)
    next(network.parameters()).data.view(-1)[0] += 0.5
    save_weights(folder.weights, network, config, step)


def alter_checkpoint(change: Callable[[dict[str, Any]], None]) -> Callable[[RunFolder], None]:
    def alter(folder: RunFolder) -> None:
        state = load_checkpoint(folder.checkpoints, torch.device("cpu"))
        assert state is not None
        change(state)
        save_checkpoint(folder.checkpoints, state["step"], state)

    return alter


def nudge_moment(state: dict[str, Any]) -> None:
    moments = state["optimiser"]["state"][0]["exp_avg_sq"]
    moments.view(-1)[0] = torch.nextafter(moments.view(-1)[0], torch.tensor(1.0))


def negate_zero(state: dict[str, Any]) -> None:
    state["interval_sums"].neg_()  # is zero after the last record: -0 has another bit


def rewrite_journal(change: Callable[[list[str]], None]) -> Callable[[RunFolder], None]:
    def alter(folder: RunFolder) -> None:
        lines = folder.journal.read_text().splitlines(keepends=True)
        change(lines)
        folder.journal.write_text("".join(lines))

    return alter


def swap(lines: list[str]) -> None:
    lines[3], lines[4] = lines[4], lines[3]


def change_loss(folder: RunFolder) -> None:
    records = read_records(folder.journal)[0]
    folder.journal.unlink()
    with Journal.open(folder.journal) as journal:
        for record in records:
            journal.append(record.step, record.metrics | {"train/loss": 0.125})


ALTERATIONS = {
    "ema.safetensors differs, by at most 0.5": alter_weights,
    "1 of the checkpoint's": alter_checkpoint(nudge_moment),
    "/interval_sums": alter_checkpoint(negate_zero),
    "other contents: /step-too": alter_checkpoint(lambda state: state.update({"step-too": 1})),
    "values differ: /interval_steps": alter_checkpoint(
        lambda state: state.update(interval_steps=1)
    ),
    "lacks records": rewrite_journal(lambda lines: lines.pop(5)),
    "records of its own": rewrite_journal(
        lambda lines: lines.append(lines[-1].replace('"step":60', '"step":61'))
    ),
    "has records twice": rewrite_journal(lambda lines: lines.append(lines[-1])),
    "not in order": rewrite_journal(swap),
    "of the journal's records differ: train/loss at step": change_loss,
}


@pytest.mark.parametrize("message", ALTERATIONS)
def test_every_alteration_is_found(
    pair: tuple[RunFolder, RunFolder], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert differences(*pair) == []
    ALTERATIONS[message](pair[1])
    (found,) = differences(*pair)
    assert message in found
    assert verdict(*pair, [HIT]) == 1
    assert f"DIFFERENT: 1 interruptions changed the result: {found}" in capsys.readouterr().out


def test_clocks_are_not_compared(pair: tuple[RunFolder, RunFolder]) -> None:
    text = (
        pair[1]
        .journal.read_text()
        .replace('"speed/images_per_second":', '"speed/other":1,"speed/images_per_second":')
    )
    pair[1].journal.write_text(text)
    assert differences(*pair) == []


HIT = Hit("scontrol requeue", 40, 40, 0.5, 2.0, 9.0, 121.0)


def test_the_verdict_on_equal_runs(
    pair: tuple[RunFolder, RunFolder], capsys: pytest.CaptureFixture[str]
) -> None:
    assert verdict(*pair, [HIT]) == 0
    out = capsys.readouterr().out
    assert "IDENTICAL" in out and "cost no step" in out and "KillWait" not in out
    assert "9.0 s later (121 s unless nudged), resumed at step 40: 0 steps lost" in out


def test_steps_that_were_lost_are_told(
    pair: tuple[RunFolder, RunFolder], capsys: pytest.CaptureFixture[str]
) -> None:
    assert verdict(*pair, [dataclasses.replace(HIT, resumed=10, saved_s=None)]) == 0
    out = capsys.readouterr().out
    assert "30 steps were computed again" in out and "did not save" in out and "KillWait" in out


def test_other_machines_explain_other_bits(
    pair: tuple[RunFolder, RunFolder], capsys: pytest.CaptureFixture[str]
) -> None:
    alter_weights(pair[1])
    assert verdict(*pair, []) == 1
    assert "different kinds of machines" not in capsys.readouterr().out
    record = read_json(pair[1].environment)
    record["attempts"][0]["device"] = "cuda:0"
    write_json(pair[1].environment, record)
    write_json(pair[1].path / "gpus.json", ["NVIDIA A100"])
    assert verdict(*pair, []) == 1
    out = capsys.readouterr().out
    assert "different kinds of machines" in out and "NVIDIA A100" in out


# A scheduler that does as it is told


class ScriptedHost:
    """Runs the scripts of a test: what each look shows, after what it does to the run's folder."""

    poll_s = 0.0
    orders = ("warn", "preempt")

    def __init__(self, *script: tuple[Callable[[RunFolder], None], Sight]) -> None:
        self.script = list(script)
        self.seen = Sight("queued")
        self.submitted = self.nudged = self.ended = 0

    def submit(self, tasks: Sequence[AnyTask]) -> list[Submitted]:
        self.submitted += len(tasks)
        return [Submitted("1", Path("1.out"), Path("1.err")) for _ in tasks]

    def sight(self, job: Submitted, folder: RunFolder) -> Sight:
        if self.script:
            act, self.seen = self.script.pop(0)
            act(folder)
        return self.seen

    def warn(self, job: Submitted, folder: RunFolder) -> None: ...

    preempt = warn

    def again(self, task: AnyTask) -> Submitted | None:
        return None

    def nudge(self, job: Submitted) -> None:
        self.nudged += 1

    def end(self) -> None:
        self.ended += 1


def nothing(folder: RunFolder) -> None: ...


def attempt(resumed: int, step: int) -> Callable[[RunFolder], None]:
    """A process starts, and comes to a step."""

    def act(folder: RunFolder) -> None:
        record = read_json(folder.environment) if folder.environment.exists() else {"attempts": []}
        record["attempts"].append({"resumed_from_step": resumed})
        write_json(folder.environment, record)
        folder.write_status("running", step, 1000)

    return act


def interrupted(step: int) -> Callable[[RunFolder], None]:
    return lambda folder: folder.write_status("interrupted", step, 1000)


def trained(folder: RunFolder) -> None:
    folder.write_status("finished", 1000, 1000)
    folder.weights.write_bytes(b"")


RUNNING = Sight("running", "n1")


def scripted(
    tmp_path: Path, *script: tuple[Callable[[RunFolder], None], Sight], patience_s: float = 30
) -> tuple[DrilledRun, ScriptedHost]:
    folder, host = RunFolder.create(tmp_path, drill_config(1000, 1)), ScriptedHost(*script)
    job = Submitted("1", tmp_path / "1.out", tmp_path / "1.err")
    return DrilledRun("drilled", DrillTask(str(folder.path)), job, host, patience_s), host


def waiting(seconds: float) -> Sight:
    """Queued by Slurm after a requeueing."""
    start = datetime.now() + timedelta(seconds=seconds)
    return Sight("queued", reason="BeginTime", start=start.isoformat(timespec="seconds"))


def test_a_hit_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, host = scripted(
        tmp_path,
        (nothing, Sight("queued", reason="Priority")),
        (attempt(0, 200), RUNNING),
        (nothing, RUNNING),
        (interrupted(212), waiting(121)),
        (nothing, waiting(3)),  # Slurm has taken the nudge: another one would put it off
        (nothing, waiting(2)),
        (attempt(212, 212), RUNNING),
    )
    run.reach(200)
    hit = run.strike("warn", host.warn)
    assert (hit.step, hit.resumed, hit.lost) == (212, 212, 0)
    assert hit.saved_s is not None and hit.planned_s == pytest.approx(121, abs=2)
    assert host.nudged == 1
    out = capsys.readouterr().out
    assert "queued as 1 (Priority)" in out and "running as 1 on n1" in out
    assert "goes on from step 212" in out


def test_a_kill_before_the_save_is_seen(tmp_path: Path) -> None:
    run, host = scripted(
        tmp_path,
        (attempt(0, 200), RUNNING),
        (nothing, waiting(0)),
        (attempt(0, 0), RUNNING),
    )
    run.reach(200)
    hit = run.strike("preempt", host.preempt)
    assert hit.saved_s is None and (hit.step, hit.resumed, hit.lost) == (200, 0, 200)


def test_the_second_hit_waits_for_the_second_process(tmp_path: Path) -> None:
    """The first one saved far beyond the mark: its step says nothing of the one after it."""
    run, host = scripted(
        tmp_path,
        (attempt(0, 700), RUNNING),
        (interrupted(710), waiting(0)),
        (attempt(710, 710), RUNNING),
        (lambda folder: folder.write_status("running", 720, 1000), RUNNING),
    )
    run.reach(200)
    run.strike("warn", host.warn)
    run.reach(600)
    assert run.step == 720 and host.script == []


def test_a_job_that_is_not_requeued(tmp_path: Path) -> None:
    (tmp_path / "1.err").write_text("slurmstepd: *** JOB 1 CANCELLED DUE TO PREEMPTION ***\n")
    run, host = scripted(tmp_path, (attempt(0, 200), RUNNING), (interrupted(210), Sight("ended")))
    run.reach(200)
    with pytest.raises(DrillError, match="not requeued after preempt.*DUE TO PREEMPTION.*doctor"):
        run.strike("preempt", host.preempt)


def test_a_job_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "ARRIVAL_S", 0.2)
    (tmp_path / "1.err").write_text("Traceback …\nValueError: no such disk\n")
    run, _ = scripted(tmp_path, (nothing, Sight("ended")))
    with pytest.raises(DrillError, match="has ended before step 200: ValueError: no such disk"):
        run.reach(200)


def test_a_run_that_stands_still(tmp_path: Path) -> None:
    run, _ = scripted(tmp_path, (attempt(0, 100), RUNNING), patience_s=0.2)
    with pytest.raises(DrillError, match="running as 1 on n1, and .* for step 200 in vain"):
        run.reach(200)


def test_runs_that_are_over_too_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, host = scripted(tmp_path / "a", (attempt(0, 10), RUNNING), (trained, Sight("ended")))
    with pytest.raises(TooQuickError):
        run.reach(200)
    run, host = scripted(tmp_path / "b", (attempt(0, 200), RUNNING), (trained, Sight("ended")))
    run.reach(200)
    with pytest.raises(TooQuickError):
        run.strike("warn", host.warn)
    tried = []

    def too_quick(self: Drill, steps: int, profile: Profile) -> int:
        tried.append(steps)
        if steps < 10_000:
            raise TooQuickError
        return 0

    monkeypatch.setattr(Drill, "try_with", too_quick)
    assert Drill()() == 0 and tried == [1_500, 6_000, 24_000]


# Slurm's orders


def test_slurms_orders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = SlurmRunner(tmp_path, monkeypatch)
    runner.write("full", "")
    profile, folder = Profile(gpus=0), RunFolder.create(tmp_path, drill_config(1000, 1))
    host = SlurmHost(profile, tmp_path / "jobs", tmp_path / "code")
    (job,) = host.submit([DrillTask(str(folder.path))])
    assert host.sight(job, folder) == Sight(
        "queued", reason="Resources", start="2030-01-02T03:04:05"
    )
    host.warn(job, folder)
    assert runner.calls("scancel") == ["--signal=USR2 901"]
    host.preempt(job, folder)
    host.nudge(job)
    requeue, nudge = runner.calls("scontrol")[-2:]
    assert requeue == "requeue 901" and nudge.startswith("update JobId=901 StartTime=now")
    (runner.state / "cancelled").unlink()
    host.end()
    assert runner.calls("scancel")[1:] == ["901"]
    assert host.sight(job, folder) == Sight("ended")


def test_slurm_that_is_gone_ends_the_drill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    SlurmRunner(tmp_path, monkeypatch)
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\necho 'error: no such account' >&2; exit 1")
    assert main(["drill", "--cluster", "slurm", "--runs", str(tmp_path / "runs")]) != 0
    assert "no such account" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [".code"]


def test_the_batch_fits_the_processes() -> None:
    for ranks in (1, 2, 3, 4, 8, 24):
        batch = drill_config(1000, ranks).training.batch_size
        assert batch % ranks == 0 and batch >= min(ranks, 6)


@pytest.mark.parametrize(
    ("time", "delay_s", "expected"),
    [("2-12", 120, ("30", 120)), ("10", 120, ("10", 120)), ("3", 120, ("3", 90))],
)
def test_jobs_that_start_soon(time: str, delay_s: int, expected: tuple[str, int]) -> None:
    profile = shortened(Profile(time=time, signal_delay_s=delay_s, account="a"), 30)
    assert (profile.time, profile.signal_delay_s) == expected and profile.account == "a"


def test_scratch_folders_go_or_stay(tmp_path: Path) -> None:
    with pytest.raises(slurm.SlurmError), scratch_folder(tmp_path, "drill") as folder:
        (folder / "a").mkdir()
        raise slurm.SlurmError
    assert not folder.exists()
    with scratch_folder(tmp_path, "drill", keep=True) as folder:
        pass
    assert folder.is_dir()
