"""A random mask that stays: the baseline that every other method must beat."""

from __future__ import annotations

from s2sam.sparse.base import Sparsifier


class Static(Sparsifier):
    """Random active weights within the budget, fixed for the whole training.

    With good layer densities ("erk") a strong baseline (Liu et al. 2022, arXiv:2202.02643). Cost: the masks alone.
    """

    method = "static"
