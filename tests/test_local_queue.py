"""The local queue with real processes: who runs when and where, and what is said of it."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from local_jobs import Launch, nap, note, processes, until
from queue_tasks import Broken, Busy, Lonely, Long
from run_comparison import assert_identical
from tiny import tiny

from colddiff.journal import read_records
from colddiff.run_folder import RunFolder
from jobs.local.queue import cancel_locally, local_phases, submit_locally
from jobs.local.slots import find_slots, hold
from jobs.tasks import TrainTask

TESTS = Path(__file__).parent
STEPS = 120


def test_jobs_run_one_after_the_other_in_order_without_a_gpu(place: Path) -> None:
    began = time.monotonic()
    names = ["a", "b", "c"]
    launch = Launch(place, *(nap(place, name, seconds=0.2) for name in names))
    assert time.monotonic() - began < 1  # does not wait
    assert launch.phases == ["queued"] * 3  # from the beginning
    assert not launch.submitted[0].stdout.exists()
    launch.wait()
    notes = [note(place, name) for name in names]
    for earlier, later in itertools.pairwise(notes):
        assert earlier["end"] < later["begin"]
    assert [each["gpus"] for each in notes] == [""] * 3
    assert launch.submitted[1].stdout.read_text().count("b naps") == 1
    assert launch.process.wait(timeout=10) == 0


@pytest.mark.parametrize("gpus", ["", "0,1,2"])
def test_at_once_limits_a_launch(place: Path, monkeypatch: pytest.MonkeyPatch, gpus: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    tasks = [nap(place, str(i), gate=str(place / "gate")) for i in range(3)]
    launch = Launch(place, *tasks, at_once=2)
    until(lambda: note(place, "0") and note(place, "1"))
    time.sleep(0.5)
    assert launch.phases == ["running", "running", "queued"]
    (place / "gate").touch()
    launch.wait()
    assert note(place, "2")["begin"] > min(note(place, "0")["end"], note(place, "1")["end"])


def test_two_launches_share_the_gpus(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never two jobs on a GPU; and the second launch does not wait for the end of the first."""
    gpus = ["3", "GPU-8932f937-d72c"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(gpus))
    names = {launch: [f"{launch}{i}" for i in range(4)] for launch in "ab"}
    launches = [
        Launch(place, *(nap(place, name, seconds=0.4) for name in names[launch])) for launch in "ab"
    ]
    while (phases := [phase for launch in launches for phase in launch.phases]) != ["ended"] * 8:
        assert phases.count("running") <= len(gpus)
        time.sleep(0.02)
    notes = [note(place, name) for launch in "ab" for name in names[launch]]
    assert {each["gpus"] for each in notes} == set(gpus)
    for gpu in gpus:
        turns = sorted((n["begin"], n["end"]) for n in notes if n["gpus"] == gpu)
        for (_, end), (begin, _) in itertools.pairwise(turns):
            assert end < begin
    assert note(place, "b0")["begin"] < note(place, "a3")["begin"]
    for launch in launches:
        starts = re.findall(r"job (\d) .* starts on (\S+)", launch.log)
        assert [number for number, _ in starts] == ["0", "1", "2", "3"]
        assert {slot for _, slot in starts} == {"gpu-3", "gpu-GPU-8932f937-d72c"}


@pytest.mark.parametrize(
    ("at_once", "ranks", "given", "threads"),
    [
        (3, 1, None, "4"),
        (1, 1, None, None),
        (2, 3, None, "2"),
        (20, 1, None, "1"),
        (3, 1, "7", "7"),
    ],
)
def test_jobs_at_the_same_time_share_the_cores(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    at_once: int,
    ranks: int,
    given: str | None,
    threads: str | None,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    monkeypatch.delenv("OMP_NUM_THREADS")
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    Launch(place, nap(place, "a"), at_once=at_once, ranks=ranks).wait()
    assert note(place, "a")["threads"] == threads


def test_ranks_of_a_job_share_its_gpus(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    gate = str(place / "gate")
    launch = Launch(place, nap(place, "a", gate=gate), nap(place, "b"), ranks=2)
    until(lambda: note(place, "a", 0) and note(place, "a", 1))
    Launch(place, nap(place, "c")).wait()
    # One GPU is left: enough for a job with one rank, not for another one with two.
    assert [note(place, "a", rank)["gpus"] for rank in (0, 1)] == ["0,1", "0,1"]
    assert [note(place, "a", rank)["world_size"] for rank in (0, 1)] == [2, 2]
    assert note(place, "c")["gpus"] == "2"
    assert launch.phases == ["running", "queued"]
    Path(gate).touch()
    launch.wait()
    assert len(note(place, "b", 1)["gpus"].split(",")) == 2
    with pytest.raises(ValueError, match=r"ranks = 4 .* 1\.\.3, a GPU for each"):
        Launch(place, nap(place, "d"), ranks=4)


def test_a_failing_job_and_a_busy_run_stop_nothing(place: Path) -> None:
    tasks = nap(place, "a"), Broken("/x/broken"), Busy("/x/busy"), nap(place, "b")
    launch = Launch(place, *tasks)
    launch.wait()
    assert note(place, "b")["end"]
    ends = [line for line in launch.log.splitlines() if "starts" not in line]
    for line, said in zip(
        ends,
        [
            "job 0 (nap a) ended",
            "job 1 (broken broken) failed",
            "job 2 (busy busy) ended",
            "job 3 (nap b) ended",
        ],
        strict=True,
    ):
        assert line.endswith(said)
    assert "this is broken" in launch.submitted[1].stderr.read_text()
    assert "busy is being worked on" in launch.submitted[2].stderr.read_text()
    assert launch.process.wait(timeout=10) == 1


def test_cancelled_jobs_never_start(place: Path) -> None:
    tasks = [nap(place, name, gate=str(place / "gate")) for name in "abc"]
    launch = Launch(place, *tasks)
    launch.cancel(1)
    assert launch.phases == ["queued", "ended", "queued"]
    until(lambda: note(place, "a"))
    assert launch.phases == ["running", "ended", "queued"]
    (place / "gate").touch()
    launch.wait()
    assert note(place, "c")["end"] and not note(place, "b")
    assert not launch.submitted[1].stdout.exists()
    launch.cancel(0)  # too late, and no mistake
    assert launch.phases == ["ended"] * 3


def test_a_job_cancelled_while_it_starts_does_nothing(place: Path) -> None:
    launch = Launch(place, nap(place, "a"), nap(place, "b"))
    descriptor = hold(launch.folder / "0" / "rank-0.lock")  # it comes no further than this
    until(launch.submitted[0].stdout.exists)
    launch.cancel(0)
    os.close(descriptor)
    launch.wait()
    assert note(place, "b")["end"] and not note(place, "a")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_queue_told_to_stop_ends_its_job(place: Path, signum: signal.Signals) -> None:
    launch = Launch(place, nap(place, "a", seconds=100), nap(place, "b"))
    until(lambda: note(place, "a"))
    launch.process.send_signal(signum)
    assert launch.process.wait(timeout=30) == 128 + signum
    assert launch.phases == ["ended", "ended"]
    assert not psutil.pid_exists(note(place, "a")["pid"]) and not note(place, "b")


def test_kill_9_of_the_queue_leaves_its_job_its_slot(place: Path) -> None:
    launch = Launch(place, nap(place, "a", gate=str(place / "gate")), nap(place, "b"))
    until(lambda: note(place, "a"))
    launch.process.kill()
    launch.process.wait(timeout=10)
    assert launch.phases == ["running", "ended"]
    after = Launch(place, nap(place, "c"))
    time.sleep(2)  # it has looked for a slot by now
    assert after.phases == ["queued"]
    # After a reboot there are the files, and no locks.
    shutil.copytree(launch.runs, place / "rebooted", symlinks=True)
    assert set(local_phases(place / "rebooted", launch.ids + after.ids).values()) == {"ended"}
    (place / "gate").touch()
    after.wait()
    assert note(place, "a")["end"] < note(place, "c")["begin"]
    assert launch.phases == ["ended", "ended"] and not note(place, "b")


def test_a_job_without_its_queue_is_cancelled_too(place: Path) -> None:
    launch = Launch(place, nap(place, "a", seconds=100))
    until(lambda: note(place, "a"))
    launch.process.kill()
    launch.process.wait(timeout=10)
    launch.cancel(0)
    launch.wait()
    until(lambda: not psutil.pid_exists(note(place, "a")["pid"]), seconds=10)


def test_kill_9_of_a_job_frees_its_slot(place: Path) -> None:
    launch = Launch(place, nap(place, "a", seconds=100), nap(place, "b"))
    until(lambda: note(place, "a"))
    os.kill(note(place, "a")["pid"], signal.SIGKILL)
    launch.wait()
    assert note(place, "b")["end"] and "end" not in note(place, "a")
    assert "job 0 (nap a) was stopped" in launch.log


def test_kill_9_of_submitits_controller_leaves_its_job_its_slot(place: Path) -> None:
    launch = Launch(place, nap(place, "a", seconds=100), nap(place, "b"))
    until(lambda: note(place, "a"))
    (controller,) = processes(launch.folder, "submitit.local._local")
    controller.kill()
    time.sleep(1)
    assert launch.phases == ["running", "queued"]
    launch.cancel(0)
    launch.wait()
    assert note(place, "b")["end"] and "end" not in note(place, "a")


def test_jobs_outlive_the_launcher_and_its_terminal(place: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from queue_tasks import Nap;"
        "from jobs.local.queue import submit_locally;"
        "place = Path(sys.argv[1]);"
        "task = Nap(str(place / 'naps/a'), gate=str(place / 'gate'));"
        "print(submit_locally([task], place / 'runs')[0].job_id, flush=True); time.sleep(100)"
    )
    launcher = subprocess.Popen(
        [sys.executable, "-c", code, str(place)],
        env=os.environ | {"TMPDIR": str(place / "tmp")},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        text=True,
    )
    assert launcher.stdout is not None
    job_id = launcher.stdout.readline().strip()
    until(lambda: note(place, "a"))
    for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGKILL):  # as a closed terminal has it
        os.killpg(launcher.pid, signum)
    launcher.communicate(timeout=10)
    time.sleep(0.3)
    assert local_phases(place / "runs", [job_id]) == {job_id: "running"}
    (place / "gate").touch()
    until(lambda: local_phases(place / "runs", [job_id]) == {job_id: "ended"})
    assert note(place, "a")["end"]


def test_jobs_run_from_a_code_snapshot(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("jobs", "colddiff"):
        shutil.copytree(TESTS.parent / package, place / "code" / package)
    monkeypatch.chdir(TESTS.parent)  # where the sources lie, too
    launch = Launch(place, nap(place, "a"), code=place / "code")
    launch.wait()
    assert Path(note(place, "a")["jobs"]).parent == place / "code" / "jobs"


# Training that is stopped in the middle.


def train_config() -> Any:
    return tiny(steps=STEPS, log_every=3, checkpoint_every=50, validate_every=0)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The same training in a process of its own, without a queue."""
    folder = RunFolder.create(tmp_path_factory.mktemp("uninterrupted"), train_config())
    code = "import sys; from jobs.tasks import TrainTask; TrainTask(sys.argv[1], evaluate=False)()"
    command = [sys.executable, "-c", code, str(folder.path)]
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
    return folder


def training(place: Path) -> tuple[RunFolder, TrainTask]:
    folder = RunFolder.create(place / "runs", train_config())
    return folder, TrainTask(str(folder.path), evaluate=False)


def reached(folder: RunFolder, step: int) -> bool:
    if not folder.journal.exists():
        return False
    records, _ = read_records(folder.journal)
    return bool(records) and records[-1].step >= step


def resumed_from(folder: RunFolder) -> list[int]:
    attempts = json.loads(folder.environment.read_text())["attempts"]
    return [attempt["resumed_from_step"] for attempt in attempts]


def test_a_cancelled_training_is_saved_and_resumed(place: Path, uninterrupted: RunFolder) -> None:
    folder, task = training(place)
    launch = Launch(place, task, nap(place, "a"))
    until(lambda: reached(folder, 10))
    launch.cancel(0)
    launch.wait()
    status = folder.status()
    assert status is not None and status.state == "interrupted" and 10 <= status.step < STEPS
    assert note(place, "a")["end"]  # the next one had its turn
    Launch(place, task).wait()
    assert resumed_from(folder) == [0, status.step]
    assert_identical(folder, uninterrupted)


def test_a_requeued_training_goes_on_in_its_slot(place: Path, uninterrupted: RunFolder) -> None:
    """USR2 is what submitit's controller sends ahead of a time limit."""
    folder, task = training(place)
    launch = Launch(place, task, nap(place, "a"))
    until(lambda: reached(folder, 10))
    (job,) = processes(launch.folder, "submitit.core._submit")
    job.send_signal(signal.SIGUSR2)
    job.wait(timeout=30)
    assert launch.phases == ["running", "queued"]
    launch.wait()
    first, second = resumed_from(folder)
    assert first == 0 and 10 <= second < STEPS
    assert_identical(folder, uninterrupted)
    assert launch.log.count("starts on") == 2  # the queue saw one job


def test_a_rank_that_fails_takes_the_others_along(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "sitecustomize.py").write_text(
        "import jobs.local.queue as queue\nqueue.GRACE_S = 0.5\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{place}:{TESTS}")
    launch = Launch(place, Lonely(str(place / "lonely")), nap(place, "a"), ranks=2)
    launch.wait()
    assert note(place, "a")["end"]
    assert "rank 1 has gone, the others end" in launch.log
    assert "job 0 (lonely lonely) failed" in launch.log


def test_submitits_time_limit_starts_a_job_again(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "sitecustomize.py").write_text(
        "import jobs.local.queue as queue\n"
        "queue.TIMEOUT_MINUTES, queue.TIMEOUT_NOTICE_S = 0.5, 28  # after 2 s\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{place}:{TESTS}")
    launch = Launch(place, Long(str(place / "long")), nap(place, "a"))
    launch.wait()
    assert (place / "long.end").exists() and note(place, "a")["end"]
    assert "timed-out" in launch.submitted[0].stdout.read_text() + (
        launch.submitted[0].stderr.read_text()
    )
    assert launch.log.count("starts on") == 2


# What is asked for.


def test_slots_are_counted_without_torch(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def names(at_once: int = 0) -> list[tuple[str, str]]:
        return [(Path(slot.path).name, slot.device) for slot in find_slots(at_once)]

    assert names() == [("cpu-0", "")]
    assert names(2) == [("cpu-0", ""), ("cpu-1", "")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert names() == [("cpu-0", "")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, MIG-GPU-1/7/0")
    assert names(8) == [("gpu-2", "2"), ("gpu-MIG-GPU-1_7_0", "MIG-GPU-1/7/0")]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    (place / "bin").mkdir()
    monkeypatch.setenv("PATH", str(place / "bin"))
    assert names() == [("cpu-0", "")]
    program = place / "bin" / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\n[ $1 = --list-gpus ] && echo 'GPU 0: NVIDIA A100 (UUID: GPU-1)'\n"
        "echo '  MIG 1g.5gb Device 0: (UUID: MIG-2)'\necho 'GPU 1: NVIDIA A100 (UUID: GPU-3)'\n"
    )
    program.chmod(0o755)
    assert names() == [("gpu-0", "0"), ("gpu-1", "1")]
    program.write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    assert names() == [("cpu-0", "")]


def test_bad_input_is_refused_before_anything_is_made(place: Path) -> None:
    with pytest.raises(ValueError, match="at_once = -1"):
        Launch(place, nap(place, "a"), at_once=-1)
    with pytest.raises(ValueError, match="ranks = 0"):
        Launch(place, nap(place, "a"), ranks=0)
    assert submit_locally([], place / "runs") == []
    assert not (place / "runs").exists()
    with pytest.raises(ValueError, match="'12_3' is no local job"):
        local_phases(place / "runs", ["12_3"])
    gone = "local-0123abcd-0"
    assert local_phases(place / "runs", [gone]) == {gone: "ended"}
    cancel_locally(place / "runs", [gone])
    assert not (place / "runs").exists()
