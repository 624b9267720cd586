"""Lanczos against dense eigenvalues in float64: values, residuals, the flag, multiplicities, quadrature."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2sam.analysis.lanczos import density, extremes, gaussian, lanczos, quadrature

F64 = torch.zeros((), dtype=torch.float64)


def symmetric(n, generator):
    a = gaussian((n, n), generator, F64)
    return (a + a.T) / 2


def of(h):
    return lambda rows: rows @ h


def test_both_ends_are_those_of_the_dense_matrix(make_generator):
    h = symmetric(40, make_generator(1))
    exact = torch.linalg.eigvalsh(h).flip(0)
    found = extremes(of(h), 40, make_generator(2), count=4, tolerance=1e-9, max_steps=40)
    assert found.converged
    assert [one.value for one in found.top] == pytest.approx(exact[:4].tolist(), rel=1e-9)
    assert found.lowest.value == pytest.approx(float(exact[-1]), rel=1e-9)
    assert torch.allclose(found.vectors @ h, exact[:4, None] * found.vectors, atol=1e-7)
    assert torch.allclose(found.vectors @ found.vectors.T, torch.eye(4, dtype=torch.float64), atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 30), st.integers(1, 12), st.integers(1, 4), st.integers(0, 10**6))
def test_values_are_bounds_and_residuals_are_true(n, steps, count, seed):
    generator = torch.Generator().manual_seed(seed)
    h = symmetric(n, generator)
    exact = torch.linalg.eigvalsh(h).flip(0).tolist()
    found = extremes(of(h), n, generator, count=count, tolerance=1e-4, max_steps=steps)
    assert found.steps <= min(steps, n)
    for one, largest, v in zip(found.top, exact, found.vectors, strict=False):
        assert one.value <= largest + 1e-9
        assert float((v @ h - one.value * v).norm()) == pytest.approx(one.residual, abs=1e-9)
        assert min(abs(one.value - x) for x in exact) <= one.residual + 1e-9
    assert found.lowest.value >= exact[-1] - 1e-9
    if found.converged:
        assert len(found.top) == min(count, n)
        assert all(one.residual <= 1e-4 * max(map(abs, exact)) + 1e-12 for one in found.top)


def test_too_few_steps_are_told(make_generator):
    h = torch.diag(torch.linspace(0.0, 1.0, 200, dtype=torch.float64))
    early = extremes(of(h), 200, make_generator(), max_steps=4)
    assert not early.converged and not early.top[0].converged
    assert early.steps == 4 and early.top[0].value < 0.999
    fewer = extremes(of(h), 200, make_generator(), count=5, max_steps=3)
    assert len(fewer.top) == 3 and not any(one.converged for one in fewer.top)
    enough = extremes(of(h), 200, make_generator(), max_steps=200)
    assert enough.converged and enough.steps < 100
    assert enough.top[0].value == pytest.approx(1.0, abs=1e-3)


def test_eigenvalues_that_occur_twice_are_found_twice(make_generator):
    h = torch.diag(torch.tensor([3.0, 3.0, 1.0, 1.0, 0.0], dtype=torch.float64))
    found = extremes(of(h), 5, make_generator(), count=3, max_steps=5, tolerance=1e-9)
    assert [round(one.value, 9) for one in found.top] == [3.0, 3.0, 1.0]
    nothing = extremes(of(torch.zeros_like(h)), 5, make_generator(), count=2)
    assert [one.value for one in nothing.top] == [0.0, 0.0] and nothing.converged
    assert extremes(of(h[:1, :1]), 1, make_generator(), count=3).top[0].value == pytest.approx(3.0)


def test_single_precision_is_enough_for_its_tolerance(make_generator):
    h = symmetric(300, make_generator(3)).float()
    found = extremes(of(h), 300, make_generator(), count=2, like=torch.zeros(()), max_steps=150)
    exact = torch.linalg.eigvalsh(h.double()).flip(0)
    assert found.converged and found.vectors.dtype == torch.float32
    assert [one.value for one in found.top] == pytest.approx(exact[:2].tolist(), rel=1e-4)


def test_the_basis_stays_orthogonal(make_generator):
    h = torch.diag(torch.logspace(-8, 2, 120, dtype=torch.float64)).float()  # where plain Lanczos loses it
    for t in lanczos(of(h), gaussian((2, 120), make_generator(), torch.zeros(())), 60, make_generator(1)):
        last = t
    eye = torch.eye(60).expand(2, 60, 60)
    assert torch.allclose(last.basis @ last.basis.transpose(1, 2), eye, atol=1e-5)


def test_moments_of_the_quadrature_are_exact(make_generator):
    h = symmetric(30, make_generator(5))
    start = gaussian((2, 30), make_generator(6), F64)
    found = quadrature(of(h), 30, make_generator(6), probes=2, steps=4)
    q = start / start.norm(dim=1, keepdim=True)
    for power in range(8):  # up to 2 steps - 1
        exact = ((q @ torch.linalg.matrix_power(h, power)) * q).sum(1)
        assert (found.weights * found.nodes**power).sum(1) == pytest.approx(exact.numpy(), rel=1e-9, abs=1e-9)


def test_the_density_is_that_of_the_eigenvalues(make_generator):
    exact = torch.cat([torch.zeros(80), torch.full((20,), 4.0)]).double()
    found = quadrature(of(torch.diag(exact)), 100, make_generator(), probes=300, steps=5)
    assert found.mean == pytest.approx(0.8, abs=0.03)
    grid = np.linspace(-2, 6, 1601)
    phi = density(found.nodes, found.weights, grid, 0.1)
    below = grid < 2
    assert np.trapezoid(phi, grid) == pytest.approx(1.0, abs=1e-6)
    assert np.trapezoid(phi[below], grid[below]) == pytest.approx(0.8, abs=0.01)


def test_wrong_use_is_refused(make_generator):
    h = torch.eye(3, dtype=torch.float64)
    for wrong, sentence in [({"count": 0}, "count"), ({"max_steps": 0}, "max_steps"), ({"tolerance": 0.0}, "above 0")]:
        with pytest.raises(ValueError, match=sentence):
            extremes(of(h), 3, make_generator(), **wrong)
    with pytest.raises(ValueError, match="probes"):
        quadrature(of(h), 3, make_generator(), probes=0)
    for function in (extremes, quadrature):
        with pytest.raises(RuntimeError, match="not finite"):
            function(of(h * torch.nan), 3, make_generator())
