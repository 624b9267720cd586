"""Adam and grown weights: bias correction by the age of each weight instead of the age of the optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from s2sam.detached import DetachedCopy
from s2sam.hooks import Handle, Phase, StepContext, step_hooks

if TYPE_CHECKING:
    from s2sam.sparse.base import Sparsifier
    from s2sam.sparse.part import Part

UNBORN = -1  #: of a weight that is pruned


def first_update(t: int, beta1: float = 0.9, beta2: float = 0.999) -> float:
    """|first update| / lr of a weight whose moments were set to 0 just before the optimizer's step `t` (from 1).

    (1 - beta1) / (1 - beta1^t) sqrt((1 - beta2^t) / (1 - beta2)),  1 at t = 1, up to (1 - beta1) / sqrt(1 - beta2)

    >>> [round(first_update(t), 2) for t in (1, 10, 100, 1000, 10000)]
    [1.0, 0.48, 0.98, 2.51, 3.16]
    """
    return (1 - beta1) / (1 - beta1**t) * math.sqrt((1 - beta2**t) / (1 - beta2))


class BiasByAge:
    """Corrects the updates that Adam or AdamW gives to weights that `sparsifier` has grown; others stay as they are.

    u(n) = lr m / (1 - beta1^n) / (sqrt(v / (1 - beta2^n)) + eps);   w <- w + u(t) - u(k) after the optimizer's step

    t is the optimizer's step, k the number of steps since the weight was grown (with m = v = 0). So a grown weight
    takes the steps that it would take in an Adam made at its growth. torch divides by 1 - beta^t, which is 1 by then:
    the first update is :func:`first_update` times lr, and up to 6.6 lr follow if the gradient stays the same.

    Make it after `sparsify()`; it serves every method. It has a state of its own to save.

    Cost: 4 bytes a weight, and after each step about as much work again as Adam's on the sparse layers.

    Raises:
        ValueError: an optimizer of the sparsifier is neither Adam nor AdamW.

    >>> from s2sam import sparsify
    >>> layer = torch.nn.Linear(8, 8)
    >>> optimizer = torch.optim.AdamW(layer.parameters())
    >>> rigl = sparsify(layer, optimizer, method="rigl", sparsity=0.5, total_steps=100, delta_t=10)
    >>> aged = BiasByAge(rigl)
    """

    def __init__(self, sparsifier: Sparsifier) -> None:
        for part in sparsifier.parts:
            if not isinstance(part.optimizer, torch.optim.Adam | torch.optim.AdamW):
                name = type(part.optimizer).__name__
                raise ValueError(f"BiasByAge corrects torch's Adam and AdamW; {name} has no bias correction of theirs")
        self.sparsifier = sparsifier
        self.birth = {  #: the optimizer's step at which each weight was grown; 0 from the start on
            name: torch.zeros_like(mask, dtype=torch.int32).masked_fill_(~mask, UNBORN)
            for name, mask in sparsifier.masks.items()
        }
        self._handles: list[Handle] = []
        for part in sparsifier.parts:

            def correct(context: StepContext, part: Part = part) -> None:
                self._correct(part, context)

            self._handles.append(step_hooks(part.optimizer).register(Phase.REMASK, correct))

    def remove(self) -> None:
        """Correct nothing any longer."""
        while self._handles:
            self._handles.pop().remove()

    def __reduce_ex__(self, protocol: Any) -> tuple[type[DetachedCopy], tuple[str, str]]:
        return DetachedCopy, ("a BiasByAge", "call BiasByAge(sparsifier) with a sparsifier of the copied model")

    def state_dict(self) -> dict[str, Any]:
        """The births, as tensors."""
        return {"birth": dict(self.birth)}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take back :meth:`state_dict`.

        Raises:
            ValueError: it is of other weights.
        """
        shapes = {name: birth.shape for name, birth in self.birth.items()}
        if {name: birth.shape for name, birth in saved["birth"].items()} != shapes:
            raise ValueError("these births are of other weights; load what state_dict() gave for the same model")
        self.birth = {name: birth.to(self.birth[name].device, copy=True) for name, birth in saved["birth"].items()}

    def _correct(self, part: Part, context: StepContext) -> None:
        if context.replace or context.nothing_moved():
            return
        for name, weight, group in part.in_groups():
            state, mask = part.optimizer.state.get(weight, {}), part.layers.masks[name]
            if "exp_avg_sq" not in state:
                continue
            wide = torch.promote_types(weight.dtype, torch.float32)
            t = torch.as_tensor(state["step"], dtype=wide, device=weight.device)
            birth = self.birth[name] = self.birth[name].to(weight.device)
            birth.copy_(torch.where(mask & (birth == UNBORN), t - 1, birth)).masked_fill_(~mask, UNBORN)
            k = t - birth.clamp(min=0)
            v = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
            change = _update(state["exp_avg"], v, t, group) - _update(state["exp_avg"], v, k, group)
            weight += torch.where(birth > 0, change, 0.0).to(weight.dtype)


def _update(m: Tensor, v: Tensor, n: Tensor, group: Mapping[str, Any]) -> Tensor:
    """u(n)."""
    beta1, beta2 = group["betas"]
    found: Tensor = group["lr"] * m / _bias(beta1, n) / ((v / _bias(beta2, n)).sqrt() + group["eps"])
    return found


def _bias(beta: float | Tensor, n: Tensor) -> Tensor:
    """1 - beta^n, to the last digit for small n too."""
    return -torch.expm1(n * math.log(beta)) if beta else torch.ones_like(n)
