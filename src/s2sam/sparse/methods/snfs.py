"""SNFS: grow where the momentum of the dense gradient is largest (Dettmers and Zettlemoyer 2019, arXiv:1907.04840)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from s2sam.hooks import StepContext, check_number
from s2sam.sparse.budget import share_out
from s2sam.sparse.drop_grow import DropGrow, DropGrowOptions, add, check_annealed
from s2sam.sparse.part import Part
from s2sam.sparse.schedules import CosineDrop


@dataclass(frozen=True)
class SNFSOptions(DropGrowOptions):
    """A cosine from `drop_fraction` to 0 at `t_end`, and `beta`, the decay of the momentum."""

    drop_fraction: float = 0.5
    t_end: float | None = 1.0
    regrow_dropped: bool = True
    beta: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        check_annealed(self.t_end)
        check_number("beta", self.beta, 0.0, 1.0)


class SNFS(DropGrow):
    """Drop the lowest |w| of each layer, grow as many in all where |m| is largest; layers with a large mean |m| gain.

    m <- beta m + dL/dw, dense;  layer l grows the share  mean_l |m| / sum_k mean_k |m|  (means over active weights)

    After the optimizer's step; f_t = f/2 (1 + cos(pi t / T_end)). The number of all active weights stays, those of the
    layers drift apart; what finds no free place in a layer goes to the others, and each layer keeps a weight.

    Differs from TimDettmers/sparse_learning:sparselearning/core.py in that m is the method's own, fed by the gradients
    before those of pruned weights become 0, so that any optimizer will do and its state stays sparse
    (google-research/rigl:rigl/sparse_optimizers.py has it so too); for SGD it is the same but for weight decay, which m
    does not contain, for Adam it is not (there: exp_avg / sqrt(exp_avg_sq)). Gradients that are not finite count as 0.

    Defaults are for CIFAR; there delta_t is an epoch. ImageNet: drop_fraction=0.2.

    Cost: one dense buffer, and a dense weight gradient in every step, of which a copy is held until its end; a change
    ranks each layer twice.

    Raises:
        ValueError: no total_steps.
    """

    method = "snfs"
    Options = SNFSOptions
    options: SNFSOptions

    def check_options(self) -> None:
        """No momentum so far."""
        super().check_options()
        self.momentum: dict[str, Tensor] = {}
        self._seen: dict[Part, dict[str, Tensor]] = {}

    def drop_fraction(self, t: int) -> float:
        """The cosine."""
        return CosineDrop(self.options.drop_fraction, self.last_step)(t)

    def drop_count(self, part: Part, name: str, t: int) -> int:
        """One stays."""
        return min(super().drop_count(part, name, t), part.kept[name] - 1)

    def look(self, part: Part) -> None:
        """Keep the dense gradients until the step is done."""
        self._seen[part] = part.gradients()

    def moved(self, part: Part, context: StepContext) -> None:
        """m <- beta m + dL/dw, where there is a gradient; nothing if the step was skipped."""
        seen = self._seen.pop(part, {})
        for name, weight in part.layers.weights.items():
            held = self.momentum.get(name)
            m = self.momentum[name] = torch.zeros_like(weight) if held is None else held.to(weight.device)
            if name in seen and not context.nothing_moved():
                m.mul_(self.options.beta).add_(seen[name])

    def next_masks(self, part: Part, t: int) -> dict[str, Tensor]:
        """Per layer what is kept; over all layers as many as before."""
        masks = part.layers.masks
        strength = {name: self.momentum[name].abs() for name in masks}
        rest = part.resting()
        n = {name: 0 if name in rest else self.drop_count(part, name, t) for name in masks}
        kept = {name: self.keep(part, name, n[name])[0] for name in masks}
        taken = {n: self.closed(kept[n] if self.options.regrow_dropped else mask, mask) for n, mask in masks.items()}
        free = {name: self.open(name) - part.kept[name] for name in masks}
        room = {name: (free[name] + n[name] * self.options.regrow_dropped) * (name not in rest) for name in masks}
        grown = share_out(sum(n.values()), self._means(part, strength), room)
        return {name: add(kept[name], strength[name], grown[name], taken=taken[name]) for name in masks}

    def extra_state(self) -> dict[str, Any]:
        """m."""
        return {"momentum": dict(self.momentum)}

    def load_extra_state(self, extra: Mapping[str, Any]) -> None:
        """m."""
        self.momentum = {name: m.to(self.weights[name].device, copy=True) for name, m in extra["momentum"].items()}

    def _means(self, part: Part, strength: dict[str, Tensor]) -> dict[str, float]:
        """Mean |m| over the active weights of each layer; one host read."""
        sums = [(strength[name].float() * mask).sum() for name, mask in part.layers.masks.items()]
        total = torch.stack([s.to(sums[0].device) for s in sums]).tolist()
        return {name: s / part.kept[name] for name, s in zip(part.kept, total, strict=True)}
