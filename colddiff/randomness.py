"""Everything random is a function of (seed, purpose, step): no generator state is ever saved.

So a run resumed at step k draws what an uninterrupted run draws at step k. Numbers are drawn for
the whole global batch and each rank takes its part, so they do not depend on how many ranks share
the work.
"""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, purpose: str, step: int = 0) -> torch.Generator:
    """A fresh generator for one purpose ("order", "t", "flip", "crop", "noise", …) at one step."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{step}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
