"""How many weights each layer keeps: shapes and a sparsity in, densities or counts out. Pure functions.

Conventions (n_l weights in layer l, N in all, s the sparsity asked for, d_l the density of layer l):

========================  ==========================================================  =============
name                      density                                                     N (1-s) kept
========================  ==========================================================  =============
uniform                   d_l = 1 - s in every prunable layer                         yes
uniform-first-dense       the first prunable layer dense, 1 - s in the others (RigL)  of the others
uniform-first-last-dense  first and last dense, 1 - s in the others (MEST, AC/DC)     of the others
er                        d_l = min(1, eps (n_in + n_out) / (n_in n_out))             yes
erk                       d_l = min(1, eps (sum(shape) / prod(shape))^power_scale)    yes
{name or regex: s_l}      these layers as given, the others "erk" to meet s           yes
========================  ==========================================================  =============

Sources: Mocanu et al. 2018 (ER); Evci et al. 2020 and google-research/rigl:rigl/sparse_utils.py (ERK). One difference
from there: a fixed layer's weights count in the target, so the sparsity asked for is that of all prunable weights.
"""

from __future__ import annotations

import heapq
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from s2sam.sparse.names import DISTRIBUTIONS, LAYERWISE, select, unknown

Shapes = Mapping[str, Sequence[int]]
Distribution = str | Mapping[str, float]


def densities(
    shapes: Shapes, sparsity: float, distribution: Distribution = "erk", *, power_scale: float = 1.0
) -> dict[str, float]:
    """The density d_l of every layer, as real numbers.

    >>> shapes = {"a": (16, 3, 3, 3), "b": (32, 16, 3, 3), "c": (64, 32, 3, 3), "fc": (10, 64)}
    >>> {name: round(d, 6) for name, d in densities(shapes, 0.9).items()}
    {'a': 0.566298, 'b': 0.114675, 'c': 0.054152, 'fc': 1.0}

    Raises:
        ValueError: unknown distribution, sparsity outside [0, 1), no layers, or fixed layers that leave no way to meet
            the target; the message then names the feasible range.
    """
    sizes = _sizes(shapes, sparsity)
    if not isinstance(distribution, str):
        return _with_fixed(shapes, sizes, sparsity, _fixed(shapes, distribution), power_scale)
    if distribution not in LAYERWISE:
        raise unknown("distribution", distribution, DISTRIBUTIONS)
    if distribution == "er":
        raw = {name: _er(shape) for name, shape in shapes.items()}
        return _water_fill(raw, sizes, (1 - sparsity) * sum(sizes.values()))
    if distribution == "erk":
        return _with_fixed(shapes, sizes, sparsity, {}, power_scale)
    return {name: 1.0 if name in _dense(shapes, distribution) else 1 - sparsity for name in shapes}


def counts(
    shapes: Shapes, sparsity: float, distribution: Distribution = "erk", *, power_scale: float = 1.0
) -> dict[str, int]:
    """How many weights every layer keeps: :func:`densities` rounded by largest remainder, at least 1 in each layer.

    The total is exactly round((1 - s) N) where the convention promises it; for the two with dense layers it is that of
    the other layers alone.

    >>> counts({"a": (4, 5), "b": (7, 5)}, 0.5, "uniform")
    {'a': 10, 'b': 18}

    Raises:
        ValueError: as :func:`densities`, or fewer weights than layers are left; the message names the largest feasible
            sparsity.
    """
    target = densities(shapes, sparsity, distribution, power_scale=power_scale)
    sizes = _sizes(shapes, sparsity)
    fixed: dict[str, int] = {}  # settled layers that count in the target
    dense: set[str] = set()  # settled layers that do not
    if isinstance(distribution, str):
        dense = _dense(shapes, distribution)
    else:
        fixed = {name: max(1, round(target[name] * sizes[name])) for name in _fixed(shapes, distribution)}
    free = {name: n for name, n in sizes.items() if name not in fixed and name not in dense}
    total = round((1 - sparsity) * sum(n for name, n in sizes.items() if name not in dense)) - sum(fixed.values())
    tolerance = 0 if free else len(fixed)  # a map of all layers leaves only its own rounding
    if not len(free) - tolerance <= total <= sum(free.values()) + tolerance:
        raise _infeasible(sparsity, sizes, fixed, free)
    kept = {name: sizes[name] for name in dense} | fixed
    if free:
        kept |= _largest_remainder({name: target[name] * sizes[name] for name in free}, free, total)
    return {name: kept[name] for name in shapes}


def descend(
    shapes: Shapes, sparsities: Sequence[float], distribution: Distribution = "erk", *, power_scale: float = 1.0
) -> list[dict[str, int]]:
    """Counts at rising sparsities, the last of which is the target and gets exactly its own :func:`counts`.

    s_l(t) = s_l s(t) / s     every layer's own target on one common schedule, as google-research/jaxpruner has it

    Rounded by largest remainder, so that the total is that of :func:`counts` at s(t), and no layer ever gains a weight:
    masks of these sizes can be nested. Fixed layers go along; layers that stay dense do.

    >>> descend({"a": (4, 5), "b": (7, 5)}, [0.0, 0.3, 0.5], "uniform")
    [{'a': 20, 'b': 35}, {'a': 14, 'b': 24}, {'a': 10, 'b': 18}]

    Raises:
        ValueError: as :func:`counts` at the target, or the sparsities fall.
    """
    if not sparsities or any(b < a for a, b in pairwise(sparsities)):
        raise ValueError(f"the sparsities must rise to the target, got {list(sparsities)}")
    last = sparsities[-1]
    final = counts(shapes, last, distribution, power_scale=power_scale)
    sizes = ceiling = _sizes(shapes, last)
    outside = sum(sizes[name] for name in _dense(shapes, distribution)) if isinstance(distribution, str) else 0
    path = []
    for s in sparsities:
        share = s / last if last else 1.0
        total = outside + round((1 - s) * (sum(sizes.values()) - outside))
        total = min(max(total, sum(final.values())), sum(ceiling.values()))
        if s < last:
            ideal = {name: n - (n - final[name]) * share for name, n in sizes.items()}
            ceiling = _largest_remainder(ideal, ceiling, total, final)
        path.append(dict(ceiling if s < last else final))
    return path


def thin(kept: Mapping[str, int], share: float) -> dict[str, int]:
    """About `share` of each layer's weights, at least 1, of all together exactly round(share * sum).

    >>> thin({"a": 10, "b": 18, "c": 1}, 0.8)
    {'a': 8, 'b': 14, 'c': 1}
    """
    return thin_on(kept, [share])[0]


def thin_on(kept: Mapping[str, int], shares: Sequence[float]) -> list[dict[str, int]]:
    """:func:`thin` by falling shares of the same start, one after the other, so that no layer ever gains a weight."""
    path, ceiling, total = [], dict(kept), sum(kept.values())
    for share in shares:
        left = min(sum(ceiling.values()), max(len(kept), round(share * total)))
        ceiling = _largest_remainder({name: share * n for name, n in kept.items()}, ceiling, left)
        path.append(dict(ceiling))
    return path


def share_out(total: int, shares: Mapping[str, float], room: Mapping[str, int]) -> dict[str, int]:
    """`total` weights among layers in proportion to their `shares`, none above its `room`; the others take the excess.

    If all shares are 0 they count as equal. `total` is at most the sum of the room.

    >>> share_out(10, {"a": 1.0, "b": 3.0, "c": 0.0}, {"a": 9, "b": 4, "c": 5})
    {'a': 6, 'b': 4, 'c': 0}
    """
    least = 1e-9 * max(shares.values()) or 1.0  # so that a layer without a share is the last to be filled
    raw = {name: max(share, least) / room[name] for name, share in shares.items() if room[name]}
    found = _water_fill(raw, room, total)
    ideal = {name: found.get(name, 0.0) * n for name, n in room.items()}
    return _largest_remainder(ideal, room, total, dict.fromkeys(room, 0))


def _sizes(shapes: Shapes, sparsity: float) -> dict[str, int]:
    if not shapes:
        raise ValueError("there is no layer to make sparse")
    if not isinstance(sparsity, numbers.Real) or not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity must be between 0 and 1 (the share of weights that are zero), got {sparsity!r}")
    return {name: math.prod(shape) for name, shape in shapes.items()}


def _dense(shapes: Shapes, distribution: str) -> set[str]:
    names = list(shapes)
    return {"uniform-first-dense": {names[0]}, "uniform-first-last-dense": {names[0], names[-1]}}.get(
        distribution, set()
    )


def _fixed(shapes: Shapes, distribution: Mapping[str, float]) -> dict[str, float]:
    """Layer name -> sparsity, for the layers that the keys of `distribution` mean."""
    if not isinstance(distribution, Mapping):
        raise ValueError(f"distribution must be a name or a map from layers to sparsities, got {distribution!r}")
    fixed: dict[str, float] = {}
    for pattern, sparsity in distribution.items():
        if not isinstance(sparsity, numbers.Real) or not 0 <= sparsity < 1:
            raise ValueError(f"the sparsity of {pattern!r} must be at least 0 and less than 1, got {sparsity!r}")
        names = select(pattern, list(shapes))
        if not names:
            raise unknown("layer", pattern, shapes)
        for name in names:
            if fixed.setdefault(name, sparsity) != sparsity:
                raise ValueError(f"two patterns give layer {name!r} different sparsities, {fixed[name]} and {sparsity}")
    return fixed


def _er(shape: Sequence[int]) -> float:
    n_out, n_in = shape[0], (shape[1] if len(shape) > 1 else 1)
    return (n_in + n_out) / (n_in * n_out)


def _with_fixed(
    shapes: Shapes, sizes: Mapping[str, int], sparsity: float, fixed: Mapping[str, float], power_scale: float
) -> dict[str, float]:
    """ERK over the layers that are not fixed, so that all together keep (1 - s) N weights."""
    free = [name for name in shapes if name not in fixed]
    budget = (1 - sparsity) * sum(sizes.values()) - sum((1 - s) * sizes[name] for name, s in fixed.items())
    slack = 0.5 + len(fixed)  # rounding to whole weights settles that much
    if budget < -slack or budget > sum(sizes[name] for name in free) + slack:
        settled = {name: max(1, round((1 - s) * sizes[name])) for name, s in fixed.items()}
        raise _infeasible(sparsity, sizes, settled, free)
    raw = {name: (sum(shapes[name]) / sizes[name]) ** power_scale for name in free}
    found = _water_fill(raw, sizes, budget)
    return {name: 1 - fixed[name] if name in fixed else found[name] for name in shapes}


def _water_fill(raw: Mapping[str, float], sizes: Mapping[str, int], budget: float) -> dict[str, float]:
    """d_l = min(1, eps raw_l) with the eps for which sum_l d_l n_l = budget (0 <= budget <= sum n_l).

    eps is solved over the layers that are not yet dense; if it lifts the largest raw_l of them above 1, the layers that
    have it become dense, and eps is solved again.
    """
    open_ = dict(raw)
    while open_:
        left = max(0.0, budget - sum(sizes[name] for name in raw if name not in open_))
        eps = left / sum(r * sizes[name] for name, r in open_.items())
        largest = max(open_.values())
        if eps * largest <= 1:
            return {name: eps * r if name in open_ else 1.0 for name, r in raw.items()}
        open_ = {name: r for name, r in open_.items() if r != largest}
    return dict.fromkeys(raw, 1.0)


def _largest_remainder(
    ideal: Mapping[str, float], sizes: Mapping[str, int], total: int, least: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Whole numbers near `ideal`, from `least` (1) to the sizes, that sum to `total`; the earlier of equals gains."""
    low = dict.fromkeys(ideal, 1) if least is None else least
    kept = {name: min(sizes[name], max(low[name], math.floor(x + 1e-9))) for name, x in ideal.items()}
    missing = total - sum(kept.values())
    step = 1 if missing > 0 else -1
    order = {name: i for i, name in enumerate(ideal)}
    heap = [(-step * (ideal[name] - k), order[name], name) for name, k in kept.items()]
    heapq.heapify(heap)
    while missing:
        _, _, name = heapq.heappop(heap)
        if not low[name] <= kept[name] + step <= sizes[name]:
            continue
        kept[name] += step
        missing -= step
        heapq.heappush(heap, (-step * (ideal[name] - kept[name]), order[name], name))
    return kept


def _infeasible(sparsity: float, sizes: Mapping[str, int], fixed: Mapping[str, int], free: Iterable[str]) -> ValueError:
    """The error that names what is feasible: between one weight and all weights in each free layer."""
    room = [sizes[name] for name in free]
    held, total = sum(fixed.values()), sum(room) + sum(sizes[name] for name in fixed)
    largest = math.floor((1 - (held + len(room)) / total) * 1e6) / 1e6
    smallest = math.ceil((1 - (held + sum(room)) / total) * 1e6) / 1e6
    given, low = (" with the layers you fixed", f" and the smallest is {smallest:.6g}") if fixed else ("", "")
    return ValueError(
        f"sparsity {sparsity!r} is not feasible{given}: every layer keeps at least one weight, so the largest feasible "
        f"sparsity is {largest:.6g}{low}"
    )
