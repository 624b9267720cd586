"""The premise of S2-SAM in the report: what `s2sam sharpness --premise` has seen at the checkpoints of its runs."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from s2sam.analysis.premise_run import FILE
from s2sam.outside import COUNT, NUMBER, OPTIONAL, Row
from s2sam.report.arms import Arm
from s2sam.report.curves import Curve, stack
from s2sam.report.draw import DASHES, End, end_labels, spread
from s2sam.report.held import Held, Result, find
from s2sam.report.panels import Figure, Section, treatments
from s2sam.report.sharpness_plots import value_of
from s2sam.report.stats import mean, t_interval
from s2sam.report.svg import INK, MUTED, mark, new_axes, series_colour, shorten, to_svg

_THREE = (("previous", "previous"), ("own", "own"), ("random", "random"))
#: title, unit, and the lines: (key, what to call it)
PANELS: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    ("cosine", "cosine of g_t and g_t-1", (("cosine", ""),)),
    ("odd part, slope", "nats", tuple((f"{key}_odd", text) for key, text in _THREE)),
    ("even part, curvature", "nats", tuple((f"{key}_even", text) for key, text in _THREE)),
    ("curvature", "of the loss", (("lambda_max", "lambda_max"), ("batch_sharpness", "batch"))),
    ("rho / ||w||", "", (("rho_over_w", ""),)),
    ("c lambda_max", "c = rho / ||g_t-1||", (("c_lambda_max", ""),)),
)
_VALUE = ({"value?": OPTIONAL, "mean?": OPTIONAL, "sd?": OPTIONAL, "converged?": bool}, None)
_POINT = {
    "step": COUNT, "lr": NUMBER, "looks": COUNT, "over?": bool, "previous_rises?": OPTIONAL, "random_rises?": OPTIONAL,
    **{f"{key}?": _VALUE for _, _, lines in PANELS for key, _ in lines},
}  # fmt: skip
_SHAPE = {
    "points": Row(_POINT), "rho": NUMBER, "direction": object, "settings": {"looks": COUNT}, "data_digest": str,
}  # fmt: skip


def find_premise(arms: Sequence[Arm]) -> Held:
    """What the run folders hold; ValueError as :func:`s2sam.report.held.find`."""
    return find(arms, FILE, "s2sam sharpness --premise", shared=("settings", "data_digest"), shape=_SHAPE)


def premise_sections(held: Held, arms: Sequence[Arm]) -> list[Section]:
    """A panel for each network and quantity, over the steps of training."""
    figures = [
        figure
        for number, base in enumerate(dict.fromkeys(arm.base for arm in held.by_arm))
        for place in range(len(PANELS))
        if (figure := _panel(held, arms, base, place, f"premise{number}-{place}")) is not None
    ]
    of_arms = {
        arm.name: " and ".join(sorted({f"{r['rho']:g}" for r in seeds.values()})) for arm, seeds in held.by_arm.items()
    }
    one = set(of_arms.values())
    radii = one.pop() if len(one) == 1 else ", ".join(f"{name} {rho}" for name, rho in of_arms.items())
    section = Section(
        "The premise of S2-SAM",
        f"Before some steps after each checkpoint, on the batch of the step ({held.first['settings']['looks']} looks): "
        "is e = rho g_t-1 / ||g_t-1|| a way up for the next batch? Odd part: (L(w + e) - L(w - e)) / 2; even part: "
        "(L(w + e) + L(w - e)) / 2 - L(w), for e along the previous gradient, along the batch's own and along noise, "
        f"all of one length. rho: {radii}. Colour: optimizer; line: mean of the seeds; band: from the lowest to the "
        f"highest; hollow: an eigenvalue that did not converge.{_after(held)}",
        tuple(figures),
        says=(*(words(arm, list(seeds.values())) for arm, seeds in held.by_arm.items()), *held.notes),
    )
    return [section]


def words(arm: Arm, results: Sequence[Result]) -> str:
    """What was seen at the last checkpoint before the end of an arm's runs; after the end if they have no other."""
    last = [last_in_training(r["points"]) for r in results]
    n, looks = len(last), sum(p["looks"] for p in last)
    shares = [
        [p[f"{name}_rises"] for p in last if p.get(f"{name}_rises") is not None] for name in ("previous", "random")
    ]
    cosines = [value for p in last if (value := value_of(p.get("cosine"))) is not None]
    if not all(shares) or not cosines:
        return f"{arm.name}: nothing could be looked at {place(last)}."
    interval = t_interval(cosines)
    between = ", no interval" if interval is None else f", 95 % interval {interval.low:+.3f} to {interval.high:+.3f}"
    return (
        f"{arm.name}: {place(last)}, the loss of the next batch rises along +g_t-1 in "
        f"{100 * fmean(shares[0]):.0f} % of {looks} looks, and along noise of the same length in "
        f"{100 * fmean(shares[1]):.0f} %; the cosine of g_t and g_t-1 is {mean(cosines):+.3f} (n = {n} "
        f"run{'' if n == 1 else 's'}{between})."
    )


def last_in_training(points: Sequence[Result]) -> Result:
    """The last that steps of the training follow; from the end of a run on its weights hardly move any more.

    >>> last_in_training([{"step": 4, "over": False}, {"step": 8, "over": True}])["step"]
    4
    """
    return next((p for p in reversed(points) if not p.get("over")), points[-1])


def place(points: Sequence[Result]) -> str:
    """Where these points of several runs were looked at, and with which learning rates.

    >>> place([{"step": 40, "lr": 0.00954915}, {"step": 40, "lr": 0.00954915}])
    'from step 40 on, at learning rate 0.00955'
    >>> place([{"step": 40, "lr": 0.05}, {"step": 80, "lr": 0.0, "over": True}])
    'from steps 40 to 80 on, at learning rates 0 to 0.05, in 1 of 2 runs after the end of training'
    """
    steps = sorted({p["step"] for p in points})
    rates = list(dict.fromkeys(f"{rate:.3g}" for rate in sorted(p["lr"] for p in points)))
    over, n = sum(bool(p.get("over")) for p in points), len(points)
    rate = f"at learning rate {rates[0]}" if len(rates) == 1 else f"at learning rates {rates[0]} to {rates[-1]}"
    if over == n:
        return f"after the end of training, {rate}"
    step = f"from step {steps[0]:,} on" if len(steps) == 1 else f"from steps {steps[0]:,} to {steps[-1]:,} on"
    return f"{step}, {rate}" + (f", in {over} of {n} runs after the end of training" if over else "")


def curve_of(results: Sequence[Result], key: str) -> Curve | None:
    """A quantity over the steps, a row for each run, at the checkpoints that all runs have; None if no run has it."""
    runs = [
        {float(p["step"]): float(value) for p in r["points"] if (value := value_of(p.get(key))) is not None}
        for r in results
    ]
    known = [run for run in runs if run]
    if not known:
        return None
    common = sorted(set.intersection(*map(set, known)))
    if common:
        return stack([(common, [run[step] for step in common]) for run in known])
    return stack([(list(run), list(run.values())) for run in known])


def _after(held: Held) -> str:
    over = any(p.get("over") for r in held.results for p in r["points"])
    return " The last point of a run may lie after its end, at the learning rate that is left there." if over else ""


def _panel(held: Held, arms: Sequence[Arm], base: str, place: int, name: str) -> Figure | None:
    title, unit, lines = PANELS[place]
    names = treatments(arms)
    figure, axes = new_axes(shorten(f"{base}: {title}", 34), "training step", unit)
    ends: list[End] = []
    for arm in (arm for arm in held.by_arm if arm.base == base):
        results, series = list(held.by_arm[arm].values()), names.index(arm.treatment)
        for number, (key, text) in enumerate(lines):
            curve = curve_of(results, key)
            if curve is None:
                continue
            label = f"{arm.treatment}, {text}" if text else arm.treatment
            ends.append(spread(axes, curve, series, label, f"{name}-{number}", ls=DASHES[number]))
            bad = {p["step"] for r in results for p in r["points"] if not (p.get(key) or {}).get("converged", True)}
            for index, (step, value) in enumerate(zip(curve[0], curve[1].mean(0), strict=True)):
                face = "none" if step in bad else series_colour(series)
                (point,) = axes.plot([step], [value], "o", ms=3, color=series_colour(series), markerfacecolor=face)
                mark(point, series, unique=f"{name}-{number}-{arm.treatment}-{index}")
    if not ends:
        return None
    axes.axhline(0, color=INK, lw=0.8)
    shown = ends
    if len(lines) > 1:  # the colours say which arm
        values = {text: [end[0] for end in ends if end[1].endswith(f", {text}")] for _, text in lines}
        shown = [(mean(found), text, MUTED, None) for text, found in values.items() if found]
    end_labels(axes, shown, name)
    words = f"{base}, {title}: " + ", ".join(f"{text} ends at {value:.3g}" for value, text, _, _ in ends)
    return Figure(to_svg(figure, name, words), words)
