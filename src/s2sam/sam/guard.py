"""The guard: gradients and weights that are not where S2SAM's step needs them are named instead of used.

Three things can go wrong without an error of torch's own: a step whose gradients were taken at w (plain SGD under
another name), a window that opens when some of a step's gradients were taken at w already (half plain SGD), and weights
that somebody wrote to while they were displaced (what was written is overwritten by w).
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence

from torch import Tensor

from s2sam.sam.norms import largest

CLEAN_GRADIENT = (
    "S2SAM: the gradients were taken at the clean weights, not at the displaced ones, so this step would be plain "
    "{name}. Pass model=... and call that model itself in training mode with gradients enabled, or call sam.displace() "
    "before the forward. (Not counted: sub-modules called directly, functional_call with other tensors, model.eval(), "
    "torch.no_grad(). Stale gradients do count: use zero_grad(set_to_none=True). To accept it: on_clean_grad='ignore'.)"
)
MIXED_GRADIENTS = (
    "S2SAM: gradients taken at the clean weights are there already, and this forward would add others taken at the "
    "displaced weights. Let every forward of a step go through the model that S2SAM was given (a forward of a "
    "sub-module, model.net(x), does not), call sam.displace() before the first of them, or clear the gradients with "
    "optimizer.zero_grad(). (To accept it: on_clean_grad='ignore'.)"
)
WRITTEN = (
    "S2SAM: somebody wrote to weights while they were displaced: another optimizer that steps on them, p.copy_(...), "
    "clipping. That is undone, the weights are w again. Write after optimizer.step(), after sam.restore(), or inside "
    "`with sam.clean():`"
)


def complain(on_clean_grad: str, message: str) -> None:
    """Raise or warn, as the user wants it."""
    if on_clean_grad == "raise":
        raise RuntimeError(message)
    warnings.warn(message, stacklevel=7)


class GradientWatch:
    """Tells gradients that a backward has added since the last step from those that the step has left behind.

    Loops that clear gradients before the next forward leave none, which is all that is looked at then: no host read.
    For other loops it remembers which gradients the step left, and at which version; it reads one number from the
    device where that leaves a doubt, and the first time that gradients are zeroed in place.
    """

    def __init__(self) -> None:
        self._all = False  #: gradients were once left until the next forward: remember all of them
        self._zeroed = False  #: this loop zeroes gradients in place
        self._left: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def after_step(self, parameters: Sequence[Tensor]) -> None:
        """Remember the gradients that a step leaves: the first one, or all if that has mattered before."""
        self._left.clear()
        for p in parameters:
            if p.grad is not None:
                self._left[id(p)] = (weakref.ref(p.grad), p.grad._version)
                if not self._all:
                    return

    def added(self, parameters: Sequence[Tensor]) -> bool:
        """True if one of the gradients of `parameters` that are there has been added, and is not 0."""
        there = [(p, g) for p in parameters if (g := p.grad) is not None]
        if not there:
            return False
        age = [self._writes(p, g) for p, g in there]
        if not self._all:  # only one gradient was watched: the others are what it is
            self._all = True
            known = [n for n in age if n is not None]
            age = [known[0] if known else None] * len(age)
        changed = [g for (_, g), n in zip(there, age, strict=True) if n != 0]
        once = all(n == 1 for n in age)
        if not changed or (once and self._zeroed):
            return False
        added = float(largest(changed)) != 0
        self._zeroed = once and not added
        return added

    def _writes(self, p: Tensor, g: Tensor) -> int | None:
        """How often the gradient that the step left has been written to since; None for another one."""
        left, version = self._left.get(id(p), (None, 0))
        return g._version - version if left is not None and left() is g else None
