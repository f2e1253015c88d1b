"""The trajectory of Algorithm 2: what is recorded, against a plain loop; strip and film of it."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from plain_blur import random_images
from tiny import replaced, tiny
from torch import Tensor
from tracked_runs import EXPERIMENT, Store, error_line

from analysis.figure3 import GAP, LABEL
from analysis.trajectory import BAR, FILM, HEAD, Trajectory, film, main
from colddiff.config import DegradationConfig, EvaluationConfig, RunConfig
from colddiff.data import load_images
from colddiff.degradation import Blur
from colddiff.evaluation import evaluate
from colddiff.run_folder import RunFolder
from colddiff.trajectory import LARGEST, chosen_images, record_trajectory, stretched


def guess(xt: Tensor, t: Tensor) -> Tensor:
    """A wrong restorer that depends on everything it is given."""
    return torch.tanh(2 * xt.flip(-1)) + 0.03 * t[:, None, None, None]


def grey(x: Tensor) -> np.ndarray:
    return np.rint((x.clamp(-1, 1).double().numpy() + 1) * 127.5).transpose(0, 2, 3, 1)


def recorded(tmp_path: Path, T: int, restorer: Any = guess) -> tuple[dict[str, Any], Tensor, Blur]:
    folder = RunFolder.create(tmp_path / "runs", dataclasses.replace(tiny(), preset="x"))
    blur = Blur(DegradationConfig(T=T, kernel_size=5, sigma=2.0), 16)
    x0 = random_images(3, 1, 16, 16, seed=41)
    record_trajectory(folder, restorer, blur, x0, torch.tensor([4, 7, 9]))
    with np.load(folder.samples / "trajectory.npz") as stored:
        return {name: stored[name] for name in stored}, x0, blur


def test_what_is_recorded_is_a_plain_loop(tmp_path: Path) -> None:
    arrays, x0, blur = recorded(tmp_path, T=5)
    assert arrays["level"].tolist() == [5, 4, 3, 2, 1]
    assert arrays["index"].tolist() == [4, 7, 9]
    x = blur.terminal(x0).double()
    for place, s in enumerate(range(5, 0, -1)):
        t = torch.full((3,), s)
        x0_hat = guess(x.float(), t).double()
        mean = x.mean(dim=(-2, -1), keepdim=True)
        spread = (x - mean) / (x - mean).abs().amax(dim=(1, 2, 3), keepdim=True)
        for name, values in (("xt", x), ("x0_hat", x0_hat), ("stretched", spread)):
            assert arrays[name].dtype == np.uint8
            # A value on the border between two grey levels may fall on either side.
            assert np.abs(arrays[name][place] - grey(values)).max() <= 1
            assert (arrays[name][place] == grey(values)).mean() > 0.99
        x = x - blur(x0_hat, t) + blur(x0_hat, t - 1)
    assert np.abs(arrays["restored"] - grey(x)).max() <= 1
    assert (arrays["original"] == grey(x0)).all()


def test_long_trajectories_are_thinned_and_keep_their_ends(tmp_path: Path) -> None:
    arrays, _, _ = recorded(tmp_path, T=150, restorer=lambda xt, t: xt)
    levels = arrays["level"]
    assert len(levels) == len(arrays["xt"]) == LARGEST
    assert (levels[0], levels[-1]) == (150, 1)
    assert set(np.diff(levels)) <= {-2, -3}


def test_rounding_is_not_stretched() -> None:
    x = torch.full((2, 1, 4, 4), 0.3)
    assert torch.equal(stretched(x), torch.zeros(2, 1, 4, 4))
    x[0, 0, 0, 0] += 2**-24  # one rounding
    assert float(stretched(x).abs().max()) < 0.1
    x[0, 0, 0, 0] += 1e-4
    assert float(stretched(x)[0].max()) == 1


def test_chosen_images_are_one_a_class() -> None:
    labels = torch.tensor([3, 3, 1, 0, 1, 2, 9])
    assert chosen_images(labels, 7).tolist() == [3, 2, 5, 0, 6]  # 0, 1, 2, 3, 9
    assert chosen_images(labels, 3).tolist() == [2, 0]
    assert chosen_images(None, 4).tolist() == [0, 1, 2, 3]
    assert chosen_images(None, 99).tolist() == list(range(10))
    assert chosen_images(torch.arange(50), 50).tolist() == list(range(10))


@pytest.mark.usefixtures("no_inception")
@pytest.mark.parametrize("kind", ["blur", "noise"])
def test_an_evaluation_keeps_one_image_a_class(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replaced(tiny(), "degradation", kind=kind)
    folder = evaluated(config, EvaluationConfig(samples=40, images=12), tmp_path, monkeypatch)
    labels = load_images(config.data, "test").labels
    assert labels is not None
    with np.load(folder.samples / "trajectory.npz") as stored:
        assert stored["label"].tolist() == sorted(set(labels[:40].tolist()))
        assert stored["label"].tolist() == labels[stored["index"]].tolist()
        with np.load(folder.samples / "restorations.npz") as restored:
            for row, index in enumerate(stored["index"]):
                if index < 12:  # by the same noise, where there is any
                    for name, other in (("restored", "sampled"), ("original", "original")):
                        same = stored[name][row].astype(int) - restored[other][index]
                        assert np.abs(same).max() <= 1


@pytest.mark.usefixtures("no_inception")
def test_nothing_is_kept_where_nothing_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = evaluated(tiny(), EvaluationConfig(samples=4, images=0), tmp_path, monkeypatch)
    assert not folder.samples.exists()
    folder = evaluated(tiny(levels="last"), EvaluationConfig(samples=4), tmp_path, monkeypatch)
    assert (folder.samples / "restorations.npz").exists()
    assert not (folder.samples / "trajectory.npz").exists()


def evaluated(
    config: RunConfig, settings: EvaluationConfig, path: Path, monkeypatch: pytest.MonkeyPatch
) -> RunFolder:
    """A run without training, whose restorer is :func:`guess`."""
    folder = RunFolder.create(path / "runs", config)
    loaded = (guess, config, 6)
    monkeypatch.setattr("colddiff.evaluation.load_restorer", lambda folder, device: loaded)
    evaluate(folder, settings, torch.device("cpu"))
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def log(store: Store, folder: Path) -> dict[str, Any]:
    run = store.log("run", metrics={"direct/rmse": 0.1})
    arrays, _, _ = recorded(folder, T=5)
    (path,) = (folder / "runs").glob("*/samples/trajectory.npz")
    store.add_file(run, path, "samples")
    return arrays


def test_strip_and_film_show_the_arrays(store: Store, tmp_path: Path) -> None:
    arrays, out = log(store, tmp_path), tmp_path / "out"
    options = ["--experiment", EXPERIMENT, "--tracking-uri", store.uri, "--out", str(out)]
    assert main([*options, "--indices", "7"]) == 0
    assert "trajectory-run.png" in (out / "trajectory.md").read_text()
    assert (out / "trajectory-run.pdf").stat().st_size > 1000

    strip = np.asarray(Image.open(out / "trajectory-run.png").convert("L"))
    scale = 170 // 16
    side = 16 * scale

    def cell(row: int, column: int) -> np.ndarray:
        top, left = HEAD + row * (side + GAP), LABEL + column * (side + GAP)
        return strip[top + scale // 2 : top + side : scale, left + scale // 2 : left + side : scale]

    for row, name in enumerate(("xt", "stretched", "x0_hat")):
        for column in range(5):  # all five levels fit
            assert (cell(row, column) == arrays[name][column, 1, :, :, 0]).all()
    assert (cell(2, 5) == arrays["restored"][1, :, :, 0]).all()
    assert (cell(2, 6) == arrays["original"][1, :, :, 0]).all()


def test_the_film_has_a_frame_a_level_and_the_end(tmp_path: Path) -> None:
    arrays, _, _ = recorded(tmp_path, T=5)
    gif = Image.open(io.BytesIO(film(Trajectory("run", "run", arrays))))
    assert gif.n_frames == 6  # type: ignore[attr-defined]
    shown = [*zip(arrays["xt"], arrays["x0_hat"], strict=True)]
    shown.append((arrays["restored"], arrays["restored"]))
    durations = []
    for number, (xt, x0_hat) in enumerate(shown):
        gif.seek(number)
        durations.append(gif.info["duration"])
        pixels = np.asarray(gif.convert("L"))[BAR + 1 :: FILM // 16, 1 :: FILM // 16]
        rows = [np.concatenate(list(row), axis=1) for row in (xt, x0_hat, arrays["original"])]
        expected = np.concatenate(rows, axis=0)[..., 0]
        assert (pixels == expected).all()
    assert durations == [150] * 5 + [2000]
    assert gif.info["loop"] == 0


@pytest.mark.parametrize("size", [28, 32, 64, 128])
def test_the_film_of_ten_images_fits_a_screen(size: int) -> None:
    ramp = np.linspace(0, 255, size).astype(np.uint8)
    image = np.stack([*np.broadcast_arrays(ramp, ramp[:, None], 128 + ramp // 2)], axis=-1)
    one = np.broadcast_to(image.astype(np.uint8), (10, size, size, 3))
    arrays = {name: one[None] for name in ("xt", "x0_hat")}
    arrays |= {"original": one, "restored": one, "level": np.array([1])}
    gif = Image.open(io.BytesIO(film(Trajectory("run", "run", arrays))))
    scale = max(1, FILM // size)
    assert gif.size == (10 * size * scale, BAR + 3 * size * scale)
    assert gif.size[0] <= 1280
    pixels = np.asarray(gif.convert("RGB"))[BAR + scale // 2 :: scale, scale // 2 :: scale]
    error = np.abs(pixels[:size, :size].astype(int) - image).mean()
    assert error < 8  # 256 colours of many more


def test_mistakes_are_one_line(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        "--tracking-uri",
        store.uri,
        "--out",
        str(tmp_path / "o"),
        "--experiment",
        EXPERIMENT,
    ]
    store.log("old", metrics={"direct/rmse": 0.1}, start=500)
    message = error_line(main, capsys, *options)
    assert message.startswith("error: old has no samples/trajectory.npz in MLflow")
    assert "`python jobs/launch.py evaluate old --evaluation.images 100`" in message
    store.log("direct", metrics={"direct/rmse": 0.1}, params={"training.levels": "last"})
    message = error_line(main, capsys, *options, "--runs", "direct")
    assert message.startswith("error: direct only restores directly")
    log(store, tmp_path)
    message = error_line(main, capsys, *options, "--indices", "4", "5")
    assert "image 5 is not stored; there are 4, 7, 9" in message
    assert not (tmp_path / "o").exists()
