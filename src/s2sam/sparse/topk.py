"""The k largest scores, exactly k of them, as a mask. Pure functions; no full sort.

A threshold alone keeps too many or too few where scores tie (GraNet, Synaptic-Flow and sparse_learning drift that way),
so ties at the threshold are settled by flat index.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

LARGE = 1 << 15  #: scores on a CPU from which on numpy's vectorised selection takes over


def topk_mask(scores: Tensor, k: int, *, check: bool = True) -> Tensor:
    """A bool mask of the shape of `scores` with exactly `k` True: the largest scores, of equal ones the first.

    NaN counts as the smallest finite number: it ranks lowest among the candidates. -inf marks positions that are no
    candidates. `check=False` leaves out the one host read that counts the candidates, for callers that know there are
    enough. Cost: one `torch.topk` and one cumulative sum; for many scores on a CPU one `numpy.partition`.

    >>> topk_mask(torch.tensor([1.0, 3.0, 1.0, 1.0]), 2).tolist()
    [True, True, False, False]

    Raises:
        ValueError: `k` is negative, or larger than the number of candidates.
    """
    flat = comparable(scores).flatten()
    if not 0 <= k <= flat.numel():
        raise ValueError(f"cannot choose {k} of {flat.numel()} scores")
    if k == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    large = flat.device.type == "cpu" and flat.numel() >= LARGE  # there a read costs nothing
    threshold = kth_largest(flat, k)
    if check and bool(threshold == -torch.inf):
        raise ValueError(f"cannot choose {k} of {int((flat > -torch.inf).sum())} candidates")
    if large and torch.count_nonzero(mask := flat >= threshold) == k:  # no tie is cut
        return mask.view(scores.shape)
    above, level = flat > threshold, flat == threshold
    mask = above | (level & (level.cumsum(0) <= k - above.sum()))
    return mask.view(scores.shape)


def kth_largest(flat: Tensor, k: int) -> Tensor:
    """The k-th largest of a row without NaN, k >= 1, as a tensor of no dimension.

    `torch.topk` on a CPU selects one value after the other; `numpy.partition` uses vector instructions and takes a
    fraction of the time for the same value. Not where most are equal, so the lowest (pruned weights, positions that are
    no candidates) are set aside first.

    >>> kth_largest(torch.tensor([1.0, 3.0, 2.0]), 2)
    tensor(2.)
    """
    if flat.device.type == "cpu" and flat.numel() >= LARGE:
        values = flat.detach().numpy()
        values = values[values > values.min()]
        place = len(values) - k
        return torch.tensor(np.partition(values, place)[place]) if place >= 0 else flat.min()
    return torch.topk(flat, k, sorted=False).values.min()


def global_topk(scores: Mapping[str, Tensor], k: int, *, at_least: int = 0) -> dict[str, Tensor]:
    """Masks with exactly `k` True over all layers together, and at least `at_least` in each (all of a smaller layer).

    Of equal scores those of the earlier layer, then of the lower flat index are taken. A layer that is guaranteed
    weights gives its own largest scores first.

    >>> masks = global_topk({"a": torch.tensor([5.0, 4.0]), "b": torch.tensor([1.0, 2.0])}, 2, at_least=1)
    >>> masks["a"].tolist(), masks["b"].tolist()
    ([True, False], [False, True])

    Raises:
        ValueError: `k` is larger than the number of candidates, or smaller than `at_least` in each layer requires.
    """
    least = {name: min(at_least, s.numel()) for name, s in scores.items()}
    if k < sum(least.values()):
        raise ValueError(f"cannot keep {at_least} in each of {len(scores)} layers with {k} in all")
    masks = _joint_topk(scores, k)
    if any(int(mask.sum()) < least[name] for name, mask in masks.items()):
        sure = {name: topk_mask(s, least[name]) for name, s in scores.items()}
        others = {name: comparable(s).masked_fill(sure[name], -torch.inf) for name, s in scores.items()}
        masks = {name: sure[name] | mask for name, mask in _joint_topk(others, k - sum(least.values())).items()}
    return masks


def choose(scores: Mapping[str, Tensor], budget: int | Mapping[str, int], *, at_least: int = 1) -> dict[str, Tensor]:
    """Masks of the largest scores: over all layers together if `budget` is a number, else as many as it gives each.

    >>> scores = {"a": torch.tensor([5.0, 4.0]), "b": torch.tensor([1.0, 2.0])}
    >>> {name: mask.tolist() for name, mask in choose(scores, {"a": 1, "b": 1}).items()}
    {'a': [True, False], 'b': [False, True]}
    """
    if isinstance(budget, int):
        return global_topk(scores, budget, at_least=at_least)
    return {name: topk_mask(s, budget[name]) for name, s in scores.items()}


def _joint_topk(scores: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
    """:func:`topk_mask` of all scores in one row, on the device of the first."""
    if not scores:
        return {}
    device = next(iter(scores.values())).device
    row = topk_mask(torch.cat([s.flatten().to(device) for s in scores.values()]), k)
    parts = torch.split(row, [s.numel() for s in scores.values()])
    return {name: part.view(s.shape).to(s.device) for (name, s), part in zip(scores.items(), parts, strict=True)}


def comparable(scores: Tensor) -> Tensor:
    """As float32 or float64, with NaN as the smallest finite number."""
    wide = scores if scores.dtype in (torch.float32, torch.float64) else scores.float()
    return torch.nan_to_num(wide, nan=torch.finfo(wide.dtype).min, posinf=torch.inf, neginf=-torch.inf)
