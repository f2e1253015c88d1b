"""Images decoded by DataLoader workers: the same batches, and no worker left behind."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import psutil
import pytest
import torch
from image_files import write_images

from colddiff import data
from colddiff.batches import Order, batches
from colddiff.config import DataConfig
from colddiff.data import FolderImages, Images, TensorImages, load_images

CPU = torch.device("cpu")
# The machine that runs the tests may have one core, and Python 3.12 dislikes every fork.
with_workers = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create", "ignore:This process .* is multi-threaded"
)


@pytest.fixture(scope="module")
def face_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    write_images(root / "faces", 14)
    return root


def faces(root: Path) -> DataConfig:
    return DataConfig(
        name="folder", folder="faces", root=str(root), image_size=16, preparation="crop", flip=True
    )


@pytest.fixture
def on_disk(face_root: Path, monkeypatch: pytest.MonkeyPatch) -> Images:
    monkeypatch.setattr(data, "RESIDENT_BYTES", 0)
    images = load_images(faces(face_root), "train")
    assert isinstance(images, FolderImages)
    return images


def workers() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def wait_for_end(pids: set[int], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while any(psutil.pid_exists(pid) for pid in pids):
        assert time.monotonic() < deadline, "the loader's workers outlive the iterator"
        time.sleep(0.05)


@with_workers
@pytest.mark.parametrize("count", [0, 2])
def test_decoded_and_resident_images_give_the_same_batches(
    count: int, face_root: Path, on_disk: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, order = faces(face_root), Order(13, 4, seed=4)
    monkeypatch.setattr(data, "RESIDENT_BYTES", 2**29)
    resident = load_images(config, "train")
    assert isinstance(resident, TensorImages)
    assert len(resident) == len(on_disk) == 13
    before = workers()
    for first in (0, 5):
        decoded = batches(on_disk, config, order, first, CPU, count)
        kept = batches(resident, config, order, first, CPU, count)
        for ours, expected in itertools.islice(zip(decoded, kept, strict=True), 8):
            assert torch.equal(ours, expected)
        started = workers() - before
        assert len(started) == count
        decoded.close()  # type: ignore[attr-defined]
        wait_for_end(started)


@with_workers
def test_workers_ignore_the_signals_of_slurm_and_end_with_the_stream(
    face_root: Path, on_disk: Images
) -> None:
    before = workers()
    stream = batches(on_disk, faces(face_root), Order(13, 2, seed=0), 0, CPU, 2)
    next(stream), next(stream)  # one from each worker: both are at work
    started = workers() - before
    assert len(started) == 2
    for pid in started:
        for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
            os.kill(pid, number)
    assert len(list(itertools.islice(stream, 20))) == 20
    assert workers() - before == started
    del stream
    wait_for_end(started)


@with_workers
def test_a_worker_names_the_unreadable_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "RESIDENT_BYTES", 0)
    write_images(tmp_path / "faces", 3)
    bad = tmp_path / "faces" / "002.png"
    bad.write_bytes(b"junk")
    config = faces(tmp_path)
    images = load_images(config, "train")
    before = workers()  # of other tests in this process, which may still be ending
    stream = batches(images, config, Order(3, 3, seed=0), 0, CPU, 1)
    with pytest.raises(ValueError, match=f"cannot read the image {bad}") as error:
        next(stream)
    traceback.clear_frames(error.tb)  # which hold the loader
    wait_for_end(workers() - before)


FAILING = """
import sys, torch
from pathlib import Path
from colddiff import data
from colddiff.batches import Order, batches
from colddiff.config import DataConfig

data.RESIDENT_BYTES = 0
config = DataConfig(name="folder", folder="faces", root=sys.argv[1], image_size=16)
images = data.load_images(config, "train")
kept = []
stream = batches(images, config, Order(2, 1, seed=0), 0, torch.device("cpu"), 1)
bad = batches(images, config, Order(3, 3, seed=0), 0, torch.device("cpu"), 1)
next(stream)
try:
    next(bad)
except ValueError as error:
    kept.append(error)  # and with its traceback the loader
print("failing", flush=True)
raise KeyError("in the training loop")
"""


def test_a_failing_process_ends_though_its_workers_ignore_signals(tmp_path: Path) -> None:
    write_images(tmp_path / "faces", 3)
    (tmp_path / "faces" / "002.png").write_bytes(b"junk")
    path = str(Path(__file__).parent.parent)
    result = subprocess.run(
        [sys.executable, "-c", FAILING, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 1
    assert result.stdout == "failing\n"
    assert result.stderr.rstrip().endswith("KeyError: 'in the training loop'")
