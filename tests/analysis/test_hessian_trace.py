"""Hutch++: exact where it can be, unbiased with an honest error elsewhere, and tighter than plain Hutchinson."""

from __future__ import annotations

import pytest
import torch

from s2sam.analysis.hessian_trace import trace
from s2sam.analysis.lanczos import gaussian

F64 = torch.zeros((), dtype=torch.float64)


def test_low_rank_and_small_matrices_are_exact(make_generator):
    u = gaussian((3, 50), make_generator(1), F64)
    low = u.T @ u
    found = trace(lambda rows: rows @ low, 50, make_generator(), queries=12)
    assert found.value == pytest.approx(float(low.trace()), rel=1e-9) and found.error < 1e-6
    assert found.queries == 12
    calls = []
    whole = trace(lambda rows: (calls.append(len(rows)), rows @ low[:4, :4])[1], 4, make_generator(), queries=12)
    assert whole.value == pytest.approx(float(low[:4, :4].trace()), rel=1e-12)
    assert (whole.error, whole.queries, sum(calls)) == (0.0, 4, 4)


def test_it_is_unbiased_and_says_how_wrong_it_is(make_generator):
    eigenvalues = 2.0 * torch.arange(1, 81, dtype=torch.float64) ** -1.5  # decays like a network's
    turn = torch.linalg.qr(gaussian((80, 80), make_generator(2), F64)).Q
    h = turn @ torch.diag(eigenvalues) @ turn.T
    exact = float(eigenvalues.sum())
    found = [trace(lambda rows: rows @ h, 80, make_generator(seed), queries=30) for seed in range(150)]
    values = torch.tensor([one.value for one in found], dtype=torch.float64)
    assert abs(float(values.mean()) - exact) < 4 * float(values.std()) / 150**0.5
    claimed = float(torch.tensor([one.error**2 for one in found]).mean().sqrt())
    assert claimed == pytest.approx(float(values.std()), rel=0.25)
    signs = torch.randint(2, (150, 30, 80), generator=make_generator(3)).double() * 2 - 1
    hutchinson = ((signs @ h) * signs).sum(2).mean(1)
    assert float(values.std()) < 0.5 * float(hutchinson.std())


def test_chunks_change_nothing(make_generator):
    h = torch.diag(torch.arange(40.0, dtype=torch.float64))
    sizes = []

    def product(rows):
        sizes.append(len(rows))
        return rows @ h

    one, many = (trace(product, 40, make_generator(), queries=30, chunk=chunk) for chunk in (16, 3))
    assert one.value == pytest.approx(many.value, rel=1e-12)
    assert sizes == [10] * 3 + [3, 3, 3, 1] * 3


def test_wrong_use_is_refused(make_generator):
    with pytest.raises(ValueError, match="queries"):
        trace(lambda rows: rows, 30, make_generator(), queries=5)
    for size in (2, 30):
        with pytest.raises(RuntimeError, match="not finite"):
            trace(lambda rows: rows * torch.nan, size, make_generator(), queries=6)
