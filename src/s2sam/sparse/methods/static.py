"""A random mask that stays: the baseline that every other method must beat."""

from __future__ import annotations

from s2sam.sparse.blocks import BlockChoice, InBlocks


class Static(InBlocks):
    """Random active weights within the budget, fixed for the whole training.

    With good layer densities ("erk") a strong baseline (Liu et al. 2022, arXiv:2202.02643). With `block` whole blocks
    are active or pruned. Cost: the masks alone.
    """

    method = "static"
    Options = BlockChoice
    options: BlockChoice
