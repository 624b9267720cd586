"""S2-SAM written down a second time, slowly: two separate copies of the weights and no hooks. The truth in tests.

Nothing here is shared with the fast version, on purpose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer


class ReferenceS2SAM:
    r"""The recursion of S2-SAM on explicit lists of tensors.

    .. math::
        x_t = w_t + e_t, \qquad e_t = s \rho\, d / \|d\|_2, \qquad w_{t+1} = w_t - \eta\,\mathrm{base}(m \odot g_t, w_t)

    Args:
        weights: the initial w, one tensor per parameter; copied.
        make_optimizer: builds the base optimizer from the list of weights (in groups, each with its "rho").
        masks: one boolean tensor or None per parameter; replace entries of `self.masks` to change the topology.
        direction, sign, scale: as in S2SAM.
        factor: multiplies rho, a function of the number of finished steps.

    Cost: three copies of the parameters and a Python loop per tensor.

    Example:
        >>> ref = ReferenceS2SAM([torch.tensor([3.0])], lambda w: torch.optim.SGD([{"params": w, "rho": 1.0}], lr=0.1))
        >>> for _ in range(2):
        ...     (x,) = ref.displaced()
        ...     ref.step([x])                       # the gradient of x^2 / 2 is x
        >>> ref.weights[0]                          # 2.7 - 0.1 * (2.7 + 1)
        tensor([2.3300])
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        make_optimizer: Callable[[list[Tensor]], Optimizer],
        *,
        masks: Sequence[Tensor | None] | None = None,
        direction: str = "gradient",
        sign: int = 1,
        scale: str = "norm",
        factor: Callable[[int], float] = lambda step: 1.0,
    ) -> None:
        self._w = [w.detach().clone().requires_grad_() for w in weights]
        self.optimizer = make_optimizer(self._w)
        self.masks: list[Tensor | None] = list(masks) if masks is not None else [None] * len(self._w)
        self.gradients: list[Tensor | None] = [None] * len(self._w)
        self.direction, self.sign, self.scale, self.factor = direction, sign, scale, factor
        self.steps = 0

    @property
    def weights(self) -> list[Tensor]:
        """The clean weights w."""
        return [w.detach() for w in self._w]

    def displaced(self) -> list[Tensor]:
        """New tensors x = w + e; w itself does not change."""
        rho = {id(p): g["rho"] * self.factor(self.steps) for g in self.optimizer.param_groups for p in g["params"]}
        with torch.no_grad():
            directions = [self._direction(i) if rho[id(w)] > 0 else None for i, w in enumerate(self._w)]
            weighted = [
                None if d is None else (d * w.abs() if self.scale == "asam" else d)
                for d, w in zip(directions, self._w, strict=True)
            ]
            norm = _norm(weighted)
            size = _norm([w for w, d in zip(self._w, directions, strict=True) if d is not None])
            out = []
            for w, d in zip(self._w, directions, strict=True):
                x = w.detach().clone()
                if d is not None and norm > 0:
                    e = self.sign * rho[id(w)] * d / norm
                    if self.scale == "relative":
                        e = e * size
                    if self.scale == "asam":
                        e = e * w * w
                    x = x + e
                out.append(x)
            return out

    def step(self, gradients: Sequence[Tensor | None]) -> None:
        """The base optimizer's step at w with gradients taken at x; does nothing if one of them is not finite."""
        if all(g is None or bool(torch.isfinite(g).all()) for g in gradients):
            masked = [
                None if g is None else (g.clone() if m is None else torch.where(m, g, torch.zeros_like(g)))
                for g, m in zip(gradients, self.masks, strict=True)
            ]
            for w, g in zip(self._w, masked, strict=True):
                w.grad = g
            self.optimizer.step()
            self.gradients = [  # no gradient this time: no displacement, as for a gradient of 0
                torch.zeros_like(old) if g is None and old is not None else g
                for g, old in zip(masked, self.gradients, strict=True)
            ]
            self._mask()
        self.steps += 1

    def _direction(self, i: int) -> Tensor | None:
        if self.direction == "gradient":
            return self.gradients[i]
        state = self.optimizer.state.get(self._w[i], {})
        momentum: Tensor | None = state.get("momentum_buffer", state.get("exp_avg"))
        return momentum

    @torch.no_grad()
    def _mask(self) -> None:
        for w, m in zip(self._w, self.masks, strict=True):
            if m is not None:
                w[~m] = 0
                for value in self.optimizer.state.get(w, {}).values():
                    if isinstance(value, Tensor) and value.shape == w.shape:
                        value[~m] = 0


def _norm(tensors: Sequence[Tensor | None]) -> float:
    return math.sqrt(sum(float((t.double() ** 2).sum()) for t in tensors if t is not None))
