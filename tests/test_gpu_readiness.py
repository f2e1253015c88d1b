"""What a GPU needs of the training step, as far as it can be seen without one.

A step never waits for the device: nothing asks a tensor for its value, and no branch depends on
one. PyTorch can pretend to have CUDA tensors for whatever needs no gradient; the whole step runs on
the CPU, where the operations that would wait are watched for.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import replaced, tiny
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from colddiff.batches import Order, _pixels, batches
from colddiff.config import RunConfig
from colddiff.data import FolderImages
from colddiff.degradation import build_degradation
from colddiff.diffusion import restoration_loss
from colddiff.inputs import Inputs
from colddiff.presets import preset
from colddiff.ranks import ALONE, Group
from colddiff.restorer import build_restorer
from colddiff.run_folder import RunFolder
from colddiff.trainer import Trainer

aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense,  # item(), bool(), float()
    aten.is_nonzero,
    aten.equal,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_consecutive,
}
"""Operations whose result, or its shape, the host must know."""


traced_on_a_cpu = pytest.mark.filterwarnings(
    "ignore:Dynamo detected a call to a `functools.lru_cache`"  # of what only a CPU does
)


class NoWaiting(TorchDispatchMode):
    """Refuses operations that wait for the device, and copies off it."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        assert func.overloadpacket not in WAITING, f"{func} waits for the device"
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.device.type == "cpu":
            given = [each for each in args if isinstance(each, Tensor)]
            assert all(each.device.type == "cpu" for each in given), f"{func} copies off the device"
        return out


class NothingAsked(TorchFunctionMode):
    """Refuses what a CPU's tensors answer at once, and a GPU's only when it is done."""

    ASKING = (
        *(Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__),
        *(Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__),
    )

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        assert func not in self.ASKING, f"{func} waits for the device"
        if func is Tensor.__getitem__:
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            masks = [
                each for each in places if isinstance(each, Tensor) and each.dtype == torch.bool
            ]
            assert not masks, "a mask's count waits for the device"
        return func(*args, **(kwargs or {}))


def configs() -> Iterator[Any]:
    plain = tiny(steps=50)
    yield pytest.param(plain, id="plain")
    yield pytest.param(replaced(plain, "training", precision="bfloat16"), id="bfloat16")
    yield pytest.param(replaced(plain, "training", own_states=0.5), id="own states")
    yield pytest.param(replaced(plain, "data", flip=True), id="flipped")
    yield pytest.param(replaced(plain, "optimiser", clip_norm=1.0), id="clipped")
    yield pytest.param(
        replaced(replaced(plain, "degradation", kind="noise"), "training", accumulation=2), id="hot"
    )
    wiener = replaced(plain, "model", conditioning="wiener", residual=True, patch=2)
    yield pytest.param(wiener, id="wiener")


@pytest.mark.parametrize("config", list(configs()))
def test_a_step_never_waits_for_the_device(tmp_path: Path, config: RunConfig) -> None:
    folder = RunFolder.create(tmp_path, config)
    trainer = Trainer(folder, config, Group(ALONE, torch.device("cpu")))
    stream = batches(trainer.images, config.data, trainer.order, 0, torch.device("cpu"), 0)
    before = [value.clone() for value in trainer.restorer.parameters()]
    average = [value.data_ptr() for value in trainer.average.parameters()]
    with NothingAsked(), NoWaiting():
        trainer.train_step(stream)
        trainer.train_step(stream)
    # What a CUDA graph needs: the average in the same memory, gradients made anew.
    assert [value.data_ptr() for value in trainer.average.parameters()] == average
    assert all(value.grad is None for value in trainer.restorer.parameters())
    pairs = zip(before, trainer.restorer.parameters(), strict=True)
    assert trainer.step == 2
    assert any(not torch.equal(old, new) for old, new in pairs)


def on_cuda(module: torch.nn.Module, mode: FakeTensorMode) -> None:
    """Pretend that the module's tensors are on a GPU."""
    for each in module.modules():
        for table in (each._parameters, each._buffers):
            for name, value in table.items():
                if value is not None:
                    table[name] = mode.from_tensor(value.detach()).to("cuda")  # type: ignore[assignment]


@pytest.mark.parametrize("config", list(configs()))
def test_states_and_loss_stay_on_the_gpu(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the batch to the loss, with host and device kept apart: no mixing, no way back.

    What the host draws goes there from pinned memory.
    """
    pinned: list[torch.Size] = []
    uploads: list[bool] = []

    def to(values: Tensor, *places: Any, **named: Any) -> Tensor:
        moved = original(values, *places, **named)
        if (values.device.type, moved.device.type) == ("cpu", "cuda"):
            uploads.append(named.get("non_blocking", False))
        return moved

    def pin(values: Tensor) -> Tensor:
        pinned.append(values.shape)
        return values

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    degradation = build_degradation(config.degradation, config.data.image_size)
    restorer = build_restorer(config)
    order = Order(64, config.training.batch_size, 0)
    size = config.data.image_size
    inputs = Inputs(config, order, degradation, restorer, torch.device("cpu"))
    original = Tensor.to
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        device = torch.device("cuda")
        for module in (degradation, restorer):
            on_cuda(module, mode)
        x0 = torch.empty(
            config.training.batch_size, config.data.channels, size, size, device=device
        )
        inputs.device, inputs.chosen = device, mode.from_tensor(inputs.chosen).to("cuda")
        monkeypatch.setattr(Tensor, "to", to)
        with NoWaiting():
            xt, t = inputs(0, x0)
            loss = restoration_loss(restorer, xt, t, x0, "l1", bounded=config.model.bounded)
    assert {xt.device.type, t.device.type, loss.device.type} == {"cuda"}
    assert t.shape in pinned
    assert uploads
    assert all(uploads)
    assert (xt.shape, t.shape, loss.shape) == (x0.shape, (len(x0),), ())


def test_images_from_files_are_pinned_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class Pixels:
        def to(self, device: torch.device, *, non_blocking: bool = False) -> None:
            seen.append((device.type, non_blocking))

    def loader(images: Any, *, pin_memory: bool, **named: Any) -> list[Pixels]:
        seen.append(pin_memory)
        return [Pixels()]

    monkeypatch.setattr("colddiff.batches.DataLoader", loader)
    files = FolderImages.__new__(FolderImages)
    next(_pixels(files, Order(4, 2, 0), 0, torch.device("cuda"), 0))
    assert seen == [True, ("cuda", True)]


@pytest.mark.parametrize("wrong", ["item", "tolist", "numpy", "cpu", "bool", "mask"])
def test_the_watch_sees_what_a_cpu_answers_at_once(wrong: str) -> None:
    ways: dict[str, Any] = {"bool": lambda x: bool(x[0] > 0), "mask": lambda x: x[x > 0]}
    with pytest.raises(AssertionError, match="waits for the device"), NothingAsked():
        ways.get(wrong, lambda x: getattr(x.sum(), wrong)())(torch.ones(3))


@pytest.mark.parametrize("wrong", ["item", "cpu", "branch"])
def test_the_watch_sees_what_waits(wrong: str) -> None:
    ways = {"item": lambda x: x.sum().item(), "branch": lambda x: x.sum() > 0 or 1}
    with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():
        ways.get(wrong, lambda x: x.nonzero())(torch.ones(3))
    if wrong == "cpu":
        with FakeTensorMode(), NoWaiting():
            x = torch.empty(3, device="cuda")
            with pytest.raises(AssertionError, match="copies off the device"):
                x.cpu()
    with pytest.raises(DataDependentOutputException), FakeTensorMode():
        torch.empty(3, device="cuda").sum().item()


@traced_on_a_cpu
@pytest.mark.parametrize("own_states", [0.0, 0.5])
def test_a_compiled_training_is_captured_once_and_trains_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_states: float
) -> None:
    plain = tiny(steps=50, own_states=own_states)
    torch._dynamo.reset()
    whole = functools.partial(torch.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr("colddiff.trainer.torch.compile", whole)
    weights = []
    for name, config in (("plain", plain), ("compiled", replaced(plain, "training", compile=True))):
        folder = RunFolder.create(tmp_path / name, config)
        trainer = Trainer(folder, config, Group(ALONE, torch.device("cpu")))
        stream = batches(trainer.images, config.data, trainer.order, 0, torch.device("cpu"), 0)
        for k in range(3):
            with torch.compiler.set_stance("fail_on_recompile" if k else "default"):
                trainer.train_step(stream)
        weights.append(list(trainer.restorer.parameters()))
    for first, second in zip(*weights, strict=True):
        torch.testing.assert_close(first, second)


@traced_on_a_cpu
@pytest.mark.parametrize("name", ["mnist", "mnist-paper", "mnist-hot", "cifar10"])
def test_network_and_loss_are_one_captured_region(name: str) -> None:
    """No break in the graph, and none made anew for other images, levels or weights."""
    config = preset(name)
    config = replaced(config, "model", dim=32, mults=(1, 2), dropout=0.0)
    restorer, size = build_restorer(config), config.data.image_size

    def loss(xt: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        return restoration_loss(restorer, xt, t, x0, "l1", bounded=config.model.bounded)

    torch._dynamo.reset()
    captured = torch.compile(loss, fullgraph=True, backend="eager")
    source = torch.Generator().manual_seed(0)
    for level in (1, 2):
        x0 = 2 * torch.rand(2, config.data.channels, size, size, generator=source) - 1
        t = torch.tensor([level, config.degradation.T])
        with torch.compiler.set_stance("default" if level == 1 else "fail_on_recompile"):
            found = captured(x0 / level, t, x0)
        expected = loss(x0 / level, t, x0)
        torch.testing.assert_close(found, expected)
        found.backward()
        with torch.no_grad():
            for value in restorer.parameters():
                value -= 0.01 * value.grad
