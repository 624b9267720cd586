"""DropGrow: the common frame of dynamic sparse training; drop some active weights of each layer, grow as many others.

    n_drop = floor(f_t n_active)        keep the n_active - n_drop largest drop scores (|w|)
    new mask = kept + top n_drop grow scores among the candidates

Candidates are all positions not kept (`regrow_dropped=True`; a weight dropped and grown at once keeps its value and its
optimizer state) or all that were inactive before. Grown weights start at 0. A layer's number of active weights stays.
With `min_per_filter` the strongest weights of each filter are kept, and filters without weights hold no candidates
(:mod:`s2sam.sparse.filter_guard`); where that leaves less to drop or to grow, fewer are exchanged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from s2sam.hooks import check_number
from s2sam.sparse import scores
from s2sam.sparse.base import Sparsifier
from s2sam.sparse.filter_guard import FilterGuard
from s2sam.sparse.options import check_flag, check_whole
from s2sam.sparse.part import Part
from s2sam.sparse.topk import topk_mask


@dataclass(frozen=True)
class DropGrowOptions:
    """f (or its start) in [0, 1], steps between changes, the share of `total_steps` at which they end (None: never).

    `min_per_filter`: how many of its strongest weights a filter keeps in any case; 0: as published.
    """

    drop_fraction: float = 0.3
    delta_t: int = 100
    t_end: float | None = None
    regrow_dropped: bool = False
    min_per_filter: int = 1

    def __post_init__(self) -> None:
        check_number("drop_fraction", self.drop_fraction, 0.0, 1.0)
        check_whole("delta_t", self.delta_t)
        if self.t_end is not None:
            check_number("t_end", self.t_end, 0.0, 1.0)
        check_flag("regrow_dropped", self.regrow_dropped)
        check_whole("min_per_filter", self.min_per_filter, 0)


def check_annealed(t_end: float | None) -> None:
    """Raise ValueError unless the share of weights to exchange has an end to fall to."""
    if not t_end:
        raise ValueError(f"a drop_fraction that falls needs a t_end above 0 and up to 1, got {t_end!r}")


class DropGrow(FilterGuard):
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
        n = min(math.floor(self.drop_fraction(t) * active + 1e-9), active - self.sure(name))
        return n if self.options.regrow_dropped else min(n, self.open(name) - active)

    def due(self, part: Part, t: int) -> bool:
        """Every `delta_t` steps up to the end, but not in the last one, if there is something to exchange."""
        if t > self.last_step or not self.on_grid(t):
            return False
        places = [name for name in part.layers.weights if part.kept[name] < self.open(name)]
        names = places if self.min_per_filter else part.layers.masks  # a dense layer alone would exchange nothing
        return bool(places) and any(self.drop_count(part, name, t) for name in names)

    def keep(self, part: Part, name: str, n_drop: int) -> tuple[Tensor, int]:
        """The mask without the weights to drop, and how many these are."""
        ranked = self.drop_scores(part, name).masked_fill(~part.layers.masks[name], -torch.inf)
        n_keep = part.kept[name] - n_drop
        return topk_mask(ranked, n_keep, check=False, min_per_filter=self.min_per_filter), n_drop

    def next_masks(self, part: Part, t: int) -> dict[str, Tensor]:
        """Kept and grown weights of each layer."""
        masks = {}
        for name, mask in part.layers.masks.items():
            n = self.drop_count(part, name, t)
            grow = self.grow_scores(part, name) if n else None
            if grow is None:
                continue
            kept, n = self.keep(part, name, n)
            taken = self.closed(kept if self.options.regrow_dropped else mask, mask)
            masks[name] = self.complete(kept, grow, n, taken=taken)
        return masks

    def complete(self, kept: Tensor, grow: Tensor, n: int, *, taken: Tensor) -> Tensor:
        """The mask after growth. Default: :func:`add`."""
        return add(kept, grow, n, taken=taken)


class GrowByGradient(Sparsifier):
    """Grow by |dL/dw| in a change that follows the step: the scores are kept from before the gradients are masked.

    Call :meth:`mask_gradients` once a step at most: it looks as well, and a second call would find zeros.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._seen: dict[Part, dict[str, Tensor]] = {}
        super().__init__(*args, **kwargs)

    def look(self, part: Part) -> None:
        """Keep |dL/dw| if the step is due; else forget the last one."""
        weights = part.layers.weights.items() if part.due_at(part.step + 1) else ()
        self._seen[part] = {name: scores.gradient_magnitude(w) for name, w in weights if w.grad is not None}

    def grow_scores(self, part: Part, name: str) -> Tensor | None:
        """|dL/dw|; a layer without a gradient stays as it is."""
        return self._seen[part].get(name)

    def catch_up(self) -> bool:
        """Without the gradients of the step that was missed."""
        self._seen = {part: {} for part in self.parts}
        return super().catch_up()


def add(kept: Tensor, grow: Tensor, n: int, *, taken: Tensor) -> Tensor:
    """The mask `kept`, and the `n` largest of the scores `grow` among the positions that are not `taken`.

    >>> kept = torch.tensor([True, False, False])
    >>> add(kept, torch.tensor([9.0, 1.0, 2.0]), 1, taken=kept).tolist()
    [True, False, True]
    """
    return kept | topk_mask(grow.masked_fill(taken, -torch.inf), n, check=False)
