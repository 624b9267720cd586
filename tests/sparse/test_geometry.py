"""n of m and blocks, by hand and against slow loops."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from s2sam.sparse.geometry import (
    block_grid,
    block_mask,
    block_scores,
    divides,
    is_blocks,
    is_n_of_m,
    n_of_m_mask,
)

shapes = st.tuples(st.integers(1, 4), st.integers(1, 3), st.sampled_from([(), (1, 1), (2, 3)]))


def slow(scores, n, m):
    """Group by group, with Python's stable sort."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    rest = [range(size) for size in scores.shape[2:]]
    for o, *k in itertools.product(range(scores.shape[0]), *rest):
        for start in range(0, scores.shape[1], m):
            group = [float(scores[(o, i, *k)]) for i in range(start, start + m)]
            for i in sorted(range(m), key=lambda i: -group[i])[:n]:
                mask[(o, start + i, *k)] = True
    return mask


def rows(mask):
    return mask.int().tolist()


def test_golden_two_of_four():
    scores = torch.tensor([[0.1, 0.4, 0.3, 0.2, 9.0, 1.0, 2.0, 8.0], [5.0, 5.0, 5.0, 5.0, 0.0, 0.0, 1.0, 0.0]])
    assert rows(n_of_m_mask(scores, 2, 4)) == [[0, 1, 1, 0, 1, 0, 0, 1], [1, 1, 0, 0, 1, 0, 1, 0]]
    assert rows(n_of_m_mask(scores, 1, 4)) == [[0, 1, 0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 1, 0]]
    assert rows(n_of_m_mask(scores, 3, 8)) == [[0, 0, 0, 0, 1, 0, 1, 1], [1, 1, 1, 0, 0, 0, 0, 0]]


def test_groups_of_a_convolution_lie_along_its_inputs_at_each_position():
    weight = torch.zeros(1, 4, 1, 2)
    weight[0, :, 0, 0] = torch.tensor([1.0, 4.0, 3.0, 2.0])
    weight[0, :, 0, 1] = torch.tensor([4.0, 1.0, 2.0, 3.0])
    mask = n_of_m_mask(weight, 2, 4)
    assert rows(mask[0, :, 0, 0]) == [0, 1, 1, 0]
    assert rows(mask[0, :, 0, 1]) == [1, 0, 0, 1]
    as_product = weight.permute(0, 2, 3, 1).reshape(1, -1)  # channels last: what sparse tensor cores multiply by
    assert torch.equal(n_of_m_mask(as_product, 2, 4), mask.permute(0, 2, 3, 1).reshape(1, -1))


def test_a_group_of_a_grouped_convolution_reads_one_group_of_channels():
    conv = nn.Conv2d(8, 4, 1, groups=2, bias=False)
    with torch.no_grad():
        conv.weight.mul_(n_of_m_mask(conv.weight.abs(), 2, 4))
    wide = torch.zeros(4, 8)  # the same layer as a product with all 8 channels
    wide[:2, :4], wide[2:, 4:] = conv.weight[:2, :, 0, 0], conv.weight[2:, :, 0, 0]
    x = torch.randn(3, 8, 1, 1, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(conv(x)[..., 0, 0], x[..., 0, 0] @ wide.T, atol=1e-6)
    assert (wide != 0).view(4, 2, 4).sum(-1).max() == 2


@given(shape=shapes, m=st.integers(2, 6), data=st.data(), kind=st.sampled_from([torch.float32, torch.bfloat16]))
def test_every_group_holds_exactly_n_and_equals_the_slow_loop(shape, m, data, kind):
    out, groups, kernel = shape
    n = data.draw(st.integers(0, m))
    size = torch.Size((out, groups * m, *kernel))
    values = data.draw(
        st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, -1.0]), min_size=size.numel(), max_size=size.numel())
    )
    scores = torch.tensor(values, dtype=kind).view(size)
    mask = n_of_m_mask(scores, n, m)
    assert mask.shape == size and mask.is_contiguous()
    assert int(mask.sum()) == size.numel() // m * n
    assert is_n_of_m(mask, n, m)
    assert n in (0, m) or not is_n_of_m(~mask, m - n + 1, m)
    assert torch.equal(mask, slow(scores.float(), n, m))


def test_nan_and_infinities():
    scores = torch.tensor([[torch.nan, 1.0, -torch.inf, torch.inf], [torch.nan, torch.nan, -torch.inf, -torch.inf]])
    assert rows(n_of_m_mask(scores, 3, 4)) == [[1, 1, 0, 1], [1, 1, 1, 0]]


def test_a_wide_group_does_not_overflow_its_ranks():
    scores = torch.arange(600.0).view(1, 600)
    assert n_of_m_mask(scores, 300, 600).flatten().nonzero().flatten().tolist() == list(range(300, 600))


def test_is_n_of_m_sees_one_group_that_differs():
    mask = n_of_m_mask(torch.rand(3, 8, generator=torch.Generator().manual_seed(0)), 2, 4)
    broken = mask.clone()
    broken[2, 4:] = ~broken[2, 4:] if int(broken[2, 4:].sum()) != 2 else torch.tensor([True, True, True, False])
    assert is_n_of_m(mask, 2, 4)
    assert not is_n_of_m(broken, 2, 4)
    assert not is_n_of_m(mask, 2, 3), "8 inputs do not divide by 3"
    assert not divides((4,), 2)


@pytest.mark.parametrize(
    ("shape", "n", "m", "message"),
    [
        ((2, 3), 2, 4, r"shape \(2, 3\) does not divide into groups of 4"),
        ((8,), 2, 4, "does not divide into groups of 4"),
        ((2, 8), 5, 4, "between 0 and m=4 weights of a group, got n=5"),
    ],
)
def test_what_cannot_be_n_of_m(shape, n, m, message):
    with pytest.raises(ValueError, match=message):
        n_of_m_mask(torch.zeros(shape), n, m)


# -- blocks ----------------------------------------------------------------------------------------------------------


def test_golden_blocks():
    scores = torch.tensor([[1.0, 2.0, 0.0, 5.0], [3.0, 4.0, 1.0, 1.0], [6.0, 6.0, 3.0, 0.0], [0.0, 0.0, 0.0, 4.0]])
    assert block_scores(scores, (2, 2)).tolist() == [[10.0, 7.0], [12.0, 7.0]]
    assert rows(block_mask(scores, 12, (2, 2))) == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]
    assert rows(block_mask(scores, 4, (1, 4))) == [[0] * 4, [0] * 4, [1] * 4, [0] * 4]
    assert rows(block_mask(scores, 4, (4,))) == [[0, 1, 0, 0]] * 4


def test_whole_kernels():
    weight = torch.zeros(2, 2, 3, 3)
    weight[0, 1] = weight[1, 0] = 1.0
    mask = block_mask(weight, 18, (1, 1, 3, 3))
    assert block_grid(weight.shape, (1, 1, 3, 3)) == (2, 2, 1, 1)
    assert torch.equal(mask, weight > 0)


@given(
    grid=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 2)),
    block=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    data=st.data(),
)
def test_blocks_are_whole_and_as_many_as_asked(grid, block, data):
    shape = (grid[0] * block[0], grid[1] * block[1], grid[2])
    kept = data.draw(st.integers(0, grid[0] * grid[1] * grid[2]))
    size = block[0] * block[1]
    scores = torch.randint(0, 3, shape, generator=torch.Generator().manual_seed(kept)).float()
    mask = block_mask(scores, kept * size, block)
    assert int(mask.sum()) == kept * size
    assert is_blocks(mask, block)
    sums = block_scores(scores, block)
    chosen = block_scores(mask.float(), block) > 0
    assert kept in (0, sums.numel()) or float(sums[chosen].min()) >= float(sums[~chosen].max())


def test_is_blocks_sees_half_a_block():
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[0, 3] = False
    assert not is_blocks(mask, (2, 2))
    assert is_blocks(mask, (1, 1))


@pytest.mark.parametrize(
    ("budget", "block", "message"),
    [
        (4, (3, 1), r"blocks of \(3, 1\) do not tile a weight of shape \(2, 4\)"),
        (4, (1, 1, 1), "do not tile"),
        (4, (0, 1), "do not tile"),
        (3, (2, 1), "3 weights are no whole number of blocks of 2"),
        (10, (2, 1), "cannot choose 5 of 4"),
    ],
)
def test_what_cannot_be_blocks(budget, block, message):
    with pytest.raises(ValueError, match=message):
        block_mask(torch.zeros(2, 4), budget, block)
