"""CHEX: prune channels, and let pruned ones come back with the weights they had (Hou et al. 2022, arXiv:2203.15794)."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from s2sam.hooks import check_number
from s2sam.sparse import sync
from s2sam.sparse.budget import Distribution
from s2sam.sparse.channels import OUT, SCALE, STATISTIC, choose_channels, masks_of, rows, touched
from s2sam.sparse.leverage import draw, leverage, residual
from s2sam.sparse.options import check_whole
from s2sam.sparse.part import Part
from s2sam.sparse.schedules import CosineDrop
from s2sam.sparse.structured import ChannelOptions, Structured
from s2sam.sparse.topk import topk_mask


@dataclass(frozen=True)
class CHEXOptions(ChannelOptions):
    """Steps between changes, the share of `total_steps` at which they end, delta_0 and what :class:`Structured` takes.

    `regrow`: delta_0, the share of all channels that is over the target at first.
    """

    delta_t: int = 780
    t_end: float = 0.72
    regrow: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("delta_t", self.delta_t)
        check_number("t_end", self.t_end, 0.0, 1.0)
        check_number("regrow", self.regrow, 0.0, 1.0)


class CHEX(Structured):
    """Every `delta_t` steps prune each group of channels to its share of S, and let others come back until t_end.

    shares:  the K largest |gamma| of all groups, K = C - round(S C) to prune to, C - round((S - delta_t) C) to grow to
    prune:   keep the largest leverage scores l_j = ||row j of V_k||, W^T = U S V^T            (`s2sam.sparse.leverage`)
    regrow:  draw from the others with p = softmax(||w_j - P w_j||), P the projection onto the kept channels
    delta_t = delta_0 (1 + cos(pi t / T_end)) / 2

    `sparsity` S is the share of *channels* that is pruned, over all groups; that of the weights follows, and is what
    :meth:`report` says. At the start each group keeps its largest channels by L1 norm, S - delta_0 of them pruned. A
    channel that comes back has the weights, gamma, beta and running statistics with which it was pruned ("most recently
    used"), and no momentum. W holds the weights of all layers that make the group's channels, gamma is the mean over
    its BatchNorms; a group without BatchNorm takes S and S - delta_t for itself.

    Differs from zejiangh/Filter-GaP:CLS/image_classification/prune_utils.py: groups come from the dependency graph of
    the model instead of lists of ResNet-50's layers; counts are exact; each group keeps `min_channels` (there one may
    lose all); optimizer state of pruned channels is cleared; the draw takes the sparsifier's generator.

    Defaults are for CIFAR: two epochs of 390 steps, until .72 of the training (180 of 250 epochs). ImageNet: delta_t of
    two epochs, regrow .2 to .3, SGD with momentum .875, weight decay 3.05e-5, lr 1.024 for a batch of 1024.

    Cost: a dense copy of weights and BatchNorm up to the last change; a change takes two SVDs of each group.

    Raises:
        ValueError: no total_steps, no step to change in, a target that `min_channels` cannot meet, as Structured.
    """

    method = "chex"
    cannot_adopt = "channels come back with the weights that they had, and of these a sparse model holds none"
    Options = CHEXOptions
    options: CHEXOptions

    def check_options(self) -> None:
        """Make the plan: when, and how many channels stay."""
        if self.total_steps is None:
            raise ValueError("method 'chex' follows a plan; give total_steps, the number of optimizer steps")
        if self.distribution != "erk":
            raise ValueError("method 'chex' spreads channels by |gamma| over all groups; leave distribution at 'auto'")
        o, s = self.options, check_number("sparsity", self.final_sparsity, 0.0, 1.0)
        end = round(o.t_end * self.total_steps)
        if end < 1:
            raise ValueError(f"no step is left to change in before t_end={o.t_end} of {self.total_steps} steps")
        super().check_options()
        self.grid = [*range(o.delta_t, end, o.delta_t), end]
        over = CosineDrop(o.regrow, end)
        self.shares = [max(0.0, s - over(t)) for t in (0, *self.grid)]  #: of channels pruned after each change
        self.done = 0  #: changes so far
        self.reserve: dict[str, Tensor] = {}  #: every tensor with channels, as it was when last used
        if self.total(s, least=False) < self.total(s):
            raise ValueError(
                f"sparsity {s} leaves {self.total(s, least=False)} of {self.channels.total} channels, and min_channels="
                f"{o.min_channels} of each group are {self.total(s)}; lower one of them"
            )

    def total(self, share: float, *, least: bool = True) -> int:
        """How many channels of all are left when this share is pruned; with or without regard to `min_channels`."""
        pooled = [g for g in self.channels.groups if g.of(SCALE)]
        sets = [pooled, *([g] for g in self.channels.groups if not g.of(SCALE))]
        sizes = [(sum(g.size for g in some), sum(map(self.least, some)) if least else 0) for some in sets]
        return sum(max(floor, size - round(share * size)) for size, floor in sizes)

    def channels_allowed(self, t: int) -> int:
        """How many channels the plan leaves after step `t`."""
        return self.total(self.shares[bisect_right(self.grid, t)])

    def target_sparsity(self, t: int) -> float:
        """That of the weights, which follows from the channels that are alive."""
        return self.sparsity()

    def behind(self, part: Part) -> bool:
        """A change was missed."""
        return self.done < bisect_right(self.grid, part.step)

    def due(self, part: Part, t: int) -> bool:
        """On the grid, and as long as a change was missed."""
        return self.done < bisect_right(self.grid, t)

    # -- the channels -----------------------------------------------------------------------------------------------

    def initial_masks(
        self, model: nn.Module, sparsity: float, distribution: Distribution, power_scale: float
    ) -> dict[str, Tensor]:
        """Each group's largest by L1 norm."""
        tensors = self.tensors()
        self.reserve = {name: tensors[name].detach().clone() for name in touched(self.channels.groups)}
        sync.broadcast(self.reserve.values())
        for group in self.channels.groups:
            size = group.matrix(self.reserve, OUT).abs().sum(1).cpu()
            n = group.size - round(self.shares[0] * group.size)
            self.keep[group.name] = topk_mask(size, max(self.least(group), n))
        self.keep = self.agreed(self.keep)
        self._set_riders()
        return self.weight_masks()

    def counts(self, tensors: Mapping[str, Tensor], share: float) -> dict[str, int]:
        """How many channels each group keeps when this share of all is pruned, by |gamma| over all groups."""
        found, gamma = {}, {}
        for group in self.channels.groups:
            if group.of(SCALE):
                parts = group.matrix({m.name: tensors[m.name].abs() for m in group.of(SCALE)}, SCALE)
                gamma[group.name] = parts.mean(1).cpu()
            else:
                found[group.name] = max(self.least(group), group.size - round(share * group.size))
        least = {name: self.least(self.channels[name]) for name in gamma}
        k = self.total(share) - sum(found.values())
        chosen = choose_channels(gamma, k, least)
        return found | {name: int(mask.sum()) for name, mask in chosen.items()}

    def next_masks(self, part: Part, t: int) -> dict[str, Tensor]:
        """Prune by leverage, regrow by what is missing."""
        tensors = self.tensors()
        self._remember(tensors)
        self.done = bisect_right(self.grid, t)
        down = self.counts(tensors, self.final_sparsity)
        up = self.counts(tensors, self.shares[self.done])
        keep = {}
        for group in self.channels.groups:
            alive = self.keep[group.name]
            score = leverage(group.matrix(tensors, OUT), down[group.name]).cpu().masked_fill(~alive, -1.0)
            kept = topk_mask(score, down[group.name])
            missing = residual(group.matrix(self.reserve, OUT), kept).cpu().masked_fill(kept, -math.inf)
            keep[group.name] = kept | draw(missing, max(0, up[group.name] - down[group.name]), self.generator)
        self.keep = self.agreed(keep)
        return self.weight_masks()

    def _remember(self, tensors: Mapping[str, Tensor]) -> None:
        """The reserve: what is in use now, else what it was when last used."""
        used = masks_of(self.channels.groups, self.keep, {name: tensors[name] for name in self.reserve})
        for name, old in self.reserve.items():
            self.reserve[name] = torch.where(used[name], tensors[name].detach(), old.to(tensors[name].device))

    def change_topology(self, part: Part) -> None:
        """And put back what came back; after the last change nothing is kept any longer."""
        before = dict(self.keep)
        super().change_topology(part)
        back = {name: ~(keep & ~before[name]) for name, keep in self.keep.items()}
        statistics = set(touched(self.channels.groups, STATISTIC))
        tensors, masks = self.tensors(), masks_of(self.channels.groups, self.keep, self.reserve)
        returned = rows(self.channels.groups, back)
        for name, mask in masks.items():
            if name not in statistics:
                tensors[name].copy_(self.reserve[name].masked_fill(~mask, 0))
            elif name in returned:
                tensors[name].copy_(torch.where(returned[name][0].to(mask.device), tensors[name], self.reserve[name]))
        if self.done == len(self.grid):
            self.reserve = {}

    # -- state ------------------------------------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Any]:
        """And the reserve."""
        return super().extra_state() | {"done": self.done, "reserve": dict(self.reserve)}

    def load_extra_state(self, extra: Mapping[str, Any]) -> None:
        """And the reserve."""
        super().load_extra_state(extra)
        tensors, self.done = self.tensors(), extra["done"]
        self.reserve = {name: v.to(tensors[name].device, copy=True) for name, v in extra["reserve"].items()}
