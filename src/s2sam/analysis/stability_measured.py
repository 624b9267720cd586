"""The same critical curvature, measured: the optimizers themselves on a quadratic, and which deviations grow."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from s2sam.analysis.stability import (
    METHODS,
    Array,
    Method,
    Setting,
    critical_curvature,
    first_unstable,
    period,
    polynomials,
    root_radius,
)
from s2sam.sam.single_step import S2SAM
from s2sam.sam.two_step import SAM

FAR = 1e6  #: a deviation that began at 1 and comes this far has diverged
ROUNDING = 1e-9  #: one that is smaller than that has died out
STEPS, MOST = 900, 9000  #: of a measurement, at least and at most


def measured_critical_curvature(
    method: Method, setting: Setting, *, steps: int | None = None, points: int = 129
) -> float:
    """The lowest curvature at which the real optimizer is unstable, found by training, to 0.05 %.

    The polynomial only says how many `steps` to watch, unless they are given: see :func:`steps_needed`.

    Raises:
        ValueError: it would take too many steps to show whether a deviation grows.

    Cost: 2 or 3 runs of `steps` steps.
    """
    watched = check_measurable(setting, (method,)) if steps is None else steps
    return first_unstable(lambda h: grows(method, h, setting, steps=watched), setting, points=points, within=1e-3)


def check_measurable(setting: Setting, methods: Sequence[Method] = METHODS) -> int:
    """The steps that the slowest of these methods needs; ValueError if they are more than 9,000, or not known."""
    if max(setting.momentum, setting.beta) > 0.99:
        raise ValueError("the stability boundary is measured for momentum and beta of at most 0.99; choose a lower one")
    steps = {method.name: steps_needed(method, setting) for method in methods}
    slowest = max(steps, key=lambda name: steps[name])
    if math.isinf(steps[slowest]):
        raise ValueError(
            f"{slowest} is unstable in a band of curvatures that is too narrow to be found by training; choose another "
            "c or momentum"
        )
    if steps[slowest] > MOST:
        raise ValueError(
            f"near the boundary of {slowest} deviations change so slowly that {steps[slowest]:,.0f} steps would be "
            f"needed to measure it, and {MOST:,} are the limit; choose a lower momentum or beta, or a c nearer to lr"
        )
    return int(steps[slowest])


def steps_needed(method: Method, setting: Setting) -> float:
    """Steps after which the critical mode shows: 18 of its beats, and until no other mode hides it; at least 900.

    At 0.5 % above the critical curvature one root z (with its conjugate) is the largest; |z^t| as seen in whole steps
    repeats after pi / (distance of its angle from 0 and pi). Another root r hides what grows until it has died out,
    6 / (1 - |r|) steps, or until that has grown by e^20. Roots of echo are those of pairs of steps. inf where the
    method is stable again within 20 % above its critical curvature: the grid of a measurement could step over that.

    >>> slow = Setting(lr=0.001, momentum=0.99, c=1.0)
    >>> steps_needed(METHODS[0], Setting()), round(steps_needed(METHODS[5], slow), -3)
    (900.0, 18000.0)
    """
    h = critical_curvature(method, setting)
    if not math.isfinite(h):
        return float(STEPS)
    if (root_radius(method, np.linspace(1.005, 1.2, 40) * h, setting) <= 1).any():
        return math.inf
    roots = np.roots(polynomials(method, np.array([1.005 * h]), setting)[0])
    sizes, angles = np.abs(roots), np.abs(np.angle(roots))
    critical = int(sizes.argmax())
    turn = min(angles[critical], math.pi - angles[critical])
    beat = math.pi / turn if turn > 1e-9 else 1.0
    others = np.abs(sizes - sizes[critical]) > 1e-9
    slowest = float(sizes[others].max(initial=0.0))
    hidden = min(6 / max(1 - slowest, 1e-12), 20 / max(sizes[critical] - 1, 1e-12))
    return float(max(STEPS, period(method) * max(18 * beat, hidden)))


def grows(method: Method, curvatures: Array, setting: Setting, *, steps: int = 900) -> NDArray[np.bool_]:
    r"""True where the optimizer moves away from the minimum of (1/2) sum_i h_i w_i^2; each i is a problem by itself.

    All start at 1. A weight grows if it comes to 1e6, where it is stopped by setting its h to 0, or if its largest
    size in the last third of the steps is above that in the second third. c is held fixed: S2SAM has scale "step",
    e = c d, and SAM's rho is set to c ||g|| in every step. The gradient is that of the whole problem, so that any two
    steps in a row are echo's two visits of one batch. A random direction never lets the weights rest; so there are
    two runs with the same draws, from 1 and from 2, and what grows is their difference.

    Example:
        >>> grows(Method("SGD", "sgd"), np.array([37.0, 39.0]), Setting()).tolist()
        [False, True]
    """
    h = torch.tensor(curvatures, dtype=torch.float64)
    starts = (1.0, 2.0) if method.direction == "random" else (1.0,)
    runs = [torch.nn.Parameter(torch.full_like(h, start)) for start in starts]
    movers = [real_optimizer(method, w, setting, rho=setting.c / setting.lr, scale="step") for w in runs]
    sizes, diverged = torch.zeros(3, len(h), dtype=torch.float64), torch.zeros(len(h), dtype=torch.bool)

    def fill(w: torch.nn.Parameter, optimizer: torch.optim.SGD) -> None:
        w.grad = torch.where(diverged, 0.0, h) * w.detach()
        if method.kind == "sam":
            optimizer.param_groups[0]["rho"] = setting.c * float(w.grad.norm())

    for t in range(steps):
        for w, (optimizer, single) in zip(runs, movers, strict=True):
            step_at(optimizer, single, partial(fill, w, optimizer))
        size = (runs[-1].detach() - runs[0].detach() if len(runs) > 1 else runs[0].detach()).abs()
        diverged |= size > FAR
        third = 3 * t // steps
        sizes[third] = torch.maximum(sizes[third], size)
    found: NDArray[np.bool_] = (diverged | (sizes[2] > sizes[1].clamp(min=ROUNDING))).numpy()
    return found


def real_optimizer(
    method: Method, w: torch.nn.Parameter, setting: Setting, *, rho: float, scale: str = "norm", decay: float = 0.0
) -> tuple[torch.optim.SGD, S2SAM | None]:
    """torch's SGD with the method attached; the S2SAM if it is one, whose `scale` it is (noise has its own: rms).

    Draws are always the same.
    """
    nesterov = method.kind == "nesterov" and setting.momentum > 0
    optimizer = torch.optim.SGD([w], setting.lr, setting.momentum, weight_decay=decay, nesterov=nesterov)
    if method.kind == "sam":
        SAM(optimizer, rho=rho)
    if method.kind == "echo":
        return optimizer, S2SAM.echo(optimizer, rho=rho, scale=scale)
    if method.kind == "noise":
        return optimizer, S2SAM.noise(optimizer, rho=rho, generator=torch.Generator().manual_seed(0))
    if method.kind != "s2sam":
        return optimizer, None
    return optimizer, S2SAM(
        optimizer,
        rho=rho,
        direction=method.direction,
        sign=method.sign,
        scale=scale,
        ema_beta=setting.beta,
        generator=torch.Generator().manual_seed(0) if method.direction == "random" else None,
    )


def step_at(optimizer: torch.optim.SGD, single: S2SAM | None, fill: Callable[[], None]) -> None:
    """One step with the gradients that `fill` writes, at the point (SAM: both points) where the method wants them."""
    if single is None:
        optimizer.step(fill)  # type: ignore[arg-type]
    else:
        with single.displaced():
            fill()
        optimizer.step()


def limit_cycle(
    method: Method, setting: Setting, *, curvature: float, rho: float, start: float, steps: int = 600
) -> float:
    """Root mean square of the weight over the second half of the steps on h w^2 / 2, with ||e|| = rho.

    Example:
        >>> from s2sam.analysis.stability import METHODS, quarter_turn_cycle
        >>> size = limit_cycle(METHODS[3], Setting(), curvature=20.0, rho=0.05, start=0.01)
        >>> round(size / 0.05, 3), round(quarter_turn_cycle(20.0, Setting()), 3)
        (14.142, 14.142)
    """
    w = torch.nn.Parameter(torch.full((1,), start, dtype=torch.float64))
    optimizer, single = real_optimizer(method, w, setting, rho=rho)

    def fill() -> None:
        w.grad = curvature * w.detach()

    squares = 0.0
    for t in range(steps):
        step_at(optimizer, single, fill)
        squares += float(w.detach()) ** 2 if 2 * t >= steps else 0.0
    return math.sqrt(2 * squares / steps)
