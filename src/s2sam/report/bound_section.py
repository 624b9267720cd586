"""The theorem in the report: the terms that `s2sam bound` has evaluated for its runs, beside what was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from s2sam.analysis.bound_words import ALL, BESIDE, biased, unsided
from s2sam.outside import COUNT, NUMBER, OPTIONAL, Number
from s2sam.report.arm_bars import number
from s2sam.report.arms import Arm
from s2sam.report.bound_bars import DECADES, PARTS
from s2sam.report.held import Held, Result, find
from s2sam.report.panels import Figure, Section, treatments
from s2sam.report.svg import INK, MUTED, mark, new_axes, series_colour, shorten, to_svg

TITLES = {"theorem 1": "Theorem 1", "theorem 1, own decay": "Theorem 1, own lambda", "corollary": "Corollary"}
SHARED = ("settings", "split", "images", "data_digest", "classes")
_SHAPE = {
    "terms": {name: dict.fromkeys(PARTS, OPTIONAL) for name in TITLES}, "step_condition": NUMBER,
    "measured": {
        **{key: OPTIONAL for key, _ in BESIDE.values()}, "tested_epochs?": (COUNT, None), "epochs?": (COUNT, None),
    },
    "classes": Number(2, whole=True), "images": COUNT, "split": str, "probes?": [{}], "method?": str,
}  # fmt: skip


def find_bounds(arms: Sequence[Arm]) -> Held:
    """What the run folders hold; ValueError as :func:`s2sam.report.held.find`."""
    return find(arms, "bound.json", "s2sam bound", shared=SHARED, shape=_SHAPE)


def bound_sections(held: Held, arms: Sequence[Arm]) -> list[Section]:
    """A panel for each bound and network: a bar for each term and arm, on one logarithmic scale."""
    bases = list(dict.fromkeys(arm.base for arm in held.by_arm))
    figures = [
        _terms(held, arms, base, name, f"bound{number}-{place}")
        for number, base in enumerate(bases)
        for place, name in enumerate(TITLES)
    ]
    first = held.first
    section = Section(
        "The theorem's terms",
        f"Right sides of Theorem 1 (with its lambda = 2L, and with the run's own weight decay) and of the corollary, "
        f"each term from below, with constants seen on {first['images']:,} {first['split']} images. Bars: mean of the "
        "seeds, dots: runs; a term of 0 has no bar. Dashed: the loss that the bound is about, as measured; dotted: "
        f"that of guessing. {_sentence(ALL[0])} {_sentence(ALL[3])}",
        tuple(figures),
        says=(*_words(held.results), _sentence(ALL[2]), *held.notes),
    )
    return [section]


def _words(results: Sequence[Result]) -> list[str]:
    """What the totals say of all runs together."""
    n, guess = len(results), math.log(results[0]["classes"])
    lines = []
    for name, (key, _) in BESIDE.items():
        totals = [_number(r["terms"][name]["total"], math.inf) for r in results]
        beside = [_number(r["measured"][key], math.nan) for r in results]
        seen = [value for value in beside if math.isfinite(value)]
        line = f"{TITLES[name]}: at least {_span(totals)} nats in {n} run{'' if n == 1 else 's'}"
        if seen:
            line += f", where the mean {key.replace('_', ' ')} was {_span(seen)}"
            line += _tested(results) if key == "test_loss" else ""
        empty = sum(total > guess for total in totals)
        costs = f"as guessing costs {guess:.3g}"
        if empty == 0:
            lines.append(f"{line}; not shown to be vacuous, {costs}.")
        else:
            others = "" if empty == n else ", and not shown to be in the others"
            lines.append(f"{line}; vacuous in {'all' if empty == n else empty} of them, {costs}{others}.")
    old = sum(map(unsided, results))
    if old:
        lines.append(
            f"In {old} of {n} runs mu was taken over all masks together, so where masks moved it is on no side, and "
            "the last two right sides may be too large: measure them again with `s2sam bound`."
        )
    same = sum(map(biased, results))
    if same:
        lines.append(
            f"In {same} of {n} runs (two-step SAM, echo) a batch's gradient is taken at a place that the batch itself "
            "has chosen, so it is biased and none of these bounds is proved."
        )
    broken = sum(r["step_condition"] > 1 for r in results)
    if broken:
        lines.append(
            f"In {broken} of {n} runs eta (L + lambda) was above 1 at some step, where the corollary's proof does not "
            "apply."
        )
    return lines


def _tested(results: Sequence[Result]) -> str:
    """Of how many epochs the test loss is known, unless it is of all.

    >>> _tested([{"measured": {"tested_epochs": 2, "epochs": 10}}, {"measured": {"tested_epochs": 4, "epochs": 10}}])
    ' (2 to 4 of 10 epochs)'
    """
    counts = [(r["measured"].get("tested_epochs"), r["measured"].get("epochs")) for r in results]
    known = [(tested, epochs) for tested, epochs in counts if tested is not None and epochs is not None]
    if all(tested == epochs for tested, epochs in known):
        return ""
    spans = [f"{min(n)} to {max(n)}" if min(n) < max(n) else f"{n[0]}" for n in zip(*known, strict=True)]
    return f" ({' of '.join(spans)} epochs)"


def _terms(held: Held, arms: Sequence[Arm], base: str, name: str, key: str) -> Figure:
    """The terms of one bound for one network."""
    names, own = treatments(arms), [arm for arm in held.by_arm if arm.base == base]
    low, high = _limits(held)
    guess = math.log(held.first["classes"])
    figure, axes = new_axes("", "nats", height=1.2 + len(PARTS) * (0.2 + 0.14 * len(own)))
    axes.set_title(shorten(f"{TITLES[name]}, {base}", 32), color=INK, pad=18)
    thick = 0.7 / len(own)
    for place, arm in enumerate(own):
        series = names.index(arm.treatment)
        colour, y = series_colour(series), (place - (len(own) - 1) / 2) * thick
        artists: list[Any] = []
        for row, part in enumerate(PARTS):
            values = [_number(r["terms"][name][part], high) for r in held.by_arm[arm].values()]
            middle = sum(values) / len(values)
            if middle > low:
                artists += axes.barh(-row - y, middle - low, 0.85 * thick, left=low, color=colour, alpha=0.45)
            shown = [value for value in values if value > low]
            artists += axes.plot(shown, [-row - y] * len(shown), "o", ms=2.6, color=colour)
        for result in held.by_arm[arm].values():
            value = _number(result["measured"][BESIDE[name][0]], 0.0)
            if value > low:
                artists.append(axes.axvline(value, color=colour, ls=(0, (4, 2)), lw=1.1))
        for index, artist in enumerate(artists):
            mark(artist, series, unique=f"{key}-{place}-{index}")
    axes.axvline(guess, color=INK, ls=":", lw=1.2)
    axes.annotate("guessing", (guess, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom", color=MUTED,
                  fontsize=7.5)  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(-len(PARTS) + 0.5, 0.5)
    axes.set_yticks([-row for row in range(len(PARTS))], PARTS)
    axes.grid(axis="y", visible=False)
    words = f"{TITLES[name]}, {base}: " + "; ".join(
        f"{arm.treatment} at least {_span([_number(r['terms'][name]['total'], math.inf) for r in seeds.values()])}"
        for arm, seeds in held.by_arm.items()
        if arm in own
    )
    return Figure(to_svg(figure, key, words), words)


def _limits(held: Held) -> tuple[float, float]:
    """One scale for all panels: from below the smallest value, but at most some decades, to the largest."""
    values = [_number(r["terms"][n][part], 0.0) for r in held.results for n in TITLES for part in PARTS]
    values += [_number(r["measured"][key], 0.0) for r in held.results for key, _ in BESIDE.values()]
    shown = [value for value in (*values, math.log(held.first["classes"])) if value > 0]
    high = 2 * max(shown)
    return max(min(shown) / 2, high / 10**DECADES), high


def _number(value: float | None, otherwise: float) -> float:
    """The value if it is a finite number."""
    return float(value) if value is not None and math.isfinite(value) else otherwise


def _span(values: Sequence[float]) -> str:
    """From the lowest to the highest.

    >>> _span([2.0, 1.0]), _span([1.0, 1.0])
    ('1 to 2', '1')
    """
    low, high = number(min(values)), number(max(values))
    return low if low == high else f"{low} to {high}"


def _sentence(clause: str) -> str:
    return f"{clause[0].upper()}{clause[1:]}."
