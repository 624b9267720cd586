"""What corrupted test images say of a network: each measure under its own name. Pure functions of error rates.

    E_cs      error at corruption c and severity s        E_0   error on the clean images        A   the same of AlexNet

    mean_corruption_error             mean of E_cs over corruptions and severities: the usual one of CIFAR-10-C
    relative_mean_corruption_error    that minus E_0
    retained_accuracy                 mean of 1 - E_cs, divided by 1 - E_0
    mce_alexnet                       mean over c of  sum_s E_cs / sum_s A_cs: the "mCE" of ImageNet-C
    relative_mce_alexnet              mean over c of  sum_s (E_cs - E_0) / sum_s (A_cs - A_0): its "relative mCE"

The last two are defined for all 15 corruptions at all 5 severities of the official ImageNet-C and for nothing else.
hendrycks/robustness:ImageNet-C/test.py prints the first and calls it mCE; on ImageNet-C the two differ by 15 points.
Source: Hendrycks and Dietterich, Benchmarking Neural Network Robustness to Common Corruptions and Perturbations, 2019.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

Grid = Mapping[str, Mapping[int, float]]  #: corruption -> severity -> a number

#: Errors of AlexNet on ImageNet-C at severities 1 to 5, as its authors gave them in hendrycks/robustness#10
ALEXNET: Mapping[str, tuple[float, float, float, float, float]] = {
    "gaussian_noise": (0.69528, 0.82542, 0.93554, 0.98138, 0.99452),
    "shot_noise": (0.71224, 0.85108, 0.93574, 0.98182, 0.99146),
    "impulse_noise": (0.78374, 0.89808, 0.94870, 0.98720, 0.99548),
    "defocus_blur": (0.65624, 0.73202, 0.85036, 0.91364, 0.94714),
    "glass_blur": (0.64308, 0.75054, 0.88806, 0.91622, 0.93344),
    "motion_blur": (0.58430, 0.70048, 0.82108, 0.89750, 0.92638),
    "zoom_blur": (0.70008, 0.76992, 0.80784, 0.84198, 0.87198),
    "snow": (0.71726, 0.88392, 0.86468, 0.91870, 0.94952),
    "frost": (0.61390, 0.79734, 0.88790, 0.89942, 0.93430),
    "fog": (0.67474, 0.76050, 0.84378, 0.87260, 0.94500),
    "brightness": (0.45140, 0.48502, 0.54048, 0.62166, 0.72440),
    "contrast": (0.64548, 0.76150, 0.88874, 0.97760, 0.99270),
    "elastic_transform": (0.52596, 0.70116, 0.55686, 0.64076, 0.80554),
    "pixelate": (0.52218, 0.54620, 0.73728, 0.87092, 0.91262),
    "jpeg_compression": (0.51002, 0.54718, 0.57294, 0.65458, 0.74778),
}
ALEXNET_CLEAN = 0.435  #: its error on ImageNet, as printed in Table 1 of the paper


def mean_of(grid: Grid) -> float:
    """The mean over corruptions of the means over severities.

    >>> mean_of({"fog": {1: 0.25, 2: 0.75}, "snow": {1: 1.0, 2: 0.5}})
    0.625
    """
    return fmean(fmean(by_severity.values()) for by_severity in grid.values())


def retained_accuracy(errors: Grid, clean: float) -> float:
    """Mean accuracy on corrupted images divided by the clean one: 1 = nothing is lost; NaN if none was right.

    >>> retained_accuracy({"fog": {1: 0.6}}, 0.2)
    0.5
    """
    return (1 - mean_of(errors)) / (1 - clean) if clean < 1 else math.nan


def mce_alexnet(errors: Grid) -> float:
    """mCE of ImageNet-C, 1 = as AlexNet.

    Raises:
        ValueError: a corruption or severity is missing.

    >>> mce_alexnet({name: dict(enumerate(row, 1)) for name, row in ALEXNET.items()})
    1.0
    """
    _whole(errors)
    return fmean(math.fsum(row.values()) / math.fsum(ALEXNET[name]) for name, row in errors.items())


def relative_mce_alexnet(errors: Grid, clean: float) -> float:
    """Relative mCE of ImageNet-C, 1 = as AlexNet: what is lost to corruption, whatever the clean error is.

    Raises:
        ValueError: a corruption or severity is missing.
    """
    _whole(errors)
    return fmean(
        math.fsum(e - clean for e in row.values()) / math.fsum(a - ALEXNET_CLEAN for a in ALEXNET[name])
        for name, row in errors.items()
    )


def _whole(errors: Grid) -> None:
    if set(errors) != set(ALEXNET) or any(set(row) != {1, 2, 3, 4, 5} for row in errors.values()):
        raise ValueError("mCE is defined for all 15 corruptions at severities 1 to 5; measure them all")


@dataclass(frozen=True)
class Matched:
    """Runs of two arms paired at equal clean accuracy, and what differs there."""

    pairs: tuple[tuple[int, int], ...]  #: indices into the two lists
    clean: float | None  #: mean difference of clean accuracy that is left; None without pairs
    corrupted: float | None  #: mean difference of corrupted accuracy; None without pairs


def at_matched_clean(
    reference: Sequence[tuple[float, float]], treated: Sequence[tuple[float, float]], tolerance: float
) -> Matched:
    """Treated minus reference among runs whose clean accuracies differ by at most `tolerance`.

    A network that is more accurate on clean images is so on corrupted ones as well, and that is no robustness. The
    nearest are paired first, each run once.

    Args:
        reference: (clean accuracy, corrupted accuracy) of each run.
        treated: the same of the other arm.
        tolerance: of the clean accuracy, such as one standard error of the test set, sqrt(a (1 - a) / N).

    >>> found = at_matched_clean([(0.90, 0.60), (0.80, 0.50)], [(0.91, 0.65)], tolerance=0.02)
    >>> found.pairs, round(found.clean, 9), round(found.corrupted, 9)
    (((0, 0),), 0.01, 0.05)
    """
    distances = sorted(
        (abs(b[0] - a[0]), i, j) for i, a in enumerate(reference) for j, b in enumerate(treated)
        if abs(b[0] - a[0]) <= tolerance
    )  # fmt: skip
    pairs: list[tuple[int, int]] = []
    for _, i, j in distances:
        if all(i != used and j != taken for used, taken in pairs):
            pairs.append((i, j))
    if not pairs:
        return Matched((), None, None)
    clean, corrupted = (fmean(treated[j][k] - reference[i][k] for i, j in pairs) for k in (0, 1))
    return Matched(tuple(sorted(pairs)), clean, corrupted)
