"""Blocks: a mixin by which a method of drop and grow keeps or prunes whole blocks; :mod:`s2sam.sparse.geometry`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from s2sam.sparse.budget import Distribution
from s2sam.sparse.drop_grow import DropGrow
from s2sam.sparse.geometry import block_grid, block_mask, block_scores, spread
from s2sam.sparse.options import check_list, check_whole
from s2sam.sparse.part import Part
from s2sam.sparse.prunable import Entry
from s2sam.sparse.topk import choose


@dataclass(frozen=True)
class BlockOptions:
    """`block`: the extent of a block along the first dimensions of a weight, 1 along the others."""

    block: Sequence[int] = (1, 4)

    def __post_init__(self) -> None:
        check_list("block", self.block, "[1, 4]")
        for length in self.block:
            check_whole("block", length)


class Blocks(DropGrow):
    """Scores are summed over each block, and blocks are chosen; budgets count blocks, which "erk" spreads by the grid.

    Put it before the method: `class BlockRigL(Blocks, RigL)`. The sparsity is met to the nearest block of all layers
    together. A layer that the blocks do not tile stays dense, with its reason in :meth:`report`.
    """

    options: Any
    size: int  #: weights of a block
    meant: float  #: the sparsity, in whole blocks

    def eligible(self, entries: Sequence[Entry]) -> list[Entry]:
        """Without the layers that the blocks do not tile.

        Raises:
            ValueError: none is left.
        """
        block = tuple(self.options.block)
        found = [replace(e, reason=e.reason or _reason(e, block)) for e in entries]
        if not any(e.prunable for e in found):
            raise ValueError(f"blocks of {block} tile no prunable layer; choose smaller ones")
        return found

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The grids of blocks."""
        return {name: block_grid(shape, self.options.block) for name, shape in super().shapes.items()}

    def check_options(self) -> None:
        """Blocks have no sign."""
        super().check_options()
        if getattr(self.options, "sign_split", False):
            raise ValueError(f"method {self.method!r} exchanges whole blocks, which have no sign; leave sign_split out")
        self.size = math.prod(self.options.block)
        budget = self.budget(self.final_sparsity, self.distribution, self.power_scale)
        kept = budget if isinstance(budget, int) else sum(budget.values())
        self.meant = 1 - self.size * kept / sum(w.numel() for w in self.weights.values())

    def target_sparsity(self, t: int) -> float:
        """The sparsity asked for, to the nearest block."""
        return self.meant

    def initial_masks(
        self, model: nn.Module, sparsity: float, distribution: Distribution, power_scale: float
    ) -> dict[str, Tensor]:
        """The blocks with the largest sums of initial scores."""
        sums = {name: block_scores(score, self.options.block) for name, score in self.initial_scores(model).items()}
        grids = choose(sums, self.budget(sparsity, distribution, power_scale), at_least=self.min_per_layer)
        return {name: spread(grid, self.options.block) for name, grid in grids.items()}

    def drop_count(self, part: Part, name: str, t: int) -> int:
        """A whole number of blocks."""
        n = super().drop_count(part, name, t)
        return n - n % self.size

    def keep(self, part: Part, name: str, n_drop: int) -> tuple[Tensor, int]:
        """The mask without the blocks to drop."""
        ranked = self.drop_scores(part, name).masked_fill(~part.layers.masks[name], -torch.inf)
        return block_mask(ranked, part.kept[name] - n_drop, self.options.block, check=False), n_drop

    def complete(self, kept: Tensor, grow: Tensor, n: int, *, taken: Tensor) -> Tensor:
        """And the blocks with the largest sums of growth scores."""
        return kept | block_mask(grow.masked_fill(taken, -torch.inf), n, self.options.block, check=False)


def _reason(entry: Entry, block: Sequence[int]) -> str:
    try:
        block_grid(entry.parameter.shape, block)
    except ValueError as error:
        return str(error)
    return ""
