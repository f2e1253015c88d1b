"""Table 1 from real MLflow runs, against numbers worked out by hand."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
from tracked_runs import EXPERIMENT, Store, error_line, table1, three_seeds

from analysis.blocks import KINDS, METRICS, paper_values
from analysis.table1 import main

# The root of 0.07, the sample variance of 0.1, 0.2, 0.6
SPREAD = 0.2645751311
PRINTED = {
    "mnist": ("438.59 0.287 0.287", "4.69 0.718 0.154", "5.10 0.757 0.142"),
    "cifar10": ("298.60 0.315 0.136", "80.08 0.773 0.075", "83.69 0.775 0.071"),
    "celeba": ("382.81 0.254 0.193", "26.14 0.568 0.093", "36.37 0.607 0.083"),
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "table1.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def cell(out: Path, kind: str, metric: str, **where: str) -> dict[str, str]:
    where |= {"kind": kind, "metric": metric}
    found = [row for row in rows(out) if where.items() <= row.items() and row["preset"]]
    assert len(found) == 1, found
    return found[0]


def markdown_rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[field.strip() for field in line.strip("|").split("|")] for line in lines]


def test_paper_values_as_printed() -> None:
    expected = {
        (dataset, kind, metric): value
        for dataset, lines in PRINTED.items()
        for kind, line in zip(("degraded", "sampled", "direct"), lines, strict=True)
        for metric, value in zip(("fid_inception", "ssim", "rmse"), line.split(), strict=True)
    }
    assert paper_values() == expected


def test_mean_and_sample_deviation(store: Store) -> None:
    three_seeds(store)
    out = table1(store)
    assert cell(out, "direct", "rmse") == {
        "dataset": "mnist",
        "preset": "mnist",
        "T": "20",
        "kind": "direct",
        "metric": "rmse",
        "paper": "0.142",
        "mean": "0.3",
        "std": str(SPREAD),
        "difference": "0.158",
        "seeds": "3",
        "samples": "10000",
        "split": "test",
    }
    fid = cell(out, "direct", "fid_digits")
    assert (fid["mean"], fid["std"], fid["paper"]) == ("30", "26.45751311", "")
    mnist = [(row["kind"], row["metric"]) for row in rows(out) if row["dataset"] == "mnist"]
    assert mnist == [(kind, metric) for kind in KINDS for metric in METRICS]


def test_markdown_is_shown_and_written(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    three_seeds(store)
    text = (table1(store) / "table1.md").read_text()
    assert capsys.readouterr().out == text
    header, _, degraded, direct, sampled = markdown_rows(text)[:5]
    assert header == [
        "", "RMSE paper", "RMSE ours", "RMSE difference", "SSIM paper", "SSIM ours",
        "SSIM difference", "FID paper", "FID ours", "FID difference", "FID(digits) ours",
    ]  # fmt: skip
    assert degraded == ["degraded", "0.287", "", "", "0.287 †", "", "", "438.59", "", "", ""]
    assert direct == [
        "direct", "0.142", "0.300 ± 0.265", "+0.158", "0.757", "", "", "5.10", "", "",
        "30.00 ± 26.46",
    ]  # fmt: skip
    assert sampled == [
        "sampled", "0.154", "", "", "0.718", "0.300 ± 0.265", "-0.418", "4.69", "", "", ""
    ]  # fmt: skip
    assert "## mnist, preset mnist, T = 20\n\n3 seeds, 10,000 test images.\n" in text
    assert re.search(r"^† MNIST's degraded SSIM of 0\.287", text, re.M)
    assert "embedded digits" not in text
    assert "Other samplers" not in text


def test_data_sets_without_runs_say_so(store: Store) -> None:
    three_seeds(store)
    text = (table1(store) / "table1.md").read_text()
    for name, direct in (("cifar10", "0.071"), ("celeba", "0.083")):
        assert f"## {name}\n\nNo finished run.\n" in text
        row = ["direct", direct, "no finished run", ""]
        assert row in [found[:4] for found in markdown_rows(text)]
    assert {row["seeds"] for row in rows(table1(store)) if row["dataset"] == "celeba"} == {"0"}
    # Where one preset is asked for, the rest of the paper is not.
    alone = table1(store, "--preset", "mnist")
    assert {row["dataset"] for row in rows(alone)} == {"mnist"}


def test_hot_diffusion_has_no_row_in_the_paper(store: Store) -> None:
    store.log(
        preset="mnist-hot", metrics={"direct/rmse": 0.2}, params={"degradation.kind": "noise"}
    )
    found = cell(table1(store), "direct", "rmse", preset="mnist-hot")
    assert (found["paper"], found["difference"], found["mean"]) == ("", "", "0.2")


def test_an_empty_fid_says_how_to_fill_it(store: Store) -> None:
    store.log(metrics={"direct/rmse": 0.1, "direct/fid_digits": 1.0})
    assert "--evaluation.inception-weights FILE" in (table1(store) / "table1.md").read_text()
    store.log(metrics={"direct/rmse": 0.1, "direct/fid_inception": 9.0}, start=5_000)
    assert "inception-weights" not in (table1(store) / "table1.md").read_text()


def test_one_seed_has_no_deviation(store: Store) -> None:
    store.log(metrics={"direct/rmse": 0.1234})
    out = table1(store)
    assert cell(out, "direct", "rmse")["std"] == ""
    text = (out / "table1.md").read_text()
    assert markdown_rows(text)[3][2] == "0.123"
    assert "1 seed, 10,000 test images." in text


def test_missing_values_are_empty(store: Store) -> None:
    metrics = {"direct/rmse": 0.1, "direct/ssim": float("nan"), "sampled/rmse": float("inf")}
    store.log(metrics=metrics)
    out = table1(store)
    for kind, metric in (("direct", "ssim"), ("sampled", "rmse"), ("degraded", "fid_digits")):
        found = cell(out, kind, metric)
        assert (found["mean"], found["std"], found["seeds"]) == ("", "", "0")


def test_value_of_some_seeds_says_how_many(store: Store) -> None:
    store.log("a", seed=0, metrics={"direct/rmse": 0.1, "direct/fid_inception": 8.0})
    store.log("b", seed=1, metrics={"direct/rmse": 0.1, "direct/fid_inception": 9.0})
    store.log("c", seed=2, metrics={"direct/rmse": 0.1})
    out = table1(store)
    fid = cell(out, "direct", "fid_inception")
    assert (fid["mean"], fid["std"], fid["seeds"]) == ("8.5", "0.7071067812", "2")
    assert markdown_rows((out / "table1.md").read_text())[3][8] == "8.50 ± 0.71 (n = 2)"
    assert r"$8.50 \pm 0.71$ (n = 2)" in (out / "table1.tex").read_text()


def test_groups(store: Store) -> None:
    value = {"direct/rmse": 0.1}
    store.log("a", metrics=value)
    store.log("b", metrics={"direct/rmse": 0.2}, params={"degradation.T": 40})
    store.log("c", metrics={"direct/rmse": 0.3}, preset="mine")
    store.log("d", metrics={"direct/rmse": 0.4}, dataset="cifar10", preset="cifar10")
    out = table1(store)
    means = {
        (row["dataset"], row["preset"], row["T"]): (row["mean"], row["paper"])
        for row in rows(out)
        if (row["kind"], row["metric"]) == ("direct", "rmse") and row["preset"]
    }
    assert means == {
        ("mnist", "mnist", "20"): ("0.1", "0.142"),
        ("mnist", "mnist", "40"): ("0.2", "0.142"),
        ("mnist", "mine", "20"): ("0.3", "0.142"),
        ("cifar10", "cifar10", "20"): ("0.4", "0.071"),
    }


def test_different_recipes_are_never_averaged(store: Store) -> None:
    store.log("a", seed=0, metrics={"direct/rmse": 0.1})
    store.log("b", seed=1, metrics={"direct/rmse": 0.3})
    store.log("c", seed=0, metrics={"direct/rmse": 0.9}, params={"training.steps": 10})
    out = table1(store)
    full = cell(out, "direct", "rmse", preset="mnist[training.steps=700000]")
    short = cell(out, "direct", "rmse", preset="mnist[training.steps=10]")
    assert (full["mean"], full["seeds"]) == ("0.2", "2")
    assert (short["mean"], short["seeds"]) == ("0.9", "1")


def test_runs_of_before_a_setting_had_it_at_its_default(store: Store) -> None:
    older = store.log("a", seed=0, metrics={"direct/rmse": 0.1})
    assert "training.own_states" in store.client.get_run(older).data.params
    store.log("b", seed=1, metrics={"direct/rmse": 0.3}, without=("training.own_states",))
    store.log("c", seed=0, metrics={"direct/rmse": 0.9}, params={"training.own_states": 0.5})
    out = table1(store)
    plain = cell(out, "direct", "rmse", preset="mnist[training.own_states=0.0]")
    assert (plain["mean"], plain["seeds"]) == ("0.2", "2")
    assert cell(out, "direct", "rmse", preset="mnist[training.own_states=0.5]")["mean"] == "0.9"


def test_networks_that_do_not_sample_are_left_out(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = {"training.levels": "last"}
    store.log("a", metrics={"direct/rmse": 0.1}, params=last, preset="floor")
    common = ("--out", str(tmp_path / "out"), "--tracking-uri", store.uri, "--experiment")
    assert "only restore directly" in error_line(main, capsys, *common, EXPERIMENT)
    store.log("b", metrics={"direct/rmse": 0.2})
    assert {row["preset"] for row in rows(table1(store))} == {"mnist", ""}


def test_where_a_run_ran_does_not_split_its_seeds(store: Store) -> None:
    store.log("a", seed=0, metrics={"direct/rmse": 0.1}, params={"data.root": "/here"})
    store.log("b", seed=1, metrics={"direct/rmse": 0.3}, params={"data.root": "/there"})
    found = cell(table1(store), "direct", "rmse")
    assert (found["preset"], found["mean"], found["seeds"]) == ("mnist", "0.2", "2")


def test_evaluations_on_other_images_are_never_averaged(store: Store) -> None:
    store.log("a", seed=0, metrics={"direct/rmse": 0.1}, samples=100)
    store.log("b", seed=1, metrics={"direct/rmse": 0.3}, samples=10_000)
    out = table1(store)
    assert cell(out, "direct", "rmse", preset="mnist[samples=100]")["samples"] == "100"
    assert cell(out, "direct", "rmse", preset="mnist[samples=10000]")["samples"] == "10000"


def test_unfinished_and_superseded_runs_do_not_count(store: Store) -> None:
    store.log("same", metrics={"direct/rmse": 0.5}, start=1000)
    store.log("same", metrics={"direct/rmse": 0.2}, start=2000)
    store.log("other", seed=1, metrics={"direct/rmse": 0.9}, status="FAILED")
    found = cell(table1(store), "direct", "rmse")
    assert (found["mean"], found["seeds"]) == ("0.2", "1")


def test_preset_filter(store: Store) -> None:
    store.log("a", preset="one", metrics={"direct/rmse": 0.1})
    store.log("b", preset="two", metrics={"direct/rmse": 0.2})
    assert {row["preset"] for row in rows(table1(store, "--preset", "two"))} == {"two"}


@pytest.mark.parametrize("dataset", ["digits", "fashion-mnist"])
def test_papers_values_stand_beside_its_own_data_sets_only(store: Store, dataset: str) -> None:
    store.log(dataset=dataset, metrics={"degraded/ssim": 0.015})
    out = table1(store)
    assert {row["paper"] for row in rows(out) if row["dataset"] == dataset} == {""}
    text = (out / "table1.md").read_text()
    assert ("embedded digits set" in text) == (dataset == "digits")
    assert "†" not in (table1(store, "--preset", "mnist") / "table1.md").read_text()


def test_celeba_from_a_folder_of_images(store: Store) -> None:
    params = {"data.name": "folder", "data.folder": "CelebA"}
    store.log(metrics={"direct/rmse": 0.1}, params=params)
    assert cell(table1(store), "sampled", "fid_inception")["paper"] == "26.14"


def test_other_samplers(store: Store) -> None:
    for seed, value in enumerate((0.1, 0.2, 0.6)):
        metrics = {
            "sampled/rmse": 0.5,
            "sampled_algorithm1/rmse": 0.25,
            "sampled_20-10-0/rmse": value,
            "sampled_20-10-0/ssim": 0.7,
            "direct/rmse_per_class/3": 0.125,
        }
        store.log(f"run{seed}", seed=seed, metrics=metrics)
    out = table1(store)
    text = (out / "table1.md").read_text()
    header, _, *others = markdown_rows(text.split("## Other samplers")[1])
    name = "mnist, preset mnist, T = 20"
    assert header == ["", "sampler", "RMSE", "SSIM", "FID", "FID(digits)"]
    assert sorted(others) == [
        [name, "Algorithm 1, all levels", "0.250 ± 0.000", "", "", ""],
        [name, "Algorithm 2, levels 20-10-0", "0.300 ± 0.265", "0.700 ± 0.000", "", ""],
    ]
    assert {row["kind"] for row in rows(out)} == set(KINDS)


def test_provenance(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    three_seeds(store)
    dirty = {"colddiff.git_sha": "a" * 40 + "," + "b" * 40, "colddiff.git_dirty": "true"}
    mlflow_id = store.log("dirty", seed=9, metrics={"direct/rmse": 0.2}, tags=dirty)
    text = (table1(store) / "table1.md").read_text()
    footer = text.split("\n---\n")[1]
    assert f"Experiment study at sqlite:///{Path(store.uri).name}; " in footer
    assert re.search(r"; \d{4}-\d\d-\d\d \d\d:\d\d UTC; 4 runs, 4 seeds \(0, 1, 2, 9\)\.", footer)
    assert (
        f"- dirty: seed 9, commit {'a' * 12} and {'b' * 12} with uncommitted changes, "
        f"10,000 test images, MLflow run {mlflow_id}\n"
    ) in footer
    assert "- mnist-seed0: seed 0, commit 0123456789ab, 10,000 test images, MLflow run " in footer


def test_mistakes_are_one_line(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--out", str(tmp_path / "out"), "--tracking-uri", store.uri, "--experiment")
    assert "no experiment 'nothing' " in error_line(main, capsys, *common, "nothing")
    message = error_line(main, capsys, *common, EXPERIMENT)
    assert "no finished run in experiment 'study': make one with `python jobs/launch.py" in message
    store.log("a", status="RUNNING", metrics={"direct/rmse": 0.1})
    assert "no finished run" in error_line(main, capsys, *common, EXPERIMENT)
    store.log("b")
    assert "`python jobs/launch.py evaluate`" in error_line(main, capsys, *common, EXPERIMENT)
    store.log("c", metrics={"direct/rmse": 0.1})
    message = error_line(main, capsys, *common, EXPERIMENT, "--preset", "none")
    assert "which has: mnist" in message
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    arguments = ("--tracking-uri", store.uri, "--experiment", EXPERIMENT, "--out")
    assert str(tmp_path / "file") in error_line(main, capsys, *arguments, str(tmp_path / "file"))


def test_unknown_option_is_code_2() -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--experimnt", "a"])
    assert stopped.value.code == 2
