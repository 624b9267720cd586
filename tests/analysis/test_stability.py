"""The stability boundary: golden numbers, closed forms, and the optimizers themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from s2sam.analysis.bound_suite import Boundary, boundary_check, limit_cycles
from s2sam.analysis.stability import METHODS, Setting, critical_curvature, polynomials, root_radius
from s2sam.analysis.stability_measured import (
    check_measurable,
    grows,
    limit_cycle,
    measured_critical_curvature,
    real_optimizer,
    step_at,
)

BY_NAME = {m.name: m for m in METHODS}
SGD, NESTEROV, SAM = (BY_NAME[name] for name in ("SGD", "Nesterov", "SAM"))
PLUS, MINUS = BY_NAME["S2-SAM +gradient"], BY_NAME["S2-SAM -gradient"]
ECHO, NOISE = BY_NAME["S2-SAM echo"], BY_NAME["S2-SAM noise"]
some_settings = st.builds(
    Setting, lr=st.floats(0.01, 0.5), momentum=st.floats(0.1, 0.95), c=st.floats(0.005, 0.5), beta=st.floats(0, 0.95)
)


@pytest.mark.parametrize(
    ("method", "expected"),
    [(SGD, 38.0), (NESTEROV, 13.571), (SAM, 19.326), (PLUS, 3.851), (MINUS, 13.103), (ECHO, 6.498), (NOISE, 38.0)],
    ids=lambda v: getattr(v, "name", v),
)
def test_golden_values_at_eta_01_mu_09_c_005(method, expected):
    assert critical_curvature(method, Setting()) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("setting", "expected"), [(Setting(momentum=0.5), 9.15), (Setting(lr=0.01), 8.72), (Setting(lr=0.001), 14.52)]
)
def test_less_momentum_or_a_smaller_step_lifts_the_limit_of_the_paper(setting, expected):
    assert critical_curvature(PLUS, setting) == pytest.approx(expected, abs=0.01)


@given(some_settings)
@hypothesis_settings(max_examples=20, deadline=None)
def test_closed_forms(s):
    rim = 2 * (1 + s.momentum)
    expected = {
        "SGD": rim / s.lr,
        "Nesterov": rim / (s.lr * (1 + 2 * s.momentum)),
        "SAM": (-1 + np.sqrt(1 + 4 * s.c * rim / s.lr)) / (2 * s.c),
        "S2-SAM -momentum": min((1 + s.momentum) / s.c, rim / (s.lr + 2 * s.c)),
        "S2-SAM +momentum": min((1 - s.momentum) / s.c, rim / (s.lr - 2 * s.c) if s.lr > 2 * s.c else np.inf),
        "S2-SAM -gradient": rim / (s.lr + rim * s.c),
    }
    for name, value in expected.items():
        assert critical_curvature(BY_NAME[name], s) == pytest.approx(value, rel=1e-4), name


@given(st.floats(0.02, 0.5), st.floats(0.005, 0.5), st.floats(0.05, 60.0))
@hypothesis_settings(deadline=None)
def test_without_momentum_the_conditions_are_two_lines(lr, c, h):
    """Stable iff h c < 1 and h eta < 2 + 2 h c."""
    edge = min(abs(h * c - 1), abs(h * lr - 2 - 2 * h * c))
    radius = root_radius(PLUS, np.array([h]), Setting(lr=lr, momentum=0.0, c=c))[0]
    if edge > 1e-3:
        assert (radius < 1) == (h * c < 1 and h * lr < 2 + 2 * h * c)


@given(some_settings)
@hypothesis_settings(max_examples=30, deadline=None)
def test_every_method_without_displacement_is_sgd(s):
    s = Setting(lr=s.lr, momentum=s.momentum, c=0.0, beta=s.beta)
    h = np.geomspace(0.1, 1.9 / s.lr, 7)
    for method in (m for m in METHODS if m is not NESTEROV):
        np.testing.assert_allclose(
            np.maximum(root_radius(method, h, s), s.beta if method.direction == "ema" else 0),
            np.maximum(root_radius(SGD, h, s), s.beta if method.direction == "ema" else 0),
            rtol=1e-5,
        )


@given(some_settings)
@hypothesis_settings(max_examples=10, deadline=None)
def test_nesterov_is_minus_momentum_with_c_eta_mu(s):
    s = Setting(lr=s.lr, momentum=s.momentum, c=s.lr * s.momentum)
    h = np.geomspace(0.1, 40, 9)
    np.testing.assert_allclose(
        polynomials(NESTEROV, h, s), polynomials(BY_NAME["S2-SAM -momentum"], h, s), rtol=0, atol=1e-9
    )


@given(some_settings, st.floats(0.1, 80.0))
@hypothesis_settings(max_examples=30, deadline=None)
def test_the_polynomial_of_echo_is_that_of_two_steps_of_sgd(s, h):
    """The map of a pair, column by column, from the steps as torch takes them; its eigenvalues are the roots."""
    columns = []
    for w, buffer in ((1.0, 0.0), (0.0, 1.0)):
        plain = h * w
        buffer = s.momentum * buffer + plain
        w -= s.lr * buffer
        buffer = s.momentum * buffer + h * (w + s.c * plain)
        columns.append((w - s.lr * buffer, buffer))
    pair = np.array(columns).T
    found = polynomials(ECHO, np.array([h]), s)[0]
    np.testing.assert_allclose(found[1:], [-np.trace(pair), np.linalg.det(pair), 0.0], rtol=1e-8, atol=1e-8)


@given(some_settings)
@hypothesis_settings(max_examples=30, deadline=None)
def test_the_limit_of_echo_is_where_its_roots_leave_the_circle(s):
    limit = critical_curvature(ECHO, s)
    below = np.linspace(0.01, 1 - 1e-4, 500) * limit
    assert root_radius(ECHO, below, s).max() < 1
    assert root_radius(ECHO, np.array([1 + 1e-4]) * limit, s)[0] > 1


@pytest.mark.parametrize(("momentum", "c", "expected"), [(0.9, 0.05, 6.498), (0.5, 0.05, 11.835), (0.0, 0.01, 22.222)])
def test_each_condition_of_echo_is_where_training_says(momentum, c, expected):
    """The modulus of a complex pair, Z = -1, and Z = 1 are first in turn."""
    setting = Setting(momentum=momentum, c=c)
    measured = measured_critical_curvature(ECHO, setting)
    assert critical_curvature(ECHO, setting) == pytest.approx(expected, abs=1e-3)
    assert measured == pytest.approx(expected, rel=2e-3)


def test_a_band_that_training_could_step_over_is_refused():
    """Without momentum and at c just above eta/2 echo is unstable around h = 20 only, and again from 40 on."""
    setting = Setting(momentum=0.0, c=0.0502)
    radius = root_radius(ECHO, np.array([17.0, 20.0, 24.0]), setting)
    assert (radius > 1).tolist() == [False, True, False]
    with pytest.raises(ValueError, match="echo is unstable in a band of curvatures .* choose another c or momentum"):
        check_measurable(setting)
    assert check_measurable(Setting(momentum=0.0)) == 900  # at c = eta/2 it touches the circle, and no more


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_the_optimizers_grow_where_the_roots_say(method):
    """3 % below the predicted limit everything decays, 3 % above it grows."""
    setting = Setting()
    limit = critical_curvature(method, setting)
    assert grows(method, np.array([0.3, 0.97, 1.03]) * limit, setting, steps=450).tolist() == [False, False, True]


@pytest.mark.parametrize("method", [PLUS, SAM], ids=lambda m: m.name)
def test_the_limit_is_found_without_the_polynomial(method):
    setting = Setting(lr=0.2, momentum=0.6, c=0.1)
    measured = measured_critical_curvature(method, setting, steps=300)
    boundary = Boundary(method.name, critical_curvature(method, setting), measured)
    assert measured == pytest.approx(boundary.predicted, rel=3e-3)
    assert boundary_check(boundary).holds
    assert not boundary_check(Boundary("", boundary.predicted, 1.05 * measured)).holds


def test_noise_keeps_the_weights_moving_and_leaves_the_limit_where_sgd_has_it():
    """What must grow is the difference of two runs with the same draws: the noise itself never dies out."""
    setting, random = Setting(momentum=0.5), BY_NAME["S2-SAM random"]
    assert critical_curvature(random, setting) == pytest.approx(30.0, rel=1e-4)
    assert grows(random, np.array([10.0, 29.0, 31.0]), setting, steps=300).tolist() == [False, False, True]
    w = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer, single = real_optimizer(random, w, setting, rho=setting.c / setting.lr, scale="step")
    seen = []

    def fill():
        w.grad = 10.0 * w.detach()

    for _ in range(300):
        step_at(optimizer, single, fill)
        seen.append(float(w.detach()))
    assert 0.01 < float(np.std(seen[200:])) < 1.0  # c = 0.05 times a normal number, in every step


def test_limit_cycles_scale_with_rho_and_have_their_sizes(make_generator):
    checks = list(limit_cycles(make_generator(1)))
    assert [c for c in checks if not c.holds] == []
    assert [round(c.measured, 3) for c in checks] == [14.142, 14.142, 1.111, 1.111, 1.111, 1.111]


def test_where_sam_ends_depends_on_its_start():
    ends = [limit_cycle(SAM, Setting(), curvature=20.0, rho=1.0, start=s, steps=400) for s in (0.1, 1.0, 3.3)]
    assert ends == pytest.approx([1.111, 2.232, 3.720], rel=1e-2)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"lr": 0.0}, "lr must be above 0"),
        ({"lr": -1.0}, "lr must be a finite number >= 0"),
        ({"momentum": 1.0}, "momentum must be below 1"),
        ({"c": float("nan")}, "c must be a finite number"),
        ({"beta": 1.5}, "beta must be a finite number between 0 and 1"),
    ],
)
def test_refusals(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        Setting(**values)


def test_the_measurement_refuses_what_it_has_too_few_steps_for():
    with pytest.raises(ValueError, match="at most 0.99"):
        measured_critical_curvature(SGD, Setting(momentum=0.995))
    slow = Setting(lr=0.001, momentum=0.99, c=1.0)  # 1,990 steps a turn: growth and oscillation look alike for long
    plus = BY_NAME["S2-SAM +momentum"]
    with pytest.raises(ValueError, match="boundary of S2-SAM \\+momentum .* 9,000 are the limit"):
        measured_critical_curvature(plus, slow)
    with pytest.raises(ValueError, match="choose a lower momentum or beta, or a c nearer to lr"):
        check_measurable(slow)
    assert measured_critical_curvature(SGD, slow) == pytest.approx(3980.0, rel=0.01)


def test_a_slow_boundary_is_watched_for_longer():
    """One turn of the critical mode takes 140 steps: 900 of them do not show whether it grows."""
    setting, plus = Setting(lr=0.001, momentum=0.9, c=0.05), BY_NAME["S2-SAM +momentum"]
    assert 1200 < check_measurable(setting) < 1300
    measured = measured_critical_curvature(plus, setting)
    assert boundary_check(Boundary(plus.name, critical_curvature(plus, setting), measured)).holds
