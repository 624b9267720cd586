"""Which weights are kept or pruned together: n of m, and blocks. Pure functions from scores to masks.

Layout of n:m. A weight has the shape (out, in, *kernel); for a grouped convolution `in` counts the channels that one of
its groups reads. The m weights of a group follow each other along `in`, at one output and one kernel position:

    w[o, j m : (j + 1) m, k]    for every o, j, k

So the groups of a Linear lie in its rows, and those of a convolution along its input channels, as NVIDIA's sparse
tensor cores read them once the convolution is written as a product with the channels last (channels x kernel per row).
A transposed convolution has `in` first, and its groups lie elsewhere: see :mod:`s2sam.sparse.nofm`.

Layout of blocks. `block` = (r, c, ...) gives the extent along the first dimensions of the weight, 1 along the others:
(4, 1) keeps or prunes 4 outputs together at one input and kernel position, (1, 1, 3, 3) whole 3x3 kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from s2sam.sparse.topk import comparable, topk_mask


def n_of_m_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """A bool mask with exactly `n` True in every group of `m`: the largest scores, of equal ones the first.

    rank of i in its group = #{j < i: s_j >= s_i} + #{j > i: s_j > s_i};   kept where rank < n

    NaN counts as the smallest finite number, -inf as less. No sort and no host read. Cost: m - 1 comparisons, and 9
    bytes a weight of scratch.

    >>> n_of_m_mask(torch.tensor([[1.0, 3.0, 2.0, 3.0, 5.0, 5.0, 5.0, 5.0]]), 2, 4).int().tolist()
    [[0, 1, 0, 1, 1, 1, 0, 0]]

    Raises:
        ValueError: `n` is not between 0 and `m`, or `m` does not divide the input dimension.
    """
    if not 0 <= n <= m:
        raise ValueError(f"n of m keeps between 0 and m={m} weights of a group, got n={n}")
    if not divides(scores.shape, m):
        raise ValueError(f"the input dimension of shape {tuple(scores.shape)} does not divide into groups of {m}")
    s = _groups(comparable(scores), m).movedim(-1, 0).contiguous()
    rank = torch.zeros(s.shape, dtype=torch.uint8 if m < 256 else torch.int32, device=s.device)
    for k in range(1, m):
        later_wins = s[k:] > s[:-k]
        rank[:-k] += later_wins
        rank[k:] += ~later_wins
    return (rank < n).movedim(0, -1).flatten(-2).movedim(-1, 1).contiguous()


def is_n_of_m(mask: Tensor, n: int, m: int) -> bool:
    """Whether every group of `m` has exactly `n` True; one host read.

    >>> is_n_of_m(torch.tensor([[True, False, True, False]]), 1, 2)
    True
    >>> is_n_of_m(torch.tensor([[True, True, False, False]]), 1, 2)
    False
    """
    return divides(mask.shape, m) and bool((_groups(mask, m).sum(-1) == n).all())


def divides(shape: Sequence[int], m: int) -> bool:
    """Whether a weight of this shape has an input dimension of whole groups of `m`.

    >>> divides((16, 8, 3, 3), 4), divides((16, 3, 3, 3), 4), divides((16,), 4)
    (True, False, False)
    """
    return len(shape) > 1 and shape[1] > 0 and shape[1] % m == 0


def block_grid(shape: Sequence[int], block: Sequence[int]) -> tuple[int, ...]:
    """How many blocks lie along each dimension of a weight of this shape.

    >>> block_grid((8, 6, 3, 3), (4, 2))
    (2, 3, 3, 3)

    Raises:
        ValueError: the block has more dimensions than the weight, or its extents do not divide the shape.
    """
    extent = (*block, *[1] * (len(shape) - len(block)))
    if len(extent) > len(shape) or any(b < 1 or size % b for size, b in zip(shape, extent, strict=False)):
        raise ValueError(f"blocks of {tuple(block)} do not tile a weight of shape {tuple(shape)}")
    return tuple(size // b for size, b in zip(shape, extent, strict=True))


def block_scores(scores: Tensor, block: Sequence[int]) -> Tensor:
    """The sum of the scores in each block, in the shape of the grid. NaN counts as in :func:`topk_mask`.

    >>> block_scores(torch.tensor([[1.0, 2.0, 0.0, 5.0], [3.0, 4.0, 1.0, 1.0]]), (2, 2)).tolist()
    [[10.0, 7.0]]
    """
    grid = block_grid(scores.shape, block)
    split = [part for n, size in zip(grid, scores.shape, strict=True) for part in (n, size // n if n else 1)]
    return comparable(scores).reshape(split).sum(tuple(range(1, 2 * len(grid), 2)))


def block_mask(
    scores: Tensor, budget: int, block: Sequence[int], *, check: bool = True, min_per_filter: int = 0
) -> Tensor:
    """A bool mask that keeps whole blocks, exactly `budget` weights: the largest sums of scores, of equals the first.

    `min_per_filter` counts blocks: those that lie along the same first places of a weight.

    >>> block_mask(torch.tensor([[1.0, 2.0, 0.0, 5.0], [3.0, 4.0, 1.0, 1.0]]), 4, (2, 2)).int().tolist()
    [[1, 1, 0, 0], [1, 1, 0, 0]]

    Raises:
        ValueError: the blocks do not tile the weight, or the budget is no whole number of blocks; as :func:`topk_mask`.
    """
    block_grid(scores.shape, block)  # refuses what does not tile
    size = math.prod(block)
    if budget % size:
        raise ValueError(f"{budget} weights are no whole number of blocks of {size}")
    grid = topk_mask(block_scores(scores, block), budget // size, check=check, min_per_filter=min_per_filter)
    return spread(grid, block)


def spread(grid: Tensor, block: Sequence[int]) -> Tensor:
    """Every block's value at each of its weights: the inverse of looking at a mask block by block.

    >>> spread(torch.tensor([[True, False]]), (1, 2)).int().tolist()
    [[1, 1, 0, 0]]
    """
    for dim, length in enumerate(block):
        grid = grid.repeat_interleave(length, dim) if length > 1 else grid
    return grid


def is_blocks(mask: Tensor, block: Sequence[int]) -> bool:
    """Whether every block is kept or pruned as a whole; one host read.

    >>> is_blocks(torch.tensor([[True, True, False, False]]), (1, 2))
    True
    """
    filled = block_scores(mask.float(), block)
    return bool(((filled == 0) | (filled == math.prod(block))).all())


def _groups(tensor: Tensor, m: int) -> Tensor:
    """(out, *kernel, in / m, m)."""
    last = tensor.movedim(1, -1)
    return last.reshape(*last.shape[:-1], last.shape[-1] // m, m)
