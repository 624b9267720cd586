"""Top-KAST: the largest weights are the network, some more are trained beside it (Jayakumar et al. 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from s2sam.hooks import StepContext, check_number
from s2sam.sparse import scores, sync
from s2sam.sparse.base import Sparsifier
from s2sam.sparse.budget import Distribution
from s2sam.sparse.masks import pack_bits, unpack_bits
from s2sam.sparse.options import check_whole
from s2sam.sparse.part import Part
from s2sam.sparse.topk import topk_mask


@dataclass(frozen=True)
class TopKASTOptions:
    """What differs between runs of Top-KAST.

    `backward_sparsity`: of B; None leaves B twice as many weights as A. `delta_t`: steps between choices of A and B.
    `momentum`: of the weights of B that are not in A.
    """

    backward_sparsity: float | None = None
    delta_t: int = 1
    momentum: float = 0.9

    def __post_init__(self) -> None:
        if self.backward_sparsity is not None:
            check_number("backward_sparsity", self.backward_sparsity, 0.0, 1.0)
        check_whole("delta_t", self.delta_t)
        check_number("momentum", self.momentum, 0.0, 1.0)


class TopKAST(Sparsifier):
    """Forward with the largest |theta| of each layer, A; gradients for a larger set of the largest, B; no other moves.

    w = theta where A, else 0;   theta <- theta - lr v,  v <- mu v + dL/dw + (lambda / D) theta,  in B but not in A

    Every `delta_t` steps, after the optimizer's, A and B are chosen anew. The optimizer moves A, and its weight decay
    lambda acts there; what is outside A lives in a buffer of the method and is moved by the method, with the learning
    rate and weight decay of the weight's group, the latter divided by the density D of A (the exploration loss). So the
    network, its state and S2SAM see A alone. A weight that enters A comes with its value and no momentum.

    arXiv:2106.03517; neuralmagic/sparseml:.../pruning/modifier_pruning_topkast.py, where one optimizer moves both sets.
    That is the same for SGD with momentum mu, but for what happens to the momentum of weights that enter or leave A,
    which is lost here; for Adam and the like B's other weights are still moved by SGD.

    Defaults are for CIFAR and ImageNet alike: B twice A, which is 80 % for a network of 90 %. Cost: two dense buffers,
    and a dense weight gradient in every step, of which B's part is used; a choice ranks each layer twice.

    Raises:
        ValueError: B is sparser than A.
    """

    method = "top-kast"
    Options = TopKASTOptions
    options: TopKASTOptions

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for part in self.parts if self._ready else ():
            for name in part.layers.masks:
                self._choose(part, name)

    def check_options(self) -> None:
        """B holds A. Nothing is kept outside the network so far."""
        density, backward = 1 - self.final_sparsity, self.options.backward_sparsity
        if backward is not None and backward > self.final_sparsity:
            raise ValueError(f"backward_sparsity {backward} is above the sparsity {self.final_sparsity}; lower it")
        self.ratio = 2.0 if backward is None else (1 - backward) / density
        self.reserve: dict[str, Tensor] = {}  #: theta outside A
        self.velocity: dict[str, Tensor] = {}
        self.backward: dict[str, Tensor] = {}  #: B
        self._seen: dict[str, Tensor] = {}

    def initial_scores(self, model: nn.Module) -> dict[str, Tensor]:
        """|w|."""
        return {name: scores.magnitude(w) for name, w in self.weights.items()}

    def initial_masks(
        self, model: nn.Module, sparsity: float, distribution: Distribution, power_scale: float
    ) -> dict[str, Tensor]:
        """The largest; all other weights are kept aside."""
        self.reserve = {name: w.detach().clone() for name, w in self.weights.items()}
        sync.broadcast(self.reserve.values())
        self.velocity = {name: torch.zeros_like(w) for name, w in self.reserve.items()}
        return super().initial_masks(model, sparsity, distribution, power_scale)

    def theta(self, part: Part, name: str) -> Tensor:
        """All weights of a layer, in the network or not."""
        weight = part.layers.weights[name].detach()
        return torch.where(part.layers.masks[name], weight, self.reserve[name].to(weight.device))

    def look(self, part: Part) -> None:
        """Keep the gradients of B outside A until the step is done."""
        scale = getattr(part.optimizer, "grad_scale", None)  # of a GradScaler that leaves unscaling to the optimizer
        for name, weight in part.layers.weights.items():
            grad = torch.zeros_like(weight) if weight.grad is None else torch.nan_to_num(weight.grad, 0.0, 0.0, 0.0)
            self._seen[name] = grad if scale is None else grad / scale.to(grad.device)

    def moved(self, part: Part, context: StepContext) -> None:
        """Move what is in B but not in A, unless the step was skipped."""
        seen = {name: self._seen.pop(name) for name in part.layers.masks if name in self._seen}
        if context.nothing_moved():
            return
        for name, weight, group in part.in_groups():
            if name in seen:
                outside = self.backward[name].to(weight.device) & ~part.layers.masks[name]
                theta = self.reserve[name] = self.reserve[name].to(weight.device)
                decay = group.get("weight_decay", 0.0) / (1 - self.final_sparsity)
                v = self.velocity[name].to(weight.device).mul_(self.options.momentum).add_(seen[name] + decay * theta)
                self.velocity[name] = v.mul_(outside)
                theta -= group["lr"] * v

    def due(self, part: Part, t: int) -> bool:
        """Every `delta_t` steps."""
        return t % self.options.delta_t == 0

    def next_masks(self, part: Part, t: int) -> dict[str, Tensor]:
        """The largest |theta|, as many as before."""
        return {name: topk_mask(self.theta(part, name).abs(), n, check=False) for name, n in part.kept.items()}

    def change_topology(self, part: Part) -> None:
        """And move values in and out of the network with the masks."""
        before = {name: self.theta(part, name) for name in part.layers.masks}
        super().change_topology(part)
        for name, mask in part.layers.masks.items():
            self.reserve[name] = before[name]
            part.layers.weights[name].copy_(before[name] * mask)
            self._choose(part, name)

    def extra_state(self) -> dict[str, Any]:
        """Everything outside the network."""
        packed = {name: pack_bits(mask) for name, mask in self.backward.items()}
        return {"reserve": dict(self.reserve), "velocity": dict(self.velocity), "backward": packed}

    def load_extra_state(self, extra: Mapping[str, Any]) -> None:
        """Everything outside the network."""
        for name, w in self.weights.items():
            self.reserve[name] = extra["reserve"][name].to(w.device, copy=True)
            self.velocity[name] = extra["velocity"][name].to(w.device, copy=True)
            self.backward[name] = unpack_bits(extra["backward"][name], w.shape).to(w.device)

    def _choose(self, part: Part, name: str) -> None:
        theta = self.theta(part, name)
        n = min(theta.numel(), round(self.ratio * part.kept[name]))
        self.backward[name] = topk_mask(theta.abs(), n, check=False)
