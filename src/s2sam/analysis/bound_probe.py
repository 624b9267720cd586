r"""What the steps of a training say about L, mu, sigma^2 and B: each from one side only.

For any v, w, i, and as F_best >= F*:

.. math::
    \frac{\|\nabla F(v) - \nabla F(w)\|}{\|v - w\|} \le L, \quad \|\nabla f_i(w)\| \le B, \quad
    E\|\nabla f_b(w) - \nabla F(w)\|^2 \le \sigma^2, \quad \frac{\|\nabla F(w)\|^2}{2 (F(w) - F_{best})} \ge \mu
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from s2sam.analysis.bound_objective import Look, Objective, length

ROUNDING = 1e-4  #: a difference of gradients below this share of them is rounding
REACH = 1e-3  #: length of the differences that look for the largest curvature, as a share of ||w||


@dataclass(frozen=True, eq=False)
class Stop:
    """A training between two steps."""

    w: Tensor  #: the weights, flat
    active: Tensor  #: True where a weight is
    displaced: Callable[[Tensor], Tensor | None] = lambda gradient: None  #: e of the next step, given grad F(w)


@dataclass
class Probe:
    """What was seen along some steps of a training. Losses and gradients of `points` are with weight decay."""

    points: list[tuple[float, float]] = field(default_factory=list)  #: (F, ||grad F||) wherever F was looked at
    losses: list[float] = field(default_factory=list)  #: F at w_0, w_1, ...
    gradients: list[float] = field(default_factory=list)  #: ||grad F|| there
    quotients: dict[str, list[float]] = field(default_factory=dict)  #: lower bounds of L, by where they come from
    variances: list[float] = field(default_factory=list)  #: at x_t = w_t + e_t
    displacements: list[float] = field(default_factory=list)  #: ||e_t||
    example: float = 0.0  #: largest gradient of one image seen
    batch: float = 0.0  #: largest gradient of one batch seen
    norm: float = 0.0  #: ||w_0||
    moved_masks: int = 0  #: steps after which the masks were others
    stopped: bool = False  #: a loss was not finite, and nothing was looked at from there on


def measure(
    objective: Objective,
    stops: Iterable[Stop],
    *,
    decay: float = 0.0,
    examples: int = 16,
    power: int = 5,
    tell: Callable[[], None] = lambda: None,
) -> Probe:
    """Look at F at every stop, at both ends of its displacement, and along the largest curvature at the first and last.

    Args:
        objective: F without weight decay.
        stops: of one training, in order; the next one is asked for when all is seen at the last.
        decay: lambda.
        examples: images, those of the largest loss, whose own gradients are taken at the first and last stop.
        power: difference quotients at the first and last stop that follow the gradients' difference, which turns it
            towards the largest curvature; each is a lower bound of L.
        tell: called after each stop.

    Raises:
        ValueError: the loss at the first stop is not finite.

    Cost: a look a stop, two more where there is a displacement, and 2 x (power + about examples / batches) looks.
    """
    probe = Probe()
    first: tuple[Stop, Look] | None = None
    last: tuple[Stop, Look] | None = None
    for stop in stops:
        look = objective.look(stop.w, stop.active)
        if not math.isfinite(look.loss) or not math.isfinite(look.norm):
            if first is None:
                raise ValueError("the loss or its gradient is not finite where the probe begins; train the run again")
            probe.stopped = True
            break
        at_w = _note(probe, look, stop.w, decay)
        probe.losses.append(at_w[0])
        probe.gradients.append(at_w[1])
        if last is not None:
            if torch.equal(last[0].active, stop.active):
                _quotient(probe, "step", last, (stop, look))
            else:
                probe.moved_masks += 1
        if first is not None and torch.equal(first[0].active, stop.active):
            _quotient(probe, "chord", first, (stop, look))
        variance = _around(probe, objective, stop, look, decay)
        probe.variances.append(look.variance if variance is None else variance)
        if first is None:
            first, probe.norm = (stop, look), length(stop.w)
            _examples_and_curvature(probe, objective, stop, look, decay, examples, power)
        last = (stop, look)
        tell()
    if first is None or last is None:
        raise ValueError("a probe needs at least one stop")
    if last is not first:
        _examples_and_curvature(probe, objective, *last, decay, examples, power)
    return probe


def _note(probe: Probe, look: Look, w: Tensor, decay: float) -> tuple[float, float]:
    """Add what every look tells; returns (F, ||grad F||) with weight decay."""
    point = look.loss + 0.5 * decay * length(w) ** 2, length(look.gradient + decay * w)
    if all(map(math.isfinite, point)):
        probe.points.append(point)
        probe.batch = max(probe.batch, look.largest)
    return point


def _quotient(probe: Probe, kind: str, one: tuple[Stop, Look], other: tuple[Stop, Look]) -> None:
    """Add ||grad F(v) - grad F(w)|| / ||v - w||, unless the difference is rounding."""
    value = quotient(one[0].w, one[1].gradient, other[0].w, other[1].gradient)
    if value is not None:
        probe.quotients.setdefault(kind, []).append(value)


def quotient(w: Tensor, at_w: Tensor, v: Tensor, at_v: Tensor) -> float | None:
    """||grad F(v) - grad F(w)|| / ||v - w||, a lower bound of L; None if it is not finite or rounding.

    >>> w, v = torch.tensor([0.0, 0.0]), torch.tensor([0.0, 2.0])
    >>> quotient(w, 3 * w, v, 3 * v)
    3.0
    """
    apart, difference = length(v - w), length(at_v - at_w)
    if apart == 0 or not math.isfinite(difference) or difference < ROUNDING * max(length(at_w), length(at_v)):
        return None
    return difference / apart


def _around(probe: Probe, objective: Objective, stop: Stop, look: Look, decay: float) -> float | None:
    """Look at w + e and w - e; returns the variance at w + e, None if there is no displacement."""
    e = stop.displaced(look.gradient)
    probe.displacements.append(0.0 if e is None else length(e))
    if e is None or probe.displacements[-1] == 0:
        return None
    ends = []
    for sign, kind in ((1, "+e"), (-1, "-e")):
        there = Stop(stop.w + sign * e, stop.active)
        seen = objective.look(there.w, there.active)
        _note(probe, seen, there.w, decay)
        _quotient(probe, kind, (stop, look), (there, seen))
        ends.append((there, seen))
    _quotient(probe, "+-e", *ends)
    return ends[0][1].variance if math.isfinite(ends[0][1].variance) else None


def _examples_and_curvature(
    probe: Probe, objective: Objective, stop: Stop, look: Look, decay: float, examples: int, power: int
) -> None:
    if examples:
        found = objective.largest_example(stop.w, stop.active, look.losses, examples)
        probe.example = max(probe.example, found)
    reach, direction = REACH * max(length(stop.w), 1e-12), look.gradient
    for _ in range(power):
        size = length(direction)
        if size == 0:
            return
        there = Stop(stop.w + (reach / size) * direction, stop.active)
        seen = objective.look(there.w, there.active)
        _note(probe, seen, there.w, decay)
        _quotient(probe, "curvature", (stop, look), (there, seen))
        direction = seen.gradient - look.gradient
