"""Stage 6, meant as a positive control: wrong training labels (protocol.md, Changes, 13; why it could not work: 20).

`study.py control` runs it, and `study.py report` takes its section from here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from s2sam.report.stats import Difference, paired_difference
from sparser import cell, settings
from study import (
    CELLS,
    CONFIRMED,
    arms,
    baseline,
    by_score,
    confirm,
    label,
    means,
    noise_like,
    rows,
    run,
)

TUNING, STAGE, CLEAN, PLACE = "control tuning", "control", "control clean", "static80"
RIGHT = "control right labels"  #: the candidate on fresh seeds where no label is wrong
PLACES = (PLACE,)
SAM, PAPER, NOISE = "sam", "+g", "noise like the candidate"
PRIMARY = 4
Accuracy = Mapping[str, Mapping[int, float]]  # cell -> seed -> %


def noisy() -> dict[str, float]:
    """The change that makes training labels wrong."""
    return {"data_options.label_noise": arms()["control"]["noise"]}


def baselines() -> dict[str, dict[str, Any]]:
    """SGD and Nesterov, each at the settings of this stage: trial -> changes."""
    found = {}
    for at in settings(arms()["control"]["settings"]):
        found |= {label(arm, at): changes | at | noisy() for arm, changes in arms()["baselines"].items()}
    return found


def displaced(names: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
    """The other arms, each radius at the three settings where the base validated best: trial -> changes."""
    scores, bases, found = means(TUNING, PLACE), baselines(), {}
    for arm in names or arms()["control"]["arms"]:
        told = arms()["control"]["arms"][arm]
        own = by_score([trial for trial in bases if arm_of(trial) == told["base"]], scores)[:3]
        for trial in own:
            base = {key: value for key, value in bases[trial].items() if key != "sharpness"}  # none, in a baseline
            found |= {
                trial.replace(told["base"], f"{arm} {rho:g}", 1): base | told["changes"] | {"rho": rho}
                for rho in told["rho"]
            }
    return found


def arm_of(trial: str) -> str:
    """The arm of a trial.

    >>> arm_of("+g 0.05 lr 0.1 wd 0.002"), arm_of("sgd lr 0.1 wd 0.002")
    ('+g', 'sgd')
    """
    return trial.split(" ")[0]


def best(arm: str) -> str:
    """The trial of an arm that validated best."""
    scores = means(TUNING, PLACE)
    return by_score([trial for trial in scores if arm_of(trial) == arm], scores)[0]


def better() -> str:
    """The baseline that validated better, each at its best setting."""
    scores = means(TUNING, PLACE)
    return max(arms()["baselines"], key=lambda arm: scores[best(arm)])


def candidate() -> str:
    """The displacement with one gradient a step that validated best; neither the paper's nor noise."""
    scores = means(TUNING, PLACE)
    rivals = [arm for arm in arms()["control"]["arms"] if arm not in (SAM, PAPER)]
    return max(rivals, key=lambda arm: scores[best(arm)])


def run_all(jobs: int) -> None:
    """The tuning, the fresh seeds, and SAM on right labels."""
    first = baselines()
    run(TUNING, [(PLACE, trial, seed, first[trial]) for trial in first for seed in (0, 1)], jobs)
    second = displaced()
    run(TUNING, [(PLACE, trial, seed, second[trial]) for trial in second for seed in (0, 1)], jobs)
    everything = first | second
    primary = {arm: everything[best(arm)] for arm in dict.fromkeys((better(), SAM, PAPER, candidate()))}
    noise = noise_like(best(candidate()), primary[candidate()])
    confirm(STAGE, primary, jobs, PLACES)
    right = {"data_options.label_noise": 0.0}
    confirm(RIGHT, {best(candidate()): everything[best(candidate())] | right}, jobs)
    for wanted in ({NOISE: noise}, {arm: everything[best(arm)] for arm in arms()["baselines"]}):
        confirm(STAGE, wanted, jobs, PLACES)
    clean = {trial: changes | right for trial, changes in displaced([SAM]).items()}
    run(CLEAN, [(PLACE, trial, seed, clean[trial]) for trial in clean for seed in (0, 1)], jobs)


def accuracy(arm: str, stage: str = STAGE, places: Iterable[str] = PLACES) -> Accuracy:
    """Cell -> seed -> test accuracy on fresh seeds, %; empty before all runs of the arm are there."""
    found: dict[str, dict[int, float]] = {place: {} for place in places}
    for row in rows():
        if row["stage"] == stage and row["arm"] == arm and row["cell"] in found:
            found[row["cell"]][int(row["seed"])] = 100 * row["test_top1"]
    return found if all(len(seeds) == len(CONFIRMED) for seeds in found.values()) else {}


def right_labels() -> Accuracy:
    """The candidate on fresh seeds where no label is wrong; empty before all these runs are there."""
    return accuracy(best(candidate()), RIGHT, CELLS)


def difference(treated: Accuracy, reference: Accuracy) -> Difference:
    """Of per-seed means over the cells; the primary ones hold together."""
    pooled = [{s: fmean(seeds[s] for seeds in side.values()) for s in CONFIRMED} for side in (treated, reference)]
    return paired_difference(*pooled, comparisons=PRIMARY)


def contrasts() -> list[tuple[bool, str, Difference]]:
    """Whether it is primary, what is compared, the difference; empty while an arm of the first three lacks runs."""
    tried = {arm_of(trial) for trial in means(TUNING, PLACE)}
    if not tried >= {*arms()["baselines"], *arms()["control"]["arms"]}:
        return []
    reference = better()
    names = [SAM, PAPER, candidate()]
    if not all(accuracy(arm) for arm in (reference, *names)):
        return []
    pairs = [(arm, reference) for arm in names]
    pairs += [(NOISE, reference), (candidate(), SAM), (PAPER, SAM), (candidate(), NOISE), (PAPER, "sgd")]
    found = [
        (b == reference and a in names, f"wrong labels, {a} minus {b}", difference(accuracy(a), accuracy(b)))
        for a, b in pairs
        if a != b and accuracy(a) and accuracy(b)
    ]
    right = right_labels()
    if right:
        cost = difference(right, accuracy(baseline(), "confirmation", CELLS))
        found.append((True, f"right labels, {best(candidate())} minus {baseline()}, mean over 4 cells", cost))
    return found


def gate() -> list[str]:
    """Why this stage could not work as a control: what was memorised, and how far the weights were displaced."""
    from analyse import ends, mean, table

    right = 100 * (1 - arms()["control"]["noise"])
    fresh = {
        arm: [r for r in rows() if r["stage"] == STAGE and r["arm"] == arm]
        for arm in (better(), SAM, PAPER, candidate())
    }
    lines = [
        [best(arm), share(found), f"{mean({int(r['seed']): r for r in found}, 'train_top1'):.1f}", f"{len(found)}"]
        for arm, found in fresh.items()
    ]
    tuning = [100 * r["train_top1"] for r in rows() if r["stage"] == TUNING and arm_of(r["arm"]) in arms()["baselines"]]
    sam = [share([r]) for r in rows() if r["stage"] == TUNING and arm_of(r["arm"]) == SAM]
    (gap,) = [gap for primary, what, gap in contrasts() if what == f"wrong labels, {SAM} minus {better()}"]
    return [
        "### Why this control could not work",
        "e/w: ||e|| / final ||w|| of all matrices and kernels, %. Fitted: accuracy on the labels that were trained on, "
        "wrong ones included, in the last epoch under augmentation, %.",
        table(["arm on fresh seeds", "e/w", "fitted", "n"], lines),
        f"{right:g} % of the training labels are right. A network that memorises wrong ones fits more than that; the "
        f"gate of [the control study](../../studies/control/protocol.md) asks for {right + 10:g} %. No run of a "
        f"baseline fits more than {max(tuning):.1f} %, at any setting of the tuning: nothing was memorised, so there "
        f"was nothing for flatness to undo. The gate's other half fails too: SAM minus {better()} is {gap.mean:+.2f} "
        f"{ends(gap.simultaneous)}. And the radii were small: SAM tried {min(sam, key=float)} to {max(sam, key=float)} "
        "% of ||w||, where 4 % and more were useful with memorised labels "
        "([pilot](../../studies/control/scale.md), scale relative, with BatchNorm).",
    ]  # fmt: skip


def share(found: Sequence[Mapping[str, Any]]) -> str:
    """The mean of ||e|| / final ||w||, %; two-step SAM's e has the length in its name."""
    values = []
    for row in found:
        trial = row["arm"] if row["arm"] != SAM else best(SAM)
        length = float(trial.split(" ")[1]) if arm_of(trial) == SAM else row["displacement"]
        if length != "":
            values.append(100 * length / row["weight_norm"])
    return f"{fmean(values):.1f}" if values else "-"


def section(_: Sequence[Mapping[str, Any]]) -> list[str]:
    """The part of report.md about this stage."""
    from analyse import ends, equivalence, table, trials

    noise = 100 * arms()["control"]["noise"]
    tuning = [row for row in rows() if row["stage"] == TUNING]
    parts = trials(f"## Stage 6: {noise:g} % wrong training labels (static ERK 80 %, validation accuracy, %)", tuning)
    clean = [row for row in rows() if row["stage"] == CLEAN]
    if clean:
        parts += trials("## Stage 6: two-step SAM on right labels (static ERK 80 %, validation accuracy, %)", clean)
    parts.append("## Stage 6: fresh seeds (test accuracy of the last epoch, %, mean ± sd)")
    found = contrasts()
    if not found:
        return [*parts, "Under way."]
    names = dict.fromkeys((*arms()["baselines"], SAM, PAPER, candidate(), NOISE))
    lines = [
        [arm if arm == NOISE else best(arm), *(cell(accuracy(arm)[place]) for place in PLACES)]
        for arm in names
        if accuracy(arm)
    ]
    gaps = [
        [
            f"primary: {what}" if primary else what, f"{gap.mean:+.2f}",
            ends(gap.simultaneous if primary else gap.interval), equivalence(gap),
        ]
        for primary, what, gap in found
    ]  # fmt: skip
    left_out = [] if right_labels() else ["The candidate with right labels was not run."]
    return [
        *parts, table(["arm", *PLACES], lines),
        f"The primary contrasts hold together, {PRIMARY} of them ({100 - 5 / PRIMARY:g} % intervals); the others are "
        f"context (95 % each). n = {len(CONFIRMED)} seeds.",
        table(["difference, points", "mean", "interval", "equivalent within +-"], gaps), *left_out, *gate(),
    ]  # fmt: skip
