"""Worst, average and adaptive sharpness on quadratics with closed forms; the record of a network; its invariance."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from s2sam.analysis import sharpness
from s2sam.analysis.hessian import ActiveLoss
from s2sam.analysis.lanczos import gaussian
from s2sam.analysis.sharpness import (
    INVARIANT,
    SCALED,
    SharpnessSettings,
    along,
    ascent,
    average,
    m_sharpness,
    measure,
)
from s2sam.sam.scales import SCALES

F64 = torch.zeros((), dtype=torch.float64)
QUICK = SharpnessSettings(
    steps=3, draws=3, group=8, eigenvalues=2, max_steps=30, queries=9, probes=1, density_steps=5, precision="fp64"
)


class Quadratic:
    """L(w + e) = g'e + e'He / 2, around w."""

    def __init__(self, h, g, w=None):
        self.h, self.g = h, g
        self.weights = torch.ones_like(g) if w is None else w
        self.calls = 0

    def loss(self, e=None):
        self.calls += 1
        return 0.0 if e is None else float(self.g @ e + e @ self.h @ e / 2)

    def gradient(self, e=None):
        return self.loss(e), self.g if e is None else self.g + self.h @ e


def random_quadratic(n, generator, *, shift=0.0):
    a = gaussian((n, n), generator, F64)
    h = (a + a.T) / 2 + shift * torch.eye(n, dtype=torch.float64)
    return Quadratic(h, gaussian((1, n), generator, F64)[0])


def largest_rise(q, radius):
    """max over the ball, by the secular equation (mu I - H) e = g with mu above the largest eigenvalue."""
    values, vectors = torch.linalg.eigh(q.h)
    b = vectors.T @ q.g
    low = float(values[-1])
    low, high = low + 1e-9, low + float(q.g.norm()) / radius + 1.0
    for _ in range(200):
        mu = (low + high) / 2
        longer = float((b / (mu - values)).norm()) > radius
        low, high = (mu, high) if longer else (low, mu)
    return q.loss(vectors @ (b / (high - values)))


def test_one_step_is_that_of_sam(make_generator):
    q = random_quadratic(6, make_generator(1))
    size = float(q.g.norm())
    (rise,) = ascent(q, 0.3)
    assert rise == pytest.approx(0.3 * size + 0.045 * float(q.g @ q.h @ q.g) / size**2, rel=1e-12)
    q.weights = gaussian((1, 6), make_generator(2), F64)[0]
    scale = SCALES["asam"]
    e = scale.shaped([q.g], [q.weights])[0]
    e = e * scale.coefficient(0.3, scale.direction_norm([q.g], [q.weights]), None)
    assert float((e / q.weights).norm()) == pytest.approx(0.3)
    assert ascent(q, 0.3, scale=q.weights.abs()) == pytest.approx([q.loss(e)], rel=1e-9)


@pytest.mark.parametrize("shift", [0.0, 4.0])
@pytest.mark.parametrize("radius", [0.05, 1.0])
def test_many_steps_reach_the_largest_rise(make_generator, shift, radius):
    for seed in range(3):
        q = random_quadratic(8, make_generator(seed), shift=shift)
        exact = largest_rise(q, radius)
        rises = ascent(q, radius, 250)
        assert max(rises) <= exact * (1 + 1e-9)
        assert max(rises) == pytest.approx(exact, rel=2e-3)
        assert rises[0] < exact * (1 - 1e-6)


def test_along_the_steepest_eigenvector_one_step_is_all():
    h = torch.diag(torch.tensor([5.0, 1.0], dtype=torch.float64))
    q = Quadratic(h, torch.tensor([2.0, 0.0], dtype=torch.float64))
    assert ascent(q, 0.1, 4) == pytest.approx([0.2 + 0.025] * 4, rel=1e-12)
    q.calls = 0
    ascent(q, 0.1, 4, start=q.gradient())
    assert q.calls == 5  # the start, three gradients and a loss


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 8), st.integers(1, 6), st.floats(1e-3, 10.0), st.booleans(), st.integers(0, 10**6))
def test_no_step_leaves_the_ball(n, steps, radius, adaptive, seed):
    generator = torch.Generator().manual_seed(seed)
    q = random_quadratic(n, generator)
    q.weights = gaussian((1, n), generator, F64)[0]
    scale = q.weights.abs() if adaptive else torch.ones(n, dtype=torch.float64)
    seen, gradient, loss = [], q.gradient, q.loss
    q.gradient = lambda e=None: (seen.append(e), gradient(e))[1]
    q.loss = lambda e=None: (seen.append(e), loss(e))[1]
    rises = ascent(q, radius, steps, scale=scale)
    lengths = [float((e / scale).norm()) for e in seen if e is not None]
    assert lengths and max(lengths) <= radius * (1 + 1e-9)
    assert lengths[0] == pytest.approx(radius)
    assert len(rises) == steps


def test_flat_and_infinite_losses_end_the_ascent():
    zero = torch.zeros(3, dtype=torch.float64)
    assert ascent(Quadratic(torch.eye(3, dtype=torch.float64), zero), 0.1, 5) == [0.0]
    q = Quadratic(torch.eye(3, dtype=torch.float64) * math.inf, torch.ones(3, dtype=torch.float64))
    assert not math.isfinite(ascent(q, 0.1, 5)[0])


def test_the_even_part_is_the_curvature_and_the_odd_part_the_slope(make_generator):
    q = random_quadratic(5, make_generator(3))
    e = gaussian((1, 5), make_generator(4), F64)[0]
    odd, even = along(q, 0.0, e)
    assert odd == pytest.approx(float(q.g @ e), rel=1e-9)
    assert even == pytest.approx(float(e @ q.h @ e) / 2, rel=1e-9)


def test_on_average_the_rise_is_the_trace(make_generator):
    q = random_quadratic(10, make_generator(5), shift=2.0)
    scale = torch.linspace(0.5, 2.0, 10, dtype=torch.float64)
    for s in (None, scale):
        found = torch.tensor(average(q, 0.0, 0.3, 600, make_generator(6), scale=s), dtype=torch.float64)
        h = q.h if s is None else s[:, None] * q.h * s
        exact = 0.09 * float(h.trace()) / 20
        assert abs(float(found.mean()) - exact) < 4 * float(found.std()) / 600**0.5
        assert float(found.std()) / 600**0.5 < 0.1 * abs(exact)


def test_groups_are_worse_off_than_the_whole(make_generator):
    h = torch.eye(4, dtype=torch.float64)
    parts = [Quadratic(h, g) for g in (torch.eye(4, dtype=torch.float64) * 2)]
    rises, norms = m_sharpness(parts, 0.1)
    assert rises == pytest.approx([0.2 + 0.005] * 4) and norms == [2.0] * 4
    whole = Quadratic(h, sum(part.g for part in parts) / 4)
    assert ascent(whole, 0.1)[0] == pytest.approx(0.1 + 0.005)


class Normalised(nn.Module):
    """All weights stand before a BatchNorm without parameters: the loss does not change if they are rescaled."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 3, bias=False)
        self.bn = nn.BatchNorm1d(3, affine=False, eps=1e-12)

    def forward(self, x):
        return self.bn(self.fc(x.flatten(1)))


@pytest.fixture
def images(make_generator):
    generator = make_generator(2)
    x = torch.randn(24, 1, 2, 3, generator=generator)
    return x, torch.randint(0, 3, (24,), generator=generator)


def losses(images, factor=1.0, **options):
    torch.random.default_generator.manual_seed(1)
    model = Normalised()
    with torch.no_grad():
        model.fc.weight.mul_(factor)
    return ActiveLoss(model, *images, bn="train", dtype=torch.float64, **options)


def test_the_scale_invariant_forms_are_and_the_raw_ones_are_not(images):
    one, other = (measure(losses(images, factor), QUICK) for factor in (1.0, 4.0))
    assert other["loss"] == pytest.approx(one["loss"], rel=1e-9)
    assert other["weight_norm"] == pytest.approx(4 * one["weight_norm"], rel=1e-6)
    assert other["lambda_max"]["value"] == pytest.approx(one["lambda_max"]["value"] / 16, rel=1e-6)
    for key in ("lambda_w2", "trace_w2_n", "worst_adaptive", "average_relative", "average_adaptive"):
        assert other[key]["value"] == pytest.approx(one[key]["value"], rel=1e-6), key
        assert abs(one[key]["value"]) > 1e-6
    for key in ("worst", "average", "m_sharpness", "trace"):
        assert other[key]["value"] != pytest.approx(one[key]["value"], rel=0.2), key


def test_a_rescaled_filter_changes_no_measure_that_decides_and_those_in_units_of_w(images):
    one, other = (measure(losses(images, torch.tensor(f)), QUICK) for f in ([[1.0]] * 3, [[1.0], [20.0], [1.0]]))
    assert other["loss"] == pytest.approx(one["loss"], rel=1e-9)
    for key in INVARIANT:
        assert other[key]["value"] == pytest.approx(one[key]["value"], rel=1e-6), key
    for key in SCALED:
        assert other[key]["value"] > 2 * one[key]["value"], key


def test_the_record_is_what_its_parts_say(images):
    loss = losses(images)
    done = []
    found = measure(loss, QUICK, on_pass=done.append)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    dense = loss.product(torch.eye(loss.size, dtype=torch.float64))
    exact = torch.linalg.eigvalsh(dense).flip(0)
    assert [e["value"] for e in found["eigenvalues"]] == pytest.approx(exact[:2].tolist(), rel=1e-3)
    assert found["lambda_max"] == found["eigenvalues"][0] and found["lambda_max"]["converged"]
    assert found["lambda_w2"]["value"] == found["lambda_max"]["value"] * found["weight_norm"] ** 2
    base, g = loss.gradient()
    assert (found["loss"], found["gradient_norm"]) == (base, pytest.approx(float(g.norm())))
    assert found["worst"]["one_step"] == ascent(loss, 0.05)[0] == found["worst"]["rises"][0]
    assert found["worst"]["value"] == max(found["worst"]["rises"]) and len(found["worst"]["rises"]) == 3
    assert found["m_sharpness"]["value"] > found["worst"]["one_step"] > 0
    assert found["m_sharpness"]["images"] == 8 and len(found["m_sharpness"]["each"]) == 3
    assert found["group_gradient_norm"] > found["gradient_norm"]
    c = 0.05 / found["group_gradient_norm"]
    assert found["c_lambda_max"]["value"] == pytest.approx(c * found["lambda_max"]["value"])
    assert found["rho_over_w"] == 0.05 / found["weight_norm"]
    assert found["trace_w2_n"]["terms"] == 3  # of the 9 products
    assert len(found["density"]["nodes"]) == 1 and sum(found["density"]["weights"][0]) == pytest.approx(1.0)
    assert done[-1] == QUICK.passes and done == sorted(done)
    assert sum(found["passes"].values()) <= QUICK.passes
    assert measure(losses(images), QUICK) == found  # the seed decides every draw


def test_what_is_left_out_or_not_converged_is_said(images, monkeypatch):
    off = SharpnessSettings(steps=1, draws=2, max_steps=1, queries=0, probes=0, group=8)
    found = measure(losses(images), off)
    assert (found["trace"], found["density"], found["trace_w2_n"]) == (None, None, None)
    for key in ("lambda_max", "lambda_w2", "c_lambda_max", "lowest_eigenvalue"):
        assert found[key]["converged"] is False
    monkeypatch.setattr(sharpness, "m_sharpness", lambda parts, radius: ([1.0], [math.inf]))
    steep = measure(losses(images), off)
    assert (steep["group_gradient_norm"], steep["c"], steep["c_lambda_max"]["value"]) == (None, None, None)
    broken = losses(images)
    broken.prepare = lambda x: x * math.nan
    with pytest.raises(RuntimeError, match="not finite at the weights"):
        measure(broken, off)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [({"rho": 0.0}, "rho must be above 0"), ({"adaptive_rho": -1.0}, "adaptive_rho must be a number"),
     ({"steps": 0}, "steps must be"), ({"draws": 1}, "draws must be"), ({"queries": 3}, "at least 6 products"),
     ({"tolerance": 1.0}, "tolerance"), ({"bn": "evl"}, "did you mean 'eval'"), ({"group": 0}, "group"),
     ({"precision": "fp16"}, "precision"), ({"seed": -1}, "seed"), ({"sigma": math.inf}, "sigma")],
)  # fmt: skip
def test_impossible_settings_are_refused(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        SharpnessSettings(**wrong)
