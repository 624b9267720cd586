"""The contestants: SGD, S2-SAM with several options, SAM, RigL, RigL with S2-SAM, each with a network of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2sam import S2SAM, SAM, sparsify

RHO, SPARSITY = 0.05, 0.9
SGD = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4}
BASES: dict[str, dict[str, bool]] = {"default": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}
VARIANTS: dict[str, dict[str, str]] = {
    "s2sam-momentum": {"direction": "momentum"},
    "s2sam-ema": {"direction": "ema"},
    "s2sam-random": {"direction": "random"},
    "s2sam-step": {"scale": "step"},
    "s2sam-filter": {"scale": "filter"},
    "s2sam-norm-layers": {"scope": "norm"},
}  #: what differs from the defaults of S2SAM
DELTA_T = 100  #: RigL's steps between topology updates, over which the cost of an update is spread


@dataclass
class Arm:
    """A network, its optimizer and what is attached to it.

    `train_step` is one step of training on one fixed batch. `optimizer_step` is the part of it that is not forward or
    backward: displace, restore, base step, masks, next direction; with gradients that `refresh` puts in place.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch: tuple[Tensor, Tensor]
    sam: Any = None
    sparsifier: Any = None
    needs_closure: bool = False
    visits: int = 1  #: steps after which its work repeats: echo displaces every second one
    gradients: list[Tensor] = field(default_factory=list)
    fresh: list[Tensor] = field(default_factory=list)

    def loss(self) -> Tensor:
        """Forward and backward."""
        x, y = self.batch
        loss = F.cross_entropy(self.model(x), y)
        loss.backward()
        return loss

    def train_step(self) -> None:
        """As in a user's loop: forward, backward, step, zero_grad."""
        if self.needs_closure:
            self.optimizer.step(self.loss)
        else:
            self.loss()
            self.optimizer.step()
        self.optimizer.zero_grad()

    def capture(self) -> None:
        """Keep the gradients of one real backward as the fixed ones."""
        self.loss()
        if isinstance(self.sam, S2SAM):
            self.sam.restore()
        self.gradients = [p.grad.detach().clone() for p in self.model.parameters() if p.grad is not None]
        self.optimizer.zero_grad()

    def refresh(self) -> None:
        """Make fresh copies of the fixed gradients, for one step (untimed)."""
        self.fresh = [g.clone() for g in self.gradients]
        self.optimizer.zero_grad()

    def optimizer_step(self) -> None:
        """What is timed as "optimizer only"."""
        if self.needs_closure:

            def closure() -> Tensor:
                self._put_gradients()
                return self.gradients[0]

            self.optimizer.step(closure)
            return
        if self.sam is not None:
            self.sam.displace()
        self._put_gradients()
        self.optimizer.step()

    def _put_gradients(self) -> None:
        for p, g in zip(self.model.parameters(), self.fresh, strict=True):
            p.grad = g

    def one_pass(self) -> None:
        """One forward and backward, and nothing else."""
        self.loss()
        self.optimizer.zero_grad()


def make_arm(
    kind: str,
    build: Callable[[], nn.Module],
    batch: tuple[Tensor, Tensor],
    *,
    base: str = "default",
    delta_t: int = DELTA_T,
) -> Arm:
    """One contestant, ready: "sgd", "s2sam-gradient", one of :data:`VARIANTS`, "echo", "sam", "rigl", "rigl+s2sam"."""
    model = build().train()
    optimizer = torch.optim.SGD(model.parameters(), **SGD, **BASES[base])
    arm = Arm(model, optimizer, batch)
    if kind.startswith("rigl"):
        arm.sparsifier = sparsify(
            model,
            optimizer,
            method="rigl",
            sparsity=SPARSITY,
            total_steps=100_000,
            delta_t=delta_t,
            generator=torch.Generator().manual_seed(0),
        )
    if kind == "sam":
        arm.sam, arm.needs_closure = SAM(optimizer, model=model, rho=RHO), True
    elif kind == "echo":
        arm.sam, arm.visits = S2SAM.echo(optimizer, model=model), 2
    elif "s2sam" in kind:
        arm.sam = S2SAM(optimizer, model=model, rho=RHO, **VARIANTS.get(kind, {}))
    arm.capture()
    for _ in range(4):  # state exists, directions exist; echo is at a first visit
        arm.refresh()
        arm.optimizer_step()
    arm.optimizer.zero_grad()
    return arm
