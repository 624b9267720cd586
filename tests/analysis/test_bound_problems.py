"""The constants of the problems are what brute force says."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2sam.analysis.bound_average import problems
from s2sam.analysis.descent import unit
from s2sam.analysis.problems import LeastSquares, MeanEstimation, Quadratic, SineParabola

NAMES = list(problems(torch.Generator()))


@pytest.fixture(params=NAMES)
def case(request, make_generator):
    problem, start = problems(make_generator(3))[request.param]
    w = start + 2 * torch.randn(40, len(start), dtype=torch.float64, generator=make_generator(1))
    return problem, w


def test_gradient_is_the_derivative_of_the_loss(case):
    problem, w = case
    w = w.clone().requires_grad_()
    problem.loss(w).sum().backward()
    torch.testing.assert_close(problem.gradient(w.detach()), w.grad, rtol=1e-10, atol=1e-12)


def test_smooth_and_pl_hold_and_the_minimum_is_one(case):
    problem, w = case
    apart = (w[1:] - w[:-1]).norm(dim=1)
    slopes = (problem.gradient(w[1:]) - problem.gradient(w[:-1])).norm(dim=1) / apart
    assert float(slopes.max()) <= problem.smooth * (1 + 1e-9)
    gap = problem.loss(w) - problem.minimum
    assert float(gap.min()) > 0
    ratio = problem.gradient(w).square().sum(1) / (2 * gap)
    assert float(ratio.min()) >= problem.pl * (1 - 1e-9)


def test_the_variance_is_that_of_the_batches(case, make_generator):
    problem, w = case
    point = w[:1].expand(40_000, -1)
    noise = problem.sample_gradient(point, problem.draw(40_000, make_generator(2))) - problem.gradient(point)
    assert float(noise.square().sum(1).mean()) == pytest.approx(float(problem.variance(w[:1])), rel=0.05)
    assert float(noise.mean(0).norm()) < 5 * float(problem.variance(w[:1])) ** 0.5 / 200


def test_the_constants_are_reached():
    """L and mu are not merely safe: they are attained, to the printed digits."""
    x = torch.linspace(1e-3, 20, 200_001, dtype=torch.float64)[:, None]
    sine = SineParabola()
    ratio = (sine.gradient(x) ** 2).sum(1) / (2 * sine.loss(x))
    assert sine.pl <= float(ratio.min()) <= sine.pl + 1e-4
    assert float((2 + 6 * torch.cos(2 * x)).abs().max()) == pytest.approx(sine.smooth, abs=1e-3)
    rows = torch.tensor([[3.0, 4.0, 0.0]], dtype=torch.float64)
    one = LeastSquares(rows, torch.tensor([5.0], dtype=torch.float64))
    assert (one.smooth, one.pl, one.minimum) == (pytest.approx(25.0), pytest.approx(25.0), 0.0)


def test_lipschitz_constant_of_mean_estimation_is_reached_on_the_ball():
    z = torch.tensor([[0.0, 0.0], [4.0, 0.0], [2.0, 3.0]], dtype=torch.float64)
    problem = MeanEstimation(z, torch.tensor([0.5, 0.5], dtype=torch.float64))
    pulls = 0.5 * (z - problem.center)
    far = pulls.norm(dim=1).argmax()
    w = problem.center - 2.0 * pulls[far] / pulls[far].norm()  # on the ball of radius 2, away from that example
    assert float((0.5 * (w - z[far])).norm()) == pytest.approx(problem.lipschitz(radius=2.0))


def test_b_is_reached_on_the_ball_and_not_passed(make_generator):
    """The largest gradient of an example within the radius, by looking at many points, and at the one where it is."""
    generator = make_generator(4)
    rows = torch.randn(7, 4, dtype=torch.float64, generator=generator)
    fit = LeastSquares(rows, torch.randn(7, dtype=torch.float64, generator=generator))
    best, radius = torch.linalg.pinv(rows) @ fit.targets, 0.7
    everywhere = best + radius * unit(torch.randn(20_000, 4, dtype=torch.float64, generator=generator))
    ends = torch.stack([best + sign * radius * unit(rows) for sign in (1, -1)]).flatten(0, 1)
    largest = [
        max(float(fit.sample_gradient(w, torch.full((len(w), 1), i)).norm(dim=1).max()) for i in range(7))
        for w in (everywhere, ends)
    ]
    assert 0.8 * fit.lipschitz(radius=radius) < largest[0] <= largest[1]
    assert largest[1] == pytest.approx(fit.lipschitz(radius=radius), rel=1e-12)
    sine = SineParabola()
    for radius in (0.5, 0.96, 1.5, 2.2, 3.3, 4.2, 9.0):
        w = torch.linspace(-radius, radius, 200_001, dtype=torch.float64)[:, None]
        assert float(sine.gradient(w).abs().max()) == pytest.approx(sine.lipschitz(radius=radius), rel=1e-8)
    bowl = Quadratic(torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64))
    assert bowl.lipschitz(radius=3.0) == float(bowl.gradient(torch.tensor([[0.0, 0.0, 3.0]])).norm()) == 6.0
    for noisy in (Quadratic(torch.ones(1), sigma=0.1), SineParabola(0.1)):
        assert noisy.lipschitz(radius=1.0) == math.inf


def test_a_least_squares_problem_that_cannot_be_fitted_has_its_residual_as_minimum():
    rows = torch.ones(2, 1, dtype=torch.float64)
    assert LeastSquares(rows, torch.tensor([0.0, 2.0], dtype=torch.float64)).minimum == pytest.approx(0.5)


def test_refusals():
    with pytest.raises(ValueError, match="at least one above 0"):
        Quadratic(torch.zeros(2))
    with pytest.raises(ValueError, match="must be >= 0"):
        Quadratic(torch.tensor([1.0, -1.0]))
    with pytest.raises(ValueError, match="all be above 0"):
        MeanEstimation(torch.zeros(2, 2), torch.tensor([1.0, 0.0]))


@given(seed=st.integers(0, 2**31), rho=st.floats(0, 1), rate=st.floats(0.05, 1), decay=st.sampled_from([0.0, 0.7]))
@settings(max_examples=40, deadline=None)
def test_one_step_keeps_the_inequality_for_any_direction(seed, rho, rate, decay):
    """F(w') - F* <= (1 - eta mu) (F(w) - F*) + (eta/2) L^2 rho^2, with weight decay at w."""
    generator = torch.Generator().manual_seed(seed)
    h = 2 * torch.rand(4, dtype=torch.float64, generator=generator) + 0.01
    problem, whole = Quadratic(h), Quadratic(h + decay)
    w = torch.randn(64, 4, dtype=torch.float64, generator=generator)
    u = unit(torch.randn(64, 4, dtype=torch.float64, generator=generator))
    u[:32] = unit(w[:32]) * torch.sign(w[:32, :1])  # radial ones come nearest to the bound
    lr = rate / whole.smooth
    after = whole.loss(w - lr * (problem.gradient(w + rho * u) + decay * w))
    limit = (1 - lr * whole.pl) * whole.loss(w) + lr / 2 * (problem.smooth * rho) ** 2
    assert bool((after <= limit * (1 + 1e-12)).all())
