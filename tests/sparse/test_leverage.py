"""Leverage scores, residuals and the draw of CHEX against brute force in numpy, and by hand."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2sam.sparse.leverage import draw, leverage, residual


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(c=st.integers(1, 7), extra=st.integers(0, 9), k=st.integers(1, 7), seed=st.integers(0, 99))
def test_leverage_is_the_norm_of_the_rows_of_v_k(c, extra, k, seed):
    """As the paper says it: the right singular vectors of the (entries x channels) matrix."""
    w = normal(c, c + extra, seed=seed)
    k = min(k, c)
    _, _, vh = np.linalg.svd(w.numpy().T, full_matrices=False)
    expected = np.sqrt((vh[:k].T ** 2).sum(1))
    found = leverage(w, k)
    assert np.allclose(found.numpy(), expected, atol=1e-9)
    assert float(found.square().sum()) == pytest.approx(k)
    assert float(found.max()) <= 1 + 1e-12


def test_leverage_prefers_what_the_leading_directions_need():
    # channels 0 and 1 are one direction, longer together; 2 is alone and shorter; 3 is zero
    w = torch.tensor([[3.0, 0, 0, 0], [3.0, 0, 0, 0], [0, 2.0, 0, 0], [0, 0, 0, 0]])
    assert leverage(w, 1).tolist() == pytest.approx([0.5**0.5, 0.5**0.5, 0, 0])
    assert leverage(w, 2).tolist() == pytest.approx([0.5**0.5, 0.5**0.5, 1, 0])
    assert leverage(w, 4).tolist() == pytest.approx([0.5**0.5, 0.5**0.5, 1, 0])  # of rank 2: nothing is made up


def test_fewer_entries_than_channels_fall_back_to_the_l1_norm():
    w = torch.tensor([[1.0, -1.0], [0.5, 0.0], [0.0, -3.0]])
    assert leverage(w, 2).tolist() == [2.0, 0.5, 3.0]


@settings(max_examples=40, deadline=None)
@given(c=st.integers(1, 6), n=st.integers(1, 8), seed=st.integers(0, 99), bits=st.integers(0, 63))
def test_residual_is_the_distance_to_the_span_of_the_kept(c, n, seed, bits):
    w = normal(c, n, seed=seed)
    keep = torch.tensor([bool(bits >> i & 1) for i in range(c)])
    kept = w[keep].numpy().T
    found = residual(w, keep)
    for j in range(c):
        if keep[j]:
            expected = 0.0
        else:
            target = w[j].numpy()
            nearest = kept @ np.linalg.lstsq(kept, target, rcond=None)[0] if kept.size else 0 * target
            expected = np.linalg.norm(target - nearest)
        assert float(found[j]) == pytest.approx(expected, abs=1e-9)


def test_nothing_is_missing_from_a_span_that_holds_it():
    w = torch.tensor([[1.0, 0, 0], [1.0, 1, 0], [0, 5, 0], [0, 0, 0.5], [0, 0, 0]])
    found = residual(w, torch.tensor([True, True, False, False, False]))
    assert found.tolist() == pytest.approx([0, 0, 0, 0.5, 0], abs=1e-12)
    zero = residual(w, torch.tensor([False, False, False, False, True]))
    assert zero.tolist() == pytest.approx([1, 2**0.5, 5, 0.5, 0])


def test_the_draw_is_softmax_without_replacement():
    logits = torch.tensor([0.0, 1.0, 2.0, -torch.inf])
    p = torch.softmax(logits, 0).tolist()
    expected = {}  # of ordered draws of two, both orders together
    for i, j in itertools.permutations(range(3), 2):
        pair = tuple(sorted((i, j)))
        expected[pair] = expected.get(pair, 0) + p[i] * p[j] / (1 - p[i])
    g = torch.Generator().manual_seed(0)
    seen = dict.fromkeys(expected, 0)
    for _ in range(4000):
        seen[tuple(draw(logits, 2, g).nonzero().flatten().tolist())] += 1
    for pair, share in expected.items():
        assert seen[pair] / 4000 == pytest.approx(share, abs=0.03)


def test_the_draw_is_exact_and_repeatable():
    logits = normal(50)
    one, two = (draw(logits, 7, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two) and int(one.sum()) == 7
    assert int(draw(logits, 0, torch.Generator()).sum()) == 0
    assert int(draw(logits, 50, torch.Generator()).sum()) == 50
