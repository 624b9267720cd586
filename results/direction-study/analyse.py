"""raw.csv, guarded.csv -> report.md: the tables of the six stages, with the intervals that protocol.md names.

A stage's primary contrasts hold together for that stage, as declared. `together` takes all primary contrasts of all
stages as one family; what does not hold there is called suggestive.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from s2sam.report.stats import Difference, Interval, deviation, paired_difference, t_interval
from study import CELLS, CONFIRMED, HERE, NOISE, PAPER, STAGE_4, arms, baseline, chosen, rows, screening_stage

EQUIVALENT = 0.5  #: points
SUPERSEDED = "Superseded: SGD's choice of stage 1 has moved since, and screening 2 begins anew."
SCREENING = (
    "No interval is given here: the order of many arms on few seeds is a screening, not a finding. train: accuracy "
    "under augmentation in the last epoch, at the displaced weights. e/w: mean ||e|| over final ||w|| of all matrices "
    "and kernels, whatever the scope. alignment: mean cosine of g_t and d_{t-1}."
)
PRIMARY = 2  #: primary contrasts: stages 3 and 4
FAMILY = 10  #: primary contrasts of all stages (1 + 1 + 3 + 4), and the default minus SGD, which came later
KINDS = {  #: of arms in the table of trials: how the name of a trial without its setting begins
    "SGD": r"sgd$",
    "Nesterov": r"nesterov$",
    "the paper's arm (+g, rho 0.05; stage 6: two radii)": r"\+g-0\.05$|\+g \d",
    "other displacements with one gradient": r"(nesterov )?([-+][gm]|-ema)",
    "noise": r"(nesterov )?random",
    "two-step SAM": r"sam",
}
TUNED_IN = {  #: column of the table of trials: stages
    "1 and 2": ("baselines", "screening", "joint"), "4": (STAGE_4,), "5": ("sparser tuning",), "6": ("control tuning",),
}  # fmt: skip
Row = dict[str, Any]
Cells = Mapping[str, Mapping[str, Mapping[int, Row]]]


def report() -> str:
    """The whole report, which is also written to report.md, with its figure."""
    import control
    import sparser
    from figures import draw, draw_sparsities  # all are made of what stands here

    parts = [
        "# Direction study: results",
        "Made from `raw.csv` and `guarded.csv` by `python results/direction-study/study.py report`.",
        *(all_primary() if sparser.whole() else ()), *trials_of_arms(),
    ]  # fmt: skip
    stages = {row["stage"] for row in rows()}
    sections = {
        "baselines": baselines, "screening": screening, "screening 2": screening, "joint": joint,
        "confirmation": confirmation, STAGE_4: on_nesterov, "confirmation 2": second, "density": density,
        sparser.STAGE: sparser.section, control.TUNING: control.section,
    }  # fmt: skip
    for stage, section in sections.items():
        if stage in stages:
            parts += section([row for row in rows() if row["stage"] == stage])
    figures = {"Every arm against the better baseline": draw(), "Gain by sparsity": draw_sparsities()}
    parts += [f"![{title}]({path.name})" for title, path in figures.items() if path]
    text = "\n\n".join(parts) + "\n"
    Path(HERE / "report.md").write_text(text, encoding="utf-8")
    return text


def baselines(found: Sequence[Row]) -> list[str]:
    """Stage 1: the settings of each baseline."""
    lines = [
        [arm, f"{mean(seeds, 'val_top1'):.2f}", spread(seeds, "val_top1"), f"{len(seeds)}"]
        for arm, seeds in by_arm(found).items()
    ]
    picks = ", ".join(
        f"{arm}: lr {chosen(arm)['lr']:g}, weight decay {chosen(arm)['optim.weight_decay']:g}"
        for arm in arms()["baselines"]
    )
    return [
        "## Stage 1: tuning the baselines (static ERK 80 %, validation accuracy, %)",
        table(["setting", "mean", "sd", "n"], lines),
        f"Chosen: {picks}.",
    ]


def screening(found: Sequence[Row]) -> list[str]:
    """Stage 2: all arms against the better baseline on the seeds they share."""
    groups, stage = by_arm(found), found[0]["stage"]
    reference = baseline(stage)
    best = groups[reference]
    lines = []
    for arm, seeds in sorted(groups.items(), key=lambda item: (-len(item[1]), -mean(item[1], "val_top1"))):
        shared = {s: row for s, row in best.items() if s in seeds}
        gap = paired_difference(column(seeds, "val_top1"), column(shared, "val_top1"))
        lines.append(
            [
                arm, f"{len(seeds)}", f"{mean(seeds, 'val_top1'):.2f}", spread(seeds, "val_top1"),
                "-" if seeds is best else f"{gap.mean:+.2f}", number(seeds, "train_top1", 100.0, ".1f"),
                ratio(seeds), number(seeds, "alignment", 1.0, "+.2f"),
            ]
        )  # fmt: skip
    return [
        f"## Stage 2: {stage} (static ERK 80 %, validation accuracy, %)",
        table(["arm", "n", "mean", "sd", f"minus {reference}", "train", "e/w", "alignment"], lines),
        *[SUPERSEDED] * (stage != screening_stage()),
        SCREENING,
    ]


def joint(found: Sequence[Row]) -> list[str]:
    """The best arms at the settings where Nesterov validated best."""
    title = "Stage 2: joint, learning rate and weight decay for the best arms"
    return trials(f"## {title} (static ERK 80 %, validation accuracy, %)", found)


def on_nesterov(found: Sequence[Row]) -> list[str]:
    """Displacements on top of Nesterov, beside Nesterov alone."""
    alone = [row for row in rows() if row["stage"] == screening_stage() and row["arm"] == baseline()]
    return trials("## Stage 4: on top of Nesterov (static ERK 80 %, validation accuracy, %)", [*found, *alone])


def trials(title: str, found: Sequence[Row]) -> list[str]:
    """Arms by mean validation accuracy."""
    lines = [
        [name, f"{len(seeds)}", f"{mean(seeds, 'val_top1'):.2f}", spread(seeds, "val_top1"), ratio(seeds)]
        for name, seeds in sorted(by_arm(found).items(), key=lambda item: -mean(item[1], "val_top1"))
    ]
    return [title, table(["trial", "n", "mean", "sd", "e/w"], lines)]


def findings() -> list[tuple[str, Difference, Interval | None]]:
    """What stages 3 to 6 compare on fresh seeds; the intervals of all primary contrasts of all stages hold together."""
    import control
    import sparser

    reference, context = baseline(), {*arms()["baselines"], NOISE}
    found = [
        (
            not is_paper(arm) and arm not in context, f"{arm} minus {reference}, mean over 4 cells",
            pooled(cells, arm, reference),
        )
        for arm, cells in whole()
    ]  # fmt: skip
    found += [*sparser.contrasts(), *control.contrasts()]
    return [
        (f"{'primary: ' if primary else ''}{what}", gap, together(gap) if primary else gap.interval)
        for primary, what, gap in found
    ]


def together(gap: Difference) -> Interval | None:
    """The interval that holds together with those of all primary contrasts of all stages, Bonferroni."""
    return t_interval(list(gap.per_seed.values()), comparisons=FAMILY)


def primaries() -> list[tuple[str, str, Difference | None]]:
    """All primary contrasts: stage, what is compared, the difference; None for one that has not run.

    RigL at 98 % is left out of those of stage 5.
    """
    import control
    import sparser

    reference, context = baseline(), {*arms()["baselines"], NOISE}
    first = [(arm, cells) for arm, cells in whole() if not is_paper(arm) and arm not in context]
    found: list[tuple[str, str, Difference | None]] = [
        (stage, f"{arm} minus {reference}", pooled(cells, arm, reference))
        for stage, (arm, cells) in zip("34", first, strict=True)
    ]
    found += [("5" if c.primary else "added", f"{c.what}, {c.at} %", sparser.difference(c)) for c in headline()]
    own = [("6", what, gap) for primary, what, gap in control.contrasts() if primary]
    own += [("6", "right labels, the candidate of stage 6 minus nesterov", None)] * (control.PRIMARY - len(own))
    return [*found, *own]


def all_primary() -> list[str]:
    """All primary contrasts of all stages as one family: what holds then."""
    found = primaries()
    if len(found) != FAMILY:
        raise RuntimeError(f"{len(found)} primary contrasts are there; the family is declared as {FAMILY}")
    lines = [
        [stage, what, f"{gap.mean:+.2f}", ends(gap.interval), ends(together(gap)), conclusion(gap), f"{gap.n}"]
        if gap
        else [stage, what, "-", "-", "-", "not run", "0"]
        for stage, what, gap in (*found, *with_unsound())
    ]
    return [
        "## All primary contrasts of all stages together",
        f"Each stage has its own Bonferroni below. Here all {FAMILY} count as one family: {FAMILY - 1} were declared "
        "(one did not run and still counts), and the default minus SGD was added on 2026-12-01, as it is the paper's "
        f"own comparison. Each has a {100 - 5 / FAMILY:g} % interval. RigL at 98 % is left out; the last lines have "
        "it, as published, and count nothing. A difference that its own 95 % interval shows and the joint one does not "
        "is *suggestive*; so is a difference in any other table of this report that its own interval shows.",
        table(
            ["stage", "difference, points", "mean", "95 % by itself", "all together", "what holds", "n"], lines,
        ),
    ]  # fmt: skip


def with_unsound() -> list[tuple[str, str, Difference | None]]:
    """The contrasts of stage 5 as they were declared, with RigL at 98 % as published."""
    import sparser

    return [
        (f"with {sparser.UNSOUND}", f"{c.what}, {c.at} %", sparser.difference(c, sparser.PUBLISHED)) for c in headline()
    ]


def headline() -> list[Any]:
    """The primary contrasts of stage 5, and the paper's own comparison."""
    import sparser

    return [c for c in sparser.CONTRASTS if c.primary or c == sparser.THE_PAPERS]


def conclusion(gap: Difference) -> str:
    """What an interval that holds together with the others allows to say."""
    alone, joint = gap.interval, together(gap)
    if alone is None or joint is None:
        return "no interval"
    if not joint.contains(0.0):
        return "better" if joint.low > 0 else "worse"
    if not alone.contains(0.0):
        return f"suggestive: {'better' if alone.low > 0 else 'worse'}"
    if max(-joint.low, joint.high) < EQUIVALENT:
        return f"no difference larger than {EQUIVALENT:g}"
    return "cannot tell"


def trials_of_arms() -> list[str]:
    """How many settings each kind of arm tried in which stage: unequal budgets, named."""
    stages = {column: [row for row in rows() if row["stage"] in names] for column, names in TUNED_IN.items()}
    lines = []
    for kind in KINDS:
        counts = [trial_count(found, kind) for found in stages.values()]
        lines.append([kind, *(f"{trials} ({runs})" if runs else "-" for trials, runs in counts)])
    return [
        "## Trials of each arm (settings tried; in brackets the runs that chose)",
        table(["arm", *(f"stage {column}" for column in stages)], lines),
        "Unequal in stages 1 to 4: a baseline tried more settings than the paper's arm or two-step SAM, and the other "
        "displacements, of which the best was taken, together more than a baseline. Equal in stage 5, where the second "
        "candidate took Nesterov's setting untried. Equal for each arm in stage 6, but the other displacements are "
        "three arms there, of which the best was taken, and noise was to take the candidate's setting.",
    ]


def trial_count(found: Sequence[Row], kind: str) -> tuple[int, int]:
    """Settings that arms of a kind tried, and their runs."""
    own = [row for row in found if kind_of(row["arm"]) == kind]
    return len({(trial_name(row["arm"]), row["lr"], row["weight_decay"]) for row in own}), len(own)


def kind_of(arm: str) -> str:
    """The kind of an arm in the table of trials.

    >>> kind_of("nesterov lr 0.1 wd 0.002"), kind_of("nesterov -g-norm-0.2 lr 0.1 wd 0.002")
    ('Nesterov', 'other displacements with one gradient')
    """
    return next(kind for kind, pattern in KINDS.items() if re.match(pattern, trial_name(arm)))


def trial_name(arm: str) -> str:
    """The name of a trial without its learning rate and weight decay."""
    return arm.split(" lr ")[0]


def whole() -> list[tuple[str, Cells]]:
    """The arms of stages 3 and 4 that have all their runs on the fresh seeds, with the cells that hold them."""
    found = []
    for stage in ("confirmation", "confirmation 2"):
        cells = with_baseline([row for row in rows() if row["stage"] == stage])
        found += [(arm, cells) for arm in compared(cells, baseline())]
    return found


def compared(cells: Cells, reference: str) -> list[str]:
    """The arms that have all their runs and can be compared with `reference`, which must have all of its own."""
    names = list(dict.fromkeys(arm for groups in cells.values() for arm in groups))
    whole = [arm for arm in names if all(len(cells[cell].get(arm, {})) == len(CONFIRMED) for cell in CELLS)]
    return [arm for arm in whole if arm != reference] if reference in whole else []


def design(found: Sequence[Row]) -> tuple[Cells, str, str]:
    """Cell -> arm -> seed -> row; the candidate, "" before it has a run; the better baseline."""
    cells = {cell: by_arm([row for row in found if row["cell"] == cell]) for cell in CELLS}
    reference = baseline()
    names = next(iter(cells.values()))
    context = {*arms()["baselines"], NOISE}
    candidates = (arm for arm in names if arm not in context and not is_paper(arm))
    return cells, next(candidates, ""), reference


def is_paper(name: str) -> bool:
    """Whether a trial is one of the paper's arm, at some setting."""
    return name.split(" lr ")[0] == PAPER


def confirmation(found: Sequence[Row]) -> list[str]:
    """Stage 3: the primary contrast, its cells, and the context; arms whose runs are not all done are left out."""
    cells, candidate, reference = design(found)
    names = compared(cells, reference)
    parts = ["## Stage 3: confirmation on fresh seeds (test accuracy of the last epoch, %, mean ± sd)"]
    if candidate not in names:
        return [*parts, f"Under way: {len(found)} runs are done."]
    papers = [arm for arm in names if is_paper(arm)]
    others = [*papers, *(arm for arm in names if arm in (*arms()["baselines"], NOISE))]
    contrasts = [line for arm in names for line in against(cells, arm, reference)]
    pairs = [(candidate, arm) for arm in others]
    pairs += [(arm, "sgd") for arm in (*papers, NOISE) if {arm, "sgd"} <= set(names)]
    contrasts += [[f"{a} minus {b}", *words(pooled(cells, a, b), simultaneous=False)] for a, b in pairs]
    primary = pooled(cells, candidate, reference)
    return [
        *parts, accuracies(cells, (reference, *names)), differences(contrasts),
        verdict("Primary contrast", candidate, reference, primary), sparsity_contrast(cells, candidate, reference),
    ]  # fmt: skip


def second(found: Sequence[Row]) -> list[str]:
    """Stage 4: the second candidate against Nesterov, and both primary contrasts together."""
    cells, reference = with_baseline(found), baseline()
    parts = ["## Stage 4: on top of Nesterov, fresh seeds (test accuracy of the last epoch, %, mean ± sd)"]
    names = compared(cells, reference)
    if not names:
        return [*parts, f"Under way: {len(found)} runs are done."]
    (candidate,) = names
    first_cells, earlier, _ = design([row for row in rows() if row["stage"] == "confirmation"])
    both = [
        verdict("Second primary contrast", candidate, reference, pooled(cells, candidate, reference), PRIMARY),
        verdict("First primary contrast again", earlier, reference, pooled(first_cells, earlier, reference), PRIMARY),
    ]
    return [
        *parts, accuracies(cells, (reference, candidate)), differences(against(cells, candidate, reference)), *both,
        sparsity_contrast(cells, candidate, reference),
    ]  # fmt: skip


def density(found: Sequence[Row]) -> list[str]:
    """The paper's arm at 90 % with rho x sqrt(density) against itself with constant rho, and against Nesterov."""
    cells = {place: groups for place, groups in with_baseline(found, "confirmation").items() if place.endswith("90")}
    parts = ["## rho x sqrt(density), cells at 90 % (test accuracy of the last epoch, %, mean ± sd)"]
    reference = baseline()
    (scaled,) = {row["arm"] for row in found}
    if any(len(groups[scaled]) < len(CONFIRMED) for groups in cells.values()):
        return [*parts, f"Under way: {len(found)} runs are done."]
    (constant,) = (arm for arm in next(iter(cells.values())) if is_paper(arm) and arm != scaled)
    lines = [line for other in (constant, reference) for line in against(cells, scaled, other)]
    return [*parts, accuracies(cells, (reference, constant, scaled)), differences(lines)]


def with_baseline(found: Sequence[Row], stage: str | None = None) -> Cells:
    """Rows beside the baseline on the same seeds: run again by the same code if that gave other numbers."""
    everything = rows()
    again = [row for row in everything if row["stage"] == "again"]
    source = stage or ("again" if len(again) == len(CELLS) * len(CONFIRMED) else "confirmation")
    wanted = [row for row in everything if row["stage"] == source and (stage or row["arm"] == baseline())]
    return design([*wanted, *found])[0]


def accuracies(cells: Cells, names: Sequence[str]) -> str:
    """Arms by cells."""
    lines = [
        [arm, *(f"{mean(cells[c][arm], 'test_top1'):.2f} ± {spread(cells[c][arm], 'test_top1')}" for c in cells)]
        for arm in names
    ]
    return table(["arm", *cells], lines)


def against(cells: Cells, arm: str, reference: str) -> list[list[str]]:
    """The pooled difference, and each cell's with Bonferroni over the cells."""
    lines = [[f"{arm} minus {reference}", *words(pooled(cells, arm, reference), simultaneous=False)]]
    for cell, groups in cells.items():
        columns = (column(groups[name], "test_top1") for name in (arm, reference))
        lines.append([f"- {cell}", *words(paired_difference(*columns, comparisons=len(cells)), simultaneous=True)])
    return lines


def differences(lines: Sequence[Sequence[str]]) -> str:
    """Contrasts with their intervals."""
    return table(["difference, points", "mean", "95 % interval", "equivalent within +-", "n"], lines)


def pooled(cells: Cells, arm: str, reference: str) -> Difference:
    """The difference of per-seed means over the cells."""
    means = [
        {seed: fmean(100 * groups[name][seed]["test_top1"] for groups in cells.values()) for seed in first(cells, name)}
        for name in (arm, reference)
    ]
    return paired_difference(*means, comparisons=PRIMARY)


def sparsity_contrast(cells: Cells, arm: str, reference: str) -> str:
    """Whether the sparser cells gain more."""

    def gain(cell: str, seed: int) -> float:
        return 100 * float(cells[cell][arm][seed]["test_top1"] - cells[cell][reference][seed]["test_top1"])

    values = [
        fmean(gain(c, seed) for c in CELLS if c.endswith("90"))
        - fmean(gain(c, seed) for c in CELLS if c.endswith("80"))
        for seed in first(cells, arm)
    ]
    return f"**Higher sparsity**: gain at 90 % minus gain at 80 %: {over_seeds(values, 'points')}."


def over_seeds(values: Sequence[float], unit: str) -> str:
    """The mean of one value a seed, with its interval and n."""
    interval = t_interval(values)
    bounds = "no interval" if interval is None else f"95 % interval {ends(interval)}"
    return f"{fmean(values):+.2f} {unit}, {bounds}, n = {len(values)}"


def verdict(title: str, candidate: str, reference: str, gap: Difference, primary: int = 1) -> str:
    """A primary contrast in plain words; with `primary` of them, by intervals that hold together."""
    interval = gap.interval if primary == 1 else gap.simultaneous
    if interval is None:
        return f"**{title}**: {candidate} minus {reference}: {gap.mean:+.2f} points; no interval can be given."
    if not interval.contains(0.0):
        said = f"{candidate} is {'better' if interval.low > 0 else 'worse'}"
        joint = together(gap)
        if joint is None or joint.contains(0.0):
            said = f"suggestive: by itself {said}, not with all primary contrasts together"
    elif interval.low > -EQUIVALENT and interval.high < EQUIVALENT:
        said = f"there is no difference larger than {EQUIVALENT:g} points"
    else:
        said = "these runs cannot tell them apart"
    return (
        f"**{title}**: {candidate} minus {reference}, mean over the cells: {gap.mean:+.2f} points, "
        f"{100 - 5 / primary:g} % interval {ends(interval)}, n = {gap.n} seeds: {said}."
    )


def words(gap: Difference, *, simultaneous: bool) -> list[str]:
    """Mean, interval and n of a difference; of a pooled one also what it is equivalent within."""
    interval = gap.simultaneous if simultaneous else gap.interval
    return [f"{gap.mean:+.2f}", ends(interval), "" if simultaneous else equivalence(gap), f"{gap.n}"]


def ends(interval: Interval | None) -> str:
    """An interval as text."""
    return "-" if interval is None else f"[{interval.low:+.2f}, {interval.high:+.2f}]"


def equivalence(gap: Difference) -> str:
    """The smallest +-delta that two one-sided tests at 5 % call equivalent: the farther end of the 90 % interval."""
    interval = t_interval(list(gap.per_seed.values()), level=0.9)
    return "-" if interval is None else f"{max(abs(interval.low), abs(interval.high)):.2f}"


def by_arm(found: Sequence[Row]) -> dict[str, dict[int, Row]]:
    """Arm -> seed -> row."""
    groups: dict[str, dict[int, Row]] = {}
    for row in found:
        groups.setdefault(row["arm"], {})[int(row["seed"])] = row
    return groups


def first(cells: Cells, arm: str) -> list[int]:
    """The seeds of an arm."""
    return sorted(next(iter(cells.values()))[arm])


def column(seeds: Mapping[int, Row], key: str) -> dict[int, float]:
    """Seed -> value in percent."""
    return {seed: 100 * float(row[key]) for seed, row in seeds.items()}


def mean(seeds: Mapping[int, Row], key: str) -> float:
    """In percent."""
    return fmean(column(seeds, key).values())


def spread(seeds: Mapping[int, Row], key: str) -> str:
    """Standard deviation in percent."""
    value = deviation(list(column(seeds, key).values()))
    return "-" if value is None else f"{value:.2f}"


def number(seeds: Mapping[int, Row], key: str, factor: float, form: str) -> str:
    """The mean over the runs that have the value."""
    values = [factor * row[key] for row in seeds.values() if row[key] != ""]
    return format(fmean(values), form) if values else "-"


def ratio(seeds: Mapping[int, Row]) -> str:
    """||e|| / ||w||."""
    values = [
        r["displacement"] / r["weight_norm"] for r in seeds.values() if r["displacement"] != "" and r["weight_norm"]
    ]
    return f"{fmean(values):.4f}" if values else "-"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines))
