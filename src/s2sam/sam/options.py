"""What S2SAM's arguments may be: one sentence for each that cannot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from s2sam.hooks import check_number
from s2sam.sam.directions import DIRECTIONS
from s2sam.sam.scales import SCALES
from s2sam.sam.scope import SCOPES

CHOICES: dict[str, tuple[Any, ...]] = {
    "direction": DIRECTIONS,
    "sign": (1, -1),
    "scale": tuple(SCALES),
    "scope": SCOPES,
    "nonfinite": ("auto", "skip", "ignore"),
    "on_clean_grad": ("raise", "warn", "ignore"),
}
PAPER: dict[str, Any] = {"direction": "gradient", "sign": 1, "scale": "norm", "scope": "all"}


@dataclass(frozen=True)
class Options:
    """The arguments of S2SAM that do not depend on an optimizer."""

    direction: str
    sign: int
    scale: str
    scope: str
    ema_beta: float
    generator: torch.Generator | None
    nonfinite: str
    on_clean_grad: str

    def check(self) -> None:
        """Raise ValueError for a value, or a combination, that cannot be."""
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
        if not check_number("ema_beta", self.ema_beta, 0.0, 1.0) < 1:
            raise ValueError(f"ema_beta must be below 1, got {self.ema_beta!r}")
        drawing = self.direction == "random" and isinstance(self.generator, torch.Generator)
        if self.generator is not None and not drawing:
            raise ValueError("generator must be a torch.Generator, and is for direction='random' only")
        if SCALES[self.scale].filters and self.scope == "norm":
            raise ValueError("scale='filter' displaces tensors with at least 2 dims, and scope='norm' has none")

    def check_members(self, optimizers: Sequence[Optimizer], models: Sequence[nn.Module]) -> None:
        """Raise ValueError for an optimizer that has nothing to do with the models, or lacks what the scale needs."""
        owned = {id(p) for m in models for p in m.parameters()}
        for optimizer in optimizers:
            name, groups = type(optimizer).__name__, optimizer.param_groups
            if models and not any(id(p) in owned for group in groups for p in group["params"]):
                raise ValueError(f"{name} shares no parameter with the model; pass the model that it trains")
            if SCALES[self.scale].by_lr and not all("lr" in group for group in groups):
                raise ValueError(f"scale='{self.scale}' needs 'lr' in every param_group, and this {name} has none")


def paper_options(rho: object, options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` with those of the published variant. Raises ValueError if they say something else."""
    for name, value in options.items():
        if name in PAPER and value != PAPER[name]:
            raise ValueError(f"S2SAM.paper means {name}={PAPER[name]!r}; for {name}={value!r} call S2SAM itself")
        if name in ("ema_beta", "generator"):
            raise ValueError(f"S2SAM.paper has no use for {name}; call S2SAM itself")
    if callable(rho):
        raise ValueError("S2SAM.paper has a constant rho; for a schedule call S2SAM itself")
    return PAPER | dict(options)
