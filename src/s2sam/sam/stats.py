"""What S2SAM measures about itself: always from the weights and gradients, never echoed from its settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from s2sam.hooks import StepContext
from s2sam.sam.directions import Momentum
from s2sam.sam.norms import FLOOR, total_dot, total_norm, widen
from s2sam.sam.scales import Scale
from s2sam.sam.sharded import shard

if TYPE_CHECKING:
    from s2sam.sam.blocks import Block
    from s2sam.sam.slot import Slot


class Stats:
    """Last measured numbers, kept as device tensors until they are read."""

    def __init__(self, every: int) -> None:
        self.every, self.first = every, 0  #: steps between measured ones, and the first of them
        self._values: dict[str, Tensor | float] = {}
        self._skipped = 0
        self._skipped_on_device: Tensor | None = None
        self._pending: list[tuple[Block, list[Tensor]]] = []

    def due(self, step: int) -> bool:
        """True if this step is measured."""
        return self.every > 0 and step % self.every == self.first

    def in_second_visits(self) -> None:
        """Of every batch that comes twice measure the second visit only: the first one is not displaced (echo)."""
        if self.every:
            self.every, self.first = self.every + self.every % 2, 1

    def count_skips(self, found: int | Tensor) -> None:
        """Add a skipped step, or a device flag that says whether it was one."""
        if isinstance(found, int):
            self._skipped += found
        elif self._skipped_on_device is None:
            self._skipped_on_device = found.clone()
        else:
            self._skipped_on_device.add_(found)

    def before_displace(self, closed: list[tuple[Slot, list[Block]]], scale: Scale) -> None:
        """Keep a copy of the intended displacement of every block, up to its coefficient (twins: x - w)."""
        self._pending = []
        momentum, decay = [], []
        for slot, blocks in closed:
            for block in blocks:
                w, kept, directions = block.lists()
                if block.twin is True:
                    aim = list(torch._foreach_sub(kept, w))  # has its sign already
                else:
                    aim = [t.clone() for t in scale.shaped(directions, w)]
                self._pending.append((block, aim))
            for group in slot.optimizer.param_groups if isinstance(slot.direction, Momentum) else ():
                if group.get("weight_decay") and 0 < group.get("momentum", 0) < 1:
                    have = [(p, b) for p in group["params"] if (b := slot.buffer(p)) is not None]
                    state, of = slot.optimizer.state, slot.direction.of
                    momentum.append(total_norm([d for p, b in have if (d := of(p, b, state[p])) is not None]))
                    decay.append(total_norm([p for p, _ in have]) * group["weight_decay"] / (1 - group["momentum"]))
        if momentum:
            self._values["decay_share"] = total_norm(decay) / total_norm(momentum)

    def after_displace(self, sign: int) -> None:
        """||x - w||, the same over ||w||, and the projection of x - w on the intended direction."""
        moves: list[Tensor] = []
        aims: list[Tensor] = []
        owners = [p for block, _ in self._pending for p in block.p]
        for block, aim in self._pending:
            x, w, _ = block.lists()
            moves += [widen(p.detach()) - b for p, b in zip(x, w, strict=True)]
            aims += [a * (1 if block.twin is True else sign) for a in aim]
        clean = [kept for block, _ in self._pending for kept in block.lists()[1]]
        self._values["displacement"] = total_norm(moves, over=owners)
        self._values["relative"] = self._values["displacement"] / total_norm(clean, over=owners).clamp_min(FLOOR)
        self._pending = []
        length = total_norm(aims, over=owners)
        self._values["projection"] = (total_dot(moves, aims, over=owners) / length).nan_to_num(0.0)

    def no_displacement(self) -> None:
        """This step's forward ran at w: no direction yet, or rho = 0."""
        self._values["displacement"] = self._values["relative"] = self._values["projection"] = 0.0
        self._values.pop("alignment", None)

    def at_step(self, slot: Slot, context: StepContext, sign: int) -> None:
        """Gradient norm over active coordinates, and its cosine with the direction of the window that ends."""
        gradients = context.gradients()
        if not gradients:
            return
        norm = total_norm(gradients)
        loss_scale = getattr(context.optimizer, "grad_scale", None)
        self._values["gradient_norm"] = norm if loss_scale is None else norm / loss_scale
        owners, g, e = [], [], []
        for block in slot.blocks:
            x, w, _ = block.lists()
            for p, here, b in zip(block.p, x, w, strict=True):
                if p.grad is not None:
                    owners.append(p)
                    g.append(shard(p.grad))
                    e.append((widen(here.detach()) - b) * sign)
        if g:
            lengths = total_norm(g, over=owners) * total_norm(e, over=owners)
            self._values["alignment"] = (total_dot(g, e, over=owners) / lengths).nan_to_num(0.0)

    def read(self, step: int) -> dict[str, float]:
        """All numbers as floats."""
        skipped = self._skipped + (0 if self._skipped_on_device is None else float(self._skipped_on_device))
        return {"step": float(step), "skipped": float(skipped)} | {k: float(v) for k, v in self._values.items()}
