r"""The theorem and the corollary with what is known of a trained network: every number errs to the bound's favour.

Samples give L and B from below, mu and F* from above, so each term here is at most the term with the true constants.
If even that says nothing, neither would the truth. With a learning rate eta_t that changes, R is drawn with probability
eta_t / H, and the corollary's sum becomes (`docs/theory.md`), with H = sum eta_t:

.. math::
    \sum_t \frac{\eta_t}{H} E[F(w_t) - F_*] \le \frac{F(w_0) - F_*}{\mu H}
    + \frac{(L + \lambda) \sigma^2}{2\mu} \frac{\sum_t \eta_t^2}{H} + \frac{L^2}{2\mu} \frac{\sum_t \eta_t \rho_t^2}{H}
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from s2sam.analysis.bound import Terms
from s2sam.analysis.bound_probe import Probe

NAMES = ("theorem 1", "theorem 1, own decay", "corollary")
LEAST_GAP = 1e-6  #: a smaller F - F_best, as a share of F, is rounding


@dataclass(frozen=True)
class Rates:
    """The learning rates eta_t of a run of T steps."""

    steps: int  #: T
    total: float  #: H = sum eta_t
    effective: float  #: sum eta_t^2 / H: takes the place of a constant eta
    largest: float  #: max eta_t

    @classmethod
    def of(cls, rates: Sequence[float]) -> Rates:
        """From all of them.

        Raises:
            ValueError: none is above 0.

        >>> Rates.of([0.1, 0.1, 0.1, 0.1])
        Rates(steps=4, total=0.4, effective=0.1..., largest=0.1)
        """
        total = math.fsum(rates)
        if not total > 0:
            raise ValueError("the run's learning rate is 0 in every step, so the theorem says nothing about it")
        return cls(len(rates), total, math.fsum(rate * rate for rate in rates) / total, max(rates))


@dataclass(frozen=True)
class Constants:
    """What the probes of a run say, and from which side. F is with weight decay, L and B are without.

    Where something is None, the probes do not say.
    """

    smooth: float  #: at most L: the largest difference quotient of gradients
    pl: float | None  #: at least mu: the smallest ||grad F||^2 / (2 (F - F_best)), F_best of the same mask
    pl_if_fitted: float  #: the same with F_best = 0, the lowest F* that a loss of at least 0 can have
    variance: float  #: mean of E||g_t - grad F(x_t)||^2 over the points seen; neither above nor below
    largest_variance: float  #: at most sigma^2 as the theorem has it, a supremum (but for the error of a sample)
    lipschitz: float  #: at most B: the largest gradient of an image or a batch
    start: float  #: F(w_0)
    best: float  #: at least F*: the lowest F seen
    norm: float  #: ||w_0||

    @property
    def gap(self) -> float:
        """At most F(w_0) - F*."""
        return max(0.0, self.start - self.best)


def constants(probes: Sequence[Probe], masks: Sequence[str] | None = None) -> Constants:
    """Put the probes of one run together; the first is that at its start.

    Args:
        probes: of the run.
        masks: what names the mask at each probe's begin; None = all have one.

    Raises:
        ValueError: no two gradients of the run differ by more than rounding.
    """
    quotients = [q for probe in probes for found in probe.quotients.values() for q in found]
    if not quotients:
        raise ValueError("no two gradients of the run differ, so nothing can be said about L; train the run again")
    points = [point for probe in probes for point in probe.points]
    best = min(loss for loss, _ in points)
    variances = [v for probe in probes for v in probe.variances]
    return Constants(
        smooth=max(quotients),
        pl=smallest_quotient(one_mask(probes, masks)),
        pl_if_fitted=min((norm**2 / (2 * loss) for loss, norm in points if loss > 0), default=0.0),
        variance=math.fsum(variances) / len(variances),
        largest_variance=max(variances),
        lipschitz=max(max(probe.example, probe.batch) for probe in probes),
        start=probes[0].losses[0],
        best=best,
        norm=probes[0].norm,
    )


def one_mask(probes: Sequence[Probe], masks: Sequence[str] | None = None) -> list[list[tuple[float, float]]]:
    """The points of the probes, those of each mask together; a probe within which masks moved is left out.

    >>> a, b, c = Probe(points=[(2.0, 1.0)]), Probe(points=[(1.0, 1.0)]), Probe(points=[(0.0, 1.0)], moved_masks=1)
    >>> one_mask([a, b, c], ["x", "y", "x"]), one_mask([a, b])
    ([[(2.0, 1.0)], [(1.0, 1.0)]], [[(2.0, 1.0), (1.0, 1.0)]])
    """
    groups: dict[str, list[tuple[float, float]]] = {}
    for probe, mask in zip(probes, masks if masks is not None else [""] * len(probes), strict=True):
        if not probe.moved_masks:
            groups.setdefault(mask, []).extend(probe.points)
    return list(groups.values())


def smallest_quotient(groups: Sequence[Sequence[tuple[float, float]]]) -> float | None:
    """The smallest ||grad F||^2 / (2 (F - F_best)) in any group, F_best the lowest F in it; None if there is none.

    Gradients are those of the active weights. On another mask F may be far lower than it can get on this one, so the
    quotient with that F would be below the mu of either.

    >>> smallest_quotient([[(3.0, 2.0), (1.0, 0.5)], [(0.0, 0.1)]])
    1.0
    """
    found = []
    for points in groups:
        best = min((loss for loss, _ in points), default=math.inf)
        found += [norm**2 / (2 * (loss - best)) for loss, norm in points if loss - best > LEAST_GAP * abs(loss)]
    return min(found, default=None)


def network_terms(
    found: Constants, rates: Rates, *, squared_radius: float, decay: float, examples: int
) -> dict[str, Terms]:
    r"""Each term of the three bounds, by :data:`NAMES`; from below, as far as the constants are one-sided.

    - *theorem 1*: with lambda = 2L, as it demands. Then F + L ||w||^2 is L-strongly convex and 3L-smooth, whatever the
      network, so its mu is between L and 3L: no PL condition is left, and with mu = 3L the unknown L cancels. Its start
      is ||w_0||^2 / (3H) (the F(w_0)/(3LH) beside it is left out, as samples do not bound it from below), its noise
      eta sigma^2 / 2.
    - *theorem 1, own decay*: its formula with the run's lambda, which the theorem does not allow.
    - *corollary*: as above; with `squared_radius` = sum eta_t rho_t^2 / H.

    Args:
        found: the constants; without mu the terms that need it are 0, the least they can be.
        rates: of the run.
        squared_radius: 0 for a run without displacement.
        decay: lambda.
        examples: n.

    Example:
        >>> found = Constants(smooth=2.0, pl=0.5, pl_if_fitted=0.4, variance=0.1, largest_variance=0.2, lipschitz=1.5,
        ...                   start=1.25, best=0.25, norm=3.0)
        >>> terms = network_terms(found, Rates.of([0.5] * 100), squared_radius=0.0625, decay=0.0, examples=50)
        >>> terms["corollary"] # as corollary_terms() has it
        Terms(start=0.04, noise=0.1, radius=0.25, generalisation=0.0)
        >>> terms["theorem 1, own decay"]
        Terms(start=0.05, noise=0.2, radius=0.0, generalisation=0.2)
    """
    inverse = 0.0 if found.pl is None else 1 / max(found.pl, 1e-300)
    per_variance = rates.effective * (found.smooth + decay) * inverse / 2
    sample = (6 * found.lipschitz + 1) / examples
    return {
        "theorem 1": Terms(
            start=found.norm**2 / (3 * rates.total),
            noise=rates.effective * found.largest_variance / 2,
            generalisation=sample,
        ),
        "theorem 1, own decay": Terms(
            start=found.start * inverse / rates.total,
            noise=per_variance * found.largest_variance,
            generalisation=sample,
        ),
        "corollary": Terms(
            start=found.gap * inverse / rates.total,
            noise=per_variance * found.variance,
            radius=found.smooth**2 * squared_radius * inverse / 2,
        ),
    }  # fmt: skip


def plain(terms: Terms) -> dict[str, float]:
    """With the total, for JSON.

    >>> plain(Terms(start=1.0, noise=2.0))
    {'start': 1.0, 'noise': 2.0, 'radius': 0.0, 'generalisation': 0.0, 'total': 3.0}
    """
    return {**asdict(terms), "total": terms.total}
