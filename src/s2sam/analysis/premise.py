r"""Is the previous gradient a direction in which the next batch's loss rises? Measured step by step, as a run trains.

S2-SAM displaces the weights by e_t = rho g_{t-1} / ||g_{t-1}|| and takes the gradient of batch t there. Its premise is
that this is, for batch t, what SAM's own e = rho g_t / ||g_t|| is: a way up. Before each step, at the clean w_t, on the
batch B_t that the step is about to be taken on:

    odd   (L(w_t + e) - L(w_t - e)) / 2               the slope that e meets
    even  (L(w_t + e) + L(w_t - e)) / 2 - L(w_t)      the curvature that e meets

for e along g_{t-1}, along the momentum, along the gradient of B_t itself, and along noise; all of length rho.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from s2sam.analysis.hessian import ActiveLoss
from s2sam.analysis.lanczos import gaussian
from s2sam.analysis.sharpness import along
from s2sam.sam.directions import MOMENTUM_KEYS
from s2sam.sam.norms import all_finite
from s2sam.train.state import TrainState
from s2sam.train.step import train_step

DIRECTIONS = ("previous", "momentum", "own", "random")
WHAT = ("odd", "even")


@dataclass(frozen=True)
class Look:
    """One step of a probe. Numbers that are not there (no momentum, a gradient of 0) are NaN."""

    step: int
    numbers: dict[str, float]


def probe(
    state: TrainState,
    *,
    steps: int,
    rho: float,
    generator: torch.Generator,
    bn: str = "train",
    dtype: torch.dtype = torch.float32,
    advance: bool = True,
    on_step: Callable[[int], None] = lambda done: None,
) -> list[Look]:
    """Train on from `state` for `steps` + 1 steps of its own stream of batches, looking before each but the first.

    The steps are those that the run takes there, bit for bit: looking happens on copies. Steps whose gradients were
    not finite are looked at no further.

    Args:
        state: as loaded from a checkpoint; it is moved on.
        steps: how many looks.
        rho: length of all displacements.
        generator: of the random direction.
        bn: statistics of BatchNorm in the losses: "train" = those of the batch, as the training forward has them.
        dtype: of the losses that are looked at.
        advance: count the steps in schedules and plans; False at the end of a run, where both are over.
        on_step: called with how many looks are done.

    Raises:
        ValueError: the mask does not fit.

    Cost: a look is 9 losses, a gradient and a product with the Hessian of one batch, and a copy of the network.
    """
    grabbed: list[list[Tensor]] = []
    parameters = [p for p in state.model.parameters() if p.requires_grad]

    def grab(*_: object) -> None:
        grabbed[:] = [[torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in parameters]]

    handle = state.optimizer.register_step_post_hook(grab)
    looks: list[Look] = []
    previous: list[Tensor] | None = None
    state.model.train()
    try:
        for x, y in stream(state, steps + 1):
            look = None
            if previous is not None:
                loss = batch_loss(state, x, y, bn, dtype)
                look = look_at(state, loss, previous, rho, generator)
            grabbed.clear()
            train_step(state, x, y)
            if advance:
                state.advance()
            now = grabbed[0] if grabbed and all_finite(grabbed[0]) else None
            if look is not None and previous is not None:
                look["cosine"] = math.nan if now is None else cosine(loss.flat(now), loss.flat(previous))
                looks.append(Look(state.step, look))
                on_step(len(looks))
            previous = now
    finally:
        handle.remove()
    return looks


def stream(state: TrainState, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The next batches of the run as the network sees them, epoch after epoch."""
    while True:
        for batch in state.batches:
            if count == 0:
                return
            count -= 1
            yield state.mix(*batch)


def batch_loss(state: TrainState, x: Tensor, y: Tensor, bn: str, dtype: torch.dtype) -> ActiveLoss:
    """The loss of one batch around the clean weights."""
    return ActiveLoss(
        state.model, x, y, masks={} if state.sparsifier is None else state.sparsifier.masks, bn=bn, batch_size=len(x),
        label_smoothing=state.config.data_options.label_smoothing, dtype=dtype,
    )  # fmt: skip


def look_at(
    state: TrainState, loss: ActiveLoss, previous: list[Tensor], rho: float, generator: torch.Generator
) -> dict[str, float]:
    r"""The numbers of one look; see the top of the file. Also what c and the batch sharpness are made of.

    .. math:: \text{batch sharpness} = g^T H_B\, g / g^T g, \qquad g = \nabla L_B(w_t)
    """
    base, own = loss.gradient()
    last = loss.flat(previous).to(loss.dtype)
    directions = {"previous": last, "own": own, "random": gaussian((1, loss.size), generator, own)[0]}
    momentum = momentum_of(state)
    if momentum is not None:
        directions["momentum"] = loss.flat(momentum).to(loss.dtype)
    size, last_size = float(own.norm()), float(last.norm())
    found = {
        "loss": base, "gradient_norm": last_size, "own_gradient_norm": size, "weight_norm": float(loss.weights.norm()),
        "cosine_own": cosine(own, last),
        "batch_sharpness": float((own * loss.product(own[None])[0]).sum()) / size**2 if size > 0 else math.nan,
    }  # fmt: skip
    for name in DIRECTIONS:
        d = directions.get(name)
        length = 0.0 if d is None else float(d.norm())
        parts = (math.nan, math.nan) if d is None or length == 0 else along(loss, base, d * (rho / length))
        found |= {f"{name}_{what}": part for what, part in zip(WHAT, parts, strict=True)}
    return found


def momentum_of(state: TrainState) -> list[Tensor] | None:
    """The base optimizer's momentum, one tensor for each parameter; None if it keeps none."""
    found = []
    for p in (p for p in state.model.parameters() if p.requires_grad):
        kept = state.optimizer.state.get(p, {})
        buffers = [kept[key] for key in MOMENTUM_KEYS if kept.get(key) is not None]
        if not buffers:
            return None
        found.append(buffers[0])
    return found


def cosine(a: Tensor, b: Tensor) -> float:
    """<a, b> / (||a|| ||b||), NaN if one is 0.

    >>> cosine(torch.tensor([1.0, 0.0]), torch.tensor([-2.0, 0.0]))
    -1.0
    """
    size = float(a.norm()) * float(b.norm())
    return float((a.double() * b.double()).sum()) / size if size > 0 else math.nan


def summary(looks: Sequence[Look], rho: float) -> dict[str, Any]:
    """Mean and standard deviation over the looks of each number that is finite, and shares of steps that go up.

    `c` is rho / ||g_{t-1}||, `rises` the share of looks in which L(w_t + e_t) > L(w_t).
    """
    found: dict[str, Any] = {"looks": len(looks)}
    if not looks:
        return found
    numbers = [
        look.numbers | {"c": rho / look.numbers["gradient_norm"] if look.numbers["gradient_norm"] > 0 else math.nan,
                        "rho_over_w": rho / look.numbers["weight_norm"]}
        for look in looks
    ]  # fmt: skip
    for name in numbers[0]:
        found[name] = mean_and_sd([row[name] for row in numbers])
    for name in DIRECTIONS:
        rises = [row[f"{name}_odd"] + row[f"{name}_even"] > 0 for row in numbers if math.isfinite(row[f"{name}_odd"])]
        found[f"{name}_rises"] = statistics.fmean(rises) if rises else None
    return found


def mean_and_sd(values: Sequence[float]) -> dict[str, float | None]:
    """Of the finite ones; None where there are too few.

    >>> mean_and_sd([1.0, 3.0, math.nan])
    {'mean': 2.0, 'sd': 1.4142135623730951}
    """
    finite = [value for value in values if math.isfinite(value)]
    return {
        "mean": statistics.fmean(finite) if finite else None,
        "sd": statistics.stdev(finite) if len(finite) > 1 else None,
    }
