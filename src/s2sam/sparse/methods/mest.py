"""MEST: prune to a lower bound, grow at random to an upper bound, in phases (Yuan et al. 2021, arXiv:2110.14032)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from s2sam.hooks import check_number
from s2sam.sparse import scores
from s2sam.sparse.budget import Distribution, thin
from s2sam.sparse.filter_guard import FilterGuard
from s2sam.sparse.names import unknown
from s2sam.sparse.options import check_flag, check_list, check_whole
from s2sam.sparse.part import Part
from s2sam.sparse.scheduled import Budget, Scheduled, over
from s2sam.sparse.topk import choose

VARIANTS = ("em", "em_s")
Bounds = tuple[float, ...] | None


@dataclass(frozen=True)
class MESTOptions:
    """What differs between runs of MEST.

    `variant`: em (memory never above the target's) or em_s (soft bound: above it, then back). `delta_t`: steps between
    exchanges. `phases`: the shares of `total_steps` at which the next phase begins. `lower`, `upper`: one sparsity per
    phase, in place of the variant's rule. `grad_weight`: lambda. `regrow_dropped`: what was just dropped may be drawn,
    and then keeps its value. `mest_compat`: dropped and grown weights keep their optimizer state. `min_per_filter`: how
    many of its best weights a filter keeps, while there are enough; 0: as published.
    """

    variant: str = "em"
    delta_t: int = 100
    phases: tuple[float, ...] = (0.5625, 0.75)
    lower: Bounds = None
    upper: Bounds = None
    grad_weight: float = 0.0
    regrow_dropped: bool = False
    mest_compat: bool = False
    min_per_filter: int = 1

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise unknown("variant of method 'mest':", str(self.variant), VARIANTS)
        check_whole("delta_t", self.delta_t)
        check_number("grad_weight", self.grad_weight, 0.0)
        for name in ("phases", "lower", "upper"):
            given = getattr(self, name)
            if given is not None or name == "phases":
                check_list(name, given, "[0.5, 0.75]" if name == "phases" else "[0.92, 0.91, 0.9]")
                object.__setattr__(self, name, tuple(check_number(name, value, 0.0, 1.0) for value in given))
        check_flag("regrow_dropped", self.regrow_dropped)
        check_flag("mest_compat", self.mest_compat)
        check_whole("min_per_filter", self.min_per_filter, 0)
        if any(b <= a for a, b in pairwise(self.phases)):
            raise ValueError(f"phases must be rising shares of the training, got {self.phases}")


def bounds(variant: str, sparsity: float, phases: int) -> tuple[list[float], list[float]]:
    """The lower-bound and the upper-bound sparsities of the phases, from the widest exchange to none.

    d = 1 - s,  u = 1, 1/2, 0 for three phases
    em      lower = s + 0.2 d u     upper = s                           a fifth, then a tenth of the weights move
    em_s    lower = s               upper = max(0, s - min(d, 0.05) u)  5 points denser, at most twice as dense

    The authors' scripts give lists for 90 and 95 % alone; the rule is the one that has both as special cases.

    >>> [[round(s, 4) for s in row] for row in bounds("em", 0.9, 3)]
    [[0.92, 0.91, 0.9], [0.9, 0.9, 0.9]]
    >>> [[round(s, 4) for s in row] for row in bounds("em_s", 0.95, 3)]
    [[0.95, 0.95, 0.95], [0.9, 0.925, 0.95]]
    """
    density = 1 - sparsity
    width = [1 - i / (phases - 1) for i in range(phases)]
    if variant == "em":
        return [sparsity + 0.2 * density * u for u in width], [sparsity] * phases
    return [sparsity] * phases, [max(0.0, sparsity - min(density, 0.05) * u) for u in width]


class MEST(FilterGuard, Scheduled):
    """Every `delta_t` steps: keep the best of each layer down to the lower bound, grow zeros up to the upper bound.

    score = |w| + lambda |dL/dw|;  grown: uniformly random among the weights that were inactive; they start at 0

    After the optimizer's step. In phase i the bounds are lower_i and upper_i (see :func:`bounds`); in the last both are
    the target, so the mask is fixed, and entering it prunes to the target at once, on or off the grid. Between two
    exchanges the sparsity is upper_i. A layer at lower_i holds the same share of its target's weights as every other;
    one with too few inactive weights to grow from gives up less. With distribution="global" both choices are made over
    all layers together.

    Against boone891214/MEST:prune_utils/retrain.py: exact counts; the mask at the start is the largest |w| within
    upper_1, and the first exchange comes after `delta_t` steps (there: before the first step, and every 5 epochs); what
    was just dropped is not drawn again (`regrow_dropped`); optimizer state is cleared (`mest_compat` keeps it stale, as
    there; do not combine that with S2SAM's directions "momentum" and "ema", which would displace pruned weights). A
    layer without a gradient is only pruned, except with distribution="global".

    Cost: the masks alone; each exchange ranks every layer twice. EM&S trains above the target's memory until the last
    phase.

    Raises:
        ValueError: no total_steps; bounds that do not enclose the target, or do not end there.
    """

    method = "mest"
    Options = MESTOptions
    options: MESTOptions

    def check_options(self) -> None:
        """Make the plan: where the phases begin, and how many weights the bounds of each leave."""
        super().check_options()
        o, s = self.options, self.final_sparsity
        n = len(o.phases) + 1
        lower, self.upper_sparsities = bounds(o.variant, s, n)
        if o.lower is not None:
            lower = list(o.lower)
        if o.upper is not None:
            self.upper_sparsities = list(o.upper)
        upper = self.upper_sparsities
        rising = all(a <= b for a, b in pairwise(upper))
        enclose = len(lower) == len(upper) == n and all(u <= s <= low for u, low in zip(upper, lower, strict=True))
        if not (rising and enclose and lower[-1] == upper[-1] == s and max(lower) < 1):
            raise ValueError(
                f"{n} phases to sparsity {s} need as many bounds, lower >= {s} >= upper, upper rising, and both {s} in "
                f"the last; got lower {lower} and upper {upper}"
            )
        self.edges = [self.step_at(share) for share in o.phases]
        self.upper = self.budgets(upper)
        self.lower = [_scaled(self.upper[-1], (1 - low) / (1 - s)) for low in lower]
        self.dense_state = o.mest_compat

    def phase(self, t: int) -> int:
        """Which phase's bounds the masks have after step `t`: that of the last exchange, or the last as it begins."""
        if t >= self.edges[-1]:
            return len(self.edges)
        exchange = t - t % self.options.delta_t
        return sum(exchange >= edge for edge in self.edges)

    def target_sparsity(self, t: int) -> float:
        """The upper bound."""
        return self.upper_sparsities[self.phase(t)]

    def initial_masks(
        self, model: nn.Module, sparsity: float, distribution: Distribution, power_scale: float
    ) -> dict[str, Tensor]:
        """The largest |w|, within the first upper bound."""
        return self.pick({name: scores.magnitude(w) for name, w in self.weights.items()}, self.upper[self.phase(0)])

    def due(self, part: Part, t: int) -> bool:
        """On the grid while there is something to exchange, and wherever more is active than the upper bound."""
        exchange = t % self.options.delta_t == 0 and over(part.kept, self._keep(part, t))
        return exchange or over(part.kept, self.allowed(t))

    def allowed(self, t: int) -> Budget:
        """The upper bound."""
        return self.upper[self.phase(t)]

    def next_masks(self, part: Part, t: int) -> dict[str, Tensor]:
        """What is kept, and random others."""
        weights, masks = part.layers.weights, part.layers.masks
        keep, upper = self._keep(part, t), self.upper[self.phase(t)]
        kept = self.pick(self.active(part, {name: self._score(w) for name, w in weights.items()}), keep)
        taken = {n: self.closed(kept[n] if self.options.regrow_dropped else mask, mask) for n, mask in masks.items()}
        draw = {name: scores.random(w, self.generator) for name, w in weights.items()}
        draw = {name: s.masked_fill(taken[name], -torch.inf) for name, s in draw.items()}
        grown = choose(draw, _difference(upper, keep), at_least=0)
        rest = set() if isinstance(upper, int) else {n for n in part.resting() if part.kept[n] <= upper[n]}
        return {name: kept[name] | grown[name] for name in masks if name not in rest}

    def _score(self, weight: Tensor) -> Tensor:
        score = scores.magnitude(weight)
        if self.options.grad_weight and weight.grad is not None:
            score = score + self.options.grad_weight * scores.gradient_magnitude(weight)
        return score

    def _keep(self, part: Part, t: int) -> Budget:
        """How many stay: the lower bound, or more where too few can grow up to the upper bound again, or can go."""
        lower, upper, names = self.lower[self.phase(t)], self.upper[self.phase(t)], list(part.layers.weights)
        if isinstance(lower, int):
            assert isinstance(upper, int)
            return self._least(part, names, lower, upper)
        assert not isinstance(upper, int)
        return {name: self._least(part, [name], lower[name], upper[name]) for name in names}

    def _least(self, part: Part, names: list[str], lower: int, upper: int) -> int:
        """The same for these layers together."""
        least = max(lower, min(upper, sum(self.sure(name) for name in names)))
        if self.options.regrow_dropped:
            return least
        return max(least, upper - sum(self.open(name) - part.kept[name] for name in names))


def _scaled(budget: Budget, share: float) -> Budget:
    return round(share * budget) if isinstance(budget, int) else thin(budget, share)


def _difference(upper: Budget, lower: Budget) -> Budget:
    if isinstance(upper, int) or isinstance(lower, int):
        assert isinstance(upper, int)
        assert isinstance(lower, int)
        return upper - lower
    return {name: upper[name] - n for name, n in lower.items()}
