"""Blocks: mixins by which a method keeps or prunes whole blocks of weights; :mod:`s2sam.sparse.geometry`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from s2sam.sparse.base import Sparsifier
from s2sam.sparse.budget import Distribution
from s2sam.sparse.drop_grow import DropGrow
from s2sam.sparse.geometry import block_grid, block_mask, block_scores, is_blocks, spread
from s2sam.sparse.options import check_list, check_whole
from s2sam.sparse.part import Part
from s2sam.sparse.prunable import Entry
from s2sam.sparse.topk import choose

Budget = int | dict[str, int]


@dataclass(frozen=True)
class BlockChoice:
    """`block`: the extent of a block along the first dimensions of a weight, 1 along the others; None: one weight."""

    block: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.block is not None:
            check_list("block", self.block, "[1, 4]")
            for length in self.block:
                check_whole("block", length)


@dataclass(frozen=True)
class FixedOptions(BlockChoice):
    """And `min_per_filter`: weights (with a block: blocks) that each filter gets at least; 0: as the scores say."""

    min_per_filter: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("min_per_filter", self.min_per_filter, 0)


class InBlocks(Sparsifier):
    """Scores are summed over each block, and blocks are chosen; budgets are whole blocks, which "erk" spreads by grid.

    For methods that choose by :meth:`pick`, with an option `block` as in :class:`BlockChoice`; without a block nothing
    differs. The sparsity is met to the nearest block of all layers together. A layer that the blocks do not tile stays
    dense, with its reason in :meth:`report`.
    """

    options: Any
    meant: float  #: the sparsity, in whole blocks

    @property
    def block(self) -> tuple[int, ...] | None:
        """The extent of a block, if there are any."""
        given = getattr(self.options, "block", None)
        return None if given is None else tuple(given)

    @property
    def size(self) -> int:
        """Weights of a block."""
        return math.prod(self.block or ())

    def eligible(self, entries: Sequence[Entry]) -> Sequence[Entry]:
        """Without the layers that the blocks do not tile.

        Raises:
            ValueError: none is left.
        """
        block = self.block
        if block is None:
            return super().eligible(entries)
        found = [replace(e, reason=e.reason or _reason(e, block)) for e in entries]
        if not any(e.prunable for e in found):
            raise ValueError(f"blocks of {block} tile no prunable layer; choose smaller ones")
        return found

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The grids of blocks."""
        return {name: block_grid(shape, self.block or ()) for name, shape in super().shapes.items()}

    def check_options(self) -> None:
        """What the sparsity is in whole blocks."""
        super().check_options()
        if self.block is not None:
            kept = self.budget(self.final_sparsity, self.distribution, self.power_scale)
            self.meant = self.share(self.final_sparsity, kept)

    def budget(self, sparsity: float, distribution: Distribution, power_scale: float = 1.0) -> Budget:
        """Whole blocks, counted in weights."""
        return _times(self.size, super().budget(sparsity, distribution, power_scale))

    def budgets(self, sparsities: Sequence[float]) -> list[Budget]:
        """Whole blocks, counted in weights."""
        found = super().budgets(sparsities)  # those of "global" come from :meth:`budget`
        return found if self.distribution == "global" else [_times(self.size, one) for one in found]

    def share(self, sparsity: float, kept: Budget) -> float:
        """`sparsity`, or what is left of it in whole blocks: that of a network which keeps so many weights."""
        if self.block is None:
            return sparsity
        held = kept if isinstance(kept, int) else sum(kept.values())
        return 1 - held / sum(w.numel() for w in self.weights.values())

    def target_sparsity(self, t: int) -> float:
        """The sparsity asked for, to the nearest block."""
        return super().target_sparsity(t) if self.block is None else self.meant

    def adopt(self, model: nn.Module, present: dict[str, Tensor]) -> dict[str, Tensor]:
        """Where weights are not 0, if these are whole blocks."""
        for name, there in present.items() if self.block else ():
            if not is_blocks(there, self.block or ()):
                raise ValueError(
                    f"{name!r} has blocks of {self.block} that are 0 in part, so method {self.method!r} cannot adopt "
                    "it; choose another block, or prune with init='anew'"
                )
        return super().adopt(model, present)

    def pick(
        self, given: Mapping[str, Tensor], budget: int | Mapping[str, int], *, at_least: int = 1
    ) -> dict[str, Tensor]:
        """The blocks with the largest sums; `at_least` and `min_per_filter` count blocks."""
        block, size = self.block, self.size
        if block is None:
            return super().pick(given, budget, at_least=at_least)
        sums = {name: block_scores(score, block) for name, score in given.items()}
        whole = budget // size if isinstance(budget, int) else {name: budget[name] // size for name in sums}
        chosen = choose(sums, whole, at_least=at_least, min_per_filter=self.min_per_filter)
        return {name: spread(grid, block) for name, grid in chosen.items()}


class Blocks(InBlocks, DropGrow):
    """The same for methods of drop and grow, which then exchange whole blocks; `min_per_filter` counts blocks."""

    options: Any

    @property
    def weights_per_filter(self) -> int:
        """Those of as many blocks, each of which lies across `block[0]` filters."""
        return self.min_per_filter * self.size // (self.block or (1,))[0]

    def check_options(self) -> None:
        """Blocks have no sign."""
        super().check_options()
        if self.block is not None and getattr(self.options, "sign_split", False):
            raise ValueError(f"method {self.method!r} exchanges whole blocks, which have no sign; leave sign_split out")

    def drop_count(self, part: Part, name: str, t: int) -> int:
        """A whole number of blocks."""
        n = super().drop_count(part, name, t)
        return n - n % self.size

    def keep(self, part: Part, name: str, n_drop: int) -> tuple[Tensor, int]:
        """The mask without the blocks to drop."""
        block = self.block
        if block is None:
            return super().keep(part, name, n_drop)
        ranked = self.drop_scores(part, name).masked_fill(~part.layers.masks[name], -math.inf)
        n_keep = part.kept[name] - n_drop
        return block_mask(ranked, n_keep, block, check=False, min_per_filter=self.min_per_filter), n_drop

    def complete(self, kept: Tensor, grow: Tensor, n: int, *, taken: Tensor) -> Tensor:
        """And the blocks with the largest sums of growth scores."""
        block = self.block
        if block is None:
            return super().complete(kept, grow, n, taken=taken)
        return kept | block_mask(grow.masked_fill(taken, -math.inf), n, block, check=False)


def _times(size: int, budget: Budget) -> Budget:
    if size == 1:
        return budget
    return size * budget if isinstance(budget, int) else {name: size * n for name, n in budget.items()}


def _reason(entry: Entry, block: Sequence[int]) -> str:
    try:
        block_grid(entry.parameter.shape, block)
    except ValueError as error:
        return str(error)
    return ""
