"""Draws for a batch of images in which every image has a generator of its own.

An image is then corrupted in the same way whatever batch it is in. The generators are those of the CPU, so that the
draws are the same on every device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


def image_generators(seed: int, corruption: str, severity: int, rows: Iterable[int]) -> list[torch.Generator]:
    """One generator for each image of a test set, by its place there: `rows` are these places.

    >>> a, b = image_generators(0, "fog", 1, [7, 8])
    >>> float(torch.rand(1, generator=b)) == float(torch.rand(1, generator=image_generators(0, "fog", 1, [8])[0]))
    True
    """
    made = []
    for row in rows:
        name = hashlib.sha256(f"{seed}/{corruption}/{severity}/{row}".encode()).digest()
        made.append(torch.Generator().manual_seed(int.from_bytes(name[:8], "little") >> 1))
    return made


class Draws:
    """Random tensors (N, *shape) in float64, whose row i comes from generator i alone."""

    def __init__(self, generators: Sequence[torch.Generator], device: torch.device) -> None:
        self.generators, self.device = generators, device

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform in [low, high)."""
        unit = self._each(lambda g, _: torch.rand(shape, dtype=torch.float64, generator=g))
        return low + (high - low) * unit

    def normal(self, *shape: int) -> Tensor:
        """Of mean 0 and deviation 1."""
        return self._each(lambda g, _: torch.randn(shape, dtype=torch.float64, generator=g))

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Whole numbers from `low` to `high` - 1, int64."""
        return self._each(lambda g, _: torch.randint(low, high, shape, generator=g))

    def poisson(self, rate: Tensor) -> Tensor:
        """Poisson counts of `rate`, (N, *shape)."""
        rate = rate.cpu()
        return self._each(lambda g, i: torch.poisson(rate[i], generator=g))

    def _each(self, draw: Callable[[torch.Generator, int], Tensor]) -> Tensor:
        return torch.stack([draw(g, i) for i, g in enumerate(self.generators)]).to(self.device)
