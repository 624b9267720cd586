"""GMP: gradual magnitude pruning, from dense to the target in the course of training (arXiv:1710.01878)."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from s2sam.hooks import check_number
from s2sam.sparse import scores
from s2sam.sparse.blocks import BlockChoice, InBlocks
from s2sam.sparse.budget import Distribution
from s2sam.sparse.options import check_whole
from s2sam.sparse.part import Part
from s2sam.sparse.scheduled import Budget, Scheduled, over
from s2sam.sparse.schedules import Cubic


@dataclass(frozen=True)
class GMPOptions:
    """The sparsity at the start, steps between changes, and the shares of `total_steps` between which it rises."""

    initial_sparsity: float = 0.0
    delta_t: int = 100
    t_start: float = 0.2
    t_end: float = 0.75

    def __post_init__(self) -> None:
        check_number("initial_sparsity", self.initial_sparsity, 0.0, 1.0)
        check_whole("delta_t", self.delta_t)
        check_number("t_start", self.t_start, 0.0, 1.0)
        check_number("t_end", self.t_end, 0.0, 1.0)


@dataclass(frozen=True)
class GMPBlockOptions(BlockChoice, GMPOptions):
    """As above, and the block.

    `min_per_filter`: how many of its largest weights (with a block: blocks) a filter keeps, while there are enough; 0:
    as published.
    """

    min_per_filter: int = 1

    def __post_init__(self) -> None:
        BlockChoice.__post_init__(self)
        GMPOptions.__post_init__(self)
        check_whole("min_per_filter", self.min_per_filter, 0)


class GMP(InBlocks, Scheduled):
    """Prune the smallest |w| every `delta_t` steps, so that the sparsity follows a cubic curve to the target.

    s_t = s_f + (s_i - s_f) (1 - (t - t0) / (t1 - t0))^3,  t0 = t_start T, t1 = t_end T, T = total_steps

    Evaluated at the multiples of `delta_t` between t0 and t1 and at t1 itself, after the optimizer's step; s_i before
    the first of them, exactly s_f from t1 on. Layer by layer, layer l being at s_l s_t / s_f on its way to its target
    s_l; or over all layers together with distribution="global", which leaves at least one weight in each layer.

    Pruning is hard: a pruned weight is 0 at once and never comes back, its optimizer state is cleared, and masks are
    nested (google-research/jaxpruner:`magnitude`; not its straight-through variant, whose pruned weights live on). The
    defaults of t_start and t_end are about those of google-research/rigl for ImageNet, 20,000 and 75,000 of 97,656.

    With `block` whole blocks go, those with the smallest sums of |w|.

    Cost: the masks alone; each change ranks every layer once. The steps before t1 compute with a denser network.

    >>> import torch
    >>> from s2sam import sparsify
    >>> layer = nn.Linear(10, 10)
    >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    >>> options = {"total_steps": 10, "delta_t": 2, "t_start": 0.0, "t_end": 0.4}
    >>> gmp = sparsify(layer, optimizer, method="gmp", sparsity=0.8, **options)
    >>> for t in range(5):
    ...     layer(torch.randn(4, 10)).sum().backward()
    ...     optimizer.step()
    ...     print(t + 1, gmp.sparsity())
    1 0.0
    2 0.7
    3 0.7
    4 0.8
    5 0.8

    Raises:
        ValueError: no total_steps; pruning ends before it starts; the initial sparsity is above the target.
    """

    method = "gmp"
    Options: ClassVar[type[GMPOptions]] = GMPBlockOptions
    options: GMPOptions

    def check_options(self) -> None:
        """Make the plan: when the sparsity changes, to what, and what each layer keeps then."""
        super().check_options()
        o, final = self.options, self.final_sparsity
        if o.initial_sparsity > final:
            raise ValueError(f"initial_sparsity {o.initial_sparsity} is above the sparsity to reach, {final}; lower it")
        start, self.end = self.step_at(o.t_start), self.step_at(o.t_end)
        if self.end <= start:
            raise ValueError(
                f"pruning from t_start={o.t_start} to t_end={o.t_end} of {self.total_steps} steps has no step in it; "
                "give a later t_end or more steps"
            )
        self.grid = [t for t in range(o.delta_t, self.end, o.delta_t) if t > start] + [self.end]
        curve = Cubic(o.initial_sparsity, final, start, self.end)
        self.sparsities = [max(self.there, s) for s in (o.initial_sparsity, *map(curve, self.grid))]
        self.plan = self.budgets(self.sparsities)

    def target_sparsity(self, t: int) -> float:
        """s_t of the last change up to `t`."""
        i = bisect_right(self.grid, t)
        return self.share(self.sparsities[i], self.plan[i])

    def initial_masks(
        self, model: nn.Module, sparsity: float, distribution: Distribution, power_scale: float
    ) -> dict[str, Tensor]:
        """The largest |w|, as many as the initial sparsity leaves: all by default."""
        return self.pick({name: scores.magnitude(w) for name, w in self.weights.items()}, self.plan[0])

    def due(self, part: Part, t: int) -> bool:
        """On the grid, where the plan goes down, and after it for as long as a step was missed."""
        return over(part.kept, self.allowed(t))

    def next_masks(self, part: Part, t: int) -> dict[str, Tensor]:
        """The largest |w| of those that are left."""
        left = {name: scores.magnitude(w) for name, w in part.layers.weights.items()}
        return self.pick(self.active(part, left), self.allowed(t))

    def allowed(self, t: int) -> Budget:
        """That of the last change up to `t`."""
        return self.plan[bisect_right(self.grid, t)]
