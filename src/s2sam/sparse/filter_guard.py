"""FilterGuard: what a method needs to know so that no filter runs empty (option `min_per_filter` = k).

A filter is a row along dimension 0 of a weight with two dimensions or more: what makes one output channel or neuron.
One without weights is constant, its variance is 0, and BatchNorm multiplies its gradient by 1 / sqrt(eps). Growth by
gradient prefers such places, the first step makes the new weights huge, dropping by size never takes them away again,
and other filters lose theirs. So

    - a choice of the largest keeps the k largest of each filter first (:mod:`s2sam.sparse.topk`),
    - a drop therefore never takes the k strongest weights of a filter: if nothing else is left, fewer are exchanged,
    - nothing grows in a filter without weights; there are some only where a layer keeps fewer weights than filters.

With k = 0 a method does what its authors published.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from s2sam.sparse.base import Sparsifier
from s2sam.sparse.part import Part


class FilterGuard(Sparsifier):
    """Counts with each change of the masks, on the host: one more host read a change, none if the guard is off."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._filters: dict[str, tuple[int, int]] = {}
        super().__init__(*args, **kwargs)

    @property
    def weights_per_filter(self) -> int:
        """How many weights of a filter a drop does not take."""
        return self.min_per_filter

    def sure(self, name: str) -> int:
        """How many active weights of the layer no drop can take."""
        return self._filters[name][0] if self.min_per_filter else 0

    def open(self, name: str) -> int:
        """How many places of the layer, taken or not, are in filters where weights may grow."""
        return self._filters[name][1] if self.min_per_filter else self.weights[name].numel()

    def nothing_to_drop(self) -> bool:
        """Whether all active weights are sure in every layer that has room for others."""
        kept = {name: n for part in self.parts for name, n in part.kept.items() if n < self.open(name)}
        return bool(kept) and all(n == self.sure(name) for name, n in kept.items())

    def closed(self, taken: Tensor, mask: Tensor) -> Tensor:
        """The places `taken`, and all those in filters that have no weight in `mask`."""
        return taken | empty_filters(mask) if self.min_per_filter else taken

    def count_kept(self) -> None:
        """And what of it is sure."""
        super().count_kept()
        self._count_filters(self.parts)

    def change_topology(self, part: Part) -> None:
        """And count what is sure from now on."""
        super().change_topology(part)
        self._count_filters([part])

    def _count_filters(self, parts: Sequence[Part]) -> None:
        if self.min_per_filter:
            masks = {name: mask for part in parts for name, mask in part.layers.masks.items()}
            self._filters |= filter_counts(masks, self.weights_per_filter)


def filter_counts(masks: Mapping[str, Tensor], k: int) -> dict[str, tuple[int, int]]:
    """Of each layer the active weights, at most `k` of each filter, and the places in filters that have some.

    One host read. A vector has no filters: nothing of it is sure, and all its places are open.

    >>> filter_counts({"a": torch.tensor([[True, True], [True, False], [False, False]])}, 1)
    {'a': (2, 4)}
    """
    found = []
    for mask in masks.values():
        rows = mask.flatten(1).sum(1) if mask.dim() > 1 else torch.zeros(0, dtype=torch.int64, device=mask.device)
        found.append(torch.stack([rows.clamp(max=k).sum(), (rows > 0).sum()]))
    numbers = torch.stack([pair.to(found[0].device) for pair in found]).tolist() if found else []
    pairs = zip(masks.items(), numbers, strict=True)
    return {n: (sure, rows * m[0].numel()) if m.dim() > 1 else (0, m.numel()) for (n, m), (sure, rows) in pairs}


def empty_filters(mask: Tensor) -> Tensor:
    """True at all places of the filters that have no weight; a bool tensor of the shape of `mask`.

    >>> empty_filters(torch.tensor([[True, False], [False, False]])).tolist()
    [[False, False], [True, True]]
    """
    if mask.dim() < 2:
        return torch.zeros_like(mask)
    return ~mask.flatten(1).any(1).view(-1, *[1] * (mask.dim() - 1)).expand_as(mask)
