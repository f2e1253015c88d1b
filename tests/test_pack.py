"""Packs: several tasks in one job, each in a process and with a record of its own."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from local_jobs import Launch, nap, note, processes, until
from queue_tasks import Broken, Long
from run_comparison import assert_identical
from tiny import tiny

from colddiff.run_folder import RunFolder
from colddiff.training import train
from jobs.cancelling import cancel_jobs
from jobs.cluster import Submitted
from jobs.launch import main
from jobs.ledger import Ledger
from jobs.pack import PackedTask, PackError, packs, unpacked
from jobs.states import living_jobs
from jobs.tasks import TrainTask


def packed(place: Path, *tasks: Any) -> PackedTask:
    (made,) = packs(tasks, len(tasks), place / "runs")
    assert isinstance(made, PackedTask)
    return made


def test_tasks_are_packed_in_order_and_a_job_of_one_is_the_task(tmp_path: Path) -> None:
    naps = [nap(tmp_path, name) for name in "abcde"]
    assert packs(naps, 1, tmp_path) == naps
    first, second, last = packs(naps, 2, tmp_path)
    assert isinstance(first, PackedTask) and isinstance(second, PackedTask)
    assert (first.tasks, second.tasks, last) == (tuple(naps[:2]), tuple(naps[2:4]), naps[4])
    assert len({*first.logs, *second.logs}) == 4  # no two tasks write to one log
    jobs = [(each, Submitted(str(i), Path("o"), Path("e"))) for i, each in enumerate((first, last))]
    found = list(unpacked(jobs))
    assert [(task.run, job.job_id) for task, job in found] == [("a", "0"), ("b", "0"), ("e", "1")]
    assert [str(job.stderr) for _, job in found] == [*(f"{x}.err" for x in first.logs), "e"]


def test_all_run_at_once_on_the_jobs_gpu_with_logs_of_their_own(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    gate = str(place / "gate")
    task = packed(place, nap(place, "a", gate=gate), nap(place, "b", gate=gate))
    launch = Launch(place, task)
    until(lambda: note(place, "a") and note(place, "b"))  # neither waits for the other
    (place / "gate").touch()
    launch.wait()
    notes = [note(place, name) for name in "ab"]
    assert [each["gpus"] for each in notes] == ["5", "5"]
    assert [each["threads"] for each in notes] == ["3", "3"]  # they share the job's
    assert notes[0]["pid"] != notes[1]["pid"]
    outputs = [Path(f"{logs}.out").read_text() for logs in task.logs]
    assert outputs == ["a naps\n", "b naps\n"]


def test_one_failure_leaves_the_others_alone_and_is_named(place: Path) -> None:
    task = packed(place, Broken(str(place / "x")), nap(place, "a", seconds=0.5))
    with pytest.raises(PackError, match=r"1 of 2 tasks failed: x \(.*x-broken\.err\)"):
        task()
    assert "end" in note(place, "a")
    assert "ValueError: this is broken" in Path(f"{task.logs[0]}.err").read_text()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_reaches_each_and_the_job_ends_after_all_of_them(
    place: Path,
    signum: signal.Signals,
) -> None:
    """At its time limit (USR2) submitit starts the whole pack again."""
    tasks = [Long(str(place / name)) for name in "ab"]
    launch = Launch(place, packed(place, *tasks))
    until(lambda: all((place / name).exists() for name in "ab"))
    (job,) = processes(place, "submitit.core._submit")
    job.send_signal(signum)
    launch.wait()
    again = [(place / name).with_suffix(".end").exists() for name in "ab"]
    assert again == [signum == signal.SIGUSR2] * 2
    assert not processes(place, "jobs.pack")


def test_no_process_outlives_a_killed_job(place: Path) -> None:
    launch = Launch(place, packed(place, *(Long(str(place / name)) for name in "ab")))
    until(lambda: all((place / name).exists() for name in "ab"))
    children = processes(place, "jobs.pack")
    assert len(children) == 2
    for job in processes(place, "submitit.core._submit"):
        job.kill()
    gone, alive = psutil.wait_procs(children, timeout=20)
    assert len(gone) == 2 and not alive
    launch.wait()


def test_packed_trainings_are_those_of_separate_jobs(place: Path) -> None:
    """To the last bit: same threads, same seeds; each has its checkpoint, status and process."""
    configs = [tiny(steps=6, seed=seed) for seed in (0, 1)]
    alone = [RunFolder.create(place / "alone", config) for config in configs]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for folder in alone:
            train(folder)
    finally:
        torch.set_num_threads(threads)
    folders = [RunFolder.create(place / "runs", config) for config in configs]
    tasks = [TrainTask(str(folder.path), evaluate=False) for folder in folders]
    launch = Launch(place, packed(place, *tasks))
    launch.wait()
    for one, other in zip(folders, alone, strict=True):
        assert_identical(one, other)
        process = json.loads((one.path / "process.json").read_text())
        assert process["pid"] not in (os.getpid(), launch.process.pid)
        assert process["cluster"] == "local"


def test_launched_runs_share_a_job_and_are_cancelled_with_it(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place)
    words = ["train", "--preset", "demo", "--seeds", "0", "1", "2", "--pack", "2", "--offline"]
    words += ["--training.steps", str(10**6), "--model.dim", "4", "--optimiser.warmup-steps", "0"]
    assert main([*words, "--runs", str(place / "runs")]) == 0
    entries = Ledger(place / "runs").entries()
    ids = [entry.job_id for entry in entries]
    assert ids[0] == ids[1] != ids[2] and len(ids) == 3
    assert len({entry.stderr for entry in entries}) == 3
    assert capsys.readouterr().out.count(ids[0]) == 2
    until(lambda: all(Path(entry.stderr).exists() for entry in entries[:2]))
    living = living_jobs(place / "runs", [entries[0].run])
    cancel_jobs(place / "runs", list(living.values()))
    cancelled = [e.run for e in Ledger(place / "runs").entries() if e.event == "cancelled"]
    assert cancelled == [entries[0].run, entries[1].run]
    until(lambda: not processes(place, "jobs.pack"))
    rest = living_jobs(place / "runs", [entries[2].run])
    cancel_jobs(place / "runs", list(rest.values()))
    until(lambda: not processes(place))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pack", "0"], "--pack 0 is not allowed: it must be at least 1"),
        (["--pack", "2", "--ranks", "2"], "--pack 2 is not allowed with 2 processes a job"),
        (["--pack", "2", "--cluster", "debug"], "--pack is not allowed with --cluster debug"),
    ],
)
def test_what_cannot_be_packed_is_refused_before_anything_is_made(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--preset", "demo", *words]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
