"""Scheduled: the common frame of methods whose number of active weights follows a plan over the training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from s2sam.sparse import scores
from s2sam.sparse.base import Sparsifier
from s2sam.sparse.masks import counts
from s2sam.sparse.part import Part

Budget = int | dict[str, int]


class Scheduled(Sparsifier):
    """Knows the length of the training, and compares what is kept with what the plan says. Never reads the device.

    A change that is due in a step whose gradients are not finite, or that a GradScaler skips, does not happen; but a
    step in which more is active than the plan leaves is always due, so that the next one makes up for it.
    """

    gradual = True

    def adopt(self, model: nn.Module, present: dict[str, Tensor]) -> dict[str, Tensor]:
        """Where weights are not 0; of these the largest |w|, if the plan begins sparser. Nothing is grown back."""
        allowed = self.allowed(0)
        if not over(counts(present), allowed):
            return present
        size = {n: scores.magnitude(w).masked_fill(~present[n], -torch.inf) for n, w in self.weights.items()}
        return self.pick(size, allowed)

    def allowed(self, t: int) -> Budget:
        """How many weights the plan leaves after step `t`: in each layer, or in all together."""
        raise NotImplementedError(f"{type(self).__name__} must say how many weights its plan leaves")

    def behind(self, part: Part) -> bool:
        """More active weights than the plan leaves."""
        return over(part.kept, self.allowed(part.step))

    def check_options(self) -> None:
        """A plan needs the length of the training, and "global" counts need one optimizer."""
        if self.total_steps is None:
            raise ValueError(f"method {self.method!r} follows a plan; give total_steps, the number of optimizer steps")
        if self.distribution == "global" and len(self.parts) > 1:
            raise ValueError(
                f"method {self.method!r} with distribution='global' needs all prunable weights in one optimizer; "
                "choose another distribution, or one optimizer with several param_groups"
            )

    def step_at(self, share: float) -> int:
        """The step at which this share of the training is over."""
        assert self.total_steps is not None
        return round(share * self.total_steps)

    def active(self, part: Part, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        """The scores, -inf where a weight is pruned."""
        return {name: s.masked_fill(~part.layers.masks[name], -torch.inf) for name, s in scores.items()}


def over(kept: dict[str, int], budget: Budget) -> bool:
    """Whether a layer keeps more than its budget, or all together more than a budget that is a number.

    >>> over({"a": 3, "b": 1}, {"a": 3, "b": 2}), over({"a": 3, "b": 1}, 3)
    (False, True)
    """
    if isinstance(budget, int):
        return sum(kept.values()) > budget
    return any(n > budget[name] for name, n in kept.items())
