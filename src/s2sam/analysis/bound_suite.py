"""All verification experiments of the theory, in one call: the theorem, its corollary, and the stability boundary."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from s2sam.analysis import bound_average, bound_echo, bound_rates, diagonal_network
from s2sam.analysis.bound_average import NAMES
from s2sam.analysis.bound_check import Check
from s2sam.analysis.bound_rates import Rate
from s2sam.analysis.descent import descend
from s2sam.analysis.problems import LeastSquares
from s2sam.analysis.stability import (
    METHODS,
    Method,
    Setting,
    alternating_cycle,
    critical_curvature,
    quarter_turn_cycle,
)
from s2sam.analysis.stability_measured import (
    check_measurable,
    limit_cycle,
    measured_critical_curvature,
    real_optimizer,
    step_at,
)

RATES = (bound_rates.in_steps, bound_rates.in_learning_rate, bound_rates.in_radius, bound_rates.in_examples)


@dataclass(frozen=True)
class Boundary:
    """Critical curvature of one method."""

    method: str
    predicted: float
    measured: float


@dataclass
class Suite:
    """What the experiments found, as far as they have run."""

    setting: Setting
    seed: int
    checks: list[Check] = field(default_factory=list)
    rates: list[Rate] = field(default_factory=list)
    boundaries: list[Boundary] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """True if every check does."""
        return all(check.holds for check in self.checks)


def run_suite(
    setting: Setting | None = None, *, seed: int = 0, tell: Callable[[str], None] = lambda name: None
) -> Suite:
    """Run everything; `tell` is called with the name of each experiment before it begins.

    Raises:
        ValueError: the stability boundary cannot be measured at this setting: see check_measurable.

    Cost: about 30 s on one core, of which most is the optimizers' own steps in the measured stability boundary.
    """
    suite = Suite(setting or Setting(), seed)
    check_measurable(suite.setting)
    generator = torch.Generator().manual_seed(seed)
    experiments = (
        same_as_the_classes,
        bound_average.unbiased,
        bound_average.mean_iterate,
        bound_average.tight,
        bound_average.negative_control,
        bound_average.random_iterate,
        bound_rates.decay_place,
        bound_average.published,
        limit_cycles,
        bound_echo.momentum_filter,
        bound_echo.echo_pairs,
        diagonal_network.same_batch_force,
        diagonal_network.recovery,
    )
    for experiment in experiments:
        tell(experiment.__name__.replace("_", " "))
        suite.checks += experiment(generator)
    for rate in RATES:
        tell(f"rate {rate.__name__.replace('_', ' ')}")
        for found in rate(generator):
            suite.rates.append(found)
            suite.checks += found.checks()
    for method in METHODS:
        if method.direction != "momentum" or suite.setting.momentum > 0:
            tell(f"stability of {method.name}")
            boundary = measure_boundary(method, suite.setting)
            suite.boundaries.append(boundary)
            suite.checks.append(boundary_check(boundary))
    return suite


def measure_boundary(method: Method, setting: Setting) -> Boundary:
    """Critical curvature from the polynomial and from the optimizer itself."""
    return Boundary(method.name, critical_curvature(method, setting), measured_critical_curvature(method, setting))


def boundary_check(boundary: Boundary) -> Check:
    """Measured and predicted differ by at most 1 %."""
    low, high = 0.99 * boundary.predicted, 1.01 * boundary.predicted
    return Check("critical curvature", boundary.method, boundary.measured, high, low, unit="curvature")


def same_as_the_classes(generator: torch.Generator, *, steps: int = 60) -> Iterator[Check]:
    """S2SAM and SAM on torch's SGD follow the recursions that the other experiments use, batch for batch."""
    rows = torch.randn(20, 8, dtype=torch.float64, generator=generator)
    problem = LeastSquares(rows, torch.randn(20, dtype=torch.float64, generator=generator), batch=2)
    start = torch.ones(1, 8, dtype=torch.float64)
    seed = generator.initial_seed()
    for direction in ("none", "+previous", "-previous", "same batch"):
        batches = torch.Generator().manual_seed(seed)
        expected = descend(
            problem, start, lr=0.05, steps=steps, rho=0.1, direction=direction, generator=batches, decay=0.01
        ).last
        actual = _with_the_class(problem, start, steps, direction, torch.Generator().manual_seed(seed))
        apart = float((actual - expected).abs().max())
        yield Check("classes follow the recursion", NAMES[direction], apart, 1e-12, unit="weight")
    batches = torch.Generator().manual_seed(seed)
    expected = bound_echo.echo_descent(problem, start, lr=0.05, pairs=steps // 2, rho=0.1, generator=batches)[-1]
    actual = _with_the_class(problem, start, steps, "echo", torch.Generator().manual_seed(seed), decay=0.0)
    apart = float((actual - expected).abs().max())
    yield Check("classes follow the recursion", "echo", apart, 1e-12, unit="weight")


def limit_cycles(generator: torch.Generator) -> Iterator[Check]:
    """With a fixed rho the methods end in cycles proportional to it, whose sizes are known at eta h = 2, mu = 0.9."""
    setting, curvature = Setting(), 20.0
    plus, minus, sam = (
        next(m for m in METHODS if m.name == n) for n in ("S2-SAM +gradient", "S2-SAM -gradient", "SAM")
    )
    start = 0.001 + 0.01 * float(torch.rand(1, generator=generator))
    for method, size in (
        (plus, quarter_turn_cycle(curvature, setting)),
        (minus, alternating_cycle(curvature, setting)),
        (sam, alternating_cycle(curvature, setting)),
    ):
        for rho in (0.05, 0.2):
            found = limit_cycle(method, setting, curvature=curvature, rho=rho, start=start) / rho
            yield Check("limit cycle / rho", f"{method.name}, rho {rho:g}", found, 1.01 * size, 0.99 * size)


def _with_the_class(
    problem: LeastSquares,
    start: Tensor,
    steps: int,
    direction: str,
    generator: torch.Generator,
    *,
    decay: float = 0.01,
) -> Tensor:
    w = torch.nn.Parameter(start.clone())
    kinds = {"none": "sgd", "same batch": "sam", "echo": "echo"}
    method = Method(direction, kinds.get(direction, "s2sam"), sign=-1 if direction == "-previous" else 1)
    optimizer, single = real_optimizer(method, w, Setting(lr=0.05, momentum=0.0), rho=0.1, decay=decay)
    for step in range(steps):
        if direction != "echo" or step % 2 == 0:
            sample = problem.draw(1, generator)

        def fill(sample: Tensor = sample) -> None:
            w.grad = problem.sample_gradient(w.detach(), sample)

        step_at(optimizer, single, fill)
    return w.detach()
