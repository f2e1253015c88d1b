"""Generation: where it starts, which levels it visits, and what it writes."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from plain_blur import convolve
from plain_metrics import plain_frechet
from tiny import replaced, tiny
from torch import Tensor

from colddiff import generation
from colddiff.batches import to_batch
from colddiff.checkpoint import load_weights
from colddiff.classifier import load_digit_classifier
from colddiff.config import GenerationConfig, RunConfig
from colddiff.data import load_images, split_validation
from colddiff.degradation import build_degradation
from colddiff.generation import generate, starting_states
from colddiff.metrics import digit_features
from colddiff.randomness import generator
from colddiff.run_folder import RunFolder
from colddiff.training import train

CPU = torch.device("cpu")


def stored(path: Path) -> np.ndarray:
    with np.load(path) as arrays:
        images: np.ndarray = arrays["images"]
    return images


class Constant:
    """A restorer that always answers ``value``, and notes at which levels it was asked."""

    def __init__(self, value: float) -> None:
        self.value = value
        self.levels: list[int] = []
        self.sizes: list[int] = []

    def __call__(self, xt: Tensor, t: Tensor) -> Tensor:
        assert len(set(t.tolist())) == 1
        self.sizes.append(len(xt))
        self.levels.append(int(t[0]))
        return torch.full_like(xt, self.value)


def halved(xt: Tensor, t: Tensor) -> Tensor:
    """A restorer whose answers depend on what it is given."""
    return xt / 2


def generate_with(
    restorer: Any, config: RunConfig, settings: GenerationConfig, tmp_path: Path
) -> np.ndarray:
    folder = RunFolder.create(tmp_path / "runs", config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "load_restorer", lambda *which: (restorer, config, 6))
        return stored(generate(folder, settings, CPU))


def starts(config: RunConfig, settings: GenerationConfig) -> Tensor:
    degradation = build_degradation(config.degradation, config.data.image_size)
    return starting_states(config, settings, degradation, CPU)


def test_images_of_a_trained_run(copied_run: RunFolder) -> None:
    settings = GenerationConfig(n=13, batch_size=5, seed=2)
    path = generate(copied_run, settings, CPU, progress=True)
    assert path.parent == copied_run.samples
    with np.load(path) as arrays:
        assert set(arrays) == {"images", "settings"}
        images = arrays["images"]
        assert GenerationConfig(**json.loads(str(arrays["settings"]))) == settings
    assert images.shape == (13, 16, 16, 1)
    assert images.dtype == np.uint8
    assert len({image.tobytes() for image in images}) == 13
    first = path.read_bytes()
    assert generate(copied_run, settings, CPU) == path
    assert np.array_equal(stored(path), images)
    assert len(first) == path.stat().st_size
    other = generate(copied_run, dataclasses.replace(settings, seed=3), CPU)
    assert other != path
    assert not np.array_equal(stored(other), images)
    whole = stored(generate(copied_run, dataclasses.replace(settings, batch_size=13), CPU))
    assert np.abs(whole.astype(int) - images).max() <= 1  # only rounding


def test_the_network_never_sees_more_than_a_part(tmp_path: Path) -> None:
    restorer = Constant(0.0)
    settings = GenerationConfig(n=13, batch_size=5, levels="4-2-0")
    generate_with(restorer, tiny(), settings, tmp_path)
    assert restorer.sizes == [5, 5, 5, 5, 3, 3]  # two levels of each part


@pytest.mark.parametrize(
    ("n", "rows", "columns"), [(1, 1, 1), (10, 1, 10), (13, 2, 10), (105, 10, 10)]
)
def test_the_grid_shows_the_first_hundred(n: int, rows: int, columns: int, tmp_path: Path) -> None:
    settings = GenerationConfig(n=n, algorithm="algorithm1")
    generate_with(Constant(0.0), tiny(), settings, tmp_path)
    (png,) = tmp_path.rglob("*.png")
    assert png.stem == settings.slug
    with Image.open(png) as picture:
        assert picture.size == (2 * (18 * columns - 2), 2 * (18 * rows - 2))
        cells = np.asarray(picture)[::2, ::2]
    for i in range(min(n, 100)):
        top, left = 18 * (i // columns), 18 * (i % columns)
        assert (cells[top : top + 16, left : left + 16] == 128).all()
    if n == 13:
        assert (cells[18:, 3 * 18 :] == 255).all()  # blank after the last


def test_algorithm2_keeps_the_mean_it_starts_from(tmp_path: Path) -> None:
    """From a constant start and with constant answers, x - D(c, s) + D(c, s') never moves."""
    settings = GenerationConfig(n=20, symmetry_noise=0.0)
    images = generate_with(Constant(0.3), tiny(), settings, tmp_path)
    expected = (starts(tiny(), settings) + 1) * 127.5
    assert images.transpose(0, 3, 1, 2) == pytest.approx(expected.numpy(), abs=0.51)
    assert len(np.unique(images)) > 5


def test_algorithm1_ends_with_the_last_answer(tmp_path: Path) -> None:
    settings = GenerationConfig(n=4, algorithm="algorithm1")
    images = generate_with(Constant(0.3), tiny(), settings, tmp_path)
    assert (images == round(1.3 * 127.5)).all()


@pytest.mark.parametrize("algorithm", ["algorithm1", "algorithm2"])
@pytest.mark.parametrize(("levels", "asked"), [("", [4, 3, 2, 1]), ("4-2-0", [4, 2]), ("4-0", [4])])
def test_levels_are_visited(algorithm: Any, levels: str, asked: list[int], tmp_path: Path) -> None:
    restorer = Constant(0.0)
    settings = GenerationConfig(n=3, levels=levels, algorithm=algorithm)
    generate_with(restorer, tiny(), settings, tmp_path)
    assert restorer.levels == asked


@pytest.mark.parametrize("levels", ["20-0", "4-1", "4-4-0"])
def test_levels_must_fit_the_run(levels: str, copied_run: RunFolder) -> None:
    with pytest.raises(ValueError, match=f"levels = '{levels}' .* falling from T = 4 to 0"):
        generate(copied_run, GenerationConfig(n=2, levels=levels), CPU)
    assert not copied_run.samples.exists()


def test_weights_on_the_way(tmp_path: Path) -> None:
    """Raw weights and those of earlier steps are those that shorter trainings end with."""
    config = tiny(steps=7, keep_every=3, validate_every=0)
    config = replaced(config, "optimiser", schedule="constant", warmup_steps=2)
    folder = RunFolder.create(tmp_path / "a", config)
    train(folder)
    kept = sorted(path.name for path in (folder.path / "weights").iterdir())
    steps = ("00000003", "00000006", "00000007")
    assert kept == sorted(f"{which}-{s}.safetensors" for which in ("average", "raw") for s in steps)
    short = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=3))
    other = RunFolder.create(tmp_path / "b", short)
    train(other)
    settings = GenerationConfig(n=3)
    made = {
        (f.path.parent.name, which, step): stored(
            generate(f, dataclasses.replace(settings, weights=which, step=step), CPU)
        )
        for f, which, step in (
            (folder, "average", 0), (folder, "raw", 0), (folder, "average", 3),
            (folder, "raw", 3), (other, "average", 0), (other, "raw", 0),
        )
    }  # fmt: skip
    for which in ("average", "raw"):
        assert np.array_equal(made["a", which, 3], made["b", which, 0])
        assert not np.array_equal(made["a", which, 3], made["a", which, 0])
    assert not np.array_equal(made["a", "average", 0], made["a", "raw", 0])
    last = load_weights(folder.kept_weights("average", 7))[0]
    final = load_weights(folder.weights)[0]
    assert all(torch.equal(last[name], final[name]) for name in final)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": "raw"}, "weights = 'raw' .* average for training.keep_every = 0"),
        ({"step": 3}, "step = 3 is not allowed: it must be 0$"),
    ],
)
def test_weights_that_are_not_kept(
    settings: dict[str, Any], message: str, copied_run: RunFolder
) -> None:
    with pytest.raises(ValueError, match=message):
        generate(copied_run, GenerationConfig(n=2, **settings), CPU)
    copied_run.update(replaced(copied_run.config, "training", keep_every=3))
    with pytest.raises(ValueError, match="training.keep_every was 3|has no"):
        generate(copied_run, GenerationConfig(n=2, **settings | {"step": 3}), CPU)
    with pytest.raises(ValueError, match="or a multiple of training.keep_every below 6"):
        generate(copied_run, GenerationConfig(n=2, step=4), CPU)


def test_what_is_generated_is_known_by_its_record(copied_run: RunFolder) -> None:
    settings = GenerationConfig(n=2)
    assert not copied_run.is_generated(settings)
    path = generate(copied_run, settings, CPU)
    assert copied_run.is_generated(settings)
    assert copied_run.is_generated(dataclasses.replace(settings, batch_size=1))  # changes nothing
    assert not copied_run.is_generated(dataclasses.replace(settings, n=3))
    longer = replaced(copied_run.config, "training", steps=9)
    RunFolder(copied_run.path).update(longer)
    assert not copied_run.is_generated(settings)
    copied_run.update(replaced(longer, "training", steps=6))
    path.with_suffix(".json").unlink()
    assert not copied_run.is_generated(settings)


def test_images_of_before_are_measured_and_not_made_again(
    copied_run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = GenerationConfig(n=4)
    path = generate(copied_run, settings, CPU, measured=False)
    assert not path.with_suffix(".json").exists()
    assert not copied_run.is_generated(settings)
    generate(copied_run, settings, CPU)
    complete = json.loads(path.with_suffix(".json").read_text())
    old = complete | {"quality": {"fid_digits": 1.0}, "sampling_seconds": 7.5}
    path.with_suffix(".json").write_text(json.dumps(old))
    assert not copied_run.is_generated(settings)
    monkeypatch.setattr(generation, "_sampled", None)  # what makes images
    before = path.stat().st_mtime_ns
    generate(copied_run, settings, CPU)
    assert json.loads(path.with_suffix(".json").read_text()) == complete | {"sampling_seconds": 7.5}
    assert path.stat().st_mtime_ns == before
    assert copied_run.is_generated(settings)


def test_start_intensities_are_counted_by_class(tmp_path: Path) -> None:
    """Answers of one image: its class alone, from starts in equal tenths of the training images."""
    config = tiny()
    training, _ = split_validation(load_images(config.data, "train"), config.data.validation, 8)
    one = to_batch(training.take(torch.tensor([5])), config.data)
    settings = GenerationConfig(n=500, start="real", symmetry_noise=0.0, algorithm="algorithm1")
    generate_with(lambda xt, t: one.expand_as(xt), config, settings, tmp_path)
    (path,) = (tmp_path / "runs").glob(f"*/samples/{settings.slug}.json")
    quality = json.loads(path.read_text())["quality"]
    table = np.array(quality["by_intensity"])
    assert table.shape == (10, 10)
    assert table.sum(axis=0).tolist() == quality["counts"]
    assert max(quality["counts"]) == 500
    expected = math.sqrt(500 * 0.1 * 0.9)
    assert np.abs(table.sum(axis=1) - 50).max() < 4 * expected


def test_an_untrained_run_is_refused(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, tiny())
    with pytest.raises(ValueError, match="is not trained yet"):
        generate(folder, GenerationConfig(), CPU)


def test_mean_starts_are_constant_and_spread_like_the_data() -> None:
    start = starts(tiny(), GenerationConfig(n=3000, symmetry_noise=0.0))
    assert start.shape == (3000, 1, 16, 16)
    means = start[:, 0, 0, 0]
    assert torch.equal(start, means[:, None, None, None].expand_as(start))
    images = load_images(tiny().data, "train")
    data = to_batch(images.take(torch.arange(len(images))), tiny().data).mean(dim=(1, 2, 3))
    assert means.mean().item() == pytest.approx(data.mean().item(), abs=0.01)
    assert means.std().item() == pytest.approx(data.std().item(), rel=0.08)


def test_more_components_follow_the_data_too() -> None:
    one, three = (
        starts(tiny(), GenerationConfig(n=500, symmetry_noise=0.0, components=c)) for c in (1, 3)
    )
    assert not torch.equal(one, three)
    assert three.mean().item() == pytest.approx(one.mean().item(), abs=0.05)


def test_symmetry_noise_is_added_to_the_start() -> None:
    plain = starts(tiny(), GenerationConfig(n=50, symmetry_noise=0.0))
    for std in (0.002, 0.05):
        noise = starts(tiny(), GenerationConfig(n=50, symmetry_noise=std)) - plain
        assert noise.std().item() == pytest.approx(std, rel=0.03)
        assert noise.mean().item() == pytest.approx(0, abs=std / 30)


def test_real_starts_are_blurred_training_images() -> None:
    settings = GenerationConfig(n=30, start="real", symmetry_noise=0.0, seed=1)
    start = starts(tiny(), settings)
    images = load_images(tiny().data, "train")
    known = to_batch(images.take(torch.arange(len(images))), tiny().data)
    for _ in range(4):
        known = convolve(known, 5, 2.0, "circular")
    distance, nearest = torch.cdist(start.flatten(1), known.flatten(1)).min(dim=1)
    difference = (start - known[nearest]).abs().amax(dim=(1, 2, 3))
    assert difference.max() < 1e-5
    assert len(distance) == len(set(nearest.tolist())) == 30  # without replacement
    again = starts(tiny(), settings)
    assert torch.equal(start, again)
    assert not torch.equal(start, starts(tiny(), dataclasses.replace(settings, seed=2)))


def test_modelled_starts_are_spread_like_blurred_training_images() -> None:
    """Along every principal component of x_T that float32 keeps, to a hundredth of the first."""
    settings = GenerationConfig(n=3000, start="terminals", components=3, symmetry_noise=0.0)
    images = load_images(tiny().data, "train")
    known = to_batch(images.take(torch.arange(len(images))), tiny().data)
    for _ in range(4):
        known = convolve(known, 5, 2.0, "circular")
    made = starts(tiny(), settings).double().flatten(1)
    flat = known.double().flatten(1)
    lengths, axes = torch.linalg.eigh(torch.cov(flat.T))
    assert float(lengths[-9]) > 1e-4 * float(lengths[-1])
    for axis, length in zip(axes.T[-9:], lengths[-9:], strict=True):
        assert float(((made - flat.mean(0)) @ axis).std()) == pytest.approx(
            float(length.sqrt()), rel=0.1
        )


def test_real_starts_of_a_discrete_run_are_means() -> None:
    config = replaced(tiny(), "degradation", discrete=True)
    start = starts(config, GenerationConfig(n=5, start="real", symmetry_noise=0.0))
    assert torch.equal(start, start[:, :, :1, :1].expand_as(start))


@pytest.mark.parametrize("algorithm", ["algorithm1", "algorithm2"])
def test_hot_diffusion_starts_from_noise_and_holds_it(algorithm: Any, tmp_path: Path) -> None:
    """x_T = z; with answers c, Algorithm 2 ends at z - D(c, T) + c, Algorithm 1 at c."""
    config = replaced(tiny(), "degradation", kind="noise")
    settings = GenerationConfig(n=6, seed=5, algorithm=algorithm, batch_size=4)
    z = torch.randn(6, 1, 16, 16, generator=generator(5, "start"))
    assert torch.equal(starts(config, settings), z)
    images = generate_with(Constant(0.3), config, settings, tmp_path)
    power, f = 1.0, [math.cos((t / 4 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(5)]
    for t in range(1, 5):
        power *= max(f[t] / f[t - 1], 0.001)
    end = torch.full_like(z, 0.3)
    if algorithm == "algorithm2":
        end = z - (math.sqrt(power) * 0.3 + math.sqrt(1 - power) * z) + 0.3
    expected = (end.clamp(-1, 1) + 1) * 127.5
    assert images.transpose(0, 3, 1, 2) == pytest.approx(expected.numpy(), abs=0.51)


@pytest.mark.parametrize("algorithm", ["ddim", "ddpm"])
def test_samplers_of_hot_diffusion(algorithm: Any, tmp_path: Path) -> None:
    """With constant answers both end there; and batches of any size generate the same."""
    config = replaced(tiny(), "degradation", kind="noise")
    settings = GenerationConfig(n=6, seed=5, algorithm=algorithm, batch_size=4)
    images = generate_with(Constant(0.3), config, settings, tmp_path / "a")
    assert images == pytest.approx(np.full_like(images, round(1.3 * 127.5)), abs=1)
    made = [
        generate_with(halved, config, dataclasses.replace(settings, batch_size=size),
                      tmp_path / str(size))
        for size in (4, 6)
    ]  # fmt: skip
    assert np.array_equal(*made)
    assert made[0].std() > 1
    with pytest.raises(ValueError, match="algorithm1 or algorithm2 for degradation.kind = blur"):
        generate_with(Constant(0.3), tiny(), settings, tmp_path / "blur")


CHANGES: dict[str, Any] = {
    "n": 50,
    "start": "real",
    "components": 2,
    "symmetry_noise": 0.00200001,
    "algorithm": "algorithm1",
    "levels": "4-2-0",
    "seed": 1,
    "weights": "raw",
    "step": 10,
}


def test_file_names_tell_settings_apart() -> None:
    """All settings but the batch size, which changes nothing."""
    fields = set(typing.get_type_hints(GenerationConfig)) - {"SECTION", "batch_size"}
    assert set(CHANGES) == fields
    slugs = {GenerationConfig(**{name: value}).slug for name, value in CHANGES.items()}
    slugs |= {GenerationConfig().slug, GenerationConfig(levels="4-1-0").slug}
    assert len(slugs) == len(CHANGES) + 2
    assert GenerationConfig(batch_size=3).slug == GenerationConfig().slug


def test_file_names_of_long_lists_of_levels_fit() -> None:
    long = "-".join(map(str, range(300, -1, -1)))
    first, second = (GenerationConfig(levels=text).slug for text in (long, long[4:]))
    assert first != second
    assert all(len(slug) < 200 and "/" not in slug for slug in (first, second))


def test_the_record_says_how_good_the_digits_are(tmp_path: Path) -> None:
    """Of answers that are one training image: its class alone, at the distance of that image."""
    config = tiny()
    training, held = split_validation(load_images(config.data, "train"), config.data.validation, 8)
    assert training.labels is not None and held is not None and held.labels is not None
    one = to_batch(training.take(torch.tensor([5])), config.data)
    settings = GenerationConfig(n=30, symmetry_noise=0.0, algorithm="algorithm1")
    images = generate_with(lambda xt, t: one.expand_as(xt), config, settings, tmp_path)
    (path,) = (tmp_path / "runs").glob(f"*/samples/{settings.slug}.json")
    record = json.loads(path.read_text())
    classifier = load_digit_classifier()
    with torch.no_grad():
        predicted = int(classifier(one).argmax())
    found = record["quality"]
    assert found["counts"] == [30 * (digit == predicted) for digit in range(10)]
    shares = torch.bincount(training.labels, minlength=10) / len(training)
    assert found["total_variation"] == pytest.approx(1 - float(shares[predicted]), abs=1e-6)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    known = to_batch(training.take(torch.arange(len(training))), config.data)
    pair = [digit_features(each, classifier).double().numpy() for each in (x, known)]
    assert found["fid_digits"] == pytest.approx(plain_frechet(*pair), rel=1e-3)
    assert found["training_images"] == len(training)
    assert record["network_calls"] == config.degradation.T
    assert record["levels"] == [4, 3, 2, 1, 0]
    assert record["settings"] == dataclasses.asdict(settings)


def test_labels_follow_their_images_into_the_splits() -> None:
    everything = load_images(tiny().data, "train")
    assert everything.labels is not None
    label_of = {
        everything.take(torch.tensor([i])).numpy().tobytes(): int(everything.labels[i])
        for i in range(len(everything))
    }
    for part in split_validation(everything, 300, 8):
        assert part is not None and part.labels is not None
        for i in range(0, len(part), 97):
            assert label_of[part.take(torch.tensor([i])).numpy().tobytes()] == int(part.labels[i])
