"""Exact top-k: equal to a slow stable sort, with ties, NaN and excluded positions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from s2sam.sparse.topk import LARGE, global_topk, kth_largest, topk_mask

values = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, math.inf, -math.inf, math.nan]),
    st.floats(width=32, allow_infinity=False),
)
score_lists = st.lists(values, min_size=1, max_size=60)


def slow(scores: list[float], k: int) -> list[bool]:
    """Sort stably by falling score; NaN counts as the smallest finite float32."""
    known = [torch.finfo(torch.float32).min if math.isnan(s) else s for s in scores]
    chosen = sorted(range(len(known)), key=lambda i: -known[i])[:k]
    return [i in chosen for i in range(len(known))]


@given(score_lists, st.data())
def test_equals_a_stable_sort(scores, data):
    candidates = sum(s != -math.inf for s in scores)
    k = data.draw(st.integers(0, candidates))
    assert topk_mask(torch.tensor(scores), k).tolist() == slow(scores, k)


@given(score_lists, st.data())
def test_too_few_candidates_is_an_error(scores, data):
    candidates = sum(s != -math.inf for s in scores)
    k = data.draw(st.integers(candidates + 1, len(scores) + 3))
    with pytest.raises(ValueError, match="cannot choose"):
        topk_mask(torch.tensor(scores), k)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64])
def test_exact_count_in_every_dtype_with_one_great_tie(dtype):
    scores = torch.ones(7, 11).to(dtype)
    mask = topk_mask(scores, 30)
    assert mask.shape == (7, 11)
    assert mask.flatten().tolist() == [True] * 30 + [False] * 47


def test_float64_scores_that_are_equal_in_float32_are_told_apart():
    scores = torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64)
    assert topk_mask(scores, 1).tolist() == [False, True]


def test_no_host_read_without_check():
    class NoBool(torch.Tensor):
        def __bool__(self):
            raise AssertionError("read on the host")

        def item(self):
            raise AssertionError("read on the host")

    scores = torch.tensor([3.0, 1.0, 3.0]).as_subclass(NoBool)
    mask = topk_mask(scores, 1, check=False).as_subclass(torch.Tensor)
    assert mask.tolist() == [True, False, False]


class Operators(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.__name__.partition(".")[0])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["normal", "ties", "candidates", "sorted", "periodic", "one value"])
def test_many_scores_on_a_cpu(kind):
    """The bracket finds the same value as a sort, also where every 64th value is a bad sample."""
    generator = torch.Generator().manual_seed(0)
    n = LARGE + 17
    scores = torch.randn(n, generator=generator)
    if kind == "ties":
        scores = (scores * 3).round()
    elif kind == "candidates":
        scores[torch.rand(n, generator=generator) < 0.9] = -math.inf
    elif kind == "sorted":
        scores = scores.sort().values
    elif kind == "periodic":
        scores[::64] = torch.arange(len(scores[::64])) + 10.0
    elif kind == "one value":
        scores[:] = 2.0
    order = scores.sort(descending=True, stable=True)
    candidates = int((scores > -math.inf).sum())
    for k in (1, 2, 7, candidates // 10, candidates // 2, candidates - 1, candidates):
        assert kth_largest(scores, k) == order.values[k - 1]
        expected = torch.zeros(n, dtype=torch.bool)
        expected[order.indices[:k]] = True
        assert torch.equal(topk_mask(scores, k), expected)
    if candidates < n:
        with pytest.raises(ValueError, match=f"cannot choose {candidates + 1} of {candidates} candidates"):
            topk_mask(scores, candidates + 1)


def test_25_million_weights_are_neither_sorted_nor_read():
    """On the meta device nothing can be read; the weights are those of a ResNet-50."""
    n = 25_502_912
    with Operators() as operators:
        mask = topk_mask(torch.empty(n, device="meta"), n // 10, check=False)
    assert (mask.shape, mask.dtype, mask.device.type) == ((n,), torch.bool, "meta")
    assert operators.names.count("topk") == 1
    assert not {"sort", "argsort", "msort", "kthvalue", "unique", "_local_scalar_dense"} & set(operators.names)
    with pytest.raises(RuntimeError, match="meta"):
        topk_mask(torch.empty(n, device="meta"), n // 10)  # the check is a read, and callers that know leave it out


@given(
    st.lists(st.lists(values.filter(lambda v: v != -math.inf), min_size=2, max_size=15), min_size=1, max_size=5),
    st.data(),
)
def test_global_equals_one_long_list(layers, data):
    flat = [s for layer in layers for s in layer]
    k = data.draw(st.integers(0, len(flat)))
    masks = global_topk({str(i): torch.tensor(layer) for i, layer in enumerate(layers)}, k)
    assert [bool(b) for m in masks.values() for b in m] == slow(flat, k)


@given(
    st.lists(st.lists(st.sampled_from([0.0, 1.0, 2.0, math.nan]), min_size=2, max_size=15), min_size=1, max_size=5),
    st.data(),
)
def test_global_keeps_the_best_of_each_layer(layers, data):
    size = sum(map(len, layers))
    k = data.draw(st.integers(len(layers), size))
    masks = global_topk({str(i): torch.tensor(layer) for i, layer in enumerate(layers)}, k, at_least=1)
    assert sum(int(m.sum()) for m in masks.values()) == k
    for layer, mask in zip(layers, masks.values(), strict=True):
        best = slow(layer, 1).index(True)
        assert bool(mask[best])


def test_global_with_too_few_for_all_layers():
    with pytest.raises(ValueError, match="cannot keep 1 in each of 2 layers with 1"):
        global_topk({"a": torch.ones(3), "b": torch.ones(3)}, 1, at_least=1)


def test_negative_k():
    with pytest.raises(ValueError, match="cannot choose -1"):
        topk_mask(torch.ones(3), -1)
