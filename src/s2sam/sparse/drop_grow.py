"""DropGrow: the common frame of dynamic sparse training; drop some active weights of each layer, grow as many others.

    n_drop = floor(f_t n_active)        keep the n_active - n_drop largest drop scores (|w|)
    new mask = kept + top n_drop grow scores among the candidates

Candidates are all positions not kept (`regrow_dropped=True`; a weight dropped and grown at once keeps its value and its
optimizer state) or all that were inactive before. Grown weights start at 0. A layer's number of active weights stays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from s2sam.hooks import check_number
from s2sam.sparse import scores
from s2sam.sparse.base import Sparsifier
from s2sam.sparse.part import Part
from s2sam.sparse.schedules import check_interval
from s2sam.sparse.topk import topk_mask


@dataclass(frozen=True)
class DropGrowOptions:
    """f (or its start) in [0, 1], steps between changes, the share of `total_steps` at which they end (None: never)."""

    drop_fraction: float = 0.3
    delta_t: int = 100
    t_end: float | None = None
    regrow_dropped: bool = False

    def __post_init__(self) -> None:
        check_number("drop_fraction", self.drop_fraction, 0.0, 1.0)
        check_interval(self.delta_t)
        if self.t_end is not None:
            check_number("t_end", self.t_end, 0.0, 1.0)


class DropGrow(Sparsifier):
    """Drop and grow the same number of weights in each layer, every `delta_t` steps."""

    Options = DropGrowOptions
    options: DropGrowOptions

    def check_options(self) -> None:
        """A share of the training needs its length."""
        if self.options.t_end is not None and self.total_steps is None:
            raise ValueError(
                f"method {self.method!r} stops changing masks at t_end={self.options.t_end} of the training; "
                "give total_steps, the number of optimizer steps"
            )

    @property
    def last_step(self) -> float:
        """The step after which the topology stays."""
        end = self.options.t_end
        return math.inf if end is None or self.total_steps is None else end * self.total_steps

    def drop_fraction(self, t: int) -> float:
        """f_t."""
        return self.options.drop_fraction

    def drop_scores(self, part: Part, name: str) -> Tensor:
        """The smallest are dropped. Default: |w|."""
        return scores.magnitude(part.layers.weights[name])

    def grow_scores(self, part: Part, name: str) -> Tensor | None:
        """The largest are grown; None leaves the layer as it is."""
        raise NotImplementedError(f"{type(self).__name__} must say which weights to grow")

    def drop_count(self, part: Part, name: str, t: int) -> int:
        """How many weights of the layer are exchanged in step `t`, known on the host."""
        active = part.kept[name]
        n = math.floor(self.drop_fraction(t) * active + 1e-9)
        return n if self.options.regrow_dropped else min(n, part.layers.weights[name].numel() - active)

    def due(self, part: Part, t: int) -> bool:
        """Every `delta_t` steps up to the end, if there is something to exchange."""
        if t % self.options.delta_t or t > self.last_step:
            return False
        return any(self.drop_count(part, name, t) for name in part.layers.masks)

    def keep(self, part: Part, name: str, n_drop: int) -> tuple[Tensor, int]:
        """The mask without the weights to drop, and how many these are."""
        ranked = self.drop_scores(part, name).masked_fill(~part.layers.masks[name], -torch.inf)
        return topk_mask(ranked, part.kept[name] - n_drop, check=False), n_drop

    def next_masks(self, part: Part, t: int) -> dict[str, Tensor]:
        """Kept and grown weights of each layer."""
        masks = {}
        for name, mask in part.layers.masks.items():
            n = self.drop_count(part, name, t)
            grow = self.grow_scores(part, name) if n else None
            if grow is None:
                continue
            kept, n = self.keep(part, name, n)
            taken = kept if self.options.regrow_dropped else mask
            masks[name] = kept | topk_mask(grow.masked_fill(taken, -torch.inf), n, check=False)
        return masks
