"""Lists of levels that a sampler visits: a setting apart from the blur schedule."""

from __future__ import annotations

from collections.abc import Sequence

from colddiff.schema import require


def parse_levels(text: str) -> tuple[int, ...]:
    """``"20-10-0"`` -> ``(20, 10, 0)``; raises ``ValueError`` for anything else."""
    parts = text.split("-")
    require(
        all(part.isdecimal() for part in parts),
        "levels",
        text,
        "integers joined by -, like 20-10-0",
    )
    return tuple(int(part) for part in parts)


def check_levels(levels: Sequence[int], T: int) -> None:
    """Raise ``ValueError`` unless ``levels`` falls strictly from T to 0."""
    falling = all(a > b for a, b in zip(levels[:-1], levels[1:], strict=True))
    require(
        len(levels) >= 2 and falling and levels[0] == T and levels[-1] == 0,
        "levels",
        "-".join(map(str, levels)),
        f"strictly falling from T = {T} to 0",
    )
