"""Block RigL: RigL that drops and grows whole blocks of weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from s2sam.sparse.blocks import BlockChoice
from s2sam.sparse.methods.rigl import RigL, RigLOptions
from s2sam.sparse.options import check_list


@dataclass(frozen=True)
class BlockRigLOptions(BlockChoice, RigLOptions):
    """As RigL's, and the block."""

    block: Sequence[int] | None = (1, 4)

    def __post_init__(self) -> None:
        check_list("block", self.block, "[1, 4]")
        BlockChoice.__post_init__(self)
        RigLOptions.__post_init__(self)


class BlockRigL(RigL):
    """RigL with sums over blocks: drop the blocks of smallest sum |w|, grow those of largest sum |dL/dw|.

    n_drop = floor(f_t n_active / b) b  weights,  b weights a block,  f_t = f/2 (1 + cos(pi t / T_end))

    The mask at the start is random, all else is RigL's (Evci et al. 2020, arXiv:1911.11134). Blocks let a kernel skip
    work: (1, 4) are 4 inputs of an output, (1, 1, 3, 3) whole 3x3 kernels of convolutions (and no Linear). Defaults as
    RigL's, for CIFAR and ImageNet alike. Cost: as RigL, on sums; a change ranks each layer twice.

    Raises:
        ValueError: the blocks tile no layer; as RigL.
    """

    method = "block-rigl"
    Options = BlockRigLOptions
    options: BlockRigLOptions
