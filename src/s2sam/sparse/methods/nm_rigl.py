"""N:M RigL: RigL that exchanges weights within groups of m, so that n of each stay active."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from s2sam.sparse.methods.rigl import RigL, RigLOptions
from s2sam.sparse.nofm import NOfM, NOfMOptions


@dataclass(frozen=True)
class NMRigLOptions(NOfMOptions, RigLOptions):
    """As RigL's, and n of m."""

    def __post_init__(self) -> None:
        NOfMOptions.__post_init__(self)
        RigLOptions.__post_init__(self)


class NMRigL(NOfM, RigL):
    """Drop the smallest |w| of a layer as RigL does; each group grows as many as it lost, where |dL/dw| is largest.

    n_drop = floor(f_t n_active) over the whole layer, f_t = f/2 (1 + cos(pi t / T_end))
    a group that lost d weights grows the d largest |dL/dw| among its m - n + d weights not kept

    So the groups with weak weights move first, and a layer may exchange fewer weights than groups it has. The mask at
    the start is random. Evci et al. 2020 (arXiv:1911.11134) with the groups of Zhou et al. 2021 (arXiv:2102.04010); to
    drop as many in every group would mean all or nothing at 1:m. With `regrow_dropped=False` a group takes a dropped
    weight back only where it has no other. Everything else is RigL's: the change takes the place of the step, and needs
    `total_steps`.

    Defaults as RigL's, for CIFAR and ImageNet alike: m=4, n from the sparsity. Cost: a change ranks each layer once and
    compares each group; a step in between costs what a static mask does.

    Raises:
        ValueError: the sparsity is not 1 - n / m, no layer divides into groups of m; as RigL.
    """

    method = "nm-rigl"
    Options = NMRigLOptions
    options: NMRigLOptions

    def complete(self, kept: Tensor, grow: Tensor, n: int, *, taken: Tensor) -> Tensor:
        """What is kept, and the largest of the others in each group up to n."""
        return self.of_groups(grow.masked_fill(taken, -torch.inf).masked_fill(kept, torch.inf))
