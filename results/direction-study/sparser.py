"""Stage 5: 95 and 98 %, with arms tuned at 95 %, and an average of the weights (protocol.md, Changes, 9).

`study.py sparser` runs it, and `study.py report` takes its section from here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import log2
from statistics import fmean, linear_regression
from typing import Any

from s2sam.report.stats import Difference, deviation, paired_difference
from study import (
    CELLS,
    CONFIRMED,
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
Gains = Mapping[float, Mapping[int, float]]  # sparsity -> seed -> points, mean over static ERK and RigL


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
    at = {arm: tuned[arm] | best(arm) for arm in tuned}
    second = next(changes for name, changes in on_nesterov().items() if name.startswith(SECOND))
    first = {"nesterov": at["nesterov"], PAPER: at[PAPER], SECOND: second | best("nesterov")}
    own = best("nesterov", "ema_val_top1")
    if own != best("nesterov"):
        first[AVERAGED] = tuned["nesterov"] | own
    for wanted in (first, {"sgd": at["sgd"]}):
        confirm(STAGE, wanted, jobs, SPARSER)
    for sparsity in (0.98, 0.95):
        cells = [cell for cell, (_, value) in SPARSER.items() if value == sparsity]
        rho = at[PAPER]["rho"] * ((1 - sparsity) / 0.2) ** 0.5
        confirm(STAGE, {SCALED: at[PAPER] | {"rho": rho}}, jobs, cells)


def run_growth(jobs: int) -> None:
    """The paper's arm with RigL, displaced in all steps but those that choose where weights grow."""
    changes = tuned_arms()[PAPER] | best(PAPER) | {"sam.clean_growth": True}
    confirm(GROWTH, {CLEAN_ARM: changes}, jobs, [cell for cell in SPARSER if cell.startswith("rigl")])


def accuracy(arm: str) -> dict[str, dict[int, float]]:
    """Cell -> seed -> test accuracy of an arm, %, at all four sparsities where it has run."""
    stored = {"nesterov": baseline(), PAPER: paper()}.get(arm, arm)
    own = [row for row in rows() if row["stage"] == STAGE]
    averaged = arm == AVERAGED and all(row["arm"] != AVERAGED for row in own)  # then they are Nesterov's own runs
    found: dict[str, dict[int, float]] = {}
    for row in rows():
        earlier = row["stage"] in ("confirmation", "confirmation 2")
        name = stored if earlier else "nesterov" if averaged else arm
        wanted = row["arm"] == name or (earlier and arm == SECOND and row["arm"].startswith(SECOND))
        if wanted and (earlier or row["stage"] in (STAGE, GROWTH)) and row["cell"] in PLACES:
            key = "ema_test_top1" if arm == AVERAGED else "test_top1"
            found.setdefault(row["cell"], {})[int(row["seed"])] = 100 * row[key]
    return {cell: seeds for cell, seeds in found.items() if len(seeds) == len(CONFIRMED)}


def gains(arm: str, reference: str, methods: Sequence[str] = METHODS) -> Gains:
    """Arm minus reference by sparsity, mean over the methods; `better` as the reference is the better baseline."""
    found: dict[float, dict[int, float]] = {}
    own = accuracy(arm)
    for sparsity in dict.fromkeys(value for _, value in PLACES.values()):
        name = (baseline() if sparsity < 0.95 else better()) if reference == "better" else reference
        cells, against = [c for c, (m, value) in PLACES.items() if value == sparsity and m in methods], accuracy(name)
        if all(cell in own and cell in against for cell in cells):
            found[sparsity] = {s: fmean(own[c][s] - against[c][s] for c in cells) for s in CONFIRMED}
    return found


def pooled(by_sparsity: Gains, sparsities: Iterable[float]) -> Difference:
    """The mean over sparsities against 0, with the interval over seeds."""
    whole = {s: fmean(by_sparsity[sparsity][s] for sparsity in sparsities) for s in CONFIRMED}
    return paired_difference(whole, dict.fromkeys(whole, 0.0), comparisons=PRIMARY)


def slope(by_sparsity: Gains) -> list[float]:
    """Of each seed: points gained per halving of the density, by least squares over the sparsities.

    >>> slope({0.5: {0: 1.0}, 0.75: {0: 3.0}, 0.875: {0: 5.0}})
    [2.0]
    """
    halvings = [log2(1 / (1 - sparsity)) for sparsity in by_sparsity]
    seeds = next(iter(by_sparsity.values()))
    return [linear_regression(halvings, [gain[seed] for gain in by_sparsity.values()]).slope for seed in seeds]


def whole() -> list[str]:
    """The arms that have all their runs at 95 and 98 %; none before the primary contrasts are there."""
    names = [arm for arm in ("nesterov", "sgd", PAPER, SECOND, AVERAGED, SCALED) if set(SPARSER) <= set(accuracy(arm))]
    return names if {"nesterov", PAPER, SECOND, AVERAGED} <= set(names) else []


def contrasts() -> list[tuple[bool, str, str, Difference]]:
    """Whether it is primary, what is compared, at which sparsities, the difference; the primary ones come first."""
    names, all_three, own = whole(), (0.9, 0.95, 0.98), (0.95, 0.98)
    if not names:
        return []
    wanted = [(PAPER, "better", all_three), (SECOND, "nesterov", all_three), (AVERAGED, "nesterov", own)]
    wanted += [(PAPER, "better", own), (SECOND, "nesterov", own)]
    context = (("sgd", "nesterov"), (PAPER, "sgd"), (SCALED, PAPER))
    wanted += [(arm, reference, own) for arm, reference in context if {arm, reference} <= set(names)]
    return [
        (
            place < PRIMARY, f"{arm} minus {named(reference)}",
            ", ".join(f"{100 * s:.0f}" for s in sparsities), pooled(gains(arm, reference), sparsities),
        )
        for place, (arm, reference, sparsities) in enumerate(wanted)
    ]  # fmt: skip


def section(_: Sequence[Mapping[str, Any]]) -> list[str]:
    """The part of report.md about this stage."""
    from analyse import ends, equivalence, table

    parts = ["## Stage 5: 95 and 98 % (test accuracy of the last epoch on fresh seeds, %, mean ± sd)"]
    if not whole():
        return [*parts, "Under way."]
    picks = [f"{arm}: lr {best(arm)['lr']:g}, weight decay {best(arm)['optim.weight_decay']:g}" for arm in tuned_arms()]
    lines = []
    for primary, what, at, gap in contrasts():
        interval = gap.simultaneous if primary else gap.interval
        lines.append([what, at, f"{gap.mean:+.2f}", ends(interval), equivalence(gap), f"{gap.n}"])
    return [
        *parts, accuracies(whole()),
        f"Tuned at {PLACE} by validation accuracy: {'; '.join(picks)}. The better baseline there: {better()}.",
        f"The first {PRIMARY} differences are the stage's primary contrasts and hold together "
        f"({100 - 5 / PRIMARY:.1f} % intervals); the others are context (95 % each).",
        table(["difference, points", "cells at %", "mean", "interval", "equivalent within +-", "n"], lines),
        *(higher(arm, reference) for arm, reference in ((PAPER, "better"), (SECOND, "nesterov"), (PAPER, "sgd"))),
        *exploratory(),
    ]  # fmt: skip


def higher(arm: str, reference: str) -> str:
    """The gain at each sparsity, and its slope, of both methods together and of each."""
    from analyse import over_seeds

    found = gains(arm, reference)
    each = ", ".join(f"{100 * s:.0f} %: {fmean(seeds.values()):+.2f}" for s, seeds in found.items())
    alone = "; ".join(
        f"{method} alone {over_seeds(slope(gains(arm, reference, [method])), 'points')}" for method in METHODS
    )
    return (
        f"**Higher sparsity**, {arm} minus {named(reference)}: {each}. "
        f"Slope: {over_seeds(slope(found), 'points per halving of the density')}; {alone}."
    )


def exploratory() -> list[str]:
    """Where the differences come from: each method by itself, and each cell."""
    from analyse import ends, table

    pairs, lines = ((PAPER, "better"), (PAPER, "sgd"), (SECOND, "nesterov")), []
    for arm, reference in pairs:
        for method in METHODS:
            found = gains(arm, reference, [method])
            gap = pooled(found, (0.9, 0.95, 0.98))
            each = (paired_difference(s, dict.fromkeys(s, 0.0), comparisons=len(SPARSER)) for s in found.values())
            shown = [f"{g.mean:+.2f} {ends(g.simultaneous)}" for g in list(each)[-2:]]
            lines.append([f"{arm} minus {named(reference)}", method, f"{gap.mean:+.2f} {ends(gap.interval)}", *shown])
    return [
        "### By method (exploratory: written after the runs)",
        table(["difference, points", "method", "90, 95, 98 %", "95 %", "98 %"], lines),
        "95 % intervals: over the three sparsities each by itself, at 95 and 98 % with Bonferroni over "
        f"{len(SPARSER)} cells.",
        *growth(),
    ]


def growth() -> list[str]:
    """What it brings to choose RigL's growth by gradients at the clean weights, once it has run."""
    from analyse import ends

    found = gains(CLEAN_ARM, PAPER, ["rigl"])
    if set(found) < {0.95, 0.98}:
        return []
    gap = pooled(found, found)
    each = ", ".join(f"{100 * s:.0f} %: {fmean(seeds.values()):+.2f}" for s, seeds in found.items())
    return [f"**{CLEAN_ARM} minus {PAPER}**, RigL: {gap.mean:+.2f} points, 95 % interval {ends(gap.interval)}; {each}."]


def named(reference: str) -> str:
    """A reference in words."""
    return "the better baseline" if reference == "better" else reference


def accuracies(names: Sequence[str]) -> str:
    """Arms by cells."""
    from analyse import table

    lines = [[arm, *(cell(accuracy(arm)[place]) for place in SPARSER)] for arm in names]
    return table(["arm", *SPARSER], lines)


def cell(values: Mapping[int, float]) -> str:
    """Mean and standard deviation."""
    return f"{fmean(values.values()):.2f} ± {deviation(list(values.values())) or 0.0:.2f}"
