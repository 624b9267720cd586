"""DSR: drop below one threshold for all layers, grow at random where most survive (Mostafa and Wang 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from s2sam.hooks import check_number
from s2sam.sparse import scores
from s2sam.sparse.budget import share_out
from s2sam.sparse.drop_grow import DropGrow, add
from s2sam.sparse.masks import counts
from s2sam.sparse.options import check_list, check_whole
from s2sam.sparse.part import Part
from s2sam.sparse.topk import choose, class_of


@dataclass(frozen=True)
class DSROptions:
    """What differs between runs of DSR.

    `drop_fraction`: the share of active weights that a change should move, N_p / n. `threshold`: H at the start.
    `delta_t`: steps between changes at first. `stretch`: the shares of `total_steps` at which that doubles. `t_end`:
    the share at which changes end. `min_per_filter`: how many of its strongest weights a filter keeps in any case,
    whatever the threshold; 0: as published.
    """

    drop_fraction: float = 0.15
    threshold: float = 1e-3
    delta_t: int = 100
    stretch: tuple[float, ...] = (0.25, 0.5, 0.75)
    t_end: float = 0.95
    min_per_filter: int = 1

    def __post_init__(self) -> None:
        check_number("drop_fraction", self.drop_fraction, 0.0, 1.0)
        if not check_number("threshold", self.threshold):
            raise ValueError("threshold must be above 0: it is only ever doubled and halved")
        check_whole("delta_t", self.delta_t)
        check_number("t_end", self.t_end, 0.0, 1.0)
        check_whole("min_per_filter", self.min_per_filter, 0)
        if self.stretch not in ((), []):
            check_list("stretch", self.stretch, "[0.25, 0.5, 0.75]")
        object.__setattr__(self, "stretch", tuple(check_number("stretch", share, 0.0, 1.0) for share in self.stretch))
        if any(b <= a for a, b in pairwise(self.stretch)):
            raise ValueError(f"stretch must be rising shares of the training, got {self.stretch}")


class DSR(DropGrow):
    """Drop every |w| < H, grow as many at random; layer l gets the share that its survivors have of all survivors.

    n = weights dropped;  H <- H / 2 if n > 1.1 N_p,  2 H if n < 0.9 N_p;  N_p = drop_fraction * active weights

    After the optimizer's step. The number of all active weights stays, those of the layers drift apart. What finds no
    free place in a layer goes to the others. What was just dropped is not drawn, and grown weights start at 0.

    arXiv:1902.05967; TimDettmers/sparse_learning:imagenet/dynamic-reparameterization (Intel's code). Differs from there
    in that each layer keeps its largest weight whatever H is, no more is dropped than there are free places, and
    optimizer state is cleared at dropped and grown weights. Single weights only, no kernels.

    Defaults are for CIFAR (20,000 of WRN-28-2's weights are about 14 % of those active at 90 %). ImageNet: 400,000 of
    ResNet-50's, which is drop_fraction=0.08 at 80 % and 0.16 at 90 %, and delta_t=1000.

    Cost: the masks alone; each change ranks all layers together and draws a number for every weight.

    Raises:
        ValueError: no total_steps.
    """

    method = "dsr"
    Options = DSROptions  # type: ignore[assignment]  # no regrow_dropped: N_p counts what was dropped
    options: DSROptions  # type: ignore[assignment]

    def check_options(self) -> None:
        """One threshold for each optimizer."""
        super().check_options()
        self.thresholds = [self.options.threshold] * len(self.parts)

    def interval(self, t: int) -> int:
        """Steps between changes around step `t`."""
        assert self.total_steps is not None
        return int(self.options.delta_t * 2 ** sum(t >= share * self.total_steps for share in self.options.stretch))

    def due(self, part: Part, t: int) -> bool:
        """Every :meth:`interval` steps up to the end, but not in the last one, if there is a free place."""
        on_grid = t % self.interval(t) == 0 and t != self.total_steps
        return on_grid and t <= self.last_step and any(self._room(part, part.layers.weights).values())

    def next_masks(self, part: Part, t: int) -> dict[str, Tensor]:
        """Survivors, and random others."""
        weights, masks = self._live(part), part.layers.masks
        room = self._room(part, weights)
        size = {name: scores.magnitude(w).masked_fill(~masks[name], -torch.inf) for name, w in weights.items()}
        threshold = self.thresholds[self.parts.index(part)]
        k = self.min_per_filter
        strong = counts({name: (s >= threshold) | (class_of(s, k) < k) for name, s in size.items()})
        active = sum(part.kept[name] for name in weights)
        n = max(sum(max(1, k) for k in strong.values()), active - sum(room.values()))
        kept = choose(size, n, min_per_filter=k)
        grown = share_out(active - n, counts(kept), room)
        draw = {name: scores.random(w, self.generator) for name, w in weights.items()}
        taken = {name: self.closed(masks[name], masks[name]) for name in weights}
        return {name: add(kept[name], draw[name], grown[name], taken=taken[name]) for name in weights}

    def change_topology(self, part: Part) -> None:
        """And adapt H to how many weights were dropped."""
        super().change_topology(part)
        assert self.last_update is not None
        dropped = sum(self.last_update.dropped.values())
        live = self._live(part)
        active = sum(part.kept[name] for name in live)
        aim = min(self.options.drop_fraction * active, sum(self._room(part, live).values()))
        factor = 0.5 if dropped > 1.1 * aim else 2.0 if dropped < 0.9 * aim else 1.0
        self.thresholds[self.parts.index(part)] *= factor

    def extra_state(self) -> dict[str, Any]:
        """H of each optimizer."""
        return {"thresholds": list(self.thresholds)}

    def load_extra_state(self, extra: Mapping[str, Any]) -> None:
        """H of each optimizer."""
        self.thresholds = list(extra["thresholds"])

    def _room(self, part: Part, weights: Mapping[str, Tensor]) -> dict[str, int]:
        return {name: self.open(name) - part.kept[name] for name in weights}

    def _live(self, part: Part) -> dict[str, Tensor]:
        """The layers but for those without a gradient, which stay as they are."""
        rest = part.resting()
        return {name: w for name, w in part.layers.weights.items() if name not in rest}
