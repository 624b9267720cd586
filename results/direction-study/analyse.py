"""raw.csv -> report.md: the tables of the three stages, with the intervals that protocol.md names."""

from __future__ import annotations

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
Row = dict[str, Any]
Cells = Mapping[str, Mapping[str, Mapping[int, Row]]]


def report() -> str:
    """The whole report, which is also written to report.md, with its figure."""
    import control
    import sparser
    from figures import draw, draw_sparsities  # all are made of what stands here

    parts = ["# Direction study: results", "Made from `raw.csv` by `python results/direction-study/study.py report`."]
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
    """What stages 3 to 6 compare on fresh seeds; the intervals of primary contrasts hold together for their stages."""
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
    found += [
        (primary, f"{what}, mean over the cells at {at} %", gap) for primary, what, at, gap in sparser.contrasts()
    ]
    found += control.contrasts()
    return [
        (f"{'primary: ' if primary else ''}{what}", gap, gap.simultaneous if primary else gap.interval)
        for primary, what, gap in found
    ]


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
    if interval.low > 0:
        said = f"{candidate} is better"
    elif interval.high < 0:
        said = f"{candidate} is worse"
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
