"""Leases: one holder at a time, however many try and whoever dies; nobody alive declared dead."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from fake_slurm import FakeSlurm, install

from sweeps import lease as lease_module
from sweeps.lease import HeldLease, Holder, Lease, LeaseLostError, Leases
from sweeps.orphans import ORPHAN_AFTER_S, QUIET_S, SILENT_S, free_to_take

FORK = multiprocessing.get_context("fork")
ME = Holder.here("me")


def taken(leases: Leases, trial: int, holder: Holder = ME, after: Lease | None = None) -> HeldLease:
    held = leases.take(trial, holder, after=after)
    assert held is not None
    return held


def until(true: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def race(work: Callable[[int], None], processes: int = 8) -> None:
    """Carry out the work in so many processes at once."""
    start = FORK.Barrier(processes)

    def run(index: int) -> None:
        start.wait()
        work(index)

    started = [FORK.Process(target=run, args=(index,)) for index in range(processes)]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    assert [process.exitcode for process in started] == [0] * processes


@pytest.mark.parametrize("held_before", [False, True])
def test_of_many_who_want_a_trial_one_gets_it(tmp_path: Path, held_before: bool) -> None:
    """The first time, and when all of them found its holder dead."""
    leases, trials = Leases(tmp_path / "leases"), range(30)
    dead = Holder("dead", "elsewhere", 1)
    if held_before:
        for trial in trials:
            taken(leases, trial, dead)
    before = leases.current(trials)
    wins = tmp_path / "wins"
    wins.touch()

    def work(index: int) -> None:
        for trial in trials:
            holder = Holder(f"worker-{index}", "here", os.getpid())
            if leases.take(trial, holder, after=before.get(trial)):
                with wins.open("a") as file:
                    file.write(f"{trial} worker-{index}\n")

    race(work)
    winners = dict(line.split() for line in wins.read_text().splitlines())
    assert Counter(line.split()[0] for line in wins.read_text().splitlines()) == dict.fromkeys(
        map(str, trials), 1
    )
    now = leases.current(trials)
    assert {str(trial): lease.holder.worker for trial, lease in now.items()} == winners
    assert {lease.turn for lease in now.values()} == {2 if held_before else 1}
    assert not list(leases.folder.glob(".*"))  # nothing temporary is left


def test_who_judged_by_an_old_lease_does_not_take_the_new_one(tmp_path: Path) -> None:
    leases = Leases(tmp_path)
    first = taken(leases, 5).lease
    second = taken(leases, 5, Holder("second", "there", 2), after=first)
    assert leases.take(5, ME, after=first) is None
    assert leases.current([5]) == {5: second.lease}
    assert leases.history(5) == [first, second.lease]
    assert leases.current([4]) == {}


def test_a_link_whose_answer_was_lost_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS repeats the call then, which finds the file of the first."""
    make = Path.hardlink_to

    def twice(path: Path, target: Path) -> None:
        make(path, target)
        make(path, target)

    monkeypatch.setattr(Path, "hardlink_to", twice)
    leases = Leases(tmp_path)
    assert leases.take(0, ME) is not None
    monkeypatch.undo()
    assert leases.take(0, ME) is None


def test_a_lease_is_renewed_while_it_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "RENEW_S", 0.02)
    leases = Leases(tmp_path)
    held = taken(leases, 1)
    path = leases.path(held.lease)
    os.utime(path, (0, 0))
    assert leases.ages_s([held.lease])[1] > 1e9
    with held:
        until(lambda: leases.ages_s([held.lease])[1] < 60)
    os.utime(path, (0, 0))
    time.sleep(0.1)
    assert path.stat().st_mtime == 0  # no more after its end


def test_who_was_held_for_dead_finds_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leases = Leases(tmp_path)
    held = taken(leases, 1)
    held.confirm()
    monkeypatch.setattr(lease_module, "RENEW_S", 0.02)
    with held:
        held.check()
        taken(leases, 1, Holder("next", "there", 2), after=held.lease)

        def is_lost() -> bool:
            with contextlib.suppress(LeaseLostError):
                held.check()
                return False
            return True

        until(is_lost)
    with pytest.raises(LeaseLostError, match="trial 1"):
        held.confirm()


def test_confirm_does_not_wait_for_a_renewal(tmp_path: Path) -> None:
    leases = Leases(tmp_path)
    held = taken(leases, 1)
    taken(leases, 1, Holder("next", "there", 2), after=held.lease)
    held.check()
    with pytest.raises(LeaseLostError):
        held.confirm()


def test_a_disk_that_fails_for_a_while_ends_no_renewals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lease_module, "RENEW_S", 0.02)
    leases = Leases(tmp_path / "leases")
    held = taken(leases, 1)
    with held:
        leases.folder.rename(tmp_path / "gone")
        until(lambda: "is not renewed" in caplog.text)
        (tmp_path / "gone").rename(leases.folder)
        os.utime(leases.path(held.lease), (0, 0))
        until(lambda: leases.path(held.lease).stat().st_mtime > 0)
    assert caplog.text.count("is not renewed") == 1


# who is gone


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield child
    child.kill()
    child.wait()


def holder_of(child: subprocess.Popen[bytes]) -> Holder:
    started = psutil.Process(child.pid).create_time()
    return Holder("other", socket.gethostname(), child.pid, started)


def is_free(holder: Holder, age_s: float, released: str = "", **options: float) -> bool:
    lease = Lease(0, 1, holder, released=released)
    return free_to_take([lease], {0: age_s}, ME, **options) == [lease]


def test_a_process_of_this_machine_is_gone_when_it_is_dead(
    process: subprocess.Popen[bytes],
) -> None:
    """At once, and never before, whatever its renewals say; also while nobody has waited for it."""
    holder = holder_of(process)
    assert not is_free(holder, 10 * SILENT_S)
    assert is_free(dataclasses.replace(holder, started=holder.started - 100), 0)  # another process
    process.kill()
    until(lambda: is_free(holder, 0))
    assert psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE
    process.wait()
    assert is_free(holder, 0)


def test_on_another_machine_only_a_long_silence_counts() -> None:
    holder = Holder("other", "elsewhere", os.getpid())
    assert not is_free(holder, SILENT_S - 1)
    assert is_free(holder, SILENT_S + 1)
    assert is_free(holder, 0, released="interrupted by SIGTERM")


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return install(tmp_path, monkeypatch)


ON_SLURM = Holder("other", socket.gethostname(), 1, cluster="slurm", job_id="12_3")
OLD_S = 10 * SILENT_S


@pytest.mark.parametrize(
    ("state", "age_s", "released", "free"),
    [
        ("RUNNING", OLD_S, "", False),  # a slow disk, a busy node
        ("SUSPENDED", OLD_S, "", False),
        ("COMPLETING", OLD_S, "", False),
        ("RUNNING", OLD_S, "interrupted by SIGUSR2", False),  # it has restarted and looks for it
        ("PENDING", ORPHAN_AFTER_S - 1, "", False),  # requeued: it will go on with its trial
        ("PENDING", ORPHAN_AFTER_S + 1, "", True),
        ("PENDING", ORPHAN_AFTER_S - 1, "interrupted by SIGUSR2", False),
        ("REQUEUE_HOLD", ORPHAN_AFTER_S + 1, "", True),
        ("CANCELLED", QUIET_S - 1, "", True),
        ("NODE_FAIL", QUIET_S - 1, "", True),
        ("TIMEOUT", 1, "interrupted by SIGTERM", True),
        (None, QUIET_S - 1, "", False),  # it may be another cluster's
        (None, QUIET_S + 1, "", True),
        (None, 1, "interrupted by SIGTERM", True),
    ],
)
def test_a_slurm_job_is_gone_when_slurm_says_so(
    slurm: FakeSlurm, state: str | None, age_s: float, released: str, free: bool
) -> None:
    if state is not None:
        slurm.queue(f"12_3|{state}|None|node1|N/A|N/A", "12_4|RUNNING|None|node2|N/A|N/A")
    else:
        slurm.queue("12_4|RUNNING|None|node2|N/A|N/A")
    assert is_free(ON_SLURM, age_s, released) is free
    assert slurm.calls("squeue")


def test_accounting_knows_what_the_queue_has_forgotten(slurm: FakeSlurm) -> None:
    slurm.queue("12_4|RUNNING|None|node2|N/A|N/A")
    slurm.account("12_3|OUT_OF_MEMORY|0:125|node1|00:10|1G|1:00|None")
    assert is_free(ON_SLURM, QUIET_S - 1)


def test_how_long_a_requeued_job_is_waited_for_is_an_option(slurm: FakeSlurm) -> None:
    slurm.queue("12_3|PENDING|BeginTime|node1|N/A|N/A")
    assert is_free(ON_SLURM, 100, orphan_after_s=90)
    assert not is_free(ON_SLURM, 100, orphan_after_s=110)


def test_where_slurm_does_not_answer_only_a_long_silence_counts(slurm: FakeSlurm) -> None:
    slurm.fail("squeue", "Unable to contact slurm controller")
    assert not is_free(ON_SLURM, SILENT_S - 1)
    assert not is_free(ON_SLURM, SILENT_S - 1, released="interrupted by SIGUSR2")
    assert is_free(ON_SLURM, SILENT_S + 1)


def test_slurm_is_not_asked_about_who_was_just_heard_of(slurm: FakeSlurm) -> None:
    """A hundred waiting workers would ask at once."""
    assert not is_free(ON_SLURM, 1)
    assert slurm.calls("squeue") == []


def test_a_requeued_job_goes_on_with_its_own_trial_first(slurm: FakeSlurm) -> None:
    me = dataclasses.replace(ON_SLURM, host="node7", pid=99, restarts=1)
    own = Lease(4, 1, ON_SLURM)
    orphan = Lease(2, 1, Holder("dead", "elsewhere", 1))
    now = Lease(6, 1, me)  # this very process's
    ages_s = {4: 1.0, 2: OLD_S, 6: 1.0}
    assert free_to_take([orphan, own, now], ages_s, me) == [own, orphan]
    # Numbers of local jobs are no names: two machines may have the same.
    local = dataclasses.replace(ON_SLURM, cluster="local", host="elsewhere")
    here = dataclasses.replace(local, host="node7", pid=99)
    assert free_to_take([Lease(4, 1, local)], ages_s, here) == []
