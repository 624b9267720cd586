"""Which images train and which validate: index arithmetic over labels, drawn from a given generator."""

from __future__ import annotations

import torch
from torch import Tensor

VAL_STREAM, SUBSET_STREAM, NOISE_STREAM = 1, 2, 3


def proportional_counts(available: Tensor, total: int) -> Tensor:
    """How many of each class make `total` in the proportions of `available`: largest remainders, ties to low classes.

    Shapes: int64 (classes,) -> int64 (classes,) with sum `total`, none above `available`.

    >>> proportional_counts(torch.tensor([60, 30, 10]), 10).tolist()
    [6, 3, 1]
    """
    size = int(available.sum())
    counts = available * total // max(size, 1)
    order = torch.argsort(available * total % max(size, 1), descending=True, stable=True)
    counts[order[: total - int(counts.sum())]] += 1
    return counts


def equal_counts(available: Tensor, total: int) -> Tensor:
    """How many of each class make `total` as equally as possible; a class that runs out leaves its share to the others.

    The counts of classes that do not run out differ by at most one, low classes first.

    >>> equal_counts(torch.tensor([50, 50, 3]), 20).tolist()
    [9, 8, 3]
    """
    assert 0 <= total <= int(available.sum())
    counts = torch.zeros_like(available)
    while (left := total - int(counts.sum())) > 0:
        open_classes = (counts < available).nonzero().flatten()
        if left < len(open_classes):
            counts[open_classes[:left]] += 1
        else:
            share = left // len(open_classes)
            counts[open_classes] = torch.minimum(counts[open_classes] + share, available[open_classes])
    return counts


def draw(labels: Tensor, counts: Tensor, generator: torch.Generator) -> Tensor:
    """`counts[c]` random positions of each class c, all in ascending order.

    Shapes: int64 (N,), (classes,) -> int64 (counts.sum(),).
    """
    picked = []
    for c, count in enumerate(counts.tolist()):
        members = (labels == c).nonzero().flatten()
        picked.append(members[torch.randperm(len(members), generator=generator)[:count]])
    return torch.cat(picked).sort().values


def without(size: int, positions: Tensor) -> Tensor:
    """All of 0 .. size - 1 except `positions`, ascending.

    >>> without(5, torch.tensor([1, 3])).tolist()
    [0, 2, 4]
    """
    keep = torch.ones(size, dtype=torch.bool)
    keep[positions] = False
    return keep.nonzero().flatten()


def train_val_split(
    labels: Tensor, num_classes: int, *, train_size: int | None, val_fraction: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Positions of the training and of the validation images among `labels`, int64 (N,) in [0, num_classes).

    round(val_fraction * N) images validate, in proportion to the classes; they depend on `seed` alone, not on
    `train_size`, so that runs on fewer images stay comparable. `train_size` of the others train, equally many per class
    as far as there are enough.

    Raises:
        ValueError: val_fraction outside [0, 1), or a train_size that is not there.
    """
    if not 0.0 <= val_fraction < 1.0:
        raise ValueError(f"val_fraction must be at least 0 and below 1, got {val_fraction!r}")
    available = labels.bincount(minlength=num_classes)
    held_out = round(val_fraction * len(labels))
    val = draw(labels, proportional_counts(available, held_out), _generator(seed, VAL_STREAM))
    rest = without(len(labels), val)
    if len(rest) == 0:
        raise ValueError(f"val_fraction {val_fraction} of {len(labels)} images leaves none to train on")
    if train_size is None:
        return rest, val
    if isinstance(train_size, bool) or not isinstance(train_size, int) or not 1 <= train_size <= len(rest):
        raise ValueError(
            f"train_size must be a whole number from 1 to {len(rest)}, the training images left after {len(val)} for "
            f"validation, got {train_size!r}"
        )
    counts = equal_counts(labels[rest].bincount(minlength=num_classes), train_size)
    return rest[draw(labels[rest], counts, _generator(seed, SUBSET_STREAM))], val


def noisy_labels(labels: Tensor, num_classes: int, *, share: float, seed: int) -> Tensor:
    """Labels of which round(share * N) are wrong, each by one of the other classes with equal probability.

    Symmetric label noise (Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR
    2021, section 3.3), with an exact number of wrong labels. They depend on `seed` alone.

    Shapes: int64 (N,) in [0, num_classes) -> the same, a copy.

    Raises:
        ValueError: a share outside [0, 1), or one class only, which leaves no wrong label.

    >>> noisy_labels(torch.zeros(10, dtype=torch.int64), 2, share=0.3, seed=0).sum()
    tensor(3)
    """
    if not 0.0 <= share < 1.0:
        raise ValueError(f"label_noise must be at least 0 and below 1, got {share!r}")
    if share and num_classes < 2:
        raise ValueError("label_noise needs at least two classes, or there is no wrong label")
    generator = _generator(seed, NOISE_STREAM)
    wrong = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    shift = torch.randint(1, max(num_classes, 2), (len(wrong),), generator=generator)
    found = labels.clone()
    found[wrong] = (found[wrong] + shift) % num_classes
    return found


def _generator(seed: int, stream: int) -> torch.Generator:
    """A generator of its own for each purpose, so that one split does not move the other."""
    return torch.Generator().manual_seed((int(seed) * 1_000_003 + stream) % 2**63)
