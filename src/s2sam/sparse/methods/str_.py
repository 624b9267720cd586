"""STR: a learned threshold for each layer, by which all its weights shrink (Kusupati et al. 2020, arXiv:2002.03231)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from s2sam.hooks import StepContext, check_number
from s2sam.sparse import sync
from s2sam.sparse.budget import Distribution
from s2sam.sparse.methods.gmp import GMP, GMPOptions
from s2sam.sparse.options import check_flag
from s2sam.sparse.part import Part
from s2sam.sparse.scheduled import Budget, over
from s2sam.sparse.soft import logit, shift, soft_threshold
from s2sam.sparse.topk import choose, topk_mask


@dataclass(frozen=True)
class STROptions(GMPOptions):
    """As GMP's, and what concerns the thresholds.

    `s_init`: s of every layer at the start. `s_decay`: weight decay of s; None is that of the layer's group. `follow`:
    the sparsity follows GMP's curve up to `t_end`; False lets it emerge, as in the paper, and meets the target at
    `t_end` alone. `delta_t`: steps between changes of the masks; 1 is the paper's.
    """

    t_start: float = 0.0
    s_init: float = -100.0
    s_decay: float | None = None
    follow: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("s_init", self.s_init, -math.inf)
        if self.s_decay is not None:
            check_number("s_decay", self.s_decay)
        check_flag("follow", self.follow)


class STR(GMP):
    """Soft thresholds: a weight is theta less the threshold of its layer, which is learned with the weights.

    w = S(theta, s) = sign(theta) relu(|theta| - g(s)),  g = sigmoid, one s for each layer
    dL/dtheta = dL/dw where w is not 0;   dL/ds = -g'(s) sum of dL/dw sign(theta) over these;   both with weight decay

    The model holds w, exactly 0 where pruned; theta and s live here. The optimizer moves w, and theta goes along:

        theta <- theta + (w' - w) - lr v,   v <- mu v + lambda (theta - w)
        s <- s - lr u,                      u <- mu u + dL/ds + lambda_s s

    v is what weight decay does to theta beyond what it does to w. For SGD, momentum mu, dampening and nesterov
    included, this is step by step what autograd through S would do (a test holds them equal); momentum that the
    optimizer has of a weight goes into v when the weight is pruned. A layer without a gradient rests. Other optimizers
    move theta as they move w, with decay outside their moments, and s is moved by SGD. S2SAM displaces w, on the mask.

    In the paper the sparsity emerges from `s_init` and weight decay. Here a controller adds one number to all s at each
    change, so that exactly as many weights are above their thresholds as the plan says; what the layers have learned of
    their thresholds decides which. With `follow=False` it does so at t_end only. After t_end the masks stay, and the
    weights in them are trained as they are, without a threshold.

    RAIVNLab/STR:utils/conv_type.py. Defaults are for CIFAR and ImageNet alike. Cost: two dense buffers until t_end; a
    change ranks all layers together.

    >>> layer = nn.Linear(10, 10)
    >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    >>> from s2sam import sparsify
    >>> str_ = sparsify(layer, optimizer, method="str", sparsity=0.8, total_steps=4, delta_t=1, t_end=0.5)
    >>> for t in range(3):
    ...     layer(torch.randn(4, 10)).sum().backward()
    ...     optimizer.step()
    ...     print(t + 1, str_.sparsity())
    1 0.7
    2 0.8
    3 0.8

    Raises:
        ValueError: as GMP.
    """

    method = "str"
    zeroes_active = True  # below their threshold, until the masks follow
    Options = STROptions
    options: STROptions
    default_distribution = "global"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.theta: dict[str, Tensor] = {}  #: until t_end
        self.velocity: dict[str, Tensor] = {}  #: v
        self.s: dict[str, Tensor] = {}
        self.s_velocity: dict[str, Tensor] = {}  #: u
        self._seen: dict[str, Tensor] = {}
        self._first: dict[str, bool] = {}  # whether SGD has no momentum of the layer so far
        super().__init__(*args, **kwargs)
        with torch.no_grad():
            for part in self.parts if self._ready else ():
                for name in part.layers.masks:
                    part.layers.weights[name].copy_(self.soft(part, name))

    def thresholds(self) -> dict[str, float]:
        """g(s) of each layer; one host read a layer."""
        return {name: float(torch.sigmoid(s)) for name, s in self.s.items()}

    def target_sparsity(self, t: int) -> float:
        """That of the plan; if the sparsity emerges, the one there is."""
        if self.options.follow or t >= self.end:
            return super().target_sparsity(t)
        kept = sum(sum(part.kept.values()) for part in self.parts)
        return 1 - kept / sum(w.numel() for w in self.weights.values())

    def initial_masks(
        self, model: nn.Module, sparsity: float, distribution: Distribution, power_scale: float
    ) -> dict[str, Tensor]:
        """theta is the weights, s is `s_init`."""
        for name, w in self.weights.items():
            self.theta[name] = w.detach().to(_wide(w.dtype), copy=True)
            self.velocity[name] = torch.zeros_like(self.theta[name])
            self.s[name] = torch.full((), self.options.s_init, dtype=self.theta[name].dtype, device=w.device)
            self.s_velocity[name] = torch.zeros_like(self.s[name])
        sync.broadcast(self.theta.values())
        return self._choose(list(self.weights), 0)

    def adopt(self, model: nn.Module, present: dict[str, Tensor]) -> dict[str, Tensor]:
        """The largest |w|, as many as there are, or as the plan leaves; theta of the others stays at 0."""
        return self.initial_masks(model, self.final_sparsity, self.distribution, self.power_scale)

    def soft(self, part: Part, name: str) -> Tensor:
        """S(theta, s) on the mask, in the weight's dtype."""
        shrunk = soft_threshold(self.theta[name], self.s[name])
        return (shrunk * part.layers.masks[name]).to(part.layers.weights[name].dtype)

    def look(self, part: Part) -> None:
        """Keep the sum of dL/dw sign(theta) of each layer's active weights."""
        scale = getattr(part.optimizer, "grad_scale", None)  # of a GradScaler that leaves unscaling to the optimizer
        for name, theta in self._live(part).items():
            weight = part.layers.weights[name]
            self._seen.pop(name, None)
            if weight.grad is not None:
                self._first[name] = _sgd_momentum(part, name) is None
                active = part.layers.masks[name] & (theta.abs() > torch.sigmoid(self.s[name]))
                total = torch.where(active, weight.grad * theta.sign(), 0.0).sum(dtype=theta.dtype)
                self._seen[name] = total if scale is None else total / scale.to(total)

    def moved(self, part: Part, context: StepContext) -> None:
        """Take theta and s along, unless the step was skipped; the weights are S of them."""
        seen = {name: self._seen.pop(name) for name in part.layers.masks if name in self._seen}
        live = {} if self.frozen else self._live(part)
        if not live or context.nothing_moved():
            return
        for name, weight, group in part.in_groups():
            if name not in seen:
                continue
            theta, s, mask = live[name], self.s[name], part.layers.masks[name]
            lr, decay = group["lr"], group.get("weight_decay", 0.0)
            before = self.soft(part, name)
            rate = torch.sigmoid(s) * (1 - torch.sigmoid(s))
            slope = -rate * seen[name] * (-1 if group.get("maximize") else 1)
            slope = slope + (decay if self.options.s_decay is None else self.options.s_decay) * s
            first = self._first[name]
            s -= lr * _with_momentum(self.s_velocity[name], slope, part, group, first)
            step = _with_momentum(self.velocity[name], decay * (theta - before), part, group, first)
            theta += torch.where(mask, weight - before, 0.0) - lr * step
            weight.copy_(self.soft(part, name))

    def due(self, part: Part, t: int) -> bool:
        """Every `delta_t` steps up to the end, there, and for as long as the plan is missed."""
        return (t % self.options.delta_t == 0 and t < self.end) or self._off(part, t)

    def behind(self, part: Part) -> bool:
        """More active weights than the plan leaves, or no last change yet."""
        return self._off(part, part.step)

    def allowed(self, t: int) -> Budget:
        """As GMP; everything, while the sparsity emerges."""
        if self.options.follow or t >= self.end:
            return super().allowed(t)
        return {name: w.numel() for name, w in self.weights.items()}

    def next_masks(self, part: Part, t: int) -> dict[str, Tensor]:
        """What is above its threshold, once all have been moved so that this is the right number."""
        return self._choose(list(part.layers.masks), t)

    def change_topology(self, part: Part) -> None:
        """And keep the momentum of what is pruned; after the end theta is not needed any longer."""
        old = {name: mask.clone() for name, mask in part.layers.masks.items()}
        momentum = {name: m.clone() for name in old if (m := _sgd_momentum(part, name)) is not None}
        super().change_topology(part)
        for name, mask in part.layers.masks.items():
            part.layers.weights[name].copy_(self.soft(part, name))
            if name in momentum:
                self.velocity[name] += torch.where(old[name] & ~mask, momentum[name], 0.0)
            if part.step >= self.end:
                del self.theta[name], self.velocity[name], self.s_velocity[name]

    def extra_state(self) -> dict[str, Any]:
        """theta, s and what moves them."""
        tensors = {"theta": self.theta, "velocity": self.velocity, "s": self.s, "s_velocity": self.s_velocity}
        return {key: dict(value) for key, value in tensors.items()}

    def load_extra_state(self, extra: Mapping[str, Any]) -> None:
        """theta, s and what moves them."""
        for key in ("theta", "velocity", "s", "s_velocity"):
            setattr(self, key, {n: v.to(self.weights[n].device, copy=True) for n, v in extra[key].items()})

    def _off(self, part: Part, t: int) -> bool:
        over_end = t >= self.end and any(name in self.theta for name in part.layers.masks)
        return over_end or over(part.kept, self.allowed(t))

    def _live(self, part: Part) -> dict[str, Tensor]:
        """theta of the part's layers, where the weights are now; nothing after the end."""
        for name in part.layers.masks if self.theta else ():
            device = part.layers.weights[name].device
            for held in (self.theta, self.velocity, self.s, self.s_velocity):
                if name in held:
                    held[name] = held[name].to(device)
        return {name: self.theta[name] for name in part.layers.masks if name in self.theta}

    def _choose(self, names: list[str], t: int) -> dict[str, Tensor]:
        """Masks, and all s moved by the number that makes them right."""
        if not self.options.follow and t < self.end:
            alive = {name: soft_threshold(self.theta[name], self.s[name]) != 0 for name in names}
            return {name: mask | topk_mask(self.theta[name].abs(), 1, check=False) for name, mask in alive.items()}
        above = {name: logit(self.theta[name].abs()) - self.s[name] for name in names}
        allowed = self.allowed(t)
        masks = choose(above, allowed)
        for group in [names] if isinstance(allowed, int) else [[name] for name in names]:
            by = shift([above[name] for name in group], [masks[name] for name in group])
            for name in group:
                self.s[name] += by.to(self.s[name].device)
        return masks


def _with_momentum(velocity: Tensor, slope: Tensor, part: Part, group: Mapping[str, Any], first: bool) -> Tensor:
    """The step of SGD with the group's momentum, lr apart; of other optimizers without it. Updates `velocity`.

    v <- mu v + (1 - dampening) slope, but v <- slope in the first step, as torch's SGD has it.
    """
    mu = group["momentum"] if isinstance(part.optimizer, torch.optim.SGD) else 0.0
    velocity.mul_(mu).add_(slope, alpha=1 - group["dampening"] if mu and not first else 1)
    return slope + mu * velocity if mu and group["nesterov"] else velocity


def _sgd_momentum(part: Part, name: str) -> Tensor | None:
    state = part.optimizer.state.get(part.layers.weights[name], {})
    found = state.get("momentum_buffer") if isinstance(part.optimizer, torch.optim.SGD) else None
    return found if isinstance(found, Tensor) else None


def _wide(dtype: torch.dtype) -> torch.dtype:
    """float32 for anything narrower."""
    return torch.promote_types(dtype, torch.float32)
