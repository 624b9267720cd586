"""Reserve: the common frame of methods that train weights outside the network, so that they may enter it later.

    w = theta where m, else 0      the network: what the model, the optimizer's state and S2SAM see
    theta <- theta - lr v,  v <- mu v + dL/dw + lambda theta      outside it, where the method says

What theta is outside the mask m stands in a buffer, the reserve, which is moved here by the dense gradients of the
step, with SGD's rule and the learning rate of the weight's group; the optimizer moves the inside by its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from s2sam.hooks import StepContext
from s2sam.sparse import scores, sync
from s2sam.sparse.base import Sparsifier
from s2sam.sparse.budget import Distribution
from s2sam.sparse.part import Part


class Reserve(Sparsifier):
    """Keeps theta outside the network, moves it, and moves values in and out with the masks.

    Cost: two dense buffers, and a dense copy of the weight gradients within a step.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.reserve: dict[str, Tensor] = {}  #: theta; stale inside the network
        self.velocity: dict[str, Tensor] = {}
        self._seen: dict[str, Tensor] = {}
        super().__init__(*args, **kwargs)

    # -- what a method overrides ------------------------------------------------------------------------------------

    def trained(self, part: Part, name: str) -> Tensor:
        """Where weights outside the network move. Default: everywhere."""
        return ~part.layers.masks[name]

    def decay(self, group: Mapping[str, Any]) -> float:
        """The factor of theta in its gradient outside the network. Default: the group's weight decay."""
        return float(group.get("weight_decay", 0.0))

    def momentum(self, group: Mapping[str, Any]) -> float:
        """mu outside the network."""
        raise NotImplementedError(f"{type(self).__name__} must say what momentum its reserve has")

    # -- the frame --------------------------------------------------------------------------------------------------

    def initial_scores(self, model: nn.Module) -> dict[str, Tensor]:
        """|w|."""
        return {name: scores.magnitude(w) for name, w in self.weights.items()}

    def initial_masks(
        self, model: nn.Module, sparsity: float, distribution: Distribution, power_scale: float
    ) -> dict[str, Tensor]:
        """The largest; all other weights are kept aside."""
        self._keep_aside()
        return super().initial_masks(model, sparsity, distribution, power_scale)

    def adopt(self, model: nn.Module, present: dict[str, Tensor]) -> dict[str, Tensor]:
        """Where weights are not 0; those outside the network start at 0."""
        self._keep_aside()
        return super().adopt(model, present)

    def _keep_aside(self) -> None:
        self.reserve = {name: w.detach().clone() for name, w in self.weights.items()}
        sync.broadcast(self.reserve.values())
        self.velocity = {name: torch.zeros_like(w) for name, w in self.reserve.items()}

    def theta(self, part: Part, name: str) -> Tensor:
        """All weights of a layer, in the network or not."""
        weight = part.layers.weights[name].detach()
        return torch.where(part.layers.masks[name], weight, self.reserve[name].to(weight.device))

    def look(self, part: Part) -> None:
        """Keep the dense gradients until the step is done; a weight without one is left alone, as optimizers do."""
        for name in part.layers.weights:
            self._seen.pop(name, None)
        self._seen |= part.gradients()

    def moved(self, part: Part, context: StepContext) -> None:
        """Move what is outside the network, unless the step was skipped."""
        seen = {name: self._seen.pop(name) for name in part.layers.masks if name in self._seen}
        if context.nothing_moved():
            return
        groups: dict[int, tuple[dict[str, Any], list[str]]] = {}
        for name, weight, group in part.in_groups():
            if name in seen:
                groups.setdefault(id(group), (group, []))[1].append(name)
                for kept in (self.reserve, self.velocity):
                    kept[name] = kept[name].to(weight.device)
        for group, names in groups.values():
            theta, v = [self.reserve[name] for name in names], [self.velocity[name] for name in names]
            torch._foreach_mul_(v, self.momentum(group))
            torch._foreach_add_(v, [seen[name] for name in names], alpha=-1 if group.get("maximize") else 1)
            torch._foreach_add_(v, theta, alpha=self.decay(group))
            torch._foreach_mul_(v, [self.trained(part, name) for name in names])
            torch._foreach_sub_(theta, torch._foreach_mul(v, group["lr"]))

    def change_topology(self, part: Part) -> None:
        """And move values in and out of the network with the masks."""
        before = {name: self.theta(part, name) for name in part.layers.masks}
        super().change_topology(part)
        for name, mask in part.layers.masks.items():
            self.reserve[name] = before[name]
            part.layers.weights[name].copy_(before[name] * mask)

    def extra_state(self) -> dict[str, Any]:
        """What is outside the network."""
        return {"reserve": dict(self.reserve), "velocity": dict(self.velocity)}

    def load_extra_state(self, extra: Mapping[str, Any]) -> None:
        """What is outside the network."""
        for name, w in self.weights.items():
            self.reserve[name] = extra["reserve"][name].to(w.device, copy=True)
            self.velocity[name] = extra["velocity"][name].to(w.device, copy=True)
