"""One seed, a generator for each purpose: what one part draws never moves another, so arms of one seed stay matched."""

from __future__ import annotations

import hashlib

import torch

PURPOSES = ("init", "data", "sparsify", "scoring", "sharpness", "recalibrate")


def derive(seed: int, purpose: str) -> int:
    """A 63-bit seed for `purpose`, far from those of other purposes and of neighbouring seeds.

    >>> derive(0, "init") == derive(0, "init"), derive(0, "init") == derive(0, "data")
    (True, False)
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8], "little") >> 1


def generator(seed: int, purpose: str) -> torch.Generator:
    """A CPU generator for one of :data:`PURPOSES`: the draws are the same whatever device the run uses."""
    assert purpose in PURPOSES, purpose
    return torch.Generator().manual_seed(derive(seed, purpose))
