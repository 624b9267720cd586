"""The lemma on past gradients and the bound for echo: held by the real classes, and wrong versions are found out."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from s2sam import S2SAM
from s2sam.analysis import bound_echo
from s2sam.analysis.bound_echo import echo_descent, echo_pairs, echo_terms, filter_coefficients, momentum_filter
from s2sam.analysis.problems import LeastSquares
from s2sam.data import echo


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_points_of_the_class_obey_the_three_terms(sign, momentum, make_generator):
    """x_{t+1} = x_t + mu (x_t - x_{t-1}) - (eta - s c) g_t - s c (1 + mu) g_{t-1} + s c mu g_{t-2}, c held fixed."""
    lr, c = 0.1, 0.05
    h = torch.linspace(0.1, 2.0, 7).double()
    w = torch.nn.Parameter(torch.ones(7, dtype=torch.float64))
    optimizer = torch.optim.SGD([w], lr=lr, momentum=momentum)
    sam = S2SAM(optimizer, rho=c / lr, scale="step", sign=sign)
    generator, points, gradients = make_generator(2), [], [torch.zeros(7).double(), torch.zeros(7).double()]
    for _ in range(150):
        with sam.displaced():
            points.append(w.detach().clone())
            (h * w**2 / 2 + 0.1 * torch.randn(7, dtype=torch.float64, generator=generator) * w).sum().backward()
        gradients.append(w.grad.clone())
        optimizer.step()
        optimizer.zero_grad()
    x = [points[0], *points]  # x_{-1} = w_0: there is no momentum before the first step
    for t in range(1, len(x) - 1):
        g2, g1, g0 = gradients[t - 1 : t + 2]
        expected = x[t] + momentum * (x[t] - x[t - 1])
        expected = expected - (lr - sign * c) * g0 - sign * c * (1 + momentum) * g1 + sign * c * momentum * g2
        assert float((x[t + 1] - expected).abs().max()) < 1e-10
    assert float((points[-1] - w.detach()).abs().max()) > 1e-3  # it was displaced


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=6), st.floats(0.01, 0.5), st.floats(0, 0.99))
@hypothesis_settings(deadline=None)
def test_the_coefficients_sum_to_minus_the_learning_rate(a, lr, momentum):
    b = filter_coefficients(torch.tensor(a, dtype=torch.float64), lr=lr, momentum=momentum)
    assert len(b) == len(a) + 2
    assert float(b.sum()) == pytest.approx(-lr, abs=1e-12)


def test_every_linear_direction_is_a_filter_and_a_wrong_one_is_found_out(make_generator, monkeypatch):
    checks = list(momentum_filter(make_generator(1), steps=60))
    assert len(checks) == 16 and all(c.holds for c in checks)
    right = filter_coefficients
    monkeypatch.setattr(bound_echo, "filter_coefficients", lambda a, **rest: right(1.001 * a, **rest))
    assert not any(c.holds for c in momentum_filter(make_generator(1), steps=60))


def test_pairs_of_steps_are_those_of_the_class(make_generator):
    rows = torch.randn(20, 8, dtype=torch.float64, generator=make_generator(3))
    problem = LeastSquares(rows, torch.randn(20, dtype=torch.float64, generator=make_generator(4)), batch=2)
    start = torch.ones(1, 8, dtype=torch.float64)
    _, _, expected = echo_descent(problem, start, lr=0.05, pairs=60, rho=0.1, generator=make_generator(5))
    w = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([w], lr=0.05)
    sam = S2SAM.echo(optimizer, rho=0.1, scale="norm")
    generator = make_generator(5)
    for batch in echo([problem.draw(1, generator) for _ in range(60)]):
        with sam.displaced():
            w.grad = problem.sample_gradient(w.detach(), batch)
        optimizer.step()
    assert float((w.detach() - expected).abs().max()) < 1e-12
    _, _, plain = echo_descent(problem, start, lr=0.05, pairs=60, rho=0.0, generator=make_generator(5))
    assert float((plain - expected).abs().max()) > 1e-3


@pytest.mark.parametrize("seed", [1, 2])
def test_echo_keeps_its_own_bound_and_exceeds_the_corollary(seed, make_generator):
    *pairs, control = echo_pairs(make_generator(seed), replicas=16, pairs=60)
    assert len(pairs) == 4 and control.control
    assert all(c.holds for c in [*pairs, control])
    assert all(0 < c.measured < c.terms.total for c in pairs)
    assert not dataclasses.replace(control, control=False).holds


def test_terms_of_echo_by_hand():
    terms = echo_terms(gap=3.0, smooth=1.0, pl=1.0, variance=1.0, lr=0.125, steps=2, rho=1.0)
    assert (terms.start, terms.noise, terms.radius) == pytest.approx((12.8, 17 / 60, 2 / 3))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"lr": 0.2}, r"needs 0 < lr <= 1/\(8L\) = 0.125, got lr = 0.2"),
        ({"steps": 3}, "an even number of at least 2, got 3"),
        ({"pl": 2.0}, r"pl \(mu\) must be above 0 and at most L = 1, got 2"),
        ({"rho": -1.0}, "rho must be a finite number >= 0"),
    ],
)
def test_terms_of_echo_refuse_what_is_not_proved(values, sentence):
    given_ = {"gap": 1.0, "smooth": 1.0, "pl": 1.0, "variance": 1.0, "lr": 0.1, "steps": 4, "rho": 0.1}
    with pytest.raises(ValueError, match=sentence):
        echo_terms(**given_ | values)
