"""Whatever the cluster does to a job, the run ends bit for bit as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable

import psutil
from harness import (
    Site,
    assert_identical,
    assert_tracked,
    attempts,
    config,
    last_step,
    steps_in,
    wait_for,
)
from image_files import write_images
from slurm_processes import variables_of
from tiny import changed, replaced

from colddiff.run_folder import RunFolder

Reference = Callable[..., RunFolder]


def test_a_time_limit_requeues_and_the_run_finishes(site: Site, reference: Reference) -> None:
    run = config()
    site.train(run)
    folder = site.folder(run)
    site.wait_step(folder, 200)
    # What Slurm sends ahead of a time limit, without the wait for a whole minute.
    site.command("scancel", "--signal=USR2", site.job(folder))
    wait_for("the requeueing", lambda: site.state(folder) in ("PENDING", "REQUEUED"))
    stopped_at = last_step(folder)
    site.wait_ended(folder)
    first, second = attempts(folder)
    assert first["resumed_from_step"] == 0
    assert second["resumed_from_step"] >= stopped_at  # nothing was lost, with no checkpoint due
    assert_identical(folder, reference(run))
    assert_tracked(folder, site)


def test_a_real_time_limit(site: Site, reference: Reference) -> None:
    # Slurm looks at time limits twice a minute: the warning comes 50 to 110 s before the end.
    # The run must not be done by then, twice as fast as the reference, nor take minutes more.
    steps = steps_in(140, reference(config()))
    run = config(steps=steps, log_every=100, validate_every=steps // 2)
    site.train(run, "--sbatch", "time=2", "--sbatch", "signal_delay_s=50")
    folder, uninterrupted = site.folder(run), reference(run)
    site.wait_ended(folder)
    assert len(attempts(folder)) >= 2
    assert_identical(folder, uninterrupted)
    assert_tracked(folder, site)


def test_preempted_three_times_in_a_row(site: Site, reference: Reference) -> None:
    run = config()
    site.train(run)
    folder = site.folder(run)
    for step in (150, 350, 550):
        site.wait_running(folder)
        site.wait_step(folder, step)
        site.preempt(folder)
    site.wait_ended(folder)
    resumed = [attempt["resumed_from_step"] for attempt in attempts(folder)]
    assert len(resumed) == 4
    assert resumed == sorted(resumed) and resumed[1] >= 150
    assert_identical(folder, reference(run))
    assert_tracked(folder, site)


def test_packed_runs_go_on_after_preemption_and_at_a_time_limit(
    site: Site, reference: Reference
) -> None:
    runs = [replaced(config(), "training", seed=seed) for seed in (0, 1)]
    site.train(runs[0], "--seeds", "0", "1", "--pack", "2")
    folders = [site.folder(run) for run in runs]
    assert site.job(folders[0]) == site.job(folders[1])
    for folder in folders:
        site.wait_step(folder, 150)
    site.preempt(folders[0])
    site.wait_running(folders[0])
    for folder in folders:
        site.wait_step(folder, 450)
    site.command("scancel", "--signal=USR2", site.job(folders[0]))
    wait_for("the requeueing", lambda: site.state(folders[0]) in ("PENDING", "REQUEUED"))
    site.wait_ended(folders[0])
    for folder, run in zip(folders, runs, strict=True):
        resumed = [attempt["resumed_from_step"] for attempt in attempts(folder)]
        assert len(resumed) == 3
        assert resumed == sorted(resumed) and resumed[1] >= 150
        assert_identical(folder, reference(run))
        assert_tracked(folder, site)


def test_a_lost_node(site: Site, reference: Reference) -> None:
    run = config(checkpoint_every=50)
    site.train(run)
    folder = site.folder(run)
    site.wait_step(folder, 300)
    node = site.node(folder)
    site.slurm.kill_node(node)
    try:
        wait_for("Slurm to miss the node", lambda: site.state(folder) != "RUNNING")
        site.wait_ended(folder)
    finally:
        site.slurm.resume_node(node)
    _, second = attempts(folder)
    assert second["slurm"]["job_nodelist"] != node
    assert second["resumed_from_step"] >= 250  # the last checkpoint
    assert_identical(folder, reference(run))
    assert_tracked(folder, site)


def test_two_nodes_are_preempted_together(site: Site, reference: Reference) -> None:
    run = config()
    words = ("--sbatch", "nodes=2")
    site.train(run, *words)
    folder = site.folder(run)
    site.wait_step(folder, 200)
    site.preempt(folder)
    stopped_at = last_step(folder)
    site.wait_ended(folder)
    assert [attempt["world_size"] for attempt in attempts(folder)] == [2, 2]
    assert attempts(folder)[1]["resumed_from_step"] >= stopped_at
    assert_identical(folder, reference(run, *words))
    assert_tracked(folder, site)


def test_data_loader_workers_leave_the_signal_to_the_trainer(
    site: Site, reference: Reference
) -> None:
    for split in ("train", "test"):
        write_images(site.place / "data" / "pictures" / split, 24, height=16, width=16)
    run = changed(
        config(workers=2),
        {
            "data": {
                "name": "folder",
                "folder": "pictures",
                "root": str(site.place / "data"),
                "flip": False,
                "preparation": "resize",
                "validation": 4,
            }
        },
    )
    site.train(run)
    folder = site.folder(run)
    site.wait_step(folder, 200)
    site.command("scancel", "--signal=USR2", site.job(folder))  # every process of the step gets it
    wait_for("the requeueing", lambda: site.state(folder) in ("PENDING", "REQUEUED"))
    site.wait_running(folder)
    site.wait_step(folder, 500)
    site.preempt(folder)
    site.wait_ended(folder)
    assert len(attempts(folder)) == 3
    assert_identical(folder, reference(run))
    assert_tracked(folder, site)
    log = next((site.runs / "jobs").glob("*_log.out")).read_text()
    assert log.count("Calling checkpoint method") == 1  # by one process, once


def test_a_cancelled_run_is_cancelled_and_can_be_taken_up_again(
    site: Site, reference: Reference
) -> None:
    run = config()
    site.train(run)
    folder = site.folder(run)
    site.wait_step(folder, 200)
    site.command("scancel", site.job(folder))
    site.wait_ended(folder, "CANCELLED")
    assert "cancelled" in site.launch("status")
    assert "resume at step" in site.train(run, "--wait")
    assert attempts(folder)[1]["resumed_from_step"] >= 200
    assert_identical(folder, reference(run))
    assert_tracked(folder, site)


def test_the_processes_of_the_tests_are_gone(site: Site) -> None:
    """No job leaves a process behind, whatever was done to it."""
    wait_for("an empty queue", lambda: not site.command("squeue", "-h").strip())

    def leftovers() -> list[int]:
        found = psutil.process_iter(["cmdline"])
        jobs = [p.pid for p in found if "submitit.core._submit" in (p.info["cmdline"] or ())]
        return [pid for pid in jobs if f"SLURM_CONF={site.slurm.conf}" in variables_of(pid)]

    wait_for("the jobs' processes to end", lambda: not leftovers(), 30)
