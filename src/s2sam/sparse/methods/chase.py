"""Chase: dynamic sparse training that drains weak channels and removes them (Yin et al. 2023, arXiv:2305.19454)."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from s2sam.hooks import check_number
from s2sam.sparse import scores
from s2sam.sparse.channels import OUT, choose_channels, masks_of
from s2sam.sparse.drop_grow import GrowByGradient, add
from s2sam.sparse.masks import counts
from s2sam.sparse.names import unknown
from s2sam.sparse.options import check_whole
from s2sam.sparse.part import Part
from s2sam.sparse.schedules import CosineDrop, Cubic
from s2sam.sparse.structured import ChannelOptions, Structured
from s2sam.sparse.topk import global_topk, topk_mask

STARTS = ("erk", "er", "uniform", "global")


@dataclass(frozen=True)
class ChaseOptions(ChannelOptions):
    """Of weights: steps between changes, the share of them that is over the target at first, the exchange at the end.

    Of channels: the share to prune, steps between changes and the first of them, the share of a group's fair count that
    it keeps at least. `t_start`, `t_end`: shares of `total_steps`; channels go between them, weights are over the
    target up to `t_end`.
    """

    channel_sparsity: float = 0.5
    delta_t: int = 1000
    channel_delta_t: int = 1000
    channel_offset: int = 500
    t_start: float = 0.0
    t_end: float = 0.8125
    soft_bound: float = 0.05
    min_ratio: float = 0.5
    drop_fraction: float = 0.5
    drop_end: float = 0.005

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("channel_sparsity", "t_start", "t_end", "soft_bound", "min_ratio", "drop_fraction", "drop_end"):
            check_number(name, getattr(self, name), 0.0, 1.0)
        for name in ("delta_t", "channel_delta_t"):
            check_whole(name, getattr(self, name))
        check_whole("channel_offset", self.channel_offset, least=0)


class Chase(GrowByGradient, Structured):
    """Prune and grow weights over all layers, a little over the target at first; remove channels that are left weak.

    weights, every delta_t steps:   up to t_end prune to n by |w|, grow to n + round(f_t N) by |dL/dw|, over all layers,
                                    f_t = f/2 (1 + cos(pi t / T_end)); then exchange a falling share of each layer
    channels, up to t_end:          keep C - round(r_t C), r_t the cubic curve from 0 to `channel_sparsity`, with the
                                    largest UMM = mean |w| of all weights that make the channel, zeros included
    n = (1 - s) N active weights of N, C channels in all groups

    `sparsity` s is of the weights, and n is met exactly: the active weights of a channel that goes are grown elsewhere.
    A group keeps at least ceil(C_g (1 - r_t) min_ratio) channels, and `min_channels`. Nothing grows in a pruned
    channel. Channels stay if otherwise fewer positions than n + f_t N were left: below about 75 % sparsity, then;
    :meth:`channel_sparsity` says what was reached.

    Differs from luuyin/chase:Cifar/sparselearning/core_dst_chase.py: coupled layers come from the dependency graph of
    the model; counts are exact, ties by index; an exchange is settled by layer; of the scores only UMM ("mag_wise").

    Defaults are for ResNet-50 on CIFAR (160 epochs, the last 30 without channels); VGG-19: channel_delta_t=8000,
    min_ratio=.2. ImageNet: channel_sparsity=.4, channel_delta_t of two epochs, t_end=.8.

    Cost: the masks alone; a change ranks all layers together, and looks at one step's dense gradients.

    Raises:
        ValueError: no total_steps, t_end not after t_start, as Structured.
    """

    method = "chase"
    Options = ChaseOptions
    options: ChaseOptions

    def check_options(self) -> None:
        """Make the plan."""
        if self.total_steps is None:
            raise ValueError("method 'chase' follows a plan; give total_steps, the number of optimizer steps")
        if self.distribution not in STARTS:
            raise unknown("start of method 'chase', which prunes over all layers:", str(self.distribution), STARTS)
        o, steps = self.options, self.total_steps
        start, self.end = round(o.t_start * steps), round(o.t_end * steps)
        if self.end <= start:
            raise ValueError(f"no step lies between t_start={o.t_start} and t_end={o.t_end} of {steps} steps")
        super().check_options()
        self.size = sum(w.numel() for w in self.weights.values())
        budget = self.budget(self.final_sparsity, "global")
        assert isinstance(budget, int)
        self.least_weights = budget
        first = o.channel_offset or o.channel_delta_t
        self.grid = [t for t in range(first, self.end, o.channel_delta_t) if t > start] + [self.end]
        curve = Cubic(0.0, o.channel_sparsity, start, self.end)
        self.rates = [0.0, *map(curve, self.grid)]
        self.done = 0  #: changes of the channels so far

    # -- the plan ---------------------------------------------------------------------------------------------------

    def allowed(self, t: int) -> int:
        """How many weights the plan leaves after step `t`."""
        last = t - t % self.options.delta_t
        if last == 0 or t >= self.end:
            return self.least_weights
        over = round(CosineDrop(self.options.soft_bound, self.end)(last) * self.size)
        return min(self.size, self.least_weights + over)

    def channel_rate(self, t: int) -> float:
        """The share of the channels that the plan prunes up to step `t`."""
        return self.rates[bisect_right(self.grid, t)]

    def target_sparsity(self, t: int) -> float:
        """s - round(f_t N) / N."""
        return self.final_sparsity - (self.allowed(t) - self.least_weights) / self.size

    def behind(self, part: Part) -> bool:
        """More weights than the plan leaves, or a change of the channels that was missed."""
        return sum(part.kept.values()) > self.allowed(part.step) or self.done < bisect_right(self.grid, part.step)

    def due(self, part: Part, t: int) -> bool:
        """On either grid, but for exchanges in the last step, and wherever something was missed."""
        over = sum(part.kept.values()) > self.allowed(t) or self.done < bisect_right(self.grid, t)
        return over or self.on_grid(t)

    # -- a change ---------------------------------------------------------------------------------------------------

    def next_masks(self, part: Part, t: int) -> dict[str, Tensor]:
        """Channels first, then weights."""
        on_grid = self.on_grid(t)
        masks = {name: mask.clone() for name, mask in part.layers.masks.items()}
        target = self.allowed(t) if on_grid else min(sum(part.kept.values()), self.allowed(t))
        if self.done < bisect_right(self.grid, t):
            self.done = bisect_right(self.grid, t)
            self.keep = self.agreed(self._choose(self.channel_rate(t), self.allowed(max(t, self.options.delta_t))))
        live = self.weight_masks()
        for name, mask in masks.items():
            mask &= live[name]
        if on_grid and t < self.end:
            masks = self._pruned(part, masks, self.least_weights)
        masks = self._grown(part, self._pruned(part, masks, target), live, target)
        if on_grid and t > self.end:
            self._exchange(part, masks, live, t)
        return masks

    def umm(self) -> dict[str, Tensor]:
        """Mean |w| of each channel, over all weights that make it."""
        tensors = {name: p.detach().abs() for name, p in self.tensors().items() if p.is_floating_point()}
        ones = {name: torch.ones_like(p) for name, p in tensors.items()}
        return {
            g.name: (g.matrix(tensors, OUT).sum(1) / g.matrix(ones, OUT).sum(1)).cpu() for g in self.channels.groups
        }

    def _choose(self, rate: float, weights: int) -> dict[str, Tensor]:
        """The channels that stay, as few as `rate` wants, but room for so many weights."""
        alive = {name: s.masked_fill(~self.keep[name], -torch.inf) for name, s in self.umm().items()}
        left, groups, share = self.alive(), self.channels.groups, (1 - rate) * self.options.min_ratio
        least = {
            g.name: min(left[g.name], max(self.least(g), math.ceil(g.size * share - 1e-9)))
            for g in self.channels.groups
        }

        def chosen(k: int) -> dict[str, Tensor]:
            return choose_channels(alive, k, least)

        def room(keep: Mapping[str, Tensor]) -> bool:
            return sum(counts(masks_of(groups, keep, self.weights)).values()) >= weights

        low, high = self.channels.total - round(rate * self.channels.total), sum(left.values())
        low = min(max(low, sum(least.values())), high)
        if room(chosen(low)):
            return chosen(low)
        while high - low > 1:  # room at high, none at low
            middle = (low + high) // 2
            low, high = (low, middle) if room(chosen(middle)) else (middle, high)
        return chosen(high)

    def _pruned(self, part: Part, masks: dict[str, Tensor], n: int) -> dict[str, Tensor]:
        """The largest |w| of those that are left, over all layers."""
        if sum(counts(masks).values()) <= n:
            return masks
        size = {name: scores.magnitude(w).masked_fill(~masks[name], -torch.inf) for name, w in self.weights.items()}
        return global_topk(size, n, at_least=0 if min(counts(masks).values()) == 0 else 1)

    def _grown(self, part: Part, masks: dict[str, Tensor], live: dict[str, Tensor], n: int) -> dict[str, Tensor]:
        """As many as there should be, by |dL/dw| over all layers; a layer without any gets one first."""
        grow = {}
        for name, mask in masks.items():
            seen = self.grow_scores(part, name)
            seen = torch.zeros(mask.shape, device=mask.device) if seen is None else seen
            grow[name] = seen.masked_fill(mask | ~live[name], -torch.inf)
        held = counts(masks)
        for name in [name for name, k in held.items() if k == 0]:
            masks[name] = topk_mask(grow[name], 1, check=False)
            grow[name] = grow[name].masked_fill(masks[name], -torch.inf)
        more = n - sum(counts(masks).values())
        if more <= 0:
            return masks
        added = global_topk(grow, more)
        return {name: mask | added[name] for name, mask in masks.items()}

    def _exchange(self, part: Part, masks: dict[str, Tensor], live: dict[str, Tensor], t: int) -> None:
        """Drop and grow the same share of each layer."""
        assert self.total_steps is not None
        fraction = CosineDrop(self.options.drop_fraction, self.total_steps, self.options.drop_end)(t)
        for name, active in counts(masks).items():
            grow, n = self.grow_scores(part, name), math.floor(fraction * active + 1e-9)
            if grow is not None:
                size = scores.magnitude(self.weights[name]).masked_fill(~masks[name], -torch.inf)
                kept = topk_mask(size, active - n, check=False)
                masks[name] = add(kept, grow, n, taken=kept | ~live[name])

    # -- state ------------------------------------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Any]:
        """And how far the channels are."""
        return super().extra_state() | {"done": self.done}

    def load_extra_state(self, extra: Mapping[str, Any]) -> None:
        """And how far the channels are."""
        super().load_extra_state(extra)
        self.done = extra["done"]
