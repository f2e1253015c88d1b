"""reproduce: train, evaluate, table and figure as one chain of Slurm jobs."""

from __future__ import annotations

from harness import Site, assert_tracked, config, wait_for
from tiny import replaced

from colddiff.files import read_json
from colddiff.run_folder import RunFolder


def reproduce(site: Site, steps: int) -> str:
    run = config(steps=steps)
    (site.place / "run.json").write_text(run.to_json())
    return site.launch(
        "reproduce", "--config", "run.json", "--cluster", "slurm", "--profile", "site.toml",
        "--seeds", "0", "1", "--experiment", site.experiment, "--out", "reports",
    )  # fmt: skip


def empty(site: Site) -> bool:
    return not site.command("squeue", "-h").strip()


def test_the_chain_ends_in_a_table_and_a_figure(site: Site) -> None:
    reproduce(site, 150)
    wait_for("the chain to end", lambda: empty(site), 400)
    for seed in (0, 1):
        folder = site.folder(replaced(config(steps=150), "training", seed=seed))
        assert folder.evaluation.exists()
        assert_tracked(folder, site)
        assert_submissions_are_kept(folder, site)
    table = (site.place / "reports" / "table1.md").read_text()
    assert "RMSE" in table
    assert (site.place / "reports" / "figure3.png").stat().st_size > 1000
    again = reproduce(site, 150)
    assert again.count("complete") == 4  # two trainings, two evaluations
    wait_for("the second report", lambda: empty(site), 200)


def assert_submissions_are_kept(folder: RunFolder, site: Site) -> None:
    """How each of its jobs was submitted: command line and batch script, also in MLflow."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=site.uri)
    experiment = client.get_experiment_by_name(site.experiment)
    assert experiment is not None
    tag = f"tags.`colddiff.run_id` = '{folder.path.name}'"
    (run,) = client.search_runs([experiment.experiment_id], tag)
    sent = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    for kind in ("train", "evaluate"):
        kept = folder.path / f"submission-{kind}.json"
        assert read_json(kept)["kind"] == kind
        assert " reproduce --config run.json " in read_json(kept)["command"]
        assert f"--job-name=colddiff-{kind}" in kept.with_suffix(".sh").read_text()
        assert {kept.name, kept.with_suffix(".sh").name} <= sent


def test_a_failed_training_leaves_nothing_pending(site: Site) -> None:
    broken = RunFolder.create(site.runs, replaced(config(steps=160), "training", seed=1))
    broken.checkpoints.write_text("a file where a folder must be")
    reproduce(site, 160)
    wait_for("the chain to end", lambda: empty(site), 400)
    good = site.folder(replaced(config(steps=160), "training", seed=0))
    assert good.evaluation.exists()  # its own chain was not broken
    assert not broken.evaluation.exists()
    assert not (site.place / "reports" / "table1.md").exists()
    assert "failed" in site.launch("status")
