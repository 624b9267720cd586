"""The k largest scores, exactly k of them, as a mask. Pure functions; no full sort.

A threshold alone keeps too many or too few where scores tie (GraNet, Synaptic-Flow and sparse_learning drift that way),
so ties at the threshold are settled by flat index.

With `min_per_filter` = g the choice is guarded: a filter is a row along dimension 0 of a weight with two dimensions or
more, and the k weights that are kept are the first k in this order, so that no filter is empty while there are weights
for all:

    the largest of each filter, then the second largest of each, ... up to the g-th; then all others
    within each of these g + 1 classes by score, of equal scores the first

If k is smaller than the number of filters, the filters whose largest score is largest get one weight each.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

LARGE = 1 << 15  #: scores on a CPU from which on numpy's vectorised selection takes over


def topk_mask(scores: Tensor, k: int, *, check: bool = True, min_per_filter: int = 0) -> Tensor:
    """A bool mask of the shape of `scores` with exactly `k` True: the largest scores, of equal ones the first.

    NaN counts as the smallest finite number: it ranks lowest among the candidates. -inf marks positions that are no
    candidates. `check=False` leaves out the one host read that counts the candidates, for callers that know there are
    enough. `min_per_filter`: the guard that the module describes. Cost: one `torch.topk` and one cumulative sum; for
    many scores on a CPU one `numpy.partition`. The guard adds the maximum of each row (above 1 a sort of each), and, if
    `k` is smaller than `min_per_filter` times the number of rows, a host read and perhaps a sort of what is sure.

    >>> topk_mask(torch.tensor([1.0, 3.0, 1.0, 1.0]), 2).tolist()
    [True, True, False, False]
    >>> topk_mask(torch.tensor([[4.0, 3.0], [2.0, 1.0]]), 2, min_per_filter=1).tolist()
    [[True, False], [True, False]]

    Raises:
        ValueError: `k` is negative, or larger than the number of candidates.
    """
    if min_per_filter and scores.dim() > 1 and scores.numel():
        rank = class_of(scores, min_per_filter)
        if k < min_per_filter * len(scores):
            flat = comparable(scores).flatten()
            return _by_class(flat, rank.flatten(), min_per_filter, k, check=check).view(scores.shape)
        scores = comparable(scores)  # what is sure finds room, and nothing else is as large
        scores = scores.clamp(max=torch.finfo(scores.dtype).max).masked_fill(rank < min_per_filter, torch.inf)
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


def per_row(scores: Tensor, k: int) -> Tensor:
    """A bool mask with the `k` largest scores of each row (all of a shorter one), of equal ones the first.

    >>> per_row(torch.tensor([[1.0, 2.0, 2.0], [3.0, 1.0, 2.0]]), 1).int().tolist()
    [[0, 1, 0], [1, 0, 0]]
    """
    flat = scores.flatten(1)
    k = min(k, flat.shape[1])
    if k == 1:
        threshold = flat.amax(1, keepdim=True)
    else:
        threshold = torch.topk(flat, k, dim=1, sorted=False).values.amin(1, keepdim=True)
    above, level = flat > threshold, flat == threshold
    mask = above | (level & (level.cumsum(1) <= k - above.sum(1, keepdim=True)))
    return mask.view(scores.shape)


def class_of(scores: Tensor, min_per_filter: int) -> Tensor:
    """The class of each score in a guarded choice: its place in its filter, from 0 to `min_per_filter` at most.

    What is no candidate (-inf) is in the last class, and so is all of a tensor of one dimension, which has no filters.

    >>> class_of(torch.tensor([[4.0, 3.0, 5.0], [2.0, -torch.inf, -torch.inf]]), 2).tolist()
    [[1, 2, 0], [0, 2, 2]]
    """
    wide = comparable(scores)
    rank = torch.full(wide.shape, min_per_filter, dtype=torch.int64, device=wide.device)
    if min_per_filter and wide.dim() > 1 and wide.numel():
        if min_per_filter == 1:
            rank -= per_row(wide, 1).long()
        else:
            order = torch.sort(wide.flatten(1), dim=1, descending=True, stable=True).indices
            places = torch.arange(order.shape[1], device=wide.device).clamp(max=min_per_filter)
            rank = torch.empty_like(order).scatter_(1, order, places.expand_as(order)).view(wide.shape)
    return rank.masked_fill(wide == -torch.inf, min_per_filter)


def _by_class(flat: Tensor, rank: Tensor, ordinary: int, k: int, *, check: bool = True) -> Tensor:
    """The first `k` by class, then by score, then by index; classes below `ordinary` are sure. One host read.

    It sorts what is sure, and only if there is no room for all of it.
    """
    sure, candidates = rank < ordinary, flat > -torch.inf
    n_sure, n = torch.stack([sure.sum(), candidates.sum()]).tolist()
    if not 0 <= k <= flat.numel():
        raise ValueError(f"cannot choose {k} of {flat.numel()} scores")
    if check and k > n:
        raise ValueError(f"cannot choose {k} of {n} candidates")
    if n_sure <= k:
        return sure | topk_mask(flat.masked_fill(sure, -torch.inf), k - n_sure, check=False)
    places = sure.nonzero().squeeze(1)
    places = places[torch.sort(flat[places], descending=True, stable=True).indices]
    places = places[torch.sort(rank[places], stable=True).indices]
    mask = torch.zeros_like(sure)
    mask[places[:k]] = True
    return mask


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


def global_topk(
    scores: Mapping[str, Tensor], k: int, *, at_least: int = 0, min_per_filter: int = 0
) -> dict[str, Tensor]:
    """Masks with exactly `k` True over all layers together, and at least `at_least` in each (all of a smaller layer).

    Of equal scores those of the earlier layer, then of the lower flat index are taken. A layer that is guaranteed
    weights gives its own first ones before any layer gives more. `min_per_filter`: the guard that the module describes,
    its classes compared over all layers.

    >>> masks = global_topk({"a": torch.tensor([5.0, 4.0]), "b": torch.tensor([1.0, 2.0])}, 2, at_least=1)
    >>> masks["a"].tolist(), masks["b"].tolist()
    ([True, False], [False, True])

    Raises:
        ValueError: `k` is larger than the number of candidates, or smaller than `at_least` in each layer requires.
    """
    least = {name: min(at_least, s.numel()) for name, s in scores.items()}
    if not scores:
        return {}
    if k < sum(least.values()):
        raise ValueError(f"cannot keep {at_least} in each of {len(scores)} layers with {k} in all")
    if min_per_filter:
        rank = {name: class_of(s, min_per_filter) for name, s in scores.items()}
        for name, n in least.items():
            if n:
                rank[name].masked_fill_(topk_mask(scores[name], n, min_per_filter=min_per_filter), -1)
        wide = {name: comparable(s) for name, s in scores.items()}
        return _split(_by_class(_row(wide), _row(rank), min_per_filter, k), scores)
    masks = _joint_topk(scores, k)
    if any(int(mask.sum()) < least[name] for name, mask in masks.items()):
        sure = {name: topk_mask(s, least[name]) for name, s in scores.items()}
        others = {name: comparable(s).masked_fill(sure[name], -torch.inf) for name, s in scores.items()}
        masks = {name: sure[name] | mask for name, mask in _joint_topk(others, k - sum(least.values())).items()}
    return masks


def choose(
    scores: Mapping[str, Tensor], budget: int | Mapping[str, int], *, at_least: int = 1, min_per_filter: int = 0
) -> dict[str, Tensor]:
    """Masks of the largest scores: over all layers together if `budget` is a number, else as many as it gives each.

    >>> scores = {"a": torch.tensor([5.0, 4.0]), "b": torch.tensor([1.0, 2.0])}
    >>> {name: mask.tolist() for name, mask in choose(scores, {"a": 1, "b": 1}).items()}
    {'a': [True, False], 'b': [False, True]}
    """
    if isinstance(budget, int):
        return global_topk(scores, budget, at_least=at_least, min_per_filter=min_per_filter)
    return {name: topk_mask(s, budget[name], min_per_filter=min_per_filter) for name, s in scores.items()}


def _joint_topk(scores: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
    """:func:`topk_mask` of all scores in one row, on the device of the first."""
    return _split(topk_mask(_row(scores), k), scores) if scores else {}


def _row(tensors: Mapping[str, Tensor]) -> Tensor:
    device = next(iter(tensors.values())).device
    return torch.cat([t.flatten().to(device) for t in tensors.values()])


def _split(row: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parts = torch.split(row, [t.numel() for t in like.values()])
    return {name: part.view(t.shape).to(t.device) for (name, t), part in zip(like.items(), parts, strict=True)}


def comparable(scores: Tensor) -> Tensor:
    """As float32 or float64, with NaN as the smallest finite number."""
    wide = scores if scores.dtype in (torch.float32, torch.float64) else scores.float()
    return torch.nan_to_num(wide, nan=torch.finfo(wide.dtype).min, posinf=torch.inf, neginf=-torch.inf)
