"""Schedules of the radius, as functions of the number of finished steps: `S2SAM(..., rho=late(total_steps, rho=0.1))`.

S2SAM multiplies what they return by the "rho" of each param_group, which is 1 where nobody set it. While a schedule is
0 nothing is displaced: those steps are the base optimizer's, bit for bit.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from torch.optim import Optimizer

from s2sam.hooks import check_number

Schedule = Callable[[int], float]


def late(total_steps: int, start: float = 0.75, *, rho: float = 1.0) -> Schedule:
    """0 before the share `start` of the run, `rho` from there on.

    A few final epochs of SAM are reported to come close to SAM throughout (arXiv 2410.10373).

    Example:
        >>> [late(8, rho=0.1)(t) for t in (0, 5, 6, 7)]
        [0.0, 0.0, 0.1, 0.1]
    """
    first, radius = check_number("start", start, 0.0, 1.0) * _steps(total_steps), check_number("rho", rho)
    return partial(_late, first, radius)


def rising(total_steps: int, power: float = 1.0, *, rho: float = 1.0) -> Schedule:
    """rho (t / total_steps)^power, and rho after the end; power > 0.

    Example:
        >>> [rising(4)(t) for t in (0, 1, 4, 9)], rising(4, power=2.0)(2)
        ([0.0, 0.25, 1.0, 1.0], 0.25)
    """
    total, radius = _steps(total_steps), check_number("rho", rho)
    if check_number("power", power) == 0:
        raise ValueError("power must be above 0")
    return partial(_rising, total, power, radius)


def like_lr(optimizer: Optimizer, *, rho: float = 1.0) -> Schedule:
    """rho times the learning rate of the first group over its initial one: e shrinks as the steps do.

    The initial one is the group's "initial_lr", which schedulers set (for OneCycleLR that is not the largest), or else
    the learning rate when this was called. The optimizer is not kept alive.

    Raises:
        ValueError: the learning rate is 0 when this is called, or the schedule is asked after the optimizer has gone.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        >>> factor = like_lr(optimizer)
        >>> optimizer.param_groups[0]["lr"] = 0.05
        >>> factor(7)
        0.5
    """
    radius = check_number("rho", rho)
    reference, at_first = weakref.ref(optimizer), float(optimizer.param_groups[0]["lr"])
    if not optimizer.param_groups[0].get("initial_lr", at_first) > 0:
        raise ValueError("like_lr needs a learning rate above 0 to begin with; call it before a warm-up sets it to 0")

    def factor(step: int) -> float:
        alive = reference()
        if alive is None:
            raise ValueError("like_lr: the optimizer whose learning rate it follows is gone; keep a reference to it")
        group = alive.param_groups[0]
        return radius * float(group["lr"]) / float(group.get("initial_lr", at_first))

    return factor


class _Part(Protocol):
    def replaces_next(self) -> bool: ...


class _Sparsifier(Protocol):
    @property
    def parts(self) -> Sequence[_Part]: ...


def every_second(rho: float = 1.0, period: int | None = None) -> Schedule:
    """0 in the first, third, ... step, `rho` in the second, fourth, ...: what echo needs (:meth:`S2SAM.echo`).

    Each batch is trained on twice in a row; the step on the first visit is plain, and its gradient is the direction in
    which the second visit is displaced. After `period` steps it begins anew with a first visit, also if they are odd.

    Example:
        >>> [every_second(0.1)(t) for t in range(4)], [every_second(period=3)(t) for t in range(6)]
        ([0.0, 0.1, 0.0, 0.1], [0.0, 1.0, 0.0, 0.0, 1.0, 0.0])
    """
    return partial(_every_second, check_number("rho", rho), None if period is None else _steps(period))


def clean_growth(sparsifier: _Sparsifier, rho: float | Schedule = 1.0) -> Schedule:
    """0 in the steps whose gradient chooses where weights grow (RigL and kin), `rho` in all others.

    Growth then ranks pruned weights by the gradient at w instead of w + e, so that masks and displacement can be told
    apart. Cost: one step in `delta_t` is not displaced. Without effect for methods that grow by something else.

    Example:
        >>> import torch
        >>> from s2sam import sparsify
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> options = {"method": "rigl", "sparsity": 0.5, "total_steps": 8, "delta_t": 2, "distribution": "uniform"}
        >>> rigl = sparsify(model, optimizer, **options, include=["weight"])
        >>> radius, found = clean_growth(rigl, rho=0.05), []
        >>> for step in range(4):
        ...     found.append(radius(step))
        ...     model(torch.randn(3, 8)).sum().backward()
        ...     optimizer.step()
        >>> found
        [0.05, 0.0, 0.05, 0.0]
    """
    schedule = rho if callable(rho) else check_number("rho", rho)

    def radius(step: int) -> float:
        if any(part.replaces_next() for part in sparsifier.parts):
            return 0.0
        return schedule(step) if callable(schedule) else schedule

    return radius


def _late(first: float, radius: float, step: int) -> float:
    return radius * (step >= first)


def _rising(total: int, power: float, radius: float, step: int) -> float:
    return radius * float(min(1.0, step / total) ** power)


def _every_second(radius: float, period: int | None, step: int) -> float:
    return radius * ((step if period is None else step % period) % 2)


def _steps(total_steps: int) -> int:
    if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
        raise ValueError(f"total_steps must be a whole number of at least 1, got {total_steps!r}")
    return total_steps
