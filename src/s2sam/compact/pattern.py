"""SparsePattern: which entries of a matrix are weights, in a few bytes for each of them and none for the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from s2sam.sparse.topk import topk_mask

LARGEST = 2**31 - 1  #: torch's sparse kernels count rows, columns and entries in int32
CHUNK = 1 << 16  #: positions that are scored at a time
SCORED = 1 << 28  #: positions of a matrix up to which each of them is scored; see SparsePattern.random


@dataclass(frozen=True, eq=False)
class SparsePattern:
    """The positions of the weights in a matrix of `rows` x `cols`, in compressed sparse rows (CSR).

    The weights of row r are in the columns `col[crow[r]:crow[r + 1]]`, which rise. Build one with :meth:`from_mask`,
    :meth:`from_csr` or :meth:`random`; none of its tensors may be changed afterwards. The same class describes which
    blocks of a matrix are stored, as the pattern of a matrix of blocks.

    Shapes: `crow` (rows + 1,), `col` (nnz,), both int32. Memory: 4 bytes per weight and per row.

    >>> pattern = SparsePattern.from_mask(torch.tensor([[True, False, True], [False, False, True]]))
    >>> pattern.crow.tolist(), pattern.col.tolist()
    ([0, 2, 3], [0, 2, 2])
    >>> pattern.nnz, pattern.shape, pattern.sparsity
    (3, (2, 3), 0.5)
    """

    rows: int
    cols: int
    crow: Tensor
    col: Tensor

    @classmethod
    def from_mask(cls, mask: Tensor) -> SparsePattern:
        """The pattern of a bool mask, True = weight; dimensions after the first are flattened, as for a convolution.

        Raises:
            ValueError: the mask is not bool, or has fewer than two dimensions.
        """
        if mask.dtype != torch.bool or mask.dim() < 2:
            raise ValueError(f"a mask is a bool tensor of two dimensions or more, got {mask.dtype} of {mask.dim()}")
        flat = mask.flatten(1)
        return cls._at(flat.flatten().nonzero().squeeze(1), *_size(*flat.shape))

    @classmethod
    def from_csr(cls, crow: Tensor, col: Tensor, shape: tuple[int, int]) -> SparsePattern:
        """The pattern that `crow` and `col` of another library say, checked and copied to int32.

        >>> SparsePattern.from_csr(torch.tensor([0, 2]), torch.tensor([1, 0]), (1, 2))
        Traceback (most recent call last):
        ...
        ValueError: this is no sparse pattern of a 1 x 2 matrix: the columns of row 0 do not rise; sort them and leave
        out duplicates

        Raises:
            ValueError: what they say is not sorted, out of range, not unique or does not fit the shape.
        """
        rows, cols = _size(*shape)

        def refuse(what: str) -> ValueError:
            return ValueError(f"this is no sparse pattern of a {rows} x {cols} matrix: {what}")

        for name, t in (("crow", crow), ("col", col)):
            if t.dim() != 1 or t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
                raise refuse(f"{name} must be a row of whole numbers, got {t.dtype} of {t.dim()} dimensions")
        if crow.numel() != rows + 1:
            raise refuse(f"crow must hold {rows + 1} numbers, one more than there are rows, got {crow.numel()}")
        steps = crow.long().diff()
        if int(crow[0]) != 0 or int(crow[-1]) != col.numel() or bool((steps < 0).any()):
            raise refuse(f"crow must rise from 0 to the {col.numel()} entries of col")
        if col.numel() and not 0 <= int(col.min()) <= int(col.max()) < cols:
            raise refuse(f"columns must be from 0 to {cols - 1}, got {int(col.min())} to {int(col.max())}")
        pattern = cls(rows, cols, crow.to(torch.int32, copy=True), col.to(torch.int32, copy=True))
        unsorted = pattern.positions().diff() <= 0
        if bool(unsorted.any()):
            row = int(pattern.row_of_each()[int(unsorted.nonzero()[0]) + 1])
            raise refuse(f"the columns of row {row} do not rise; sort them and leave out duplicates")
        return pattern

    @classmethod
    def random(cls, rows: int, cols: int, count: int, generator: torch.Generator) -> SparsePattern:
        """Exactly `count` positions, drawn uniformly without replacement on the CPU.

        A matrix of up to 2^28 entries gets the positions that `topk_mask(torch.rand(rows, cols), count)` gives, which
        is the random mask of `sparsify(method="static")` for the same generator: each entry is scored, a chunk at a
        time, and the `count` largest scores are kept. A larger one, where that would take minutes, gets distinct
        positions drawn directly: the same distribution, other positions, and another number of draws.

        Cost: a draw for each entry of the matrix, or about one for each weight. Memory: proportional to `count`, plus
        a chunk of 2^16 scores.

        >>> pattern = SparsePattern.random(1000, 1000, 10, torch.Generator().manual_seed(0))
        >>> mask = topk_mask(torch.rand(1000, 1000, generator=torch.Generator().manual_seed(0)), 10)
        >>> bool((pattern.mask() == mask).all())
        True

        Raises:
            ValueError: a size is not positive or too large, or the matrix has fewer than `count` entries.
            TypeError: `generator` is no torch.Generator of the CPU.
        """
        rows, cols = _size(rows, cols)
        if not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
            raise TypeError(f"a pattern is drawn from a torch.Generator on the CPU, got {generator!r}")
        total = rows * cols
        if not 0 <= count <= min(total, LARGEST):
            raise ValueError(
                f"cannot place {count} weights in a {rows} x {cols} matrix; give 0 to {min(total, LARGEST)}"
            )
        draw = _largest_scores if total <= SCORED else _distinct
        return cls._at(draw(total, count, generator), rows, cols)

    @classmethod
    def _at(cls, positions: Tensor, rows: int, cols: int) -> SparsePattern:
        """The pattern of sorted flat positions (row * cols + column)."""
        if positions.numel() > LARGEST:
            raise ValueError(f"a sparse pattern holds at most {LARGEST} weights, got {positions.numel()}")
        starts = torch.arange(rows + 1, device=positions.device) * cols
        crow = torch.searchsorted(positions, starts, out_int32=True)
        return cls(rows, cols, crow, (positions % cols).int())

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.rows, self.cols

    @property
    def nnz(self) -> int:
        """How many weights there are."""
        return self.col.numel()

    @property
    def sparsity(self) -> float:
        """The share of the matrix that is no weight."""
        return 1 - self.nnz / (self.rows * self.cols)

    def row_of_each(self) -> Tensor:
        """The row of each weight, in order; int32."""
        rows = torch.arange(self.rows, dtype=torch.int32, device=self.col.device)
        return rows.repeat_interleave(self.crow.diff(), output_size=self.nnz)

    def positions(self) -> Tensor:
        """The flat positions row * cols + column, which rise; int64."""
        return self.row_of_each().long() * self.cols + self.col

    def mask(self) -> Tensor:
        """The bool mask of `rows` x `cols`, a dense tensor."""
        mask = torch.zeros(self.rows * self.cols, dtype=torch.bool, device=self.col.device)
        mask[self.positions()] = True
        return mask.view(self.rows, self.cols)

    def transpose(self) -> tuple[SparsePattern, Tensor]:
        """The pattern of the transposed matrix, and the permutation that brings values there: values_t = values[perm].

        Cost: one stable sort of the columns. Shapes: the permutation is (nnz,), int32.
        """
        sorted_cols, order = torch.sort(self.col, stable=True)
        starts = torch.arange(self.cols + 1, dtype=torch.int32, device=self.col.device)
        crow = torch.searchsorted(sorted_cols, starts, out_int32=True)
        return SparsePattern(self.cols, self.rows, crow, self.row_of_each()[order]), order.int()

    def entries(self, block: int) -> tuple[SparsePattern, Tensor]:
        """If this says which blocks are stored: the pattern of their entries, and the place of each entry in it.

        Shapes: the places are (nnz, block, block), int64. The entry in row i and column j of block k is number
        `places[k, i, j]` of the entries in the order of compressed rows.
        """
        inside = torch.arange(block, device=self.col.device)
        blocks = self.crow.diff().long()  # in each row of blocks
        first = self.crow[:-1].long()
        row = self.row_of_each().long()
        before = torch.arange(self.nnz, device=self.col.device) - first[row]  # blocks of the same row, further left
        start = first[row] * block * block + before * block
        places = start[:, None, None] + inside[:, None] * (blocks[row] * block)[:, None, None] + inside
        col = torch.empty(self.nnz * block * block, dtype=torch.int32, device=self.col.device)
        col[places.flatten()] = (self.col[:, None, None] * block + inside).expand(places.shape).flatten().int()
        crow = torch.zeros(self.rows * block + 1, dtype=torch.int32, device=self.col.device)
        crow[1:] = (blocks * block).repeat_interleave(block).cumsum(0)
        return SparsePattern(self.rows * block, self.cols * block, crow, col), places

    def equals(self, other: SparsePattern) -> bool:
        """Whether both say the same."""
        return self.shape == other.shape and torch.equal(self.crow, other.crow) and torch.equal(self.col, other.col)


def _size(rows: int, cols: int) -> tuple[int, int]:
    for name, n in (("rows", rows), ("columns", cols)):
        if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= LARGEST:
            raise ValueError(f"a sparse matrix has from 1 to {LARGEST} {name}, got {n!r}")
    return rows, cols


def _largest_scores(total: int, count: int, generator: torch.Generator) -> Tensor:
    """The positions of the `count` largest of `total` uniform scores, of equal ones the first, sorted.

    `torch.rand` gives the same numbers in chunks as at once. What was kept of earlier chunks stands before what is new,
    so that `topk_mask` settles ties as it would for all of them together.
    """
    scores, places, held, least = [torch.empty(0)], [torch.empty(0, dtype=torch.int64)], 0, -1.0
    for start in range(0, total, CHUNK):
        drawn = torch.rand(min(CHUNK, total - start), generator=generator)
        better = (drawn > least).nonzero().squeeze(1)
        scores.append(drawn[better])
        places.append(better + start)
        held += better.numel()
        if held >= 2 * count + CHUNK or start + CHUNK >= total:
            row, at = torch.cat(scores), torch.cat(places)
            best = topk_mask(row, min(count, held), check=False)
            scores, places, held = [row[best]], [at[best]], min(count, held)
            if held == count and count:
                least = float(scores[0].min())
    return places[0]


def _distinct(total: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` distinct positions below `total`, sorted: drawn with replacement until enough differ, a few left out.

    Which draws are repeated and which are left out does not depend on where they are, so every set is equally likely.
    """
    if 2 * count > total:
        mask = torch.ones(total, dtype=torch.bool)
        mask[_distinct(total, total - count, generator)] = False
        return mask.nonzero().squeeze(1)
    found = torch.empty(0, dtype=torch.int64)
    while found.numel() < count:
        missing = count - found.numel()
        drawn = torch.randint(total, (missing + missing // 8 + 16,), generator=generator)
        found = torch.unique(torch.cat([found, drawn]))
    kept = torch.randperm(found.numel(), generator=generator)[:count]
    return found[kept.sort().values]
