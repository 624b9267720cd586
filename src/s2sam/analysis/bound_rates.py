"""Experiments on rates: how the gap changes with T, eta, rho, n, and with where weight decay acts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from s2sam.analysis.bound import Terms, corollary_terms, last_iterate_bound, matching_radius
from s2sam.analysis.bound_average import NAMES, bounded
from s2sam.analysis.bound_check import Check, mean_and_error, slope
from s2sam.analysis.descent import Descent, descend
from s2sam.analysis.problems import Quadratic

COMPARED = ("none", "+previous", "-previous")


@dataclass(frozen=True)
class Rate:
    """Measured means and their bounds against one quantity, for one method."""

    quantity: str
    method: str
    x: list[float]
    measured: list[float]
    errors: list[float]
    bounds: list[float]
    expected: float  #: slope of log measured against log x
    within: float

    @property
    def slope(self) -> float:
        """Of the least-squares line."""
        return slope(self.x, self.measured)

    def checks(self) -> Iterator[Check]:
        """The slope, and the point that comes nearest to its bound."""
        low, high = self.expected - self.within, self.expected + self.within
        yield Check(f"slope in {self.quantity}", self.method, self.slope, high, low, unit="slope")
        measured, error, x = max(
            (m / b, e / b, x) for m, e, b, x in zip(self.measured, self.errors, self.bounds, self.x, strict=True)
        )
        setting = f"{self.method}, the largest of {len(self.x)} ratios, at {x:g}"
        yield Check(f"measured / bound over {self.quantity}", setting, measured, 1.0, error=error, unit="ratio")


def in_steps(generator: torch.Generator, *, longest: int = 1600) -> Iterator[Rate]:
    """Mean gap over t < T without noise, rho = T^(-1/2): every term of the corollary falls as 1/T."""
    problem, start = Quadratic(torch.linspace(0.1, 1.0, 10).double()), torch.ones(1, 10, dtype=torch.float64)
    lengths = [longest // 16, longest // 8, longest // 4, longest // 2, longest]
    for direction in COMPARED:
        measured, bounds = [], []
        for steps in lengths:
            rho = 0.0 if direction == "none" else steps**-0.5
            run = _run(problem, start, 0.5, steps, rho, direction, generator)
            measured.append(float(run.gaps.mean()))
            bounds.append(_terms(problem, float(run.gaps[0].mean()), 0.5, steps, rho).total)
        x = [float(n) for n in lengths]
        yield Rate("T", NAMES[direction], x, measured, [0.0] * len(x), bounds, -1.0, 0.1)


def in_learning_rate(generator: torch.Generator, *, replicas: int = 96, steps: int = 1200) -> Iterator[Rate]:
    """Level that noise keeps up, with rho = 0.05 sqrt(eta): both terms that remain are proportional to eta."""
    problem = Quadratic(torch.linspace(0.5, 1.0, 8).double(), sigma=0.3)
    rates = [0.02, 0.04, 0.08, 0.16]
    for direction in COMPARED:
        measured, errors, bounds = [], [], []
        for rate in rates:
            rho = 0.0 if direction == "none" else 0.05 * math.sqrt(rate)
            start = torch.zeros(replicas, 8, dtype=torch.float64)
            run = _run(problem, start, rate, steps, rho, direction, generator)
            mean, error = mean_and_error(run.gaps[steps // 4 :].mean(0))
            measured.append(mean)
            errors.append(error)
            bounds.append(_terms(problem, 0.0, rate, steps, rho).total)  # from the minimum, at every single t
        yield Rate("eta", NAMES[direction], rates, measured, errors, bounds, 1.0, 0.15)


def in_radius(generator: torch.Generator, *, steps: int = 800) -> Iterator[Rate]:
    """Level that the displacement keeps up without noise, once the start is forgotten: proportional to rho^2."""
    problem, start = Quadratic(torch.linspace(0.1, 1.0, 10).double()), torch.ones(1, 10, dtype=torch.float64)
    radii = [0.01, 0.02, 0.04, 0.08]
    for direction in COMPARED[1:]:
        measured, bounds = [], []
        for rho in radii:
            run = _run(problem, start, 0.5, steps, rho, direction, generator)
            half = steps // 2
            measured.append(float(run.gaps[half:].mean()))
            bounds.append(_terms(problem, float(run.gaps[half].mean()), 0.5, steps - half, rho).total)
        yield Rate("rho", NAMES[direction], radii, measured, [0.0] * len(radii), bounds, 2.0, 0.15)


def in_examples(generator: torch.Generator, *, replicas: int = 400, steps: int = 300) -> Iterator[Rate]:
    r"""Excess risk of n examples with the radius that is worth 1/n: falls as 1/n.

    Full batches of the mean of n normal points: the empirical minimum is off by E = tr(H)/(2n), the iterate by at most
    1/n + start, and together by at most the square of the sum of the roots (Minkowski).
    """
    curvatures, rate = torch.linspace(0.5, 1.0, 5).double(), 0.5
    problem = Quadratic(curvatures)
    sizes = [25, 100, 400, 1600]
    for direction in COMPARED[1:]:
        measured, errors, bounds = [], [], []
        for n in sizes:
            rho = matching_radius(smooth=problem.smooth, pl=problem.pl, examples=n)
            z = torch.stack([_normal_mean(n, len(curvatures), generator) for _ in range(replicas)])
            run = _run(problem, 1.0 - z, rate, steps, rho, direction, generator)  # weights count from the minimum z
            mean, error = mean_and_error(problem.loss(run.last + z))
            gap = float(run.gaps[0].mean())
            gap = last_iterate_bound(
                _terms(problem, gap, rate, steps, rho), gap=gap, pl=problem.pl, lr=rate, steps=steps
            )
            measured.append(mean)
            errors.append(error)
            bounds.append((math.sqrt(gap) + math.sqrt(float(curvatures.sum()) / (2 * n))) ** 2)
        yield Rate("n", NAMES[direction], [float(n) for n in sizes], measured, errors, bounds, -1.0, 0.15)


def decay_place(generator: torch.Generator, *, steps: int = 800) -> Iterator[Check]:
    """Weight decay at w (torch's, S2SAM's) or at x: only the third term changes, by ((L + lambda)/L)^2."""
    curvatures, decay = torch.linspace(0.1, 1.0, 10).double(), 1.0
    problem, regularised = Quadratic(curvatures), Quadratic(curvatures + decay)
    start = torch.ones(1, 10, dtype=torch.float64)
    for rho in (0.0, 0.1):
        levels = {}
        for place in ("w", "x"):
            run = descend(
                problem,
                start,
                lr=0.25,
                steps=steps,
                rho=rho,
                direction="+previous",
                generator=generator,
                decay=decay,
                decay_at=place,
                objective=regularised,
            )
            terms = corollary_terms(
                gap=float(run.gaps[0].mean()),
                smooth=problem.smooth,
                pl=regularised.pl,
                variance=0.0,
                lr=0.25,
                steps=steps,
                rho=rho,
                decay=decay,
                decay_at=place,
            )
            levels[place] = float(run.gaps[steps // 2 :].mean())
            yield bounded("place of weight decay", f"+g_{{t-1}}, rho {rho:g}, at {place}", run.gaps.mean(0), terms)
        if rho == 0:
            difference = abs(levels["x"] - levels["w"])
            yield Check("place of weight decay", "difference at rho 0", difference, 0.0, unit="loss")
        else:
            ratio, high = levels["x"] / levels["w"], ((1 + decay) / 1.0) ** 2 * 1.5
            yield Check("place of weight decay", "level at x / level at w", ratio, high, 1.0, unit="ratio")


def _run(
    problem: Quadratic, start: Tensor, lr: float, steps: int, rho: float, direction: str, generator: torch.Generator
) -> Descent:
    return descend(problem, start, lr=lr, steps=steps, rho=rho, direction=direction, generator=generator)


def _terms(problem: Quadratic, gap: float, lr: float, steps: int, rho: float) -> Terms:
    return corollary_terms(
        gap=gap, smooth=problem.smooth, pl=problem.pl, variance=problem.sigma**2, lr=lr, steps=steps, rho=rho
    )


def _normal_mean(n: int, d: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=generator).mean(0)
