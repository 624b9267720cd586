"""NOfM: the common frame of methods that keep n of every m weights; see :mod:`s2sam.sparse.geometry` for the layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from s2sam.hooks import check_number
from s2sam.sparse.base import Sparsifier
from s2sam.sparse.budget import Distribution
from s2sam.sparse.geometry import divides, is_n_of_m, n_of_m_mask
from s2sam.sparse.masks import counts as count_true
from s2sam.sparse.options import check_whole
from s2sam.sparse.prunable import Entry

TOLERANCE = 1e-3  #: so that a sparsity of 0.667 means 1:3


@dataclass(frozen=True)
class NOfMOptions:
    """Of every `m` weights along the inputs `n` are kept; None: as many as the sparsity says, n = (1 - s) m."""

    n: int | None = None
    m: int = 4

    def __post_init__(self) -> None:
        check_whole("m", self.m, 2)
        if self.n is not None:
            check_whole("n", self.n)
            if self.n > self.m:
                raise ValueError(f"n, the weights kept of every m={self.m}, must be at most {self.m}, got {self.n}")


class NOfM(Sparsifier):
    """Exactly n of every m weights are active in every prunable layer, which is a sparsity of 1 - n / m in each.

    A layer whose input dimension does not divide by m (the stem with its 3 colours) stays dense, as does a transposed
    convolution; :meth:`report` gives the reason, and they do not count in :meth:`sparsity`. In a grouped convolution
    the m weights belong to one of its groups.
    """

    default_distribution = "uniform"
    n: int  #: weights kept of every m
    meant: float  #: the sparsity, 1 - n / m

    def eligible(self, entries: Sequence[Entry]) -> list[Entry]:
        """Without the layers that do not divide into groups of m.

        Raises:
            ValueError: none is left.
        """
        m = self.options.m
        found = [replace(e, reason=e.reason or _reason(e, m)) for e in entries]
        if not any(e.prunable for e in found):
            raise ValueError(
                f"no prunable layer has a number of input channels that divides by m={m}; choose a smaller m"
            )
        return found

    def check_options(self) -> None:
        """n, m and the sparsity say the same."""
        super().check_options()
        n, m = self.options.n, self.options.m
        asked = check_number("sparsity", self.final_sparsity, 0.0, 1.0)
        self.n = max(1, round((1 - asked) * m)) if n is None else n
        self.meant = 1 - self.n / m
        if abs(asked - self.meant) > TOLERANCE:
            raise ValueError(
                f"sparsity {asked:g} is not that of {self.n}:{m}; give sparsity={self.meant:.6g}, or another m"
            )
        if self.distribution != "uniform":
            raise ValueError(
                f"method {self.method!r} prunes all layers alike; leave distribution={self.distribution!r} out"
            )

    def target_sparsity(self, t: int) -> float:
        """1 - n / m."""
        return self.meant

    def initial_masks(
        self, model: nn.Module, sparsity: float, distribution: Distribution, power_scale: float
    ) -> dict[str, Tensor]:
        """The n largest scores of each group."""
        return {name: self.of_groups(score) for name, score in self.initial_scores(model).items()}

    def adopt(self, model: nn.Module, present: dict[str, Tensor]) -> dict[str, Tensor]:
        """Where weights are not 0, and where a group has fewer than n of these, its first others."""
        masks = {name: self.of_groups(there.float()) for name, there in present.items()}
        wrong = [name for name, n in count_true({name: present[name] & ~m for name, m in masks.items()}).items() if n]
        if wrong:
            raise ValueError(
                f"{wrong[0]!r} has groups of {self.options.m} with more than {self.n} weights that are not 0, so "
                f"method {self.method!r} cannot adopt it; choose another n and m, or prune with init='anew'"
            )
        return masks

    def of_groups(self, scores: Tensor) -> Tensor:
        """The mask of the n largest scores of each group."""
        return n_of_m_mask(scores, self.n, self.options.m)

    @torch.no_grad()
    def check_fit(self) -> None:
        """And raise RuntimeError if a group has more or fewer than n active weights."""
        super().check_fit()
        wrong = [name for name, mask in self.masks.items() if not is_n_of_m(mask, self.n, self.options.m)]
        if wrong:
            raise RuntimeError(
                f"{wrong[0]!r} does not keep {self.n} of every {self.options.m} weights; load the state of a run with "
                "the same n and m"
            )


def _reason(entry: Entry, m: int) -> str:
    shape = tuple(entry.parameter.shape)
    if "Transpose" in entry.layer:
        return "transposed convolution: its groups of inputs are not along dimension 1"
    return "" if divides(shape, m) else f"{shape[1] if len(shape) > 1 else 1} input channels do not divide by m={m}"
