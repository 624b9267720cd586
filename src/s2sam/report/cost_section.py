"""Size, FLOPs and throughput of the arms, beside those of the dense network: counted, not timed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean, median

from s2sam.report.arm_bars import Dot, arm_bars, number
from s2sam.report.arms import Arm
from s2sam.report.counted import Counted, Network, count, network_of
from s2sam.report.markup import arm_table, items, text
from s2sam.report.panels import Figure, Section, treatments
from s2sam.report.read import Run
from s2sam.report.svg import style

HEADS = (
    "arm", "parameters", "active", "bytes dense", "bytes at the mask", "forward FLOPs dense",
    "forward FLOPs at the final mask", "x dense", "training FLOPs", "x dense training", "images/s, as recorded",
)  # fmt: skip
CAPTION = (
    "Counted, not timed, and in dense arithmetic: zeros save no time here, as masked weights are multiplied like all "
    "others. FLOPs at a mask are what arithmetic that skips zeros would take. Means over the seeds."
)
NOTES = (
    "Forward: matrix products and convolutions for one image{image}; 1 multiply-accumulate = 2 FLOPs.",
    "Training: all steps of the run, each at the densities that its masks had then; a backward pass counts as two "
    "forward ones, so SAM's two passes count twice and S2-SAM's one once. Where a method looks at the gradients of "
    "pruned weights, these count; what masks, optimizer and displacement do element by element does not. The ratio is "
    "to one training of the dense network on as many images with one gradient a step.",
    "Bytes: 4 for each parameter; at the mask 4 for each active one, and one bit for each prunable weight.",
    "Images/s: as each run recorded it, median over the epochs, evaluation aside. Wall clocks of runs are not "
    "compared: only step times measured side by side in one process are (cost.json).",
)
_BARS: tuple[tuple[str, str, Callable[[Counted], float]], ...] = (
    ("Forward pass at the final mask", "FLOPs, times the dense network's", lambda c: c.final / c.dense),
    ("Training", "FLOPs, times one dense training's", lambda c: c.training / c.dense_training),
    ("Size at the final mask", "bytes, times the dense network's", lambda c: c.stored / c.dense_bytes),
)


def cost_section(arms: Sequence[Arm]) -> Section:
    """A table, and bars of the ratios; what cannot be counted is a dash, with the reason below.

    Cost: the images of the runs are loaded, for their size, and one passes the network.
    """
    network, reasons = _network(next(iter(arms[0].runs.values())))
    found = {} if network is None else {arm: _counted(arm, network, reasons) for arm in arms}
    names, counted = treatments(arms), {arm: runs for arm, runs in found.items() if runs}
    table = arm_table(HEADS, [(arm, list(map(text, cells(arm, counted.get(arm, []))))) for arm in arms], names)
    label = "Size, FLOPs and throughput: " + ", ".join(
        f"{arm.name} {ratio(runs, _BARS[1][2])} of a dense training" for arm, runs in counted.items()
    )
    image = "" if network is None else f" of {' x '.join(map(str, network.image))}"
    notes = items([*(note.format(image=image) for note in NOTES), *reasons])
    html = f'<div class="scroll" tabindex="0" role="region" aria-label="Size and FLOPs">{table}</div>'
    figures = [Figure(f'{html}<ul class="notes">{notes}</ul>', label, wide=True)]
    with style():
        for place, (title, unit, value) in enumerate(_BARS if counted else ()):
            dots = {arm: [Dot(value(one)) for one in runs] for arm, runs in counted.items()}
            figures.append(arm_bars(title, unit, dots, names, f"counted-{place}", "{:.3f}x"))
    return Section("Size, FLOPs and throughput", CAPTION, tuple(figures))


def cells(arm: Arm, runs: Sequence[Counted]) -> list[str]:
    """The texts of one line: means over the runs that could be counted; what the final records tell stands anyway."""
    rates = [e["images_per_second"] for run in arm.runs.values() for e in run.epochs if e.get("images_per_second")]
    speed = number(median(rates)) if rates else "-"
    sizes = [_told(arm, key) for key in ("parameters", "active_parameters")]
    if not runs:
        return [*sizes, *["-"] * 7, speed]
    return [
        *sizes,
        scaled(fmean(one.dense_bytes for one in runs), "B"),
        scaled(fmean(one.stored for one in runs), "B"),
        scaled(fmean(2 * one.dense for one in runs)),
        scaled(fmean(2 * one.final for one in runs)),
        ratio(runs, _BARS[0][2]),
        scaled(fmean(2 * one.training for one in runs)),
        ratio(runs, _BARS[1][2]),
        speed,
    ]


def ratio(runs: Sequence[Counted], value: Callable[[Counted], float]) -> str:
    """The mean ratio as text."""
    return f"{fmean(map(value, runs)):.3f}x"


def scaled(value: float, unit: str = "") -> str:
    """Three digits with a decimal prefix.

    >>> scaled(551225856), scaled(1320, "B"), scaled(12)
    ('551 M', '1.32 kB', '12')
    """
    prefix = ""
    for larger in ("k", "M", "G", "T", "P", "E"):
        if abs(value) < 999.5:
            break
        value, prefix = value / 1000, larger
    return f"{value:.3g} {prefix}{unit}".rstrip()


def _network(run: Run) -> tuple[Network | None, list[str]]:
    """The network of a run, which all runs of a report share, or why there is none."""
    try:
        return network_of(run), []
    except (ValueError, OSError, ImportError) as error:
        return None, [f"FLOPs and bytes are not counted: {error}."]


def _counted(arm: Arm, network: Network, reasons: list[str]) -> list[Counted]:
    """The runs of an arm that can be counted; why the others cannot goes to `reasons`."""
    found, lacking = [], Counter[str]()
    for run in arm.runs.values():
        try:
            found.append(count(run, network))
        except ValueError as error:
            lacking[str(error)] += 1
    reasons += [f"{arm.name}: {n} of {len(arm.runs)} runs not counted: {reason}." for reason, n in lacking.items()]
    return found


def _told(arm: Arm, key: str) -> str:
    """A count of the final records, mean over the seeds."""
    values = [run.final.get(key) for run in arm.runs.values()]
    return "-" if None in values else f"{fmean(float(value or 0) for value in values):,.0f}"
