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
        direction, sign, scale, ema_beta: as in S2SAM.
        factor: multiplies rho, a function of the number of finished steps.
        scope: which parameters take part; None = all.
        noise: for direction "random": one tensor per parameter, a function of the number of finished steps.

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
        ema_beta: float = 0.9,
        factor: Callable[[int], float] = lambda step: 1.0,
        scope: Sequence[bool] | None = None,
        noise: Callable[[int], Sequence[Tensor]] | None = None,
    ) -> None:
        self._w = [w.detach().clone().requires_grad_() for w in weights]
        self.optimizer = make_optimizer(self._w)
        self.masks: list[Tensor | None] = list(masks) if masks is not None else [None] * len(self._w)
        self.gradients: list[Tensor | None] = [None] * len(self._w)
        self.means: list[Tensor | None] = [None] * len(self._w)
        self.noises: list[Tensor | None] = [None] * len(self._w)
        self.ema_beta, self.noise = ema_beta, noise
        self.scope = [True] * len(self._w) if scope is None else list(scope)
        self.direction, self.sign, self.scale, self.factor = direction, sign, scale, factor
        self.steps = 0

    @property
    def weights(self) -> list[Tensor]:
        """The clean weights w."""
        return [w.detach() for w in self._w]

    def displaced(self) -> list[Tensor]:
        """New tensors x = w + e; w itself does not change."""
        groups = self.optimizer.param_groups
        rho = {id(p): g["rho"] * self.factor(self.steps) for g in groups for p in g["params"]}
        lr = {id(p): g["lr"] for g in groups for p in g["params"]}
        with torch.no_grad():
            directions = [
                self._direction(i) if rho[id(w)] > 0 and self.scope[i] else None for i, w in enumerate(self._w)
            ]
            weighted = [
                None if d is None else (d * w.abs() if self.scale == "asam" else d)
                for d, w in zip(directions, self._w, strict=True)
            ]
            norm = _norm(weighted)
            size = _norm([w for w, d in zip(self._w, directions, strict=True) if d is not None])
            active = sum(int((w != 0).sum()) for w, d in zip(self._w, directions, strict=True) if d is not None)
            out = []
            for w, d in zip(self._w, directions, strict=True):
                x = w.detach().clone()
                if d is not None and self.scale == "step":
                    x = x + self.sign * rho[id(w)] * lr[id(w)] * d
                elif d is not None and self.scale == "filter":
                    for f in range(w.shape[0] if w.dim() > 1 else 0):
                        if _norm([d[f]]) > 0:
                            x[f] = w[f] + self.sign * rho[id(w)] * _norm([w[f]]) * d[f] / _norm([d[f]])
                elif d is not None and norm > 0:
                    e = self.sign * rho[id(w)] * d / norm
                    if self.scale == "relative":
                        e = e * size
                    if self.scale == "rms":
                        e = e * math.sqrt(active)
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
            self._remember(masked)
        self.steps += 1

    @torch.no_grad()
    def _remember(self, gradients: Sequence[Tensor | None]) -> None:
        """The mean of the gradients, and noise where a gradient or a weight is not 0."""
        draws = self._w if self.noise is None else self.noise(self.steps)
        for i, (w, g, n, m) in enumerate(zip(self._w, gradients, draws, self.masks, strict=True)):
            old = self.means[i]
            if g is not None or old is not None:
                now = torch.zeros_like(w) if g is None else g
                before = torch.zeros_like(w) if old is None else old
                mean = self.ema_beta * before + (1 - self.ema_beta) * now
                self.means[i] = mean if m is None else mean * m
            if g is not None or self.noises[i] is not None:
                self.noises[i] = torch.zeros_like(w) if g is None else n * ((g != 0) | (w != 0))

    def _direction(self, i: int) -> Tensor | None:
        if self.direction == "gradient":
            return self.gradients[i]
        if self.direction == "ema":
            return self.means[i]
        if self.direction == "random":
            return self.noises[i]
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
