"""Sharpness in the report: what `s2sam sharpness` has measured of its runs, with the train loss beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from s2sam.analysis.sharpness import INVARIANT, SCALED
from s2sam.analysis.sharpness_compare import NAMES, ONLY_SHOWN, match, rank, words
from s2sam.analysis.sharpness_run import FILE
from s2sam.outside import COUNT, NUMBER, OPTIONAL, Number, Row
from s2sam.report.arm_bars import Dot, arm_bars, number
from s2sam.report.arms import Arm, reference_of
from s2sam.report.held import Held, Result, find
from s2sam.report.panels import Section, treatments
from s2sam.report.sharpness_density import density_sections
from s2sam.report.stats import paired_difference

TOLERANCE = 0.1  #: of train losses that match, relative; the default of `s2sam sharpness`
SHARED = ("settings", "split", "images", "data_digest", "augmentation", "weights")
#: measure -> title and unit of its panel; the train loss first, then what is scale-invariant, in units of ||w||, raw
PANELS = {
    "train_loss": ("Train loss, which must match", "nats"),
    "worst_adaptive": ("Adaptive worst case", "rise of the loss, nats"),
    "average_adaptive": ("Adaptive average", "rise of the loss, nats"),
    "lambda_w2": ("lambda_max ||w||^2", "nats"),
    "trace_w2_n": ("trace ||w||^2 / n", "nats"),
    "lambda_max": ("lambda_max, raw", "largest eigenvalue of the Hessian"),
    "trace": ("Trace, raw", "of the Hessian"),
    "worst": ("Worst case, raw", "rise of the loss, nats"),
    "m_sharpness": ("m-sharpness, raw", "rise of the loss, nats"),
}
_VALUE = {
    "value": OPTIONAL, "sd?": OPTIONAL, "error?": OPTIONAL, "converged?": bool, "each?": [NUMBER],
    "terms?": (COUNT, None),
}  # fmt: skip
_SHAPE = {
    **dict.fromkeys(PANELS, (_VALUE, None)), "train_loss": NUMBER,
    "density?": ({"nodes": Row(Row(NUMBER)), "weights": Row(Row(Number(-0.01, 1.01)))}, None),
    "settings": {"bn": str, "draws?": COUNT}, "images": COUNT, "split": str, "weights": str,
}  # fmt: skip


def find_sharpness(arms: Sequence[Arm]) -> Held:
    """What the run folders hold; ValueError as :func:`s2sam.report.held.find`."""
    return find(arms, FILE, "s2sam sharpness", shared=SHARED, shape=_SHAPE, check=_check)


def _check(result: Result) -> None:
    """Raise ValueError unless every start of a density has as many weights as nodes."""
    found = result.get("density") or {"nodes": [], "weights": []}
    lengths = [[len(row) for row in found[key]] for key in ("nodes", "weights")]
    if lengths[0] != lengths[1] or len(set(lengths[0])) > 1:
        raise ValueError("the nodes and the weights of its density differ in number")


def sharpness_sections(held: Held, arms: Sequence[Arm]) -> list[Section]:
    """Bars of each measure, and the spectral density."""
    first, names = held.first, treatments(arms)
    given = first["settings"]
    figures = tuple(
        arm_bars(title, unit, {arm: [dot(r[key]) for r in seeds.values()] for arm, seeds in held.by_arm.items()},
                 names, f"sharpness-{key}")
        for key, (title, unit) in PANELS.items()
    )  # fmt: skip
    section = Section(
        "Sharpness",
        f"Curvature and rise of the mean cross entropy around the {first['weights']} weights, on the active ones, over "
        f"{first['images']:,} {first['split']} images, not augmented, BatchNorm {given['bn']}. A bar is the mean over "
        "the seeds, a dot one run, the thin line its spread over random draws. Hatched: an eigenvalue did not "
        "converge, so that the bar is a lower bound, or there is no finite value. Weights can be rescaled without a "
        "change of the function: the adaptive measures stay the same, those with ||w||^2 only if all layers are "
        "rescaled alike, and raw ones change. The curvature of the cross entropy falls with the loss, so look at the "
        "train loss first. A flatter minimum does not show by itself that a network generalises better.",
        figures,
        says=(*sentences(held, arms), *held.notes),
    )
    return [section, *density_sections(held, arms)]


def dot(measured: Mapping[str, Any] | float | None) -> Dot:
    """One run's value of a measure.

    >>> dot(0.5), dot({"value": 2.0, "error": 0.1, "converged": False})
    (Dot(value=0.5, error=None, reliable=True), Dot(value=2.0, error=None, reliable=False))
    """
    if not isinstance(measured, Mapping):
        return Dot(measured)
    fine = bool(measured.get("converged", True))
    return Dot(measured["value"], measured.get("sd", measured.get("error")) if fine else None, fine)


def sentences(held: Held, arms: Sequence[Arm]) -> list[str]:
    """What may be said of each network; no order where train losses do not match."""
    bases: dict[str, list[Arm]] = {}
    for arm in held.by_arm:
        bases.setdefault(arm.base, []).append(arm)
    count = len(INVARIANT) * sum(reference_of(arm, arms) in held.by_arm for arm in held.by_arm)
    said: list[str] = []
    for base, own in bases.items():
        if len(own) < 2:
            said.append(f"{base}: one arm was measured, so nothing is compared.")
            continue
        rows = [r | {"run": _short(arm, seed, held)} for arm in own for seed, r in held.by_arm[arm].items()]
        found = match(rows, TOLERANCE)
        single = all(len(held.by_arm[arm]) == 1 for arm in own)
        if found.matched and single and len({seed for arm in own for seed in held.by_arm[arm]}) > 1:
            *names, last = [row["run"] for row in rows]
            said.append(
                f"{base}: {', '.join(names)}, and {last}, were measured at other seeds, so they are not compared."
            )
            continue
        if not found.matched or single:
            said.append(f"{base}: {'; '.join(words(rows, TOLERANCE))}.")
            continue
        said.append(
            f"{base}: train losses match, as they lie within {100 * found.spread:.1f} % of each other; "
            f"{100 * TOLERANCE:g} % is the tolerance."
        )
        for arm in own:
            reference = reference_of(arm, arms)
            if reference in held.by_arm and reference is not None:
                said += [_paired(held, arm, reference, name, rows, count) for name in (*INVARIANT, *SCALED)]
    return said


def _short(arm: Arm, seed: int, held: Held) -> str:
    """The arm, and the seed if there are several in its network."""
    seeds = {one for other, found in held.by_arm.items() if other.base == arm.base for one in found}
    return f"{arm.treatment}, seed {seed}" if len(seeds) > 1 else arm.treatment


def _paired(held: Held, arm: Arm, reference: Arm, name: str, rows: Sequence[Result], count: int) -> str:
    """The difference in one measure, over the seeds, and what its interval shows; nothing of one that is only shown."""
    only_shown = name in SCALED
    start = f"{arm.base}, {NAMES[name]}{f', {ONLY_SHOWN}' if only_shown else ''}: "
    a, b = held.by_arm[arm], held.by_arm[reference]
    bad = rank(rows, name).unreliable
    if bad:
        return f"{start}not compared, as there is no reliable value of {', '.join(bad)}."
    if a.keys() != b.keys():
        return f"{start}{arm.treatment} and {reference.treatment} were measured at other seeds, so they are not paired."
    found = paired_difference(
        *({seed: float(r[name]["value"]) for seed, r in one.items()} for one in (a, b)), comparisons=count
    )
    said = f"{start}{arm.treatment} minus {reference.treatment} is {number(found.mean, sign=True)}"
    if only_shown:
        return f"{said} (n = {found.n}); no verdict goes by it."
    interval = found.simultaneous
    if interval is None:
        return f"{said} (n = {found.n}, no interval)."
    covering = f" for all {count} together" if count > 1 else ""
    shown = "shows a difference" if found.shows else "shows none"
    between = f"{number(interval.low, sign=True)} to {number(interval.high, sign=True)}"
    return f"{said}, 95 % interval{covering} {between} (n = {found.n}): this {shown}."
