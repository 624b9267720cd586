"""What the sharpness of several runs supports in words: nothing unless their train losses match."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from s2sam.analysis.sharpness import INVARIANT

NAMES = {
    "lambda_w2": "lambda_max ||w||^2", "trace_w2_n": "trace ||w||^2 / n",
    "worst_adaptive": "adaptive worst case",
}  # fmt: skip


@dataclass(frozen=True)
class Match:
    """Whether runs can be compared: (largest - smallest) / largest train loss, and how much of it is allowed."""

    spread: float
    tolerance: float
    lowest: str
    highest: str

    @property
    def matched(self) -> bool:
        """True if they can."""
        return self.spread <= self.tolerance


def match(rows: Sequence[dict[str, Any]], tolerance: float) -> Match:
    """Compare the train losses of the records.

    >>> match([{"run": "a", "train_loss": 0.5}, {"run": "b", "train_loss": 0.4}], 0.1)
    Match(spread=0.2, tolerance=0.1, lowest='b', highest='a')
    """
    low, high = min(rows, key=lambda row: row["train_loss"]), max(rows, key=lambda row: row["train_loss"])
    top = high["train_loss"]
    spread = (top - low["train_loss"]) / top if top > 0 else 0.0
    return Match(round(spread, 12), tolerance, low["run"], high["run"])


def words(rows: Sequence[dict[str, Any]], tolerance: float) -> list[str]:
    """Sentences on which run is flatter by the scale-invariant measures, or why none is called so."""
    if len(rows) < 2:
        return []
    found = match(rows, tolerance)
    if not found.matched:
        return [
            f"train losses do not match: {found.lowest}'s is {100 * found.spread:.0f} % below {found.highest}'s, and "
            f"{100 * tolerance:g} % is the tolerance. The curvature of the cross entropy falls with the loss, so no "
            "run is called flatter or sharper than another here"
        ]
    lines = [
        f"train losses match: they lie within {100 * found.spread:.1f} % of each other, {100 * tolerance:g} % is the "
        "tolerance. What follows is about these runs, one each, and not about the methods that made them"
    ]
    rankings = {name: rank(rows, name) for name in INVARIANT}
    for name, order in rankings.items():
        lines.append(f"{NAMES[name]}: {order.text}")
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
    """Order the runs by a measure. Neighbours are told apart if they differ by more than twice their error.

    >>> rows = [{"run": "a", "x": {"value": 2.0}}, {"run": "b", "x": {"value": 1.0, "error": 0.6}}]
    >>> rank(rows, "x").text, rank([*rows, {"run": "c", "x": {"value": 9.0, "converged": False}}], "x").text
    ('b 1 ~ a 2', 'not ranked, as there is no reliable value of c')
    """
    given: dict[str, dict[str, Any]] = {row["run"]: row[name] or {"value": None} for row in rows}
    bad = tuple(run for run, one in given.items() if one["value"] is None or not one.get("converged", True))
    if bad:
        return Ranking((), (), bad)
    order = sorted(given, key=lambda run: given[run]["value"])
    error = {run: one.get("error") or 0.0 for run, one in given.items()}
    apart = tuple(
        given[b]["value"] - given[a]["value"] > 2 * math.hypot(error[a], error[b]) for a, b in itertools.pairwise(order)
    )
    return Ranking(tuple((run, given[run]["value"]) for run in order), apart, ())
