"""Workers: a trial is carried through whatever befalls those who work on it, and told once."""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from optuna.exceptions import StorageInternalError
from optuna.pruners import ThresholdPruner
from optuna.storages import JournalStorage
from run_comparison import assert_identical
from studies import created, raised, recipe, run_of, small_study, states, worker
from tiny import replaced, tiny

from colddiff.files import read_json
from colddiff.interruption import Interrupted, StopRequest
from colddiff.run_folder import RunFolder
from colddiff.trainer import NonFiniteError
from jobs.local.queue import local_phases, submit_locally
from jobs.tasks import claim
from sweeps import trial as trial_module
from sweeps.desk import Counts, TooManyFailuresError
from sweeps.lease import Holder, Leases
from sweeps.patience import wait
from sweeps.study import StudyConfig, open_study
from sweeps.trial import Reporter, carry_out
from sweeps.worker import WorkerTask, saved_step

TESTS = Path(__file__).parent


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The number of threads changes the last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], Any]) -> None:
    """Act once, when this step is reported."""
    note, done = Reporter.note, []

    def noting(self: Reporter, now: int, metrics: Any) -> bool:
        if now == step and not done:
            done.append(True)
            act()
        return note(self, now, metrics)

    monkeypatch.setattr(Reporter, "note", noting)


def take_one(config: StudyConfig, task: WorkerTask, study: Any) -> None:
    """Carry out the next trial."""
    assignment = task.desk(config, study).next()
    assert assignment is not None
    with StopRequest() as stop:
        carry_out(assignment, config, stop, lambda run: task.sent(stop, None, run))


def leases_of(config: StudyConfig) -> Leases:
    return Leases(config.folder / "leases")


def test_a_worker_makes_exactly_the_trials_that_are_wanted(runs: Path) -> None:
    config = small_study(runs, trials=3)
    study = created(config, recipe(1), recipe(2), recipe(3))
    assert worker(config)() == str(config.folder)
    assert states(study) == ["COMPLETE"] * 3 + ["WAITING"]
    for trial in study.trials[:3]:
        folder = run_of(config, trial)
        assert folder.is_trained
        assert folder.config.optimiser.lr == trial.params["lr"]
        (measured,) = folder.path.glob("objective-*.json")
        assert trial.values == [read_json(measured)["values"]["rmse"]]
        assert sorted(trial.intermediate_values) == [10, 20, 30]
        assert trial.user_attrs["worker"] == "small-worker-0"
    assert run_of(config, study.trials[0]).config == tiny()  # the reference
    # A worker too many has nothing to do; with a higher target it has.
    worker(config, 1)()
    assert states(study) == ["COMPLETE"] * 3 + ["WAITING"]
    raised(config, 4)
    worker(config, 1)()
    assert states(study) == ["COMPLETE"] * 4


def test_a_stopped_trial_goes_on_elsewhere_as_if_nothing_had_happened(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, calm = small_study(runs, trials=1), small_study(tmp_path / "calm", trials=1)
    study, undisturbed = created(config), created(calm)
    at_step(monkeypatch, 20, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted):
        worker(config)()
    (trial,) = study.trials
    assert trial.state.name == "RUNNING"
    assert leases_of(config).current([0])[0].released == "interrupted by SIGTERM"
    assert run_of(config, trial).status().state == "interrupted"  # type: ignore[union-attr]
    assert Counts.of(study.trials).finished == 0

    worker(config, 1)()
    worker(calm)()
    (trial,), (same,) = study.trials, undisturbed.trials
    assert (trial.values, trial.params) == (same.values, same.params)
    assert trial.intermediate_values == same.intermediate_values
    assert_identical(run_of(config, trial), run_of(calm, same))
    assert [lease.holder.worker for lease in leases_of(config).history(0)] == [
        "small-worker-0",
        "small-worker-1",
    ]
    attempts = read_json(run_of(config, trial).environment)["attempts"]
    assert [attempt["resumed_from_step"] for attempt in attempts] == [0, 20]


def test_a_stop_between_training_and_measuring_loses_nothing(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_study(runs, trials=1)
    study = created(config)
    at_step(monkeypatch, 30, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted):
        worker(config)()
    assert run_of(config, study.trials[0]).is_trained
    worker(config)()
    assert states(study) == ["COMPLETE"]
    assert "repeated" not in study.trials[0].user_attrs
    assert len(read_json(run_of(config, study.trials[0]).environment)["attempts"]) == 1


def test_a_pruned_trial_counts_and_its_run_says_so(runs: Path) -> None:
    config = small_study(runs, trials=2)
    study = created(config, recipe(1))
    opened = open_study(config, 0)
    opened.pruner = ThresholdPruner(upper=0.0, n_warmup_steps=15)
    take_one(config, worker(config), opened)  # the reference, which is never pruned
    take_one(config, worker(config), opened)
    trial = study.trials[1]
    assert states(study) == ["COMPLETE", "PRUNED"]
    assert sorted(trial.intermediate_values) == [10, 20]
    status = run_of(config, trial).status()
    assert status is not None
    assert (status.state, status.message) == ("interrupted", "pruned at step 20")
    worker(config)()  # finds nothing to do
    assert states(study) == ["COMPLETE", "PRUNED"]


def test_failures_are_replaced_until_they_are_too_many(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_study(runs, trials=2, base=tiny(steps=6, validate_every=6))
    study = created(config)
    measure = trial_module.measure

    def failing(folder: RunFolder, *rest: Any) -> Any:
        if failures:
            raise failures.pop()
        return measure(folder, *rest)

    monkeypatch.setattr(trial_module, "measure", failing)
    failures = [RuntimeError("CUDA out of memory")]
    worker(config)()
    assert states(study) == ["FAIL", "COMPLETE", "COMPLETE"]
    assert study.trials[0].user_attrs["error"] == "RuntimeError: CUDA out of memory"

    raised(config, 3)
    failures = [MemoryError("too wide")] * 9
    with pytest.raises(TooManyFailuresError, match="MemoryError: too wide"):
        worker(config, failed_before=1)()
    assert Counts.of(study.trials) == Counts(finished=2, running=0, waiting=0, failed=6)


def test_a_broken_machine_fails_no_trial(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its worker ends; the trial goes on elsewhere, and is given up where that ends alike."""
    config = small_study(runs, trials=1, base=tiny(steps=6, validate_every=6))
    study = created(config)
    measure = trial_module.measure

    def broken(*_: Any) -> None:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered")

    for number in range(4):  # the first one took it at step 0
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="ECC"):
            patch.setattr(trial_module, "measure", broken)
            worker(config, number)()
        assert states(study) == ["RUNNING"]
    first = leases_of(config).history(0)[0]
    assert first.released.startswith("RuntimeError: CUDA error")

    monkeypatch.setattr(trial_module, "measure", measure)
    worker(config, 4)()
    assert states(study) == ["FAIL", "COMPLETE"]
    assert "RuntimeError: CUDA error" in study.trials[0].user_attrs["error"]


@pytest.mark.parametrize(
    ("error", "own"),
    [
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"), False),
        (NonFiniteError("steps 1 to 4"), True),
        (ValueError("the mnist files are not under /data"), False),
        (OSError(28, "No space left on device"), False),
    ],
)
def test_what_is_a_trials_own_fault(error: Exception, own: bool) -> None:
    assert trial_module.is_its_own(error) == own


def test_absent_data_fail_no_trial(runs: Path, tmp_path: Path) -> None:
    """Schedules are measured on the data when a trial begins, and trials are trained on them."""
    base = replaced(tiny(), "data", name="mnist", root=str(tmp_path / "unmounted"))
    config = small_study(runs, trials=2, base=base, space="schedule")
    study = created(config, {"T": 6, "exponent": 2.0, "kernel_size": 5, "padding": "circular"})
    with pytest.raises(ValueError, match="the mnist files are not under"):
        worker(config)()
    study.tell(0, 0.0)
    with pytest.raises(ValueError, match="the mnist files are not under"):
        worker(config)()
    assert states(study) == ["COMPLETE", "RUNNING"]


def test_a_storage_that_is_away_for_a_while_ends_no_worker(
    runs: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_study(runs, trials=2)
    study = created(config)
    monkeypatch.setattr("sweeps.patience.FIRST_PAUSE_S", 0.01)
    rng = random.Random(0)
    for name in ("get_all_trials", "set_trial_user_attr", "set_trial_intermediate_value",
                 "set_trial_state_values", "create_new_trial"):  # fmt: skip
        monkeypatch.setattr(JournalStorage, name, now_and_then(getattr(JournalStorage, name), rng))
    worker(config)()
    monkeypatch.undo()
    assert states(study) == ["COMPLETE"] * 2
    assert "the storage does not answer" in caplog.text


def now_and_then(method: Any, rng: random.Random) -> Any:
    """The method, which fails every third time, before or after it has done its work."""

    @functools.wraps(method)
    def failing(*args: Any, **kwargs: Any) -> Any:
        if rng.random() < 1 / 6:
            raise StorageInternalError("the server closed the connection")
        answer = method(*args, **kwargs)
        if rng.random() < 1 / 6:
            raise StorageInternalError("the server closed the connection")
        return answer

    return failing


def test_a_full_disk_fails_no_trial(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_study(runs, trials=1, base=tiny(steps=6, validate_every=6))
    study = created(config)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(trial_module, "measure", full)
        worker(config)()
    assert states(study) == ["RUNNING"]
    assert "No space left" in leases_of(config).current([0])[0].released
    worker(config)()
    assert states(study) == ["COMPLETE"]


def test_the_same_configuration_is_trained_once(runs: Path) -> None:
    config = small_study(runs, trials=3)
    study = created(config, recipe(1), recipe(1))
    worker(config)()
    first, second = study.trials[1:]
    assert first.values == second.values
    assert first.intermediate_values == second.intermediate_values
    assert first.user_attrs["run"] == second.user_attrs["run"]
    assert [trial.user_attrs.get("repeated") for trial in study.trials] == [None, None, True]
    assert len(read_json(run_of(config, first).environment)["attempts"]) == 1


def test_a_run_that_another_process_trains_is_waited_for(runs: Path) -> None:
    config = small_study(runs, trials=1)
    study = created(config)
    folder = RunFolder.create(runs, tiny())
    task, stop = worker(config), StopRequest()
    with claim(folder):
        assignment = task.desk(config, study).next()
        assert assignment is not None
        stop.signum = signal.SIGTERM
        with pytest.raises(Interrupted):
            carry_out(assignment, config, stop, lambda run: task.sent(stop, None, run))
    assert states(study) == ["RUNNING"]
    assert folder.status() is None  # nothing was trained
    worker(config)()
    assert states(study) == ["COMPLETE"]


def test_who_lost_its_lease_tells_nothing(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_study(runs, trials=1)
    study = created(config)
    leases = leases_of(config)

    def lose() -> None:
        leases.take(0, Holder("next", "elsewhere", 1), after=leases.current([0])[0])

    at_step(monkeypatch, 20, lose)
    take_one(config, worker(config), study)
    assert states(study) == ["RUNNING"]
    assert leases.current([0])[0].holder.worker == "next"
    assert leases.history(0)[0].released == ""


def test_what_a_kill_kept_from_being_reported_is_reported_by_the_next(runs: Path) -> None:
    """The journal has it, the study not: the two are written one after the other."""
    config = small_study(runs, trials=1)
    study = created(config)
    from colddiff.training import train

    train(RunFolder.create(runs, tiny()))
    worker(config)()
    assert sorted(study.trials[0].intermediate_values) == [10, 20, 30]


def test_trials_of_levels_leave_the_trained_run_as_it_is(runs: Path) -> None:
    base = tiny()
    config = small_study(runs, trials=3, space="levels", base=base)
    study = created(config, {"calls": 1, "exponent": 1.0}, {"calls": 2, "exponent": 1.0})
    worker(config)()
    values = [trial.value for trial in study.trials]
    assert len(set(values)) == 3
    (folder,) = (path.parent for path in runs.glob("*/config.json"))
    assert RunFolder(folder).config == base
    assert len(read_json(folder / "environment.json")["attempts"]) == 1


def test_a_worker_that_waits_heeds_a_signal_at_once() -> None:
    stop = StopRequest()
    stop.signum = signal.SIGUSR2
    began = time.monotonic()
    with pytest.raises(Interrupted) as interruption:
        wait(60, stop)
    assert interruption.value.signum == signal.SIGUSR2
    assert time.monotonic() - began < 5
    stop.signum = None
    wait(0.2, stop)
    assert time.monotonic() - began >= 0.2


def test_a_task_is_what_its_record_says(runs: Path) -> None:
    task = worker(small_study(runs), 3, failed_before=2)
    values = json.loads(json.dumps(task.to_dict()))
    assert values.pop("kind") == "worker"
    assert WorkerTask(**values) == task
    assert task.run == "small-worker-3"
    assert task.checkpoint().function is task


# several processes


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Without a GPU, and without other users' launches; no process outlives the test."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    yield tmp_path
    left = [each for each in psutil.process_iter(["cmdline"]) if str(tmp_path) in _line(each)]
    for process in left:
        process.kill()
    psutil.wait_procs(left, timeout=10)


def _line(process: psutil.Process) -> str:
    return " ".join(process.info["cmdline"] or ()) if process.pid != os.getpid() else ""


def until(true: Callable[[], Any], seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return found


def halted(config: StudyConfig, study: Any, spared: set[int]) -> tuple[int, int]:
    """A trial in the midst of its training, and the process that holds it, which is halted."""

    def holders() -> Any:
        running = [trial.number for trial in study.trials if trial.state.name == "RUNNING"]
        found = leases_of(config).current(running)
        return [(number, lease.holder.pid) for number, lease in found.items() if lease.turn == 1]

    def find() -> tuple[int, int] | None:
        for number, pid in holders():
            name = study.trials[number].user_attrs.get("run")
            saved = 10 <= saved_step(config, study.trials[number]) < 90 if name else False
            if number in spared or not saved:
                continue
            os.kill(pid, signal.SIGSTOP)
            if (number, pid) in holders():
                return number, pid
            os.kill(pid, signal.SIGCONT)  # it has come to the end in between
        return None

    found: tuple[int, int] = until(find)
    return found


def test_a_study_survives_a_killed_and_a_stopped_worker(machine: Path) -> None:
    """Four workers; one is killed and one stopped in the midst of a trial: nobody can tell after.

    All trials are finished, once, with the values and weights of a study that nobody disturbed.
    """
    base = tiny(steps=100, validate_every=50, checkpoint_every=10)
    config, calm = (small_study(machine / name, trials=5, base=base) for name in ("runs", "calm"))
    params = [recipe(index) for index in range(4)]
    study, undisturbed = created(config, *params), created(calm, *params)
    tasks = [worker(config, number) for number in range(4)]
    jobs = [job.job_id for job in submit_locally(tasks, Path(config.runs), at_once=4)]
    killed, pid = halted(config, study, set())
    os.kill(pid, signal.SIGKILL)
    stopped, pid = halted(config, study, {killed})
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGCONT)
    worker(calm)()
    until(lambda: set(local_phases(Path(config.runs), jobs).values()) == {"ended"})

    assert states(study) == states(undisturbed) == ["COMPLETE"] * 5
    for trial, same in zip(study.trials, undisturbed.trials, strict=True):
        assert (trial.params, trial.values) == (same.params, same.values)
        assert trial.intermediate_values == same.intermediate_values
        assert_identical(run_of(config, trial), run_of(calm, same))
    for number in (killed, stopped):
        first, *rest = leases_of(config).history(number)
        assert rest, "somebody took it over"
        assert first.released == ("" if number == killed else "interrupted by SIGTERM")
        attempts = read_json(run_of(config, study.trials[number]).environment)["attempts"]
        assert attempts[-1]["resumed_from_step"] >= 10
