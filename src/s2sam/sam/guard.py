"""The guard: a step whose gradients were taken at the clean weights is not S2SAM's, and says so."""

from __future__ import annotations

import warnings

from s2sam.sam.slot import Slot

CLEAN_GRADIENT = (
    "S2SAM: the gradients were taken at the clean weights, not at the displaced ones, so this step would be plain "
    "{name}. Pass model=... and call that model itself in training mode with gradients enabled, or call sam.displace() "
    "before the forward. (Not counted: sub-modules called directly, functional_call with other tensors, model.eval(), "
    "torch.no_grad(). Stale gradients do count: use zero_grad(set_to_none=True). Missed: a step that mixes displaced "
    "and clean forwards. To accept it: on_clean_grad='ignore'.)"
)


def guard(slot: Slot, on_clean_grad: str) -> None:
    """Raise or warn if a parameter that should have been displaced has a gradient, and no window was opened."""
    if slot.fresh or on_clean_grad == "ignore" or not at_clean_weights(slot):
        return
    message = CLEAN_GRADIENT.format(name=type(slot.optimizer).__name__)
    if on_clean_grad == "raise":
        raise RuntimeError(message)
    warnings.warn(message, stacklevel=7)


def at_clean_weights(slot: Slot) -> bool:
    """True if a parameter with a direction and rho > 0 has a gradient."""
    for group in slot.optimizer.param_groups:
        with_direction = any(p.grad is not None and slot.buffer(p) is not None for p in group["params"])
        if with_direction and slot.rho(group) > 0:
            return True
    return False
