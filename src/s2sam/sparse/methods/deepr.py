"""DeepR: connections with a fixed sign that die when they would cross 0 (Bellec et al. 2018, arXiv:1711.05136)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from s2sam.hooks import StepContext, check_number
from s2sam.sparse import scores
from s2sam.sparse.base import Sparsifier
from s2sam.sparse.drop_grow import add
from s2sam.sparse.filter_guard import empty_filters
from s2sam.sparse.masks import counts, pack_bits, unpack_bits
from s2sam.sparse.options import check_list, check_whole
from s2sam.sparse.part import Part
from s2sam.sparse.topk import class_of, topk_mask


@dataclass(frozen=True)
class DeepROptions:
    """`l1`: alpha. `temperature`: T in equal parts of the training, in turn. `delta_t`: steps between draws.

    `min_per_filter`: how many of its connections a filter keeps though they are at 0; 0: as published.
    """

    l1: float = 1e-5
    temperature: tuple[float, ...] = (1e-5, 1e-8, 1e-12, 1e-15)
    delta_t: int = 1
    min_per_filter: int = 1

    def __post_init__(self) -> None:
        check_number("l1", self.l1)
        check_list("temperature", self.temperature, "[1e-5, 1e-8]")
        object.__setattr__(self, "temperature", tuple(check_number("temperature", t) for t in self.temperature))
        check_whole("delta_t", self.delta_t)
        check_whole("min_per_filter", self.min_per_filter, 0)


class DeepR(Sparsifier):
    """A weight that reaches 0 gives its place to a random dormant one of its layer; noise and L1 move the active ones.

    w = s theta, s = +-1 fixed;   theta <- theta - lr dL/dtheta - lr alpha + sqrt(2 lr T) nu, nu ~ N(0, 1), where active
    theta < 0: the connection dies, and as many others of the layer are activated at random, from 0

    The first term is the optimizer's own step; the rest follows it. s is the sign of the weight after the first step;
    where it is 0, random. In every step a weight that would cross 0 becomes 0; every `delta_t` steps those that are 0
    give up their places (1 is the paper's; with more a weight at 0 can come back by its own gradient). Nothing is drawn
    that was active, and a layer with too few dormant ones keeps the others. Set the optimizer's weight decay to 0, as
    the authors do: L1 takes its place.

    guillaumeBellec/deep_rewiring:script_mnist_deep_rewiring.py; noise and its T as in TimDettmers/sparse_learning
    (Intel's code), where new connections take the sign of their first step. Differs from both in that grown weights are
    0, not 1e-12, and that momentum is cleared where the mask changes.

    Defaults are for CIFAR and ImageNet alike. Cost: one byte per weight for s; a step draws a number per active weight
    if T > 0, and with delta_t=1 reads the device, draws for each weight of a layer that lost some, and ranks the draws.

    Raises:
        ValueError: several temperatures and no total_steps.
    """

    method = "deepr"
    zeroes_active = True  # until the next draw
    Options = DeepROptions
    options: DeepROptions

    def check_options(self) -> None:
        """A share of the training needs its length. No signs so far."""
        if len(self.options.temperature) > 1 and self.total_steps is None:
            raise ValueError("method 'deepr' lowers its temperature over the training; give total_steps, or one value")
        self.signs: dict[str, Tensor] = {}  #: True = positive

    def temperature(self, t: int) -> float:
        """T in step `t`."""
        values = self.options.temperature
        return values[min((t - 1) * len(values) // (self.total_steps or 1), len(values) - 1)]

    def moved(self, part: Part, context: StepContext) -> None:
        """L1, noise, and 0 for what crosses it; nothing where the step was skipped or a layer has no gradient."""
        if context.nothing_moved():
            return
        for name, weight, group in part.in_groups():
            if weight.grad is not None:
                self._move(part, name, group["lr"], self.temperature(part.step + 1))

    def due(self, part: Part, t: int) -> bool:
        """Every `delta_t` steps, but not in the last one."""
        return self.on_grid(t)

    def next_masks(self, part: Part, t: int) -> dict[str, Tensor]:
        """What is not 0 or among the first of its filter, and random others."""
        masks, weights = part.layers.masks, part.layers.weights
        stay = {name: mask & (weights[name] != 0) for name, mask in masks.items()}
        taken = dict(masks)
        if k := self.min_per_filter:
            for name, mask in masks.items():
                size = scores.magnitude(weights[name]).masked_fill(~mask, -torch.inf)
                stay[name] |= class_of(size, k) < k
                taken[name] = mask | empty_filters(mask)
        found = counts({**stay, **{f"free of {name}": ~mask for name, mask in taken.items()}})
        changed = {}
        for name, mask in masks.items():
            dead, dormant = part.kept[name] - found[name], found[f"free of {name}"]
            if not dead or not dormant or weights[name].grad is None:
                continue
            if dead > dormant:  # the first of the dead keep their places
                stay[name] = topk_mask(stay[name].float().masked_fill(~mask, -torch.inf), part.kept[name] - dormant)
            draw = scores.random(weights[name], self.generator)
            changed[name] = add(stay[name], draw, min(dead, dormant), taken=taken[name])
        return changed

    def extra_state(self) -> dict[str, Any]:
        """The signs, as bits."""
        return {"signs": {name: pack_bits(sign) for name, sign in self.signs.items()}}

    def load_extra_state(self, extra: Mapping[str, Any]) -> None:
        """The signs."""
        shapes = {name: w.shape for name, w in self.weights.items()}
        self.signs = {name: unpack_bits(bits, shapes[name]) for name, bits in extra["signs"].items()}

    def _move(self, part: Part, name: str, lr: float | Tensor, temperature: float) -> None:
        weight, mask = part.layers.weights[name], part.layers.masks[name]
        if name not in self.signs:
            self.signs[name] = torch.where(weight == 0, scores.random(weight, self.generator) < 0.5, weight > 0)
        sign = self.signs[name] = self.signs[name].to(weight.device)
        theta = torch.where(sign, weight, -weight).sub_(lr * self.options.l1)
        if temperature:
            noise = torch.randn(part.kept[name], generator=self.generator).to(weight)
            noise = torch.zeros_like(weight).masked_scatter_(mask, noise)
            theta += noise * (2 * lr * temperature) ** 0.5
        theta.clamp_(min=0).mul_(mask)
        weight.copy_(torch.where(sign, theta, -theta))
