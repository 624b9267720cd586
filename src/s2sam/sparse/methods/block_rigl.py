"""Block RigL: RigL that drops and grows whole blocks of weights."""

from __future__ import annotations

from dataclasses import dataclass

from s2sam.sparse.blocks import BlockOptions, Blocks
from s2sam.sparse.methods.rigl import RigL, RigLOptions


@dataclass(frozen=True)
class BlockRigLOptions(BlockOptions, RigLOptions):
    """As RigL's, and the block."""

    def __post_init__(self) -> None:
        BlockOptions.__post_init__(self)
        RigLOptions.__post_init__(self)


class BlockRigL(Blocks, RigL):
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
