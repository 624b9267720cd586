"""SR-STE: dense weights are trained, the n largest of every m are the network (Zhou et al. 2021, arXiv:2102.04010)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from s2sam.hooks import check_number
from s2sam.sparse.nofm import NOfM, NOfMOptions
from s2sam.sparse.options import check_whole
from s2sam.sparse.part import Part
from s2sam.sparse.reserve import Reserve


@dataclass(frozen=True)
class SRSTEOptions(NOfMOptions):
    """n of m; `lambda_w` pulls weights outside the network to 0; `delta_t`: steps between choices of the mask.

    `momentum` is that of the weights outside the network; None takes the one of the weight's group, 0 if it has none.
    """

    lambda_w: float = 2e-4
    delta_t: int = 1
    momentum: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("lambda_w", self.lambda_w)
        check_whole("delta_t", self.delta_t)
        if self.momentum is not None:
            check_number("momentum", self.momentum, 0.0, 1.0)


class SRSTE(Reserve, NOfM):
    """Forward with the n largest |theta| of every m, gradients for all; those outside decay faster.

    w = m theta;   theta <- theta - lr (dL/dw + lambda_w (1 - m) theta);   m: the n largest |theta| of each group

    dL/dw, taken at w, moves all of theta as if w were theta (the straight-through estimate); the term with lambda_w
    keeps the mask from changing back and forth. After every `delta_t` steps (1 in the paper) the mask is chosen anew
    from theta, which under S2SAM is the weight that is not displaced: no choice is made inside a step. Only m theta is
    in the model, the rest in a reserve that is moved here; see :mod:`s2sam.sparse.reserve`.

    With SGD, momentum included (but for Nesterov's and dampening), this is the authors' training up to rounding: a
    weight that enters or leaves the network takes its momentum along. With other optimizers the weights outside are
    moved by SGD at the same learning rate, which is slow beside Adam's steps; `momentum` speeds them up.
    NM-sparsity/NM-sparsity:devkit/sparse_ops/sparse_ops.py, where argsort settles ties.

    Defaults as theirs: lambda_w 2e-4, ImageNet ResNet-50 at lr .1, batch 256, 120 epochs, weight decay 5e-5; for CIFAR
    the same. Cost: two dense buffers and a dense weight gradient in every step; a choice compares each group.

    Raises:
        ValueError: the sparsity is not 1 - n / m, or no layer divides into groups of m.
    """

    method = "sr-ste"
    Options = SRSTEOptions
    options: SRSTEOptions

    def decay(self, group: Mapping[str, Any]) -> float:
        """lambda + lambda_w."""
        return super().decay(group) + self.options.lambda_w

    def momentum(self, group: Mapping[str, Any]) -> float:
        """The option, or the group's."""
        own = self.options.momentum
        return float(group.get("momentum", 0.0)) if own is None else own

    def due(self, part: Part, t: int) -> bool:
        """Every `delta_t` steps, but not in the last one."""
        return self.on_grid(t)

    def next_masks(self, part: Part, t: int) -> dict[str, Tensor]:
        """The n largest |theta| of each group; a layer without a gradient stays as it is."""
        rest = part.resting()
        return {n: self.of_groups(self.theta(part, n).abs()) for n in part.layers.masks if n not in rest}

    def change_topology(self, part: Part) -> None:
        """And SGD's momentum goes with the weights."""
        buffers = _momentum(part)
        # each of the two is 0 where the other is not
        both = {name: buffer + self.velocity[name].to(buffer.device) for name, buffer in buffers.items()}
        super().change_topology(part)
        for name, buffer in buffers.items():
            mask = part.layers.masks[name]
            self.velocity[name] = both[name] * ~mask
            buffer.copy_(both[name] * mask)


def _momentum(part: Part) -> dict[str, Tensor]:
    """SGD's momentum of each layer that has one."""
    if not isinstance(part.optimizer, torch.optim.SGD):
        return {}
    found = {name: part.optimizer.state[w].get("momentum_buffer") for name, w in part.layers.weights.items()}
    return {name: buffer for name, buffer in found.items() if buffer is not None}
