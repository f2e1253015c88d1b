"""The desk: each trial to one worker, and exactly as many as were asked for."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from studies import created, small_study, states

from sweeps.desk import DEATHS, Assignment, Counts, Desk, TooManyFailuresError, fail
from sweeps.lease import Holder
from sweeps.study import StudyConfig, open_study

FORK = multiprocessing.get_context("fork")
DEAD = Holder("dead", Holder.here("").host, 2**22 + 1)  # above the largest process number


def desk_of(config: StudyConfig, number: int = 0, **values: Any) -> Desk:
    me = Holder.here(f"worker-{number}")
    settings = {"target": lambda: config.trials, "suggest": lambda trial: trial.number} | values
    return Desk(config.folder, open_study(config, number), me, **settings)


@pytest.fixture
def config(tmp_path: Path) -> StudyConfig:
    made: StudyConfig = small_study(tmp_path / "runs", trials=2)
    return made


def got(desk: Desk) -> Assignment:
    assignment = desk.next()
    assert assignment is not None
    return assignment


def test_no_more_are_given_out_than_are_wanted(config: StudyConfig) -> None:
    """What was enqueued comes first and counts; what failed is replaced; the target may rise."""
    study = created(config, {"dim": 8})
    wanted = [2]
    desk = desk_of(config, target=lambda: wanted[0])
    first, second = got(desk), got(desk)
    assert [first.trial.number, second.trial.number] == [0, 1]
    assert second.trial.suggest_int("dim", 4, 9) == 8
    assert desk.next() is None
    fail(first.trial, "it went wrong")
    third = got(desk)
    assert third.trial.number == 2
    study.tell(1, 1.0)
    study.tell(2, state=TrialState.PRUNED)
    assert desk.next() is None
    assert desk.is_complete()
    assert desk.counts() == Counts(finished=2, running=0, waiting=0, failed=1)
    wanted[0] = 3
    assert not desk.is_complete()
    assert got(desk).trial.number == 3
    assert states(study) == ["FAIL", "COMPLETE", "PRUNED", "RUNNING"]


def test_more_enqueued_than_wanted_wait(config: StudyConfig) -> None:
    study = created(config, *({"dim": 8} for _ in range(3)))
    desk = desk_of(config)
    got(desk), got(desk)
    assert desk.next() is None
    assert states(study) == ["RUNNING"] * 2 + ["WAITING"] * 2


def test_what_a_dead_worker_left_comes_before_anything_new(config: StudyConfig) -> None:
    study = created(config)
    theirs = study.ask()
    theirs.suggest_int("dim", 4, 9)
    desk = desk_of(config)
    assert desk.leases.take(theirs.number, DEAD)
    taken = got(desk)
    assert taken.trial.number == theirs.number
    assert taken.trial.suggest_int("dim", 4, 9) == theirs.params["dim"]
    assert taken.held.lease.turn == 2


def test_a_trial_asked_for_by_who_died_before_taking_it_is_not_lost(config: StudyConfig) -> None:
    study = created(config)
    study.ask()
    desk = desk_of(config)
    assert [got(desk).trial.number, got(desk).trial.number] == [0, 1]
    assert desk.next() is None
    assert {lease.turn for lease in desk.leases.current([0, 1]).values()} == {1}


def test_a_trial_finished_meanwhile_is_not_taken(config: StudyConfig) -> None:
    """Its holder told the study, and ended, just before it was found dead."""
    study = created(config)
    desk = desk_of(config, target=lambda: 1)
    study.ask()
    desk.leases.take(0, DEAD)
    running = desk._running()
    study.tell(0, 1.0)
    assert desk._take(running[0], desk.leases.current([0])[0]) is None
    assert desk.next() is None
    assert states(study) == ["COMPLETE"]


@pytest.mark.parametrize(
    ("steps", "released", "is_given_up"),
    [
        ([7, 7, 7, 7], "", True),
        ([0, 0, 0, 0], "", True),
        ([7, 7, 14, 14], "", False),  # it gets on, though its nodes are taken away
        ([7, 7, 7], "", False),
        ([7, 7, 7, 7], "interrupted by SIGTERM", False),
        ([7, 7, 7, 7], "RuntimeError: CUDA error: uncorrectable ECC error", True),
        ([7, 7, 7, 7], "storage: OSError: No space left on device", False),
    ],
)
def test_a_trial_that_kills_its_workers_is_given_up(
    config: StudyConfig, steps: list[int], released: str, is_given_up: bool
) -> None:
    """Else it would end one worker after the other, and the study with them."""
    study = created(config)
    study.ask()
    *before, now = steps
    assert DEATHS == 3
    desk = desk_of(config, step_of=lambda trial: now)
    lease = None
    for step in before:
        held = desk.leases.take(0, DEAD, after=lease, step=step)
        assert held is not None
        lease = held.lease
        if released:
            held.release(released)
    assert got(desk).trial.number == (1 if is_given_up else 0)
    trial = study.get_trials(deepcopy=False)[0]
    assert trial.state.name == ("FAIL" if is_given_up else "RUNNING")
    if is_given_up:
        why = released or "without a word"
        assert trial.user_attrs["error"] == f"its last 3 workers ended at step {now}: {why}"


def test_after_too_many_failures_the_worker_stops_and_names_them(config: StudyConfig) -> None:
    created(config)
    desk = desk_of(config)
    for _ in range(5):
        fail(got(desk).trial, "out of memory")
    with pytest.raises(TooManyFailuresError, match=r"\(0, 1, 2, 3, 4\).*4: out of memory.*resume"):
        desk.next()
    # Who resumes the study has read that.
    again = desk_of(config, failed_before=5)
    for _ in range(5):
        fail(got(again).trial, "out of memory")
    with pytest.raises(TooManyFailuresError, match=r"\(5, 6, 7, 8, 9\)"):
        again.next()


def test_a_large_study_may_have_more_failures(config: StudyConfig) -> None:
    created(config)
    desk = desk_of(config, target=lambda: 40)
    for _ in range(10):
        fail(got(desk).trial, "why")
    with pytest.raises(TooManyFailuresError, match="10 trials"):
        desk.next()


def test_a_trial_without_parameters_is_given_out_all_the_same(config: StudyConfig) -> None:
    """Its worker fails it, where the reason can be told."""

    def suggest(trial: optuna.Trial) -> None:
        raise ValueError("no data")

    created(config)
    assert got(desk_of(config, suggest=suggest)).trial.number == 0


def test_workers_that_ask_at_once_and_die_finish_exactly_what_was_wanted(tmp_path: Path) -> None:
    """Eight processes for 40 trials; some are killed with a trial in hand."""
    config = small_study(tmp_path / "runs", trials=40)
    study = created(config)

    start = FORK.Barrier(8)

    def work(number: int) -> None:
        desk = desk_of(config, number, suggest=lambda trial: trial.suggest_float("x", 0, 1))
        start.wait()
        while not desk.is_complete():
            assignment = desk.next()
            time.sleep(0.02)
            if assignment is None:
                continue
            if number % 2 and assignment.held.lease.turn == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            with assignment.held as held:
                held.confirm()
                x = assignment.trial.suggest_float("x", 0, 1)
                desk.study.tell(assignment.trial.number, x)

    processes = [FORK.Process(target=work, args=(number,)) for number in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
    assert [process.exitcode for process in processes] == [0, -signal.SIGKILL] * 4
    assert states(study) == ["COMPLETE"] * 40
    leases = desk_of(config).leases
    turns = [lease.turn for lease in leases.current(range(40)).values()]
    assert len(turns) == 40
    assert sorted(turns) == [1] * 36 + [2] * 4  # what the killed had held
