"""SparsePattern: masks there and back, draws that need no dense tensor, foreign patterns."""

import tracemalloc
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import s2sam.compact.pattern as module
from s2sam import sparsify
from s2sam.compact import SparsePattern, sparse_linear


class PeakBytes(TorchDispatchMode):
    """The most bytes of torch's tensors that were alive at a time inside, and those of numpy's arrays beside them."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __enter__(self):
        tracemalloc.start()
        return super().__enter__()

    def __exit__(self, *exception):
        self.peak += tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return super().__exit__(*exception)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.layout == torch.strided:
                storage = t.untyped_storage()
                key = storage._cdata
                if key not in self.alive:
                    self.alive[key] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, key, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


masks = st.tuples(st.integers(1, 9), st.integers(1, 9), st.floats(0, 1), st.integers(0, 99)).map(
    lambda v: torch.rand(v[0], v[1], generator=generator(v[3])) < v[2]
)


@given(masks)
def test_a_mask_survives_the_way_there_and_back(mask):
    pattern = SparsePattern.from_mask(mask)
    assert torch.equal(pattern.mask(), mask)
    assert pattern.nnz == mask.sum() and pattern.crow.dtype == pattern.col.dtype == torch.int32
    assert torch.equal(pattern.positions(), mask.flatten().nonzero().squeeze(1))
    assert SparsePattern.from_csr(pattern.crow, pattern.col.long(), pattern.shape).equals(pattern)


@given(masks)
def test_the_transposed_pattern_holds_the_same_weights(mask):
    pattern = SparsePattern.from_mask(mask)
    transposed, perm = pattern.transpose()
    assert torch.equal(transposed.mask(), mask.T)
    weight = torch.rand(mask.shape, generator=generator())
    assert torch.equal(weight[mask][perm.long()], weight.T[mask.T])


@given(masks, st.integers(1, 4))
def test_entries_of_blocks(mask, block):
    entries, places = SparsePattern.from_mask(mask).entries(block)
    wide = mask.repeat_interleave(block, 0).repeat_interleave(block, 1)
    assert torch.equal(entries.mask(), wide)
    weight = torch.rand(wide.shape, generator=generator())
    tiles = weight.view(mask.shape[0], block, mask.shape[1], block).transpose(1, 2)[mask]
    assert torch.equal(weight[wide][places], tiles)


@pytest.mark.parametrize("chunk", [module.CHUNK, 1 << 10, 777])
@pytest.mark.parametrize("sparsity", [0.99, 0.5])
def test_the_draw_is_that_of_the_masked_method(sparsity, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    net = nn.Linear(130, 70)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    how = {"method": "static", "distribution": "uniform", "sparsity": sparsity, "generator": generator(7)}
    mask = sparsify(net, optimizer, **how).masks["weight"]
    drawn, after = SparsePattern.random(70, 130, int(mask.sum()), one := generator(7)), torch.rand(3, generator=one)
    assert torch.equal(drawn.mask(), mask)
    assert torch.equal(after, torch.rand(3, generator=how["generator"]))  # both have drawn as much


@pytest.mark.parametrize("scored", [module.SCORED, 0], ids=["scored", "direct"])
@pytest.mark.parametrize("count", [0, 1, 60, 61, 119, 120])
def test_counts_are_exact_and_draws_valid(count, scored, monkeypatch):
    monkeypatch.setattr(module, "SCORED", scored)
    pattern = SparsePattern.random(10, 12, count, generator(3))
    assert pattern.nnz == count
    assert SparsePattern.from_csr(pattern.crow, pattern.col, (10, 12)).equals(pattern)
    assert SparsePattern.random(10, 12, count, generator(3)).equals(pattern)


@pytest.mark.parametrize("scored", [module.SCORED, 0], ids=["scored", "direct"])
def test_every_position_is_drawn_equally_often(scored, monkeypatch):
    monkeypatch.setattr(module, "SCORED", scored)
    one = generator(5)
    hits = sum(SparsePattern.random(3, 4, 5, one).mask().int() for _ in range(600))
    expected, deviation = 600 * 5 / 12, (600 * 5 / 12 * 7 / 12) ** 0.5
    assert bool(((hits - expected).abs() < 4.5 * deviation).all())


def test_ties_go_to_the_first_positions_across_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 10)
    monkeypatch.setattr(torch, "rand", lambda n, generator: torch.full((n,), 0.5))
    assert module._largest_scores(100, 7, None).tolist() == list(range(7))


@pytest.mark.parametrize("scored", [module.SCORED, 0], ids=["scored", "direct"])
def test_a_layer_too_wide_to_be_dense_takes_memory_for_its_weights_only(scored, monkeypatch):
    monkeypatch.setattr(module, "SCORED", scored)
    dense = 4 * 200_000 * 64  # bytes of the weight alone
    with PeakBytes() as memory:
        layer = sparse_linear(200_000, 64, 0.999, generator())
        layer(torch.ones(2, 200_000)).sum().backward()
    assert layer.values.numel() == layer.values.grad.numel() == 12_800
    assert 200_000 * 2 * 4 < memory.peak < dense / 4  # of which the scores of a chunk and the input are the most


def test_a_million_by_a_million(monkeypatch):
    with PeakBytes() as memory:
        pattern = SparsePattern.random(1_000_000, 1_000_000, 50_000, generator())
    assert pattern.nnz == 50_000 and memory.peak < 40 << 20
    assert bool((pattern.positions().diff() > 0).all())


CSR = {"crow": [0, 2, 3], "col": [0, 2, 1], "shape": (2, 3)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"col": [2, 0, 1]}, "columns of row 0 do not rise"),
        ({"col": [0, 0, 1]}, "leave out duplicates"),
        ({"col": [0, 3, 1]}, "columns must be from 0 to 2, got 0 to 3"),
        ({"col": [0, -1, 1]}, "columns must be from 0 to 2, got -1 to 1"),
        ({"crow": [0, 2]}, "crow must hold 3 numbers"),
        ({"crow": [0, 4, 3]}, "crow must rise from 0 to the 3 entries"),
        ({"crow": [1, 2, 3]}, "crow must rise from 0"),
        ({"crow": [0, 2, 4]}, "crow must rise from 0"),
        ({"col": [0.0, 2.0, 1.0]}, "col must be a row of whole numbers"),
        ({"crow": [[0, 2, 3]]}, "crow must be a row of whole numbers"),
        ({"shape": (0, 3)}, "from 1 to 2147483647 rows, got 0"),
        ({"shape": (2, 2**31)}, "from 1 to 2147483647 columns"),
    ],
)
def test_a_foreign_pattern_is_refused_in_one_sentence(change, words):
    given = CSR | change
    with pytest.raises(ValueError, match=words) as caught:
        SparsePattern.from_csr(torch.tensor(given["crow"]), torch.tensor(given["col"]), given["shape"])
    assert "\n" not in str(caught.value)


def test_a_foreign_pattern_is_copied():
    crow, col = torch.tensor(CSR["crow"], dtype=torch.int32), torch.tensor(CSR["col"], dtype=torch.int32)
    pattern = SparsePattern.from_csr(crow, col, (2, 3))
    col.zero_()
    assert pattern.col.tolist() == CSR["col"]


def test_other_refusals():
    with pytest.raises(ValueError, match="a mask is a bool tensor"):
        SparsePattern.from_mask(torch.ones(2, 2))
    with pytest.raises(ValueError, match="a mask is a bool tensor"):
        SparsePattern.from_mask(torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="cannot place 7 weights in a 2 x 3 matrix; give 0 to 6"):
        SparsePattern.random(2, 3, 7, generator())
    with pytest.raises(TypeError, match="drawn from a torch.Generator on the CPU, got 0"):
        SparsePattern.random(2, 3, 1, 0)
