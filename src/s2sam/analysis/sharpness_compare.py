"""What the sharpness of several runs supports in words: nothing unless their train losses match."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from s2sam.analysis.sharpness import INVARIANT, SCALED

NAMES = {
    "worst_adaptive": "adaptive worst case", "average_adaptive": "adaptive average",
    "lambda_w2": "lambda_max ||w||^2", "trace_w2_n": "trace ||w||^2 / n",
}  # fmt: skip
#: what stands behind the names of SCALED
ONLY_SHOWN = "in units of ||w||, which a rescaled layer changes"
LEAST = 0.05  #: least error of a value, as a share of it: the images are a sample, and the ascent ends early


@dataclass(frozen=True)
class Match:
    """Whether runs can be compared: (largest - smallest) / largest train loss, and how much of it is allowed."""

    spread: float
    tolerance: float
    lowest: str
    highest: str
    unknown: tuple[str, ...] = ()  #: runs without a finite train loss; then nothing matches

    @property
    def matched(self) -> bool:
        """True if they can."""
        return not self.unknown and self.spread <= self.tolerance


def match(rows: Sequence[Mapping[str, Any]], tolerance: float) -> Match:
    """Compare the train losses of the records.

    >>> match([{"run": "a", "train_loss": 0.5}, {"run": "b", "train_loss": 0.4}], 0.1)
    Match(spread=0.2, tolerance=0.1, lowest='b', highest='a', unknown=())
    >>> match([{"run": "a", "train_loss": 0.5}, {"run": "b", "train_loss": None}], 0.1).unknown
    ('b',)
    """
    losses = {row["run"]: row["train_loss"] for row in rows}
    known = {run: loss for run, loss in losses.items() if loss is not None and math.isfinite(loss)}
    unknown = tuple(run for run in losses if run not in known)
    if unknown:
        return Match(math.inf, tolerance, "", "", unknown)
    low, high = min(known, key=lambda run: known[run]), max(known, key=lambda run: known[run])
    top = known[high]
    spread = (top - known[low]) / top if top > 0 else 0.0
    return Match(round(spread, 12), tolerance, low, high)


def words(rows: Sequence[dict[str, Any]], tolerance: float) -> list[str]:
    """Sentences on which run is flatter by the scale-invariant measures, or why none is called so."""
    if len(rows) < 2:
        return []
    found = match(rows, tolerance)
    if found.unknown:
        return [
            f"no finite train loss was measured of {', '.join(found.unknown)}, so the train losses do not match, and "
            "no run is called flatter or sharper than another here"
        ]
    if not found.matched:
        return [
            f"train losses do not match: {found.lowest}'s is {100 * found.spread:.0f} % below {found.highest}'s, and "
            f"{100 * tolerance:g} % is the tolerance. The curvature of the cross entropy falls with the loss, so no "
            "run is called flatter or sharper than another here"
        ]
    lines = [
        f"train losses match: they lie within {100 * found.spread:.1f} % of each other, {100 * tolerance:g} % is the "
        "tolerance, and what follows is about these runs, one each, and not about the methods that made them"
    ]
    rankings = {name: rank(rows, name) for name in INVARIANT}
    lines += [f"{NAMES[name]}: {order.text}" for name, order in rankings.items()]
    lines += [f"{NAMES[name]}, {ONLY_SHOWN}: {rank(rows, name).text}" for name in SCALED]
    flattest = {order.flattest for order in rankings.values()}
    agreed = flattest.pop() if len(flattest) == 1 else None
    if agreed is None:
        lines.append("the scale-invariant measures do not agree on a flattest run")
    else:
        lines.append(f"the scale-invariant measures agree that {agreed} is the flattest")
    return lines


@dataclass(frozen=True)
class Ranking:
    """Runs by one measure, lowest first; `apart` says of each neighbouring pair whether it is told apart."""

    order: tuple[tuple[str, float], ...]
    apart: tuple[bool, ...]
    unreliable: tuple[str, ...]  #: runs without a value to rank by; then nothing is ranked

    @property
    def flattest(self) -> str | None:
        """The first, if it is told apart from the next."""
        return self.order[0][0] if self.apart and self.apart[0] else None

    @property
    def text(self) -> str:
        """As a clause."""
        if self.unreliable:
            return f"not ranked, as there is no reliable value of {', '.join(self.unreliable)}"
        shown = [f"{run} {value:.3g}" for run, value in self.order]
        signs = ["<" if apart else "~" for apart in self.apart]
        return " ".join([shown[0], *(part for pair in zip(signs, shown[1:], strict=True) for part in pair)])


def rank(rows: Sequence[dict[str, Any]], name: str) -> Ranking:
    """Order the runs by a measure. Neighbours are told apart if they differ by more than the :func:`reach` of both.

    So nothing that differs by less than about 10 to 15 % is told apart.

    >>> rows = [{"run": "a", "x": {"value": 2.0}}, {"run": "b", "x": {"value": 1.0, "error": 0.6}}]
    >>> rank(rows, "x").text, rank([*rows, {"run": "c", "x": {"value": 9.0, "converged": False}}], "x").text
    ('b 1 ~ a 2', 'not ranked, as there is no reliable value of c')
    """
    given: dict[str, dict[str, Any]] = {row["run"]: row[name] or {"value": None} for row in rows}
    bad = tuple(run for run, one in given.items() if one["value"] is None or not one.get("converged", True))
    if bad:
        return Ranking((), (), bad)
    order = sorted(given, key=lambda run: given[run]["value"])
    apart = tuple(
        given[b]["value"] - given[a]["value"] > math.hypot(reach(given[a]), reach(given[b]))
        for a, b in itertools.pairwise(order)
    )
    return Ranking(tuple((run, given[run]["value"]) for run in order), apart, ())


def reach(one: Mapping[str, Any]) -> float:
    """How far a value may be off: Student's 97.5 % quantile times its error, but at least 2 * LEAST of the value.

    The error of a mean over draws is their deviation over the root of their number; `terms` says how many random terms
    another error is of. Errors that are not of random terms, such as the residual of an eigenvalue, count twice.

    >>> reach({"value": 100.0}), round(reach({"value": 1.0, "error": 1.0, "terms": 2}), 1)
    (10.0, 12.7)
    >>> round(reach({"value": 1.0, "sd": 2.0, "each": [0.0] * 4}), 2)  # 3.18 * 2 / 2
    3.18
    """
    terms: int | None
    draws = len(one.get("each") or ())
    if one.get("sd") is not None and draws > 1:
        terms, error = draws, one["sd"] / math.sqrt(draws)
    else:
        terms, error = one.get("terms"), one.get("error") or 0.0
    return max(quantile(terms) * error, 2 * LEAST * abs(one["value"]))


def quantile(terms: int | None) -> float:
    """Student's 97.5 % quantile with terms - 1 degrees of freedom; 2 where no random terms were counted.

    >>> [round(quantile(terms), 2) for terms in (2, 10, 100)], quantile(None)
    ([12.71, 2.26, 1.98], 2.0)
    """
    if terms is None or terms < 2:
        return 2.0
    from scipy import stats

    return float(stats.t.ppf(0.975, terms - 1))
