"""The paper's presets of larger images, with narrow networks, on small data sets made here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from image_files import write_cifar10, write_images
from plain_metrics import plain_rmse
from tracked_runs import fresh_store

from colddiff.run_folder import RunFolder
from jobs.launch import main

QUICK = (
    *("--training.steps", "1", "--training.batch-size", "2", "--training.accumulation", "1"),
    *("--training.ema-start", "0", "--training.ema-every", "1", "--evaluation.samples", "2"),
)


@pytest.fixture
def places(tmp_path: Path) -> list[str]:
    return ["--runs", str(tmp_path / "runs"), "--tracking-uri", fresh_store(tmp_path)]


def trained(tmp_path: Path) -> RunFolder:
    (path,) = (path for path in (tmp_path / "runs").iterdir() if (path / "config.json").exists())
    return RunFolder(path)


@pytest.mark.usefixtures("no_inception")
@pytest.mark.parametrize("preset", ["celeba", "afhq-generate"])
def test_image_folders_at_128_pixels(preset: str, tmp_path: Path, places: list[str]) -> None:
    name = preset.partition("-")[0]
    write_images(tmp_path / "data" / name / "train", 4, 150, 130)
    write_images(tmp_path / "data" / name / "test", 2, 150, 130, seed=50)
    data = ["--data-root", str(tmp_path / "data")]
    options = ["--preset", preset, *data, "--model.dim", "4", "--model.patch", "4"]
    assert main(["train", *options, *QUICK, *places, "--cluster", "debug"]) == 0
    folder = trained(tmp_path)
    result = json.loads(folder.evaluation.read_text())
    assert set(result["kinds"]) == {"degraded", "direct", "sampled", "sampled_algorithm1"}
    assert all(kind["fid_digits"] is None for kind in result["kinds"].values())
    with np.load(folder.samples / "restorations.npz") as arrays:
        stored = {key: arrays[key] for key in arrays}
    assert stored["original"].shape == (2, 128, 128, 3)
    # Stored in 8 bits: each within half a level of what was measured.
    error = plain_rmse(stored["degraded"] / 255, stored["original"] / 255)
    assert result["kinds"]["degraded"]["rmse"] == pytest.approx(error, abs=3e-3)
    if "generate" in preset:
        settings = ["--n", "3", "--levels", "300-150-1-0", "--cluster", "debug"]
        assert main(["generate", folder.path.name, *settings, *places]) == 0
        (images,) = folder.samples.glob("generated-*.npz")
        with np.load(images) as arrays:
            assert arrays["images"].shape == (3, 128, 128, 3)
        record = json.loads(images.with_suffix(".json").read_text())
        assert (record["network_calls"], record["quality"]) == (3, None)


@pytest.mark.usefixtures("no_inception")
def test_cifar10_with_its_network(
    tmp_path: Path, places: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar10(tmp_path / "data", monkeypatch)
    options = ["--preset", "cifar10", "--data-root", str(tmp_path / "data"), "--model.dim", "32"]
    assert main(["train", *options, *QUICK, *places, "--cluster", "debug"]) == 0
    folder = trained(tmp_path)
    assert folder.config.model.name == "ddpm"
    assert len(json.loads(folder.evaluation.read_text())["kinds"]) == 4
