"""A random mask that stays: the baseline that every other method must beat."""

from __future__ import annotations

from s2sam.sparse.blocks import FixedOptions, InBlocks


class Static(InBlocks):
    """Random active weights within the budget, fixed for the whole training.

    With good layer densities ("erk") a strong baseline (Liu et al. 2022, arXiv:2202.02643). With `block` whole blocks
    are active or pruned. `min_per_filter` gives each filter so many random weights first. Cost: the masks alone.
    """

    method = "static"
    Options = FixedOptions
    options: FixedOptions
