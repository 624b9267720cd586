"""Experiments on the corollary and the theorem: means against bounds, where they are tight, what breaks them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from s2sam.analysis.bound import Terms, corollary_terms, last_iterate_bound, matching_radius, theorem_terms
from s2sam.analysis.bound_check import Check, mean_and_error
from s2sam.analysis.descent import DIRECTIONS, Descent, descend, unit
from s2sam.analysis.problems import LeastSquares, MeanEstimation, Problem, Quadratic, SineParabola

PAST = DIRECTIONS[:-1]  #: directions that are known before the batch is drawn
NAMES = {"none": "SGD", "+previous": "+g_{t-1}", "-previous": "-g_{t-1}", "random": "random", "same batch": "SAM"}


def problems(generator: torch.Generator) -> dict[str, tuple[Problem, Tensor]]:
    """Name -> (problem, w_0 of one replica)."""
    curvatures = torch.cat([torch.zeros(4), torch.linspace(0.1, 1.0, 12)]).double()
    rows = torch.randn(12, 24, dtype=torch.float64, generator=generator)
    fitted = LeastSquares(rows, rows @ torch.randn(24, dtype=torch.float64, generator=generator))
    z = torch.randn(40, 6, dtype=torch.float64, generator=generator)
    return {
        "quadratic with null directions": (Quadratic(curvatures, sigma=0.3), torch.ones(16, dtype=torch.float64)),
        "w^2 + 3 sin^2 w": (SineParabola(sigma=0.3), torch.full((1,), 3.0, dtype=torch.float64)),
        "fitted least squares, batch 1": (fitted, torch.zeros(24, dtype=torch.float64)),
        "mean of 40 points, batch 1": (
            MeanEstimation(z, torch.linspace(0.2, 1.0, 6).double()),
            torch.ones(6, dtype=torch.float64),
        ),
    }


def mean_iterate(generator: torch.Generator, *, replicas: int = 48, steps: int = 300) -> Iterator[Check]:
    """The mean gap over t < T and the gap at T against the corollary, for every problem and past direction."""
    for name, (problem, start) in problems(generator).items():
        for direction in PAST:
            rate, rho = (0.1 if isinstance(problem, LeastSquares) else 1.0) / problem.smooth, 0.1
            run = descend(
                problem,
                start.repeat(replicas, 1),
                lr=rate,
                steps=steps,
                rho=rho,
                direction=direction,
                generator=generator,
            )
            terms = run_terms(problem, run, lr=rate, rho=0.0 if direction == "none" else rho)
            setting = f"{name}, {NAMES[direction]}, eta {rate * problem.smooth:g}/L"
            yield bounded("mean iterate", setting, run.gaps.mean(0), terms)
            if isinstance(problem, LeastSquares):
                continue  # its variance is known along the trajectory only, which is not enough for the last iterate
            last = last_iterate_bound(terms, gap=float(run.gaps[0].mean()), pl=problem.pl, lr=rate, steps=steps)
            measured, error = mean_and_error(problem.loss(run.last) - problem.minimum)
            yield Check("last iterate", setting, measured, last, error=error, unit="loss")


def tight(generator: torch.Generator, *, replicas: int = 4000, steps: int = 60) -> Iterator[Check]:
    """One weight, eta = 1/L: the corollary holds with equality, so nothing in it can be smaller."""
    problem, rho = Quadratic(torch.tensor([2.0], dtype=torch.float64), sigma=0.4), 0.3
    for direction in ("none", "random"):
        run = descend(
            problem,
            torch.full((replicas, 1), 1.5, dtype=torch.float64),
            lr=0.5,
            steps=steps,
            rho=rho,
            direction=direction,
            generator=generator,
        )
        radius = 0.0 if direction == "none" else rho
        total = run_terms(problem, run, lr=0.5, rho=radius)
        exact = total.start + (total.noise + total.radius) * (1 - 1 / steps)  # at t = 0 there is no noise yet
        measured, error = mean_and_error(run.gaps.mean(0))
        yield Check("equality", f"1-D, eta 1/L, {NAMES[direction]}", measured, exact, exact, error, unit="loss")


def negative_control(generator: torch.Generator, *, replicas: int = 4000, steps: int = 60) -> Iterator[Check]:
    """The same, with a direction taken from the same batch: unbiasedness is lost, and the bound with it."""
    problem = Quadratic(torch.tensor([2.0], dtype=torch.float64), sigma=0.4)
    for direction in ("+previous", "-previous", "same batch"):
        run = descend(
            problem,
            torch.full((replicas, 1), 1.5, dtype=torch.float64),
            lr=0.5,
            steps=steps,
            rho=0.3,
            direction=direction,
            generator=generator,
        )
        terms = run_terms(problem, run, lr=0.5, rho=0.3)
        measured, error = mean_and_error(run.gaps.mean(0))
        control = direction == "same batch"
        setting = f"1-D, eta 1/L, {NAMES[direction]}" + (" (direction of the same batch)" if control else "")
        yield Check("negative control", setting, measured, terms.total, -torch.inf, error, control, terms, "loss")


def unbiased(generator: torch.Generator) -> Iterator[Check]:
    """|E[g_t - grad F(x_t)]| at a fixed past, by going through all batches: 0 for g_{t-1}, not for SAM."""
    rows = torch.randn(12, 5, dtype=torch.float64, generator=generator)
    problem = LeastSquares(rows, torch.randn(12, dtype=torch.float64, generator=generator))
    every = torch.arange(12)[:, None]  # replica i draws row i
    w = torch.ones(12, 5, dtype=torch.float64)
    last = problem.sample_gradient(w + 0.1, torch.zeros(12, 1, dtype=torch.long))
    for name, direction in (("+g_{t-1}", unit(last)), ("SAM", unit(problem.sample_gradient(w, every)))):
        x = w + 0.3 * direction
        noise = problem.sample_gradient(x, every) - problem.gradient(x)
        bias, along = float(noise.mean(0).norm()), float((noise * direction).sum(1).mean())
        for what, value in (("length of E(xi_t)", bias), ("size of E<xi_t, u_t>", abs(along))):
            high, control = (1e-12, False) if name != "SAM" else (1e-2, True)
            yield Check("unbiased gradient", f"{what}, {name}", value, high, control=control, unit="gradient")


def random_iterate(generator: torch.Generator, *, replicas: int = 2000, steps: int = 100) -> Iterator[Check]:
    """F(w_R) with R drawn uniformly estimates the mean over t: their difference is 0 within its error."""
    problem = Quadratic(torch.linspace(0.2, 1.0, 4).double(), sigma=0.3)
    run = descend(
        problem,
        torch.ones(replicas, 4, dtype=torch.float64),
        lr=0.5,
        steps=steps,
        rho=0.1,
        direction="+previous",
        generator=generator,
    )
    drawn = torch.randint(steps, (replicas,), generator=generator)
    difference = run.gaps[drawn, torch.arange(replicas)] - run.gaps.mean(0)
    measured, error = mean_and_error(difference)
    yield Check("sampled iterate", "E F(w_R) - mean over t", measured, 0.0, 0.0, error, unit="loss")


def published(generator: torch.Generator) -> Iterator[Check]:
    r"""Theorem 1 itself: the risk of a uniformly drawn iterate, lambda = 2L, B on the ball that the iterates visit.

    With w_S the minimum of F_S, its premise min \hat F_S <= F_S(w_S) + (lambda/2)||w_t||^2 holds everywhere if w_S = 0,
    and that is the claim checked. If w_S is elsewhere, the premise fails near the regularised minimum, and with enough
    examples and little noise so does the inequality: the control. It says nothing against the theorem, but where it
    does not apply.
    """
    z = torch.randn(2000, 3, dtype=torch.float64, generator=generator)
    for place, n, batch in (("w_S = 0", 50, 1), ("w_S = (1, 1, 1)", 2000, 50)):
        control = place != "w_S = 0"
        best = torch.full((3,), float(control), dtype=torch.float64)
        problem = MeanEstimation(z[:n] - z[:n].mean(0) + best, torch.linspace(0.5, 1.0, 3).double(), batch=batch)
        truth = best - z[:n].mean(0)  # where the risk is smallest: the examples were drawn around it
        against = problem.center if control else truth  # the weaker claim is refuted, the stronger one checked
        for direction in ("none", "+previous", "-previous"):
            drawn, terms = _regularised_run(problem, direction, generator)
            risk = 0.5 * (problem.curvatures * ((drawn - truth) ** 2 - (against - truth) ** 2)).sum(1)
            setting = f"{place}, n = {n}, {NAMES[direction]}" + (" (premise fails)" if control else "")
            measured, error = mean_and_error(risk)
            yield Check(
                "theorem 1", setting, measured, terms.total, error=error, control=control, terms=terms, unit="loss"
            )


def _regularised_run(
    problem: MeanEstimation, direction: str, generator: torch.Generator, *, replicas: int = 200, steps: int = 300
) -> tuple[Tensor, Terms]:
    """Uniformly drawn iterates with weight decay 2L, and the terms of Theorem 1."""
    decay, rate, n = 2 * problem.smooth, 1 / (3 * problem.smooth), len(problem.examples)
    pl = problem.pl + decay
    start = torch.full((replicas, len(problem.curvatures)), 2.0, dtype=torch.float64)
    run = descend(
        problem,
        start,
        lr=rate,
        steps=steps,
        rho=matching_radius(smooth=problem.smooth, pl=pl, examples=n, decay=decay),
        direction=direction,
        generator=generator,
        decay=decay,
    )
    terms = theorem_terms(
        loss=float(problem.loss(start[:1])) + decay / 2 * float(start[0].square().sum()),
        smooth=problem.smooth,
        pl=pl,
        variance=float(problem.variance(start[:1])),
        lr=rate,
        steps=steps,
        lipschitz=problem.lipschitz(radius=float((run.iterates - problem.center).norm(dim=2).max())),
        examples=n,
    )
    drawn = torch.randint(steps, (replicas,), generator=generator)
    return run.iterates[drawn, torch.arange(replicas)], terms


def run_terms(problem: Problem, run: Descent, *, lr: float, rho: float) -> Terms:
    """The corollary for a run without weight decay, with the exact variance along its trajectory."""
    return corollary_terms(
        gap=float(run.gaps[0].mean()),
        smooth=problem.smooth,
        pl=problem.pl,
        variance=float(run.variances.mean()),
        lr=lr,
        steps=len(run.gaps),
        rho=rho,
    )


def bounded(experiment: str, setting: str, per_replica: Tensor, terms: Terms) -> Check:
    """The check that a Monte-Carlo mean is at most the sum of the terms."""
    measured, error = mean_and_error(per_replica)
    return Check(experiment, setting, measured, terms.total, error=error, terms=terms, unit="loss")
