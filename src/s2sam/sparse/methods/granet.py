"""GraNet: gradual magnitude pruning that also exchanges weights as RigL does (Liu et al. 2021, arXiv:2106.10404)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from s2sam.hooks import check_number
from s2sam.sparse import scores
from s2sam.sparse.base import Sparsifier
from s2sam.sparse.budget import Distribution
from s2sam.sparse.drop_grow import GrowByGradient, add
from s2sam.sparse.filter_guard import empty_filters, filter_counts
from s2sam.sparse.masks import counts
from s2sam.sparse.methods.gmp import GMP, GMPOptions
from s2sam.sparse.names import unknown
from s2sam.sparse.options import check_whole
from s2sam.sparse.part import Part
from s2sam.sparse.schedules import CosineDrop
from s2sam.sparse.topk import topk_mask

STARTS = ("erk", "er", "uniform", "global")


@dataclass(frozen=True)
class GraNetOptions(GMPOptions):
    """As GMP's; the share exchanged falls by a cosine from `drop_fraction` to `drop_end` at the end of the training.

    `min_per_filter`: how many of its largest weights a filter keeps, while there are enough; 0: as published.
    """

    initial_sparsity: float = 0.5
    delta_t: int = 1000
    t_start: float = 0.0
    t_end: float = 0.6875
    drop_fraction: float = 0.5
    drop_end: float = 0.005
    min_per_filter: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("drop_fraction", self.drop_fraction, 0.0, 1.0)
        check_number("drop_end", self.drop_end, 0.0, 1.0)
        check_whole("min_per_filter", self.min_per_filter, 0)


class GraNet(GrowByGradient, GMP):
    """Every `delta_t` steps prune to s_t over all layers together, then exchange the share f_t of each layer.

    s_t: the cubic curve of GMP from s_i to s_f;  f_t = f_end + (f - f_end) / 2 (1 + cos(pi t / T))
    exchange:  drop the f_t n smallest |w| of a layer's n, grow as many where |dL/dw| is largest among those not kept

    After the optimizer's step, with its gradients. The exchange goes on when pruning has ended. The mask at the start
    is random, spread by `distribution`; from then on |w| decides what each layer keeps, at least one weight.

    Differs from Shiweiliuiiiiiii/GraNet:CIFAR/sparselearning/core.py in exact counts (there what ties at the threshold
    is lost), and a weight that is dropped and grown at once keeps its value. s_i = 0 is its dense-to-sparse variant.

    Defaults are for CIFAR (160 epochs, pruning for 110). ImageNet: delta_t=4000, t_end=0.3.

    Cost: the masks alone; a change ranks all layers together, and each layer twice. Denser than its target up to t_end.

    Raises:
        ValueError: no total_steps, more than one optimizer, a distribution that fixes layers; as GMP.
    """

    method = "granet"
    Options = GraNetOptions
    options: GraNetOptions

    def check_options(self) -> None:
        """Pruning over all layers needs them in one optimizer, and can leave none as it is."""
        if self.distribution not in STARTS:
            raise unknown("start of method 'granet', which prunes over all layers:", str(self.distribution), STARTS)
        if len(self.parts) > 1:
            raise ValueError(
                "method 'granet' prunes over all layers together; hold them in one optimizer with several param_groups"
            )
        super().check_options()

    def budgets(self, sparsities: Sequence[float]) -> list[int | dict[str, int]]:
        """Numbers for all layers together."""
        return [self.budget(s, "global") for s in sparsities]

    def initial_masks(
        self, model: nn.Module, sparsity: float, distribution: Distribution, power_scale: float
    ) -> dict[str, Tensor]:
        """Random, at the initial sparsity."""
        return Sparsifier.initial_masks(self, model, self.options.initial_sparsity, distribution, power_scale)

    def due(self, part: Part, t: int) -> bool:
        """On the grid, but for the last step, and wherever more is active than the plan leaves."""
        return self.on_grid(t) or super().due(part, t)

    def next_masks(self, part: Part, t: int) -> dict[str, Tensor]:
        """Prune, then exchange; a step off the grid only makes up for a prune that was missed."""
        masks = super().next_masks(part, t)
        if not self.on_grid(t):
            return masks
        fraction = CosineDrop(self.options.drop_fraction, self.step_at(1.0), self.options.drop_end)(t)
        k = self.min_per_filter
        filters = filter_counts(masks, k) if k else {}
        for name, active in counts(masks).items():
            n, grow = math.floor(fraction * active + 1e-9), self.grow_scores(part, name)
            if grow is not None:
                size = scores.magnitude(part.layers.weights[name]).masked_fill(~masks[name], -torch.inf)
                n = min(n, active - filters[name][0]) if k else n
                kept = topk_mask(size, active - n, check=False, min_per_filter=k)
                masks[name] = add(kept, grow, n, taken=kept | empty_filters(masks[name]) if k else kept)
        return masks
