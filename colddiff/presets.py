"""Named configurations, each with its source."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from colddiff.config import (
    DataConfig,
    DegradationConfig,
    EvaluationConfig,
    GenerationConfig,
    ModelConfig,
    OptimiserConfig,
    RunConfig,
    TrainingConfig,
)
from colddiff.schema import closest


def demo() -> RunConfig:
    """The embedded digits and a small network: the whole job in minutes on two CPU cores.

    Degradation as in ``mnist``; network and optimiser are ours (docs/experiments.md).
    """
    return RunConfig(
        data=DataConfig(name="digits", validation=200),
        degradation=mnist().degradation,
        model=ModelConfig(dim=32, mults=(1, 2, 2), patch=2, conditioning="wiener", residual=True),
        optimiser=OptimiserConfig(
            name="adamw",
            lr=2e-3,
            weight_decay=0.05,
            schedule="cosine",
            warmup_steps=50,
            clip_norm=1.0,
        ),
        training=TrainingConfig(
            steps=1200,
            batch_size=64,
            accumulation=1,
            ema_decay=0.99,
            ema_every=1,
            ema_start=200,
            precision="bfloat16",
            log_every=20,
            validate_every=300,
            checkpoint_every=300,
        ),
        evaluation=EvaluationConfig(levels=("20-10-0", "20-4-3-2-1-0")),
    )


def mnist() -> RunConfig:
    """The authors' MNIST command (T=20, 11 taps, sigma 7, circular) with a recipe for two cores.

    Degradation: README of the authors' code. Network (1.9 M parameters on 2x2 patches, told the
    Wiener estimate), loss and optimiser are ours: docs/experiments.md.
    """
    return RunConfig(
        data=DataConfig(name="mnist", validation=1000),
        degradation=DegradationConfig(T=20, schedule="constant", kernel_size=11, sigma=7.0),
        model=ModelConfig(
            dim=32, mults=(1, 2, 2), patch=2, conditioning="wiener", residual=True, bounded=True
        ),
        optimiser=OptimiserConfig(
            name="adamw",
            lr=1.5e-3,
            weight_decay=0.01,
            schedule="cosine",
            warmup_steps=200,
            clip_norm=1.0,
        ),
        training=TrainingConfig(
            steps=6_000,
            batch_size=64,
            accumulation=1,
            ema_decay=0.999,
            ema_every=1,
            ema_start=1000,
            precision="bfloat16",
            own_states=0.5,
            checkpoint_every=500,
        ),
        evaluation=EvaluationConfig(levels=("20-10-0", "20-4-3-2-1-0")),
    )


def mnist_quick() -> RunConfig:
    """``mnist`` at half of its width, by squared errors: an eighth of its time.

    Better in direct RMSE, worse in SSIM and by Algorithm 2 (results/time_to_quality/README.md).
    """
    full = mnist()
    return dataclasses.replace(
        full,
        model=dataclasses.replace(full.model, dim=16),
        optimiser=dataclasses.replace(full.optimiser, warmup_steps=100),
        training=dataclasses.replace(
            full.training,
            loss="l2",
            own_states=0.0,
            steps=2_400,
            ema_decay=0.99,
            ema_start=100,
            validate_every=300,
        ),
    )


def mnist_generate() -> RunConfig:
    """``mnist`` with the generation that does not collapse (docs/experiments.md), and the paper's.

    2,000 digits each: from a model of all that is left in x_T, without noise, by 20-10-0; and, to
    compare, from constant images by every level (arXiv:2208.09392, section 5). Same run ids as
    ``mnist``: a trained run is only sampled.
    """
    cure = GenerationConfig(
        n=2000, start="terminals", components=50, symmetry_noise=0.0, levels="20-10-0"
    )
    return dataclasses.replace(mnist(), generation=(cure, GenerationConfig(n=2000)))


def mnist_hot() -> RunConfig:
    """Hot diffusion, the baseline: cosine noise (arXiv:2102.09672), all else as ``mnist``.

    The network sees x_t alone, since independent noise on each pixel has no linear estimate but a
    fainter x_t, and is trained on exact x_t.
    """
    cold = mnist()
    return dataclasses.replace(
        cold,
        degradation=DegradationConfig(kind="noise", T=20),
        model=dataclasses.replace(cold.model, conditioning="raw", residual=False),
        training=dataclasses.replace(cold.training, own_states=0.0),
    )


def mnist_paper() -> RunConfig:
    """MNIST as the paper's text has it: T=40, and the authors' network and optimiser.

    arXiv:2208.09392, section 4.1 and appendix; the rest as in their code: U-Net of 56.6 M
    parameters, L1, Adam 2e-5, batch 2 x 32, 700,000 steps, EMA 0.995 every 10 steps from 2,000.
    """
    return RunConfig(
        data=DataConfig(name="mnist"),
        degradation=DegradationConfig(T=40, schedule="constant", kernel_size=11, sigma=7.0),
    )


def mnist_student() -> RunConfig:
    """The student re-implementation: discrete, 35 pixels cropped at random to 32, flips, 10k steps.

    Network and optimiser are the authors'; T=20, Adam 2e-5.
    """
    paper = mnist_paper()
    return dataclasses.replace(
        paper,
        data=DataConfig(name="mnist", preparation="crop", flip=True),
        degradation=dataclasses.replace(paper.degradation, T=20, discrete=True),
        training=dataclasses.replace(paper.training, steps=10_000),
    )


def cifar10() -> RunConfig:
    """CIFAR-10 deblurring, arXiv:2208.09392: T=50, 11 taps, sigma 0.01 i + 0.35, reflect.

    With the network of the paper's table, as in the authors' code: the DDPM U-Net of 35.7 M
    parameters (arXiv:2006.11239), dropout 0.1. The rest of the training is as ``mnist-paper``.
    """
    return RunConfig(
        data=DataConfig(name="cifar10", flip=True),
        model=ModelConfig(name="ddpm", dim=128, mults=(1, 2, 2, 2), dropout=0.1),
        degradation=DegradationConfig(
            T=50, schedule="linear", kernel_size=11, sigma=0.35, growth=0.01, padding="reflect"
        ),
    )


def celeba() -> RunConfig:
    """CelebA deblurring, arXiv:2208.09392: T=200, 15 taps, sigma exp(0.01 i), reflect, 128 pixels.

    Images are read from ``<data.root>/celeba``.
    """
    return RunConfig(
        data=DataConfig(
            name="folder", folder="celeba", image_size=128, preparation="crop", flip=True
        ),
        degradation=DegradationConfig(
            T=200, schedule="exponential", kernel_size=15, sigma=1.0, growth=0.01, padding="reflect"
        ),
    )


def celeba_generate() -> RunConfig:
    """CelebA generation: T=300, 27 taps, sigma exp(0.01 i), discrete, circular, 128 pixels.

    arXiv:2208.09392, section 5, and the README of the authors' code; their ConvNeXt U-Net and
    optimiser. Images are read from ``<data.root>/celeba``.
    """
    return dataclasses.replace(
        celeba(),
        degradation=DegradationConfig(
            T=300, schedule="exponential", kernel_size=27, sigma=1.0, growth=0.01, discrete=True
        ),
    )


def afhq_generate() -> RunConfig:
    """AFHQ generation: as ``celeba-generate`` (README of the authors' code).

    Images are read from ``<data.root>/afhq``.
    """
    faces = celeba_generate()
    return dataclasses.replace(faces, data=dataclasses.replace(faces.data, folder="afhq"))


PRESETS: dict[str, Callable[[], RunConfig]] = {
    "demo": demo,
    "mnist": mnist,
    "mnist-quick": mnist_quick,
    "mnist-generate": mnist_generate,
    "mnist-hot": mnist_hot,
    "mnist-paper": mnist_paper,
    "mnist-student": mnist_student,
    "cifar10": cifar10,
    "celeba": celeba,
    "celeba-generate": celeba_generate,
    "afhq-generate": afhq_generate,
}


def preset(name: str) -> RunConfig:
    """The named configuration; raises ``ValueError`` for an unknown name, with the nearest one."""
    if name not in PRESETS:
        known = ", ".join(PRESETS)
        raise ValueError(f"there is no preset {name!r}.{closest(name, PRESETS)} Known: {known}")
    return dataclasses.replace(PRESETS[name](), preset=name)


def labelled(config: RunConfig) -> RunConfig:
    """The configuration with its label made true: ``mnist (changed)`` where more than a seed is."""
    if config.preset not in PRESETS:
        return config
    original = PRESETS[config.preset]()
    same = dataclasses.replace(
        config, training=dataclasses.replace(config.training, seed=original.training.seed)
    )
    changed = same.run_id != original.run_id
    return dataclasses.replace(config, preset=f"{config.preset} (changed)") if changed else config
