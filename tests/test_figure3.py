"""Figure 3 from real MLflow runs: every stored pixel where it belongs."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from tracked_runs import EXPERIMENT, Store, error_line, restorations

from analysis.figure3 import (
    ARTIFACT,
    GAP,
    LABEL,
    ROWS,
    SPACE,
    TITLE,
    Panel,
    default_rows,
    draw,
    load_panel,
    main,
    ranges,
    render,
)

SOME = {"direct/rmse": 0.1}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def images(count: int = 3, size: int = 32, channels: int = 1, seed: int = 0) -> Panel:
    random = np.random.default_rng(seed)
    shape = (count, size, size, channels)
    stacks = {name: random.integers(0, 256, shape, dtype=np.uint8) for name in ROWS}
    return Panel(f"run {seed}", stacks, tuple(range(count)))


def pixels(data: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def shown(
    picture: NDArray[np.uint8], row: int, column: int, size: int = 32, top: int = 0
) -> NDArray[np.uint8]:
    """The image at a place, read off the rendered dots, once a pixel."""
    scale = max(1, 170 // size)
    cell = size * scale
    y, x = top + row * (cell + GAP), LABEL + column * (cell + GAP)
    block = picture[y : y + cell, x : x + cell]
    first = block[::scale, ::scale]
    assert np.array_equal(block, first.repeat(scale, 0).repeat(scale, 1)), "a pixel is not a square"
    return first


def write_run(store: Store, run_id: str, path: Path, **options: object) -> str:
    mlflow_id = store.log(run_id, metrics=SOME, **options)  # type: ignore[arg-type]
    store.add_file(mlflow_id, path, ARTIFACT.rpartition("/")[0])
    return mlflow_id


def figure(store: Store, tmp_path: Path, *options: str) -> NDArray[np.uint8]:
    out = tmp_path / "out"
    arguments = ["--experiment", EXPERIMENT, "--out", str(out), "--tracking-uri", store.uri]
    assert main([*arguments, *options]) == 0
    assert (out / "figure3.pdf").read_bytes().startswith(b"%PDF")
    return pixels((out / "figure3.png").read_bytes())


@pytest.mark.parametrize(("size", "channels"), [(32, 1), (32, 3), (28, 1), (128, 3), (200, 1)])
def test_every_pixel_of_every_image(size: int, channels: int) -> None:
    panel = images(3, size, channels)
    picture = pixels(render(draw([panel]), "png", ""))
    cell = size * max(1, 170 // size)
    assert picture.shape == (4 * cell + 3 * GAP, LABEL + 3 * cell + 2 * GAP, 3)
    for row, name in enumerate(ROWS):
        for column in range(3):
            expected = np.broadcast_to(panel.images[name][column], (size, size, 3))
            assert np.array_equal(shown(picture, row, column, size), expected), (name, column)


def test_background_is_white_and_rows_are_labelled() -> None:
    panel = images(2)
    drawn = draw([panel])
    picture = pixels(render(drawn, "png", ""))
    assert (picture[160 : 160 + GAP, LABEL:] == 255).all()
    assert (picture[:, LABEL + 160 : LABEL + 160 + GAP] == 255).all()
    assert [text.get_text() for text in drawn.texts] == [name.capitalize() for name in ROWS]
    for row in range(len(ROWS)):
        label = picture[row * 168 : row * 168 + 160, :LABEL]
        assert label.min() < 64, "no text beside the row"
        assert (label[:, -2:] == 255).all(), "the text runs into the images"


def test_several_runs_below_each_other_with_titles() -> None:
    panels = [images(3, 32, 1, seed=1), images(2, 64, 3, seed=2)]
    drawn = draw(panels)
    picture = pixels(render(drawn, "png", ""))
    assert [t.get_text() for t in drawn.texts if t.get_text().startswith("run")] == [
        "run 1",
        "run 2",
    ]
    second = TITLE + 4 * 160 + 3 * GAP + SPACE + TITLE
    for row, name in enumerate(ROWS):
        first_image = np.broadcast_to(panels[0].images[name][2], (32, 32, 3))
        assert np.array_equal(shown(picture, row, 2, 32, TITLE), first_image)
        assert np.array_equal(shown(picture, row, 1, 64, second), panels[1].images[name][1])


def test_titles_are_not_cut_off() -> None:
    panels = [images(1, seed=1), images(1, seed=2)]
    title = "digits, preset demonstration, T = 20, seed 0"
    panels = [Panel(title, panel.images, panel.index) for panel in panels]
    picture = pixels(render(draw(panels), "png", ""))
    assert (picture[:TITLE] < 64).any()
    assert (picture[:TITLE, -4:] == 255).all()


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([7, 2, 1, 0, 4, 1, 4, 9, 5, 9, 0, 6, 9, 3, 8], [3, 2, 1, 13, 4, 8, 11, 0, 14, 7]),
        ([-1] * 15, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ([1, 1, 0, 1], [2, 0, 1, 3]),
        (list(range(30)), list(range(10))),
    ],
)
def test_default_images_are_one_of_every_class(labels: list[int], expected: list[int]) -> None:
    assert default_rows(np.array(labels)) == expected


def test_ranges() -> None:
    assert ranges([3, 0, 1, 2, 7, 9, 10]) == "0..3, 7, 9..10"


def test_chosen_images(tmp_path: Path) -> None:
    path = restorations(tmp_path / "r.npz", index=[40, 41, 50, 52], label=[0, 1, 2, 3])
    panel = load_panel(path, "run", (52, 40))
    assert panel.index == (52, 40)
    with np.load(path) as stored:
        for name in ROWS:
            assert np.array_equal(panel.images[name], stored[name][[3, 0]])
    with pytest.raises(ValueError, match=r"image 51 is not stored; there are 40..41, 50, 52$"):
        load_panel(path, "run", (40, 51))


def test_images_without_labels(tmp_path: Path) -> None:
    path = restorations(tmp_path / "r.npz", index=list(range(12)), label=[3] * 12)
    with np.load(path) as stored:
        arrays = {name: stored[name] for name in stored if name != "label"}
    np.savez(path, **arrays)
    assert load_panel(path, "run", ()).index == tuple(range(10))


def test_command_draws_the_stored_images(store: Store, tmp_path: Path) -> None:
    path = restorations(tmp_path / "restorations.npz", list(range(12)), [3, 1, 2, 0] * 3)
    write_run(store, "a", path)
    picture = figure(store, tmp_path, "--indices", "11", "0")
    with np.load(path) as stored:
        for row, name in enumerate(ROWS):
            for column, index in enumerate((11, 0)):
                expected = np.broadcast_to(stored[name][index], (32, 32, 3))
                assert np.array_equal(shown(picture, row, column), expected)
    default = figure(store, tmp_path)
    with np.load(path) as stored:
        for column, index in enumerate((3, 1, 2, 0, 4, 5, 6, 7, 8, 9)):
            expected = np.broadcast_to(stored["original"][index], (32, 32, 3))
            assert np.array_equal(shown(default, 3, column), expected)


def test_newest_run_of_every_dataset_preset_and_T(store: Store, tmp_path: Path) -> None:
    path = restorations(tmp_path / "restorations.npz", [0, 1], [0, 1])
    write_run(store, "old", path, start=1)
    write_run(store, "new", path, start=2, seed=5)
    write_run(store, "running", path, start=3, seed=6, status="RUNNING")
    store.log("trained only", start=4, seed=7)
    write_run(store, "deep", path, params={"degradation.T": 40})
    write_run(store, "digits", path, dataset="digits", preset="demo")
    figure(store, tmp_path)
    text = (tmp_path / "out" / "figure3.md").read_text()
    assert [line for line in text.splitlines() if "preset" in line] == [
        "- digits, preset demo, T = 20, seed 0: images 0, 1",
        "- mnist, preset mnist, T = 20, seed 5: images 0, 1",
        "- mnist, preset mnist, T = 40, seed 0: images 0, 1",
    ]
    figure(store, tmp_path, "--preset", "demo")
    assert "mnist" not in (tmp_path / "out" / "figure3.md").read_text()


def test_named_runs(store: Store, tmp_path: Path) -> None:
    path = restorations(tmp_path / "restorations.npz", [0, 1], [0, 1])
    mlflow_id = write_run(store, "old", path, start=1, seed=1)
    write_run(store, "new", path, start=2, seed=2)
    figure(store, tmp_path, "--runs", "new", mlflow_id)
    text = (tmp_path / "out" / "figure3.md").read_text()
    assert text.index("T = 20, seed 2: images") < text.index("T = 20, seed 1: images")


def test_provenance(store: Store, tmp_path: Path) -> None:
    path = restorations(tmp_path / "restorations.npz", [0, 1], [0, 1])
    mlflow_id = write_run(store, "a", path)
    figure(store, tmp_path)
    line = f"a: seed 0, commit 0123456789ab, 10,000 test images, MLflow run {mlflow_id}"
    text = (tmp_path / "out" / "figure3.md").read_text()
    assert "](figure3.png)" in text
    assert f"- {line}\n" in text
    assert f"Experiment study at sqlite:///{Path(store.uri).name}; " in text
    with Image.open(tmp_path / "out" / "figure3.png") as picture:
        assert line in picture.info["Description"]
        assert round(picture.info["dpi"][0]) == 300
    assert mlflow_id.encode() in (tmp_path / "out" / "figure3.pdf").read_bytes()


def test_mistakes_are_one_line(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*options: str) -> str:
        arguments = ["--experiment", EXPERIMENT, "--out", "unused", "--tracking-uri", store.uri]
        return error_line(main, capsys, *arguments, *options)

    assert "no finished run" in error()
    assert "no experiment 'none'" in error("--experiment", "none")
    path = restorations(tmp_path / "restorations.npz", [0, 1, 5], [0, 1, 2])
    write_run(store, "a", path)
    message = error("--indices", "7")
    assert "image 7 is not stored; there are 0..1, 5" in message
    assert "'b'; there are: a" in error("--runs", "b")
    store.log("bare", preset="bare", metrics=SOME)
    message = error("--preset", "bare")
    assert "has no artifact 'samples/restorations.npz'" in message
    assert not Path("unused").exists()
