"""SET: drop the weakest weights, grow random ones (Mocanu et al. 2018, arXiv:1707.04780)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from s2sam.sparse import scores
from s2sam.sparse.blocks import BlockChoice, Blocks
from s2sam.sparse.drop_grow import DropGrowOptions
from s2sam.sparse.masks import counts
from s2sam.sparse.options import check_flag
from s2sam.sparse.part import Part
from s2sam.sparse.topk import class_of, topk_mask


@dataclass(frozen=True)
class SETOptions(DropGrowOptions):
    """`sign_split`: drop by sign, as the original does."""

    sign_split: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag("sign_split", self.sign_split)


@dataclass(frozen=True)
class SETBlockOptions(BlockChoice, SETOptions):
    """As above, and the block."""

    def __post_init__(self) -> None:
        BlockChoice.__post_init__(self)
        SETOptions.__post_init__(self)


class SET(Blocks):
    """Every `delta_t` steps, after the optimizer's step, drop the share f with the lowest |w|, grow as many at random.

    The random draw is exact (as many as were dropped, never a Bernoulli number) and leaves out what was just dropped
    unless `regrow_dropped`. With `sign_split` the active weights >= 0 and those < 0 give their shares of the drop,
    rounded down, the smallest and the largest (dcmocanu/sparse-evolutionary-artificial-neural-networks); an active 0
    counts as positive there. With `block` whole blocks go and come, by sums of |w|. Cost: each change ranks each layer
    twice; a step in between costs what a static mask does.
    """

    method = "set"
    Options: ClassVar[type[SETOptions]] = SETBlockOptions
    options: SETOptions

    def grow_scores(self, part: Part, name: str) -> Tensor | None:
        """Uniform random numbers; a layer without a gradient stays as it is."""
        draw = scores.random(part.layers.weights[name], self.generator)
        return None if name in part.resting() else draw

    def keep(self, part: Part, name: str, n_drop: int) -> tuple[Tensor, int]:
        """Without the lowest |w|, or without the values nearest 0 on either side."""
        if not self.options.sign_split:
            return super().keep(part, name, n_drop)
        mask, weight = part.layers.masks[name], part.layers.weights[name]
        strength = self.drop_scores(part, name).masked_fill(~mask, -torch.inf)
        sure = class_of(strength, self.min_per_filter) < self.min_per_filter
        strength = strength.masked_fill(sure, torch.inf)
        kept = torch.zeros_like(mask)
        for side in (mask & (weight >= 0), mask & (weight < 0)):
            n, n_sure = counts({"all": side, "sure": side & sure}).values()
            n_side = max(n - math.floor(n_drop / part.kept[name] * n + 1e-9), n_sure)
            kept |= topk_mask(strength.masked_fill(~side, -torch.inf), n_side, check=False)
        return kept, part.kept[name] - counts({name: kept})[name]
