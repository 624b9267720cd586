"""Stage 5: 95 and 98 %, with arms tuned at 95 %, and an average of the weights (protocol.md, Changes, 9 and 21).

`study.py sparser` runs it, `study.py guarded` its cell RigL 98 % again, and `study.py report` takes its section from
here. RigL at 98 % as published is in no contrast that counts: its filters run empty there, and what grows in them
behind BatchNorm amplifies rounding, so that its accuracy moves with the machine (results/methods-study).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import log2
from statistics import fmean
from typing import Any, NamedTuple

from s2sam.report.stats import Difference, deviation, paired_difference, t_interval
from study import (
    CELLS,
    CONFIRMED,
    GUARDED,
    GUARDED_CELL,
    PAPER,
    SPARSER,
    arms,
    baseline,
    confirm,
    label,
    means,
    on_nesterov,
    paper,
    rows,
    run,
    settings_grid,
)

TUNING, STAGE, PLACE = "sparser tuning", "sparser", "static95"
GRID = [(0.03, 0.008), (0.1, 5e-4), (0.1, 2e-3), (0.3, 5e-4), (0.3, 2e-3), (1.0, 5e-4)]  #: lr, weight decay
EMA = 0.995  #: of 2,000 steps: the last tenth of the run
SECOND, AVERAGED, SCALED = "nesterov -g-norm-0.2-late", "nesterov averaged", f"{PAPER} x sqrt(density)"
PLACES = CELLS | SPARSER
METHODS = ("static", "rigl")
GROWTH, CLEAN_ARM = "clean growth", f"{PAPER} clean growth"
PRIMARY = 3
ALL_THREE, OWN = (0.9, 0.95, 0.98), (0.95, 0.98)
ALL_FOUR = (0.8, *ALL_THREE)
UNSOUND = "rigl98"
LEFT_OUT, PUBLISHED = "left out", "as published"
STAND_INS = {LEFT_OUT: (), PUBLISHED: (UNSOUND,), GUARDED: (GUARDED_CELL,)}  #: what stands in the place of RigL 98 %
DESIGN = PLACES | {GUARDED_CELL: PLACES[UNSOUND]}
Gaps = Mapping[str, Mapping[int, float]]  # cell -> seed -> points


class Contrast(NamedTuple):
    """Arm minus reference, mean over the cells at these sparsities."""

    arm: str
    reference: str  #: "better": the better baseline
    sparsities: tuple[float, ...]
    primary: bool = False

    @property
    def what(self) -> str:
        """The two arms in words."""
        return f"{self.arm} minus {named(self.reference)}"

    @property
    def at(self) -> str:
        """The sparsities in words."""
        return ", ".join(f"{100 * s:.0f}" for s in self.sparsities)


THE_PAPERS = Contrast(PAPER, "sgd", ALL_THREE)  #: the paper's own comparison over the headline cells
CONTRASTS = (
    Contrast(PAPER, "better", ALL_THREE, primary=True),
    Contrast(SECOND, "nesterov", ALL_THREE, primary=True),
    Contrast(AVERAGED, "nesterov", OWN, primary=True),
    THE_PAPERS,
    Contrast(PAPER, "better", OWN),
    Contrast(SECOND, "nesterov", OWN),
    Contrast("sgd", "nesterov", OWN),
    Contrast(PAPER, "sgd", OWN),
    Contrast(SCALED, PAPER, OWN),
)


def settings(pairs: Iterable[Sequence[float]] = GRID) -> list[dict[str, Any]]:
    """Learning rates and weight decays that every arm of the tuning tries."""
    return [setting for lr, wd in pairs for setting in settings_grid({"lr": [lr], "optim.weight_decay": [wd]})]


def tuned_arms() -> dict[str, dict[str, Any]]:
    """What is tuned, with equal trials: both baselines and the paper's arm. Nesterov's runs also keep an average."""
    found = arms()
    nesterov = found["baselines"]["nesterov"] | {"optim.ema": EMA}
    return {"nesterov": nesterov, "sgd": found["baselines"]["sgd"], PAPER: found["arms"][PAPER]}


def best(arm: str, key: str = "val_top1") -> dict[str, Any]:
    """The setting at which an arm validated best."""
    scores = means(TUNING, PLACE, key)
    return max(settings(), key=lambda setting: scores[label(arm, setting)])


def better() -> str:
    """The baseline that validated better at 95 %, each at its best setting."""
    scores = means(TUNING, PLACE)
    return max(arms()["baselines"], key=lambda arm: scores[label(arm, best(arm))])


def run_all(jobs: int) -> None:
    """The tuning, then the fresh seeds; what is context comes last."""
    tuned = tuned_arms()
    trials = {label(arm, at): changes | at for arm, changes in tuned.items() for at in settings()}
    run(TUNING, [(PLACE, name, seed, trials[name]) for name in trials for seed in (0, 1)], jobs)
    first = fresh_arms()
    last = {"sgd": first.pop("sgd")}
    del first[SCALED]
    for wanted in (first, last):
        confirm(STAGE, wanted, jobs, SPARSER)
    for sparsity in (0.98, 0.95):
        cells = [cell for cell, (_, value) in SPARSER.items() if value == sparsity]
        confirm(STAGE, {SCALED: fresh_arms(sparsity)[SCALED]}, jobs, cells)


def fresh_arms(sparsity: float = 0.98) -> dict[str, dict[str, Any]]:
    """The arms of the fresh seeds with their settings; the radius of the scaled arm is that of `sparsity`."""
    tuned = tuned_arms()
    at = {arm: tuned[arm] | best(arm) for arm in tuned}
    second = next(changes for name, changes in on_nesterov().items() if name.startswith(SECOND))
    found = {"nesterov": at["nesterov"], PAPER: at[PAPER], SECOND: second | best("nesterov")}
    own = best("nesterov", "ema_val_top1")
    if own != best("nesterov"):
        found[AVERAGED] = tuned["nesterov"] | own
    rho = at[PAPER]["rho"] * ((1 - sparsity) / 0.2) ** 0.5
    return found | {"sgd": at["sgd"], SCALED: at[PAPER] | {"rho": rho}}


def run_guarded(jobs: int) -> None:
    """RigL at 98 % again, a weight kept in every filter: arms, settings and seeds of stage 5; context comes last."""
    last = fresh_arms()
    first = {arm: last.pop(arm) for arm in ("sgd", "nesterov", PAPER)}
    for wanted in (first, last):
        confirm(GUARDED, wanted, jobs, [GUARDED_CELL])


def run_growth(jobs: int) -> None:
    """The paper's arm with RigL, displaced in all steps but those that choose where weights grow."""
    changes = tuned_arms()[PAPER] | best(PAPER) | {"sam.clean_growth": True}
    confirm(GROWTH, {CLEAN_ARM: changes}, jobs, [cell for cell in SPARSER if cell.startswith("rigl")])


def accuracy(arm: str) -> dict[str, dict[int, float]]:
    """Cell -> seed -> test accuracy of an arm, %, in all cells where it has run."""
    stored = {"nesterov": baseline(), PAPER: paper()}.get(arm, arm)
    own = [row for row in rows() if row["stage"] == STAGE]
    averaged = arm == AVERAGED and all(row["arm"] != AVERAGED for row in own)  # then they are Nesterov's own runs
    found: dict[str, dict[int, float]] = {}
    for row in rows():
        earlier = row["stage"] in ("confirmation", "confirmation 2")
        name = stored if earlier else "nesterov" if averaged else arm
        wanted = row["arm"] == name or (earlier and arm == SECOND and row["arm"].startswith(SECOND))
        if wanted and (earlier or row["stage"] in (STAGE, GROWTH, GUARDED)) and row["cell"] in DESIGN:
            key = "ema_test_top1" if arm == AVERAGED else "test_top1"
            found.setdefault(row["cell"], {})[int(row["seed"])] = 100 * row[key]
    return {cell: seeds for cell, seeds in found.items() if len(seeds) == len(CONFIRMED)}


def cells_at(sparsities: Iterable[float], rigl98: str = LEFT_OUT, methods: Sequence[str] = METHODS) -> list[str]:
    """The cells at these sparsities; `rigl98` says what stands in the place of RigL at 98 %.

    >>> cells_at([0.95, 0.98]), cells_at([0.98], "as published", ["rigl"])
    (['static95', 'rigl95', 'static98'], ['rigl98'])
    """
    wanted = set(sparsities)
    found = [cell for cell, (method, value) in PLACES.items() if value in wanted and method in methods]
    return [place for cell in found for place in (STAND_INS[rigl98] if cell == UNSOUND else (cell,))]


def gaps(arm: str, reference: str, cells: Sequence[str]) -> Gaps:
    """Arm minus reference by cell and seed; `better` as the reference is the better baseline. Empty if runs lack."""
    own, found = accuracy(arm), {}
    for cell in cells:
        better_one = baseline() if DESIGN[cell][1] < 0.95 else better()
        against = accuracy(better_one if reference == "better" else reference)
        if cell not in own or cell not in against:
            return {}
        found[cell] = {seed: own[cell][seed] - against[cell][seed] for seed in CONFIRMED}
    return found


def pooled(found: Gaps) -> Difference:
    """The mean over cells against 0, with the interval over seeds."""
    whole = {s: fmean(seeds[s] for seeds in found.values()) for s in next(iter(found.values()))}
    return paired_difference(whole, dict.fromkeys(whole, 0.0), comparisons=PRIMARY)


def slope(found: Gaps) -> list[float]:
    """Of each seed: points gained per halving of the density, by least squares with a level for each method.

    With the same sparsities for both methods this is the slope of the mean over the methods; where one method lacks a
    sparsity, the difference between the methods does not count as a difference between sparsities.

    >>> slope({"static80": {0: 1.0}, "static90": {0: 3.0}, "rigl80": {0: -7.0}, "rigl90": {0: -7.0}})
    [1.0]
    """
    halvings = {cell: log2(1 / (1 - DESIGN[cell][1])) for cell in found}
    centred: dict[str, float] = {}
    for method in METHODS:
        own = [cell for cell in found if DESIGN[cell][0] == method]
        centred |= {cell: halvings[cell] - fmean(halvings[c] for c in own) for cell in own}
    squares = sum(x * x for x in centred.values())
    seeds = next(iter(found.values()))
    return [sum(x * found[cell][seed] for cell, x in centred.items()) / squares for seed in seeds]


def whole() -> list[str]:
    """The arms that have all their runs at 95 and 98 %; none before the primary contrasts are there."""
    names = [arm for arm in ("nesterov", "sgd", PAPER, SECOND, AVERAGED, SCALED) if set(SPARSER) <= set(accuracy(arm))]
    return names if {"nesterov", PAPER, SECOND, AVERAGED} <= set(names) else []


def difference(contrast: Contrast, rigl98: str = LEFT_OUT) -> Difference | None:
    """The difference of a contrast, None before its runs are there."""
    found = gaps(contrast.arm, contrast.reference, cells_at(contrast.sparsities, rigl98))
    return pooled(found) if found else None


def contrasts() -> list[tuple[bool, str, Difference]]:
    """Whether it is primary, what is compared, the difference; the primary ones come first.

    RigL at 98 % is left out; the paper's own comparison follows with it, as published and guarded.
    """
    found = []
    for contrast in CONTRASTS if whole() else ():
        words = f"{contrast.what}, mean over the cells at {contrast.at} %"
        for rigl98, more in ((LEFT_OUT, "without"), (PUBLISHED, "with"), (GUARDED, "with guarded")):
            gap = difference(contrast, rigl98)
            if gap and (rigl98 == LEFT_OUT or contrast == THE_PAPERS):
                found.append((contrast.primary, f"{words} {more} RigL 98 %", gap))
    return found


def section(_: Sequence[Mapping[str, Any]]) -> list[str]:
    """The part of report.md about this stage."""
    parts = ["## Stage 5: 95 and 98 % (test accuracy of the last epoch on fresh seeds, %, mean ± sd)"]
    if not whole():
        return [*parts, "Under way."]
    picks = [f"{arm}: lr {best(arm)['lr']:g}, weight decay {best(arm)['optim.weight_decay']:g}" for arm in tuned_arms()]
    return [
        *parts, accuracies(whole()), guarded_runs(),
        f"Tuned at {PLACE} by validation accuracy: {'; '.join(picks)}. The better baseline there: {better()}.",
        *compared(), *higher(), *by_method(), *growth(),
    ]  # fmt: skip


def guarded_runs() -> str:
    """Where the guarded cell comes from."""
    own = [row for row in rows() if row["stage"] == GUARDED]
    commits = ", ".join(sorted({row["commit"] for row in own}))
    return (
        f"{GUARDED_CELL}: RigL at 98 % with `min_per_filter: 1`, {len(own)} later runs, `guarded.csv`, commit "
        f"{commits}. rigl98 is as published and stands in no contrast that counts."
        if own
        else f"{GUARDED_CELL} has not run."
    )


def compared() -> list[str]:
    """The contrasts without RigL at 98 %, and once with it."""
    from analyse import ends, equivalence, table

    lines = []
    for contrast in CONTRASTS:
        gap = difference(contrast)
        if gap is None:
            continue
        shown = [contrast.what, contrast.at]
        for rigl98 in STAND_INS:
            other = difference(contrast, rigl98)
            interval = other and (other.simultaneous if contrast.primary else other.interval)
            shown.append(f"{other.mean:+.2f} {ends(interval)}" if other else "-")
        lines.append([*shown, equivalence(gap), f"{gap.n}"])
    return [
        f"The first {PRIMARY} differences are the stage's primary contrasts and hold together "
        f"({100 - 5 / PRIMARY:.1f} % intervals); the others are context (95 % each). What counts is the column without "
        "RigL at 98 %, and the equivalence is that column's; the two others show what that cell does.",
        table(
            ["difference, points", "cells at %", "without RigL 98 %", "with it, as published", "with it, guarded",
             "equivalent within +-", "n"], lines,
        ),
    ]  # fmt: skip


def higher() -> list[str]:
    """The gain in each cell, and its slope over the sparsities."""
    from analyse import ends, table

    pairs = ((PAPER, "better"), (SECOND, "nesterov"), (PAPER, "sgd"))
    cells = [*cells_at(ALL_FOUR, PUBLISHED, ["static"]), *cells_at(ALL_FOUR, PUBLISHED, ["rigl"]), GUARDED_CELL]
    ways = {
        "static alone": cells_at(ALL_FOUR, LEFT_OUT, ["static"]),
        "RigL alone, 80 to 95 %": cells_at(ALL_FOUR, LEFT_OUT, ["rigl"]),
        "both, without RigL 98 %": cells_at(ALL_FOUR),
        "both, as published": cells_at(ALL_FOUR, PUBLISHED),
        "both, RigL 98 % guarded": cells_at(ALL_FOUR, GUARDED),
    }
    gains, slopes = [], []
    for arm, reference in pairs:
        single = [gaps(arm, reference, [cell]) for cell in cells]
        gains.append([Contrast(arm, reference, ()).what, *(f"{pooled(g).mean:+.2f}" if g else "-" for g in single)])
        each = [slope(found) if (found := gaps(arm, reference, way)) else [] for way in ways.values()]
        shown = [f"{fmean(values):+.2f} {ends(t_interval(values))}" if values else "-" for values in each]
        slopes.append([Contrast(arm, reference, ()).what, *shown])
    return [
        "### Does higher sparsity gain more?",
        table(["gain, points", *cells], gains),
        "Slopes, points per halving of the density, over 80 to 98 %, 95 % intervals over 8 seeds, each by itself; both "
        "methods together: one slope, a level for each.",
        table(["slope of", *ways], slopes),
    ]


def by_method() -> list[str]:
    """Where the differences come from: each method by itself, and each cell."""
    from analyse import ends, table

    lines = []
    for arm, reference in ((PAPER, "better"), (PAPER, "sgd"), (SECOND, "nesterov")):
        for method, rigl98 in (("static", LEFT_OUT), ("rigl", LEFT_OUT), ("rigl", PUBLISHED), ("rigl", GUARDED)):
            cells = cells_at(ALL_THREE, rigl98, [method])
            found = gaps(arm, reference, cells)
            if not found:
                continue
            gap = pooled(found)
            each = {c: paired_difference(v, dict.fromkeys(v, 0.0), comparisons=len(SPARSER)) for c, v in found.items()}
            shown = "; ".join(f"{c} {g.mean:+.2f} {ends(g.simultaneous)}" for c, g in each.items() if c not in CELLS)
            what = Contrast(arm, reference, ()).what
            lines.append([what, ", ".join(cells), f"{gap.mean:+.2f} {ends(gap.interval)}", shown])
    return [
        "### By method (exploratory: written after the runs)",
        table(["difference, points", "cells", "mean", "cells at 95 and 98 % by themselves"], lines),
        f"95 % intervals: the mean each by itself, the single cells with Bonferroni over {len(SPARSER)} of them.",
    ]


def growth() -> list[str]:
    """What it brings to choose RigL's growth by gradients at the clean weights, once it has run."""
    from analyse import ends

    without, published = (gaps(CLEAN_ARM, PAPER, cells_at(OWN, way, ["rigl"])) for way in (LEFT_OUT, PUBLISHED))
    if not published:
        return []
    alone, both = pooled(without), pooled(published)
    return [
        f"**{CLEAN_ARM} minus {PAPER}**, RigL at 95 %: {alone.mean:+.2f} points, 95 % interval {ends(alone.interval)}; "
        f"with 98 % as published, as it was declared: {both.mean:+.2f} {ends(both.interval)}."
    ]


def named(reference: str) -> str:
    """A reference in words."""
    return "the better baseline" if reference == "better" else reference


def accuracies(names: Sequence[str]) -> str:
    """Arms by cells."""
    from analyse import table

    cells = [*SPARSER, *([GUARDED_CELL] if GUARDED_CELL in accuracy(PAPER) else [])]
    found = {arm: accuracy(arm) for arm in names}
    lines = [[arm, *(cell(seeds[c]) if c in seeds else "-" for c in cells)] for arm, seeds in found.items()]
    return table(["arm", *cells], lines)


def cell(values: Mapping[int, float]) -> str:
    """Mean and standard deviation."""
    return f"{fmean(values.values()):.2f} ± {deviation(list(values.values())) or 0.0:.2f}"
