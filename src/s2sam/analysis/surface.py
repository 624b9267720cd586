"""Loss around a network's weights, along random directions: the points of a 1-D or 2-D grid, one at a time.

    z(a)    = L(w + a d_1)              dims = 1
    z(a, b) = L(w + a d_1 + b d_2)      dims = 2

L is the mean cross entropy over fixed images, in full: never that of a single batch. Directions are those of
:mod:`s2sam.analysis.filter_directions`, one set for each *pair* of a grid.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from s2sam.analysis.filter_directions import filter_direction, movable
from s2sam.sparse.names import unknown
from s2sam.train.evaluate import BATCH, evaluate
from s2sam.train.seeding import derive

BN_MODES = ("eval", "recalibrated")
Point = tuple[int, ...]  #: pair, then one index for each direction


@dataclass(frozen=True, kw_only=True)
class SurfaceSettings:
    """Where the loss is measured.

    Args:
        points: along each side; odd, so that the weights themselves are a point, and at least 5.
        span: the sides go from -span to span, in units of the filters' norms.
        pairs: how many grids, each with directions of its own.
        dims: 1 = one direction a grid, 2 = two.
        bn: eval = the running statistics of BatchNorm as they are; recalibrated = estimated anew at every point.
        seed: of the directions and of the choice of images.

    Raises:
        ValueError: none of this.
    """

    points: int = 21
    span: float = 1.0
    pairs: int = 1
    dims: int = 2
    bn: str = "eval"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.points < 5 or self.points % 2 == 0:
            raise ValueError(
                f"a grid has an odd number of points along a side, at least 5, got {self.points}; take 21 for instance"
            )
        if not 0.0 < self.span < math.inf:
            raise ValueError(f"the span of a grid must be above 0, got {self.span:g}; 1 is one norm of each filter")
        if self.pairs < 1:
            raise ValueError(f"a surface needs at least one pair of directions, got {self.pairs}")
        if self.dims not in (1, 2):
            raise ValueError(f"a grid has 1 or 2 dimensions, got {self.dims}")
        if self.bn not in BN_MODES:
            raise unknown("BatchNorm mode", self.bn, BN_MODES)
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")

    @property
    def coordinates(self) -> NDArray[np.float64]:
        """The places along a side, exactly 0 in the middle."""
        half = self.points // 2
        return self.span * np.arange(-half, half + 1) / half

    @property
    def shape(self) -> tuple[int, ...]:
        """(pairs, points) or (pairs, points, points)."""
        return (self.pairs, *[self.points] * self.dims)

    def all_points(self) -> Iterator[Point]:
        """Every point, grid by grid."""
        return itertools.product(*map(range, self.shape))


class Landscape:
    """A network on fixed images, to be looked at from elsewhere than its weights.

    `with landscape.open(): landscape.at(point)`: when the block ends, weights, statistics and modes are bit for bit
    what they were, also after an exception or Ctrl-C; their storages stay where they are.

    Args:
        model: at its clean weights, on the device where it is to run. Only its weights of two or more dims are moved.
        x: images as stored (N, C, H, W), on that device.
        y: labels (N,), there as well.
        prepare: turns stored images into what the model takes.
        settings: the grid.
        masks: active weights by name; directions stay among them.
        calibration: prepared images for bn = recalibrated; at each point BatchNorm takes their mean and variance.

    Cost: a copy of the weights, one direction or two; a point is three foreach calls and the forward passes; with
    recalibration also those of the calibration images.

    Raises:
        ValueError: no images; recalibration without BatchNorm or without images for it. And from :meth:`at`: a mask
            that does not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        prepare: Callable[[Tensor], Tensor],
        settings: SurfaceSettings,
        masks: Mapping[str, Tensor] | None = None,
        calibration: Tensor | None = None,
    ) -> None:
        self.model, self.x, self.y, self.prepare, self.settings = model, x, y, prepare, settings
        self.masks, self.calibration = dict(masks or {}), calibration
        self._norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
        if len(x) == 0:
            raise ValueError("a surface needs images, and there are none; choose another split")
        if settings.bn == "recalibrated" and not self._norms:
            raise ValueError("the network has no BatchNorm statistics to estimate anew; leave bn at eval")
        if settings.bn == "recalibrated" and (calibration is None or len(calibration) < 2):
            found = 0 if calibration is None else len(calibration)
            raise ValueError(f"bn recalibrated needs at least 2 calibration images, as many as the others, got {found}")
        self._weights: list[Tensor] = []  # while open: the parameters, their copies, and the directions of a pair
        self._origin: list[Tensor] = []
        self._pair: tuple[int, list[list[Tensor]]] | None = None

    @contextmanager
    def open(self) -> Iterator[Landscape]:
        """Within the block :meth:`at` may move the weights. Raises RuntimeError if it is open already."""
        if self._weights:
            raise RuntimeError(
                "the landscape is open already, and its weights may be elsewhere; leave that block first"
            )
        self._weights = [p.detach() for p in movable(self.model).values()]
        self._origin = [p.clone() for p in self._weights]
        buffers = [buffer for norm in self._norms for buffer in norm.buffers()]
        kept = [buffer.clone() for buffer in buffers]
        momenta = [(norm, norm.momentum) for norm in self._norms]
        modes = [(module, module.training) for module in self.model.modules()]
        try:
            yield self
        finally:
            _copy(self._weights, self._origin)
            _copy(buffers, kept)
            for norm, momentum in momenta:
                norm.momentum = momentum
            for module, training in modes:
                module.training = training
            self._weights, self._origin, self._pair = [], [], None

    @torch.no_grad()
    def at(self, point: Point) -> tuple[float, float]:
        """(mean loss, top-1) at one point; the loss is NaN or infinite where the network's outputs are."""
        if not self._weights:
            raise RuntimeError("the landscape is closed; call at() within `with landscape.open():`")
        coordinates = self.settings.coordinates
        _copy(self._weights, self._origin)
        for direction, index in zip(self._directions(point[0]), point[1:], strict=True):
            torch._foreach_add_(self._weights, direction, alpha=float(coordinates[index]))
        if self.settings.bn == "recalibrated":
            self._recalibrate()
        loss, top1 = evaluate(self.model, self.x, self.y, self.prepare)
        assert loss is not None
        assert top1 is not None
        return loss, top1

    def _directions(self, pair: int) -> list[list[Tensor]]:
        """The directions of a pair at the original weights; kept until another pair is asked for."""
        if self._pair is None or self._pair[0] != pair:
            generator = torch.Generator().manual_seed(derive(self.settings.seed, f"surface pair {pair}"))
            origin = dict(zip(movable(self.model), self._origin, strict=True))
            self._pair = pair, [filter_direction(origin, generator, self.masks) for _ in range(self.settings.dims)]
        return self._pair[1]

    def _recalibrate(self) -> None:
        """Mean and variance of the calibration images become the running ones; only BatchNorm is in training mode."""
        assert self.calibration is not None
        self.model.eval()
        for norm in self._norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean over batches
            norm.train()
        for part in self.calibration.tensor_split(math.ceil(len(self.calibration) / BATCH)):
            self.model(part)


def _copy(to: list[Tensor], source: list[Tensor]) -> None:
    """to <- source, in place."""
    if to:
        torch._foreach_copy_(to, source)
