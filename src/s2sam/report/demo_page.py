"""The page of `s2sam demo`: one picture and one sentence for each act, then differences with intervals, then details.

No sentence about a result is written here before the numbers are known: each is put together from an interval, and says
that nothing was found where that contains 0.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from statistics import fmean
from string import Template

from s2sam import __version__
from s2sam.analysis.surface_file import Surface
from s2sam.report.arm_bars import Dot, arm_bars
from s2sam.report.arms import Arm
from s2sam.report.curves import record_curve
from s2sam.report.draw import End, end_labels, spread
from s2sam.report.html import draw_section, environment_tables, style_sheet
from s2sam.report.markup import arm_table, grid, items, text
from s2sam.report.panels import Figure, Section, treatments
from s2sam.report.plots import differences_figure
from s2sam.report.stats import deviation, mean, paired_difference
from s2sam.report.surface_section import surface_section
from s2sam.report.surface_views import rules
from s2sam.report.svg import MUTED, mark, new_axes, series_colour, style, to_svg
from s2sam.report.tables import Row, interval_text, percent

TITLE = "Sparse training and flat minima on handwritten digits"
SAVES, FLAT = "Act 1: what sparsity saves", "Act 2: when flatness pays"
LARGE = 0.02  #: a loss of accuracy that a sparse network must not leave possible to be called as good as dense
HEADS = ("arm", "test accuracy %", "sd", "difference", "95 % interval", "verdict")


@dataclass(frozen=True)
class Files:
    """Bytes of a run's weights on disk, of files that were written."""

    dense: int  #: all weights, zeros included: model.safetensors of the run folder
    masks: int  #: masks.safetensors beside it; 0 for a dense network
    active: int  #: active weights and packed masks, see :mod:`s2sam.export.active_weights`


@dataclass(frozen=True)
class Act:
    """Arms that are trained on the same data, and what is compared among them."""

    arms: dict[str, Arm]  #: by key, in the order in which they are shown
    rows: tuple[Row, ...]  #: the comparisons, whose intervals hold together
    gradients: dict[str, int]  #: that one run of an arm took

    @property
    def names(self) -> list[str]:
        """The treatments in the order of their colours."""
        return treatments(self.arms.values())

    def row(self, arm: str, reference: str) -> Row:
        """The comparison of two arms, by their keys."""
        one, other = self.arms[arm], self.arms[reference]
        return next(row for row in self.rows if row.arm is one and row.reference is other)


def make_act(arms: Mapping[str, Arm], pairs: Sequence[tuple[str, str]], gradients_a_step: Mapping[str, int]) -> Act:
    """The act of these arms with the comparisons `pairs` of (arm, reference), by seed, Bonferroni over all of them.

    Raises:
        ValueError: the arms of a pair do not have the same seeds.
    """
    rows = []
    for name, other in pairs:
        arm, reference = arms[name], arms[other]
        top1, images = arm.final("test_top1"), int(next(iter(arm.final("test_images").values())))
        found = paired_difference(top1, reference.final("test_top1"), comparisons=len(pairs), grain=1 / images)
        sparsity = arm.final("sparsity").values()
        values = list(top1.values())
        rows.append(
            Row(
                arm, mean(values), deviation(values), found, reference, None, (min(sparsity), max(sparsity)), images,
            )
        )  # fmt: skip
    taken = {
        name: gradients_a_step[name] * int(next(iter(arm.runs.values())).final["n_steps"]) for name, arm in arms.items()
    }
    return Act(dict(arms), tuple(rows), taken)


# -- sentences ---------------------------------------------------------------------------------------------------------


def outcome(row: Row, *, up: str, down: str, none: str = "no difference was found") -> str:
    """What the interval of a comparison allows one to say; {} in `up` and `down` is the number of points.

    >>> from s2sam.report.stats import paired_difference
    >>> found = paired_difference({0: 0.9, 1: 0.92, 2: 0.91}, {0: 0.8, 1: 0.81, 2: 0.81})
    >>> outcome(Row(None, 0.9, None, found, None, None, (0.0, 0.0), 100), up="{} points above", down="{} points below")
    '10.3 points above (95 % interval +8.90 to +11.77)'
    """
    d = row.difference
    assert d is not None
    points = percent(abs(d.mean), 1)
    if d.simultaneous is None:
        why = "one seed gives no interval" if d.n < 2 else "all seeds differ equally, which gives no interval"
        return f"nothing can be said ({percent(d.mean, 1, sign=True)} points, and {why})"
    interval = f"95 % interval {interval_text(d.simultaneous)}"
    if d.shows == 0:
        return f"{none} ({percent(d.mean, 1, sign=True)} points, {interval})"
    return f"{(up if d.shows > 0 else down).format(points)} ({interval})"


def saves_verdict(act: Act, sizes: Mapping[str, Sequence[Files]]) -> str:
    """What the sparsest network saves whose interval tells of no loss and leaves no room for a large one; which lose.

    Where there is none, as the seeds are few, it is about the least sparse one.
    """
    by_sparsity = sorted(act.rows, key=lambda row: row.sparsity[1])
    keep = [row for row in by_sparsity if holds(row)]
    row = (keep or by_sparsity[:1])[-1]
    name = next(key for key, arm in act.arms.items() if arm is row.arm)
    active, parameters = fmean(row.arm.final("active_parameters").values()), parameters_of(row.arm)
    small, large = (fmean(getattr(one, kind) for one in sizes[name]) for kind in ("active", "dense"))
    said = outcome(row, up="its test accuracy is {} points higher", down="its test accuracy is {} points lower",
                   none="no difference to the dense network's accuracy was found")  # fmt: skip
    lower = [other for other in by_sparsity if other is not row and other.difference and other.difference.shows < 0]
    loses = [
        f"{other.arm.treatment} ({percent(other.difference.mean, 1, sign=True)} points)"
        for other in lower
        if other.difference
    ]
    return (
        f"{row.arm.treatment} keeps {active:,.0f} of {parameters:,} parameters, in a file {large / small:.1f} times "
        f"smaller ({kilobytes(small)} instead of {kilobytes(large)}); {said}"
        + (f"; lower than dense: {', '.join(loses)}." if loses else ".")
    )


def holds(row: Row) -> bool:
    """Whether the interval of a comparison shows no loss, and excludes one of :data:`LARGE`."""
    d = row.difference
    return d is not None and d.simultaneous is not None and d.shows >= 0 and d.simultaneous.low > -LARGE


def flat_verdict(act: Act, noise: float) -> str:
    """What echo gains over SGD as it is, and what of it remains over tuned SGD, the reference."""
    first = outcome(
        act.row("echo", "sgd"),
        up="echo ends {} points above SGD",
        down="echo ends {} points below SGD",
        none="no difference between echo and SGD was found",
    )
    as_it_is, tuned = (
        outcome(
            act.row(name, "sgd-tuned"),
            up="{} points of gain remain",
            down="{} points are lost",
            none="no gain was found",
        )
        for name in ("echo", "echo-tuned")
    )
    return (
        f"With {100 * noise:.0f} % wrong labels, at one learning rate and weight decay and equally many gradients, "
        f"{first}; over the reference, SGD at its best weight decay and learning rate, {as_it_is}, and with echo tuned "
        f"as well {tuned}."
    )


def memorised(arm: Arm, noise: float) -> str:
    """How many of the labels that it was given a plain arm fits at the end of its training, and how many are right."""
    fitted = fmean(run.epochs[-1]["train_top1"] for run in arm.runs.values())
    end = "; it memorises wrong ones." if fitted > 1 - noise + 0.1 else "."
    return (
        f"{arm.treatment} fits {percent(fitted, 0)} % of its training labels at the end, and {percent(1 - noise, 0)} % "
        f"of them are right{end}"
    )


def roughness_sentence(found: Mapping[Arm, Surface]) -> str:
    """Both Ra of each surface, with their spread over directions."""
    parts = []
    for arm, surface in found.items():
        row = surface.summary()
        numbers = [
            f"{row[f'{name}_mean']:.3g}" + (f" +- {row[f'{name}_spread']:.2g}" if row[f"{name}_spread"] else "")
            for name in ("ra_raw", "ra_detrended")
        ]
        parts.append(f"{arm.treatment}: Ra {numbers[0]} nats, without the bowl {numbers[1]}")
    return "; ".join(parts) + "."


def parameters_of(arm: Arm) -> int:
    """All parameters of the arm's network."""
    return int(next(iter(arm.runs.values())).final["parameters"])


def kilobytes(size: float) -> str:
    """A file's size in thousands of bytes.

    >>> kilobytes(52345), kilobytes(9870)
    ('52 kB', '9.9 kB')
    """
    return f"{size / 1000:.2g} kB" if size < 10_000 else f"{size / 1000:.0f} kB"


# -- figures -----------------------------------------------------------------------------------------------------------


def saves_figure(act: Act, sizes: Mapping[str, Sequence[Files]]) -> Figure:
    """Test accuracy against the parameters that are left: a dot a seed, a line through the means."""
    from matplotlib.ticker import NullLocator

    with style():
        figure, axes = new_axes("Accuracy against what is left", "", "test accuracy, %", height=3.4)
        places, means, labels, words = [], [], [], []
        for key, arm in act.arms.items():
            series, values = act.names.index(arm.treatment), [100 * v for v in arm.final("test_top1").values()]
            place, colour = fmean(arm.final("active_parameters").values()), series_colour(series)
            dots = axes.plot([place] * len(values), values, "o", ms=4, color=colour, mew=0, alpha=0.6)
            dots += axes.plot([place], [fmean(values)], "D", ms=6, color=colour)
            for index, dot in enumerate(dots):
                mark(dot, series, unique=f"saves-{key}-{index}")
            size = kilobytes(fmean(one.active for one in sizes[key]))
            places.append(place)
            means.append(fmean(values))
            labels.append(f"{arm.treatment.rpartition('RigL ')[2].lower()}\n{place:,.0f}\n{size}")
            words.append(f"{arm.treatment} {means[-1]:.1f} % with {place:,.0f} parameters in {size}")
        axes.plot(places, means, color=MUTED, lw=1.2, zorder=1)
        axes.set_xscale("log")
        axes.set_xlim(min(places) / 1.35, max(places) * 1.35)
        axes.set_xticks(places, labels)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("sparsity; parameters left; file with active weights only")
        label = f"Test accuracy: {'; '.join(words)}"
        return Figure(to_svg(figure, "saves", label), label)


def flat_figure(act: Act) -> Figure:
    """Test accuracy of every arm, with a line at the reference."""
    values = {arm: [Dot(100 * v) for v in arm.final("test_top1").values()] for arm in act.arms.values()}
    reference = 100 * fmean(act.arms["sgd-tuned"].final("test_top1").values())
    with style():
        return arm_bars(
            "Test accuracy at the end", "%; dashed: the reference, tuned SGD", values, act.names,
            "flat", "{:.1f} %", line=reference, pitch=0.36,
        )  # fmt: skip


def learning_figure(act: Act) -> Figure:
    """Test accuracy of every arm against the gradients taken."""
    with style():
        figure, axes = new_axes("While training", "gradients", "test accuracy, %", height=3.2)
        ends: list[End] = []
        for key, arm in act.arms.items():
            x, y = record_curve(arm, "epochs", "test_top1", 100.0)
            steps = int(next(iter(arm.runs.values())).final["n_steps"])
            curve = x * (act.gradients[key] / steps), y
            ends.append(spread(axes, curve, act.names.index(arm.treatment), arm.treatment, f"learning-{key}"))
        end_labels(axes, ends, "learning")
        label = "Test accuracy while training: " + ", ".join(f"{name} ends at {y:.1f} %" for y, name, _, _ in ends)
        return Figure(to_svg(figure, "learning", label), label)


def seconds_figure(act: Act, rounds: Mapping[str, Sequence[float]], title: str, key: str) -> Figure:
    """Milliseconds of a training step of each arm, a dot for each round."""
    values = {arm: [Dot(1000 * s) for s in rounds[name]] for name, arm in act.arms.items() if name in rounds}
    with style():
        return arm_bars(title, "milliseconds a step", values, act.names, key, "{:.2f} ms")


# -- the page ----------------------------------------------------------------------------------------------------------


def differences_section(act: Act, title: str, key: str) -> Section:
    """A table and a figure of the comparisons for each reference."""
    figures, count = [], len(act.rows)
    heads = [*HEADS[:4], f"95 %, all {count} together" if count > 1 else HEADS[4], HEADS[5]]
    lines = []
    references = list(dict.fromkeys(row.reference for row in act.rows))
    for place, reference in enumerate(references):
        assert reference is not None
        rows = [row for row in act.rows if row.reference is reference]
        group = f"minus {reference.treatment}: {percent(mean(list(reference.final('test_top1').values())))} %"
        lines += [(replace(row.arm, base=group), _cells(row)) for row in rows]
        with style():
            name = f"minus {reference.treatment}"
            figures.append(differences_figure(rows, act.names, name, f"{key}-{place}", 0.9 + 0.48 * len(rows)))
    table = arm_table(heads, lines, act.names, words=(heads[-1],))
    seeds = act.rows[0].n
    caption = (
        f"Percentage points of test accuracy, paired over {counted(seeds)}. A dot is a seed, the "
        "diamond their mean; the thick line is the 95 % interval of that comparison, the thin one covers all "
        f"{count} of this act together (Student's t, Bonferroni) and decides: where it crosses 0, nothing was found."
    )
    return Section(title, caption, (Figure(f'<div class="scroll">{table}</div>', "", wide=True), *figures))


def _cells(row: Row) -> list[str]:
    d = row.difference
    assert d is not None
    pill = f'<span class="pill{ {1: " up", -1: " down"}.get(d.shows, "") }">{text(row.verdict)}</span>'
    cells = [percent(row.mean), percent(row.deviation), percent(d.mean, sign=True), interval_text(d.simultaneous)]
    return [*map(text, cells), pill]


def sizes_section(act: Act, sizes: Mapping[str, Sequence[Files]]) -> Section:
    """The files of act 1, as written."""

    def average(key: str, kind: str) -> str:
        return f"{fmean(getattr(one, kind) for one in sizes[key]):,.0f}"

    rows = []
    for key, arm in act.arms.items():
        parameters, active = parameters_of(arm), fmean(arm.final("active_parameters").values())
        dense, small = (fmean(getattr(one, kind) for one in sizes[key]) for kind in ("dense", "active"))
        rows.append([
            arm.treatment, f"{parameters:,}", f"{active:,.0f}", average(key, "dense"), average(key, "masks"),
            average(key, "active"), f"{dense / small:.1f}x",
        ])  # fmt: skip
    heads = (
        "network", "parameters", "active", "model.safetensors", "masks.safetensors", "active weights and mask bits",
        "smaller by",
    )  # fmt: skip
    caption = (
        "Bytes of files that this demo wrote, mean over the seeds. A run folder keeps dense tensors and masks, for "
        "resuming and measuring; the file of active weights (s2sam.export.active_weights) was read back and is equal. "
        "Active counts biases and BatchNorm too, which are never pruned."
    )
    return Section(
        "What is on the disk", caption, (Figure(f'<div class="scroll">{grid(heads, rows)}</div>', "", wide=True),)
    )


def learning_section(act: Act, noise: float) -> Section:
    """What the arms of act 2 reach on their way."""
    caption = "Mean of the seeds; band: from the lowest to the highest. "
    return Section("Act 2 while training", caption + memorised(act.arms["sgd"], noise), (learning_figure(act),))


def seconds_section(saves: Act, flat: Act, rounds: Mapping[str, Sequence[float]]) -> Section:
    """Times of a step, measured side by side."""
    caption = (
        "Measured in turn in one process; a dot is a round. SAM's step takes two gradients, all others' one. Masked "
        "weights are multiplied like all others, so a mask saves no time here. On a network this small a step is "
        "mostly the fixed price of calls: these are no ratios for networks of useful size."
    )
    figures = [
        seconds_figure(act, rounds, title, f"seconds-{number}")
        for number, (title, act) in enumerate({"Act 1": saves, "Act 2": flat}.items(), start=1)
    ]
    return Section("Time of a step", caption, tuple(figures))


def surfaces_section(found: Mapping[Arm, Surface], seed: int) -> Section:
    """Loss surfaces of two arms of act 2 side by side, on one scale, with Ra."""
    made = surface_section(found, list(found), "3-D")
    return replace(
        made, title="Loss surfaces of act 2, side by side", says=(f"Seed {seed}. {roughness_sentence(found)}",)
    )


def render(
    saves: Act,
    flat: Act,
    sizes: Mapping[str, Sequence[Files]],
    surfaces: Mapping[Arm, Surface],
    rounds: Mapping[str, Sequence[float]],
    settings: Mapping[str, Mapping[str, str]],
    *,
    noise: float,
    how: str,
) -> str:
    """The page as a string.

    Args:
        saves: act 1.
        flat: act 2.
        sizes: arm of act 1 -> the files of each of its runs.
        surfaces: arms of act 2 -> their surface, at the first seed.
        rounds: arm of either act -> seconds of a step, round by round.
        settings: act -> arm -> its settings, in words.
        noise: share of wrong training labels in act 2.
        how: the command.
    """
    first = next(iter(saves.arms.values()))
    seeds, images = sorted(first.runs), saves.rows[0].test_images
    gradients = sorted(set(flat.gradients.values()))
    runs = runs_of(saves) + runs_of(flat)
    sections = [
        differences_section(saves, "Differences of act 1", "saves-differences"),
        differences_section(flat, "Differences of act 2", "flat-differences"),
        surfaces_section(surfaces, seeds[0]),
        learning_section(flat, noise),
        sizes_section(saves, sizes),
        seconds_section(saves, flat, rounds),
    ]
    facts = {
        "seeds": ", ".join(map(str, seeds)),
        "runs": len(runs),
        "test images": images,
        "gradients a run in act 2": " or ".join(f"{n:,}" for n in gradients),
    }
    return Template(files("s2sam.report").joinpath("demo.html").read_text(encoding="utf-8")).substitute(
        title=text(TITLE),
        lead=text(
            "Small networks on scikit-learn's digits. Every difference is paired over seeds and has its interval."
        ),
        style=style_sheet(views=rules()),
        saves_title=text(SAVES), saves_verdict=text(saves_verdict(saves, sizes)),
        saves_figure=saves_figure(saves, sizes).svg,
        saves_note=text(
            "A dot is a seed, the diamond their mean. Smaller, not faster: these runs compute with masked dense "
            "tensors (docs/compact.md has layers that do not)."
        ),
        flat_title=text(FLAT), flat_verdict=text(flat_verdict(flat, noise)), flat_figure=flat_figure(flat).svg,
        flat_note=text(
            "A dot is a seed. A 90 % sparse network; one learning rate and weight decay for the untuned arms. "
            + memorised(flat.arms["sgd"], noise)
        ),
        facts="".join(f"<li><b>{text(str(v))}</b> {text(k)}</li>" for k, v in facts.items()),
        sections="".join(map(draw_section, sections)),
        caveats=items(caveats(saves.rows[0].n, images)),
        how=text(how),
        settings="".join(
            f"<p class=\"caption\">{text(act)}</p>" + grid(["arm", "settings"], list(arms.items()))
            for act, arms in settings.items()
        ),
        runs=grid(("arm", "seed", "test accuracy %", "gradients", "folder"), runs),
        environment=environment_tables([*saves.arms.values(), *flat.arms.values()]),
        version=text(__version__),
    )  # fmt: skip


def caveats(seeds: int, images: int) -> list[str]:
    """What the numbers cannot tell."""
    return [
        "The data are 1,797 grey images of 8 x 8 pixels, and the networks small: what holds here need not hold for "
        "large networks or other images.",
        f"All arms share {images} test images, and one of them is {percent(1 / images, 2)} points. The intervals speak "
        f"of training again, over {counted(seeds)}, not of other test images; an interval that "
        "contains 0 is no proof that two arms are equal.",
        "Settings were chosen by validation accuracy on other seeds (benchmarks/results/demo_settings.json): radii of "
        "S2-SAM, echo and SAM at the common learning rate and weight decay, both of these for tuned SGD, and all three "
        "for tuned echo, with equally many trials each, so that tuned echo has the coarsest grid. Validation images "
        "have right labels; who has none would have to choose without them.",
        "Act 2 is a case in which a network memorises. Where labels are right and networks do not over-fit, this "
        "project's direction study found no gain over tuned Nesterov (results/direction-study).",
        "Echo meets half as many distinct batches, each twice; SAM too. Equal numbers of gradients are no equal times.",
        "A loss surface is of one seed and random directions, and Ra grows with the height of the bowl: neither shows "
        "by itself that a minimum generalises.",
    ]


def counted(seeds: int) -> str:
    """A number of seeds in words.

    >>> counted(1), counted(5)
    ('1 seed', '5 seeds')
    """
    return f"{seeds} seed{'' if seeds == 1 else 's'}"


def runs_of(act: Act) -> list[list[str]]:
    """A line for each run, with the gradients that its records tell."""
    lines = []
    for key, arm in act.arms.items():
        each = act.gradients[key] // int(next(iter(arm.runs.values())).final["n_steps"])
        for seed, run in arm.runs.items():
            taken, top1 = each * int(run.final["n_steps"]), percent(run.final["test_top1"])
            lines.append([arm.treatment, str(seed), top1, f"{taken:,}", str(run.folder)])
    return lines


def to_csv(acts: Mapping[str, Act], sizes: Mapping[str, Sequence[Files]]) -> str:
    """Unrounded numbers: a line for each arm, and one for each of its comparisons; accuracies are fractions."""
    buffer = io.StringIO()
    heads = (
        "act", "arm", "reference", "n", "test_top1_mean", "test_top1_sd", "active_parameters", "gradients",
        "file_bytes", "difference", "simultaneous_low", "simultaneous_high", "comparisons", "verdict",
    )  # fmt: skip
    writer = csv.DictWriter(buffer, heads, lineterminator="\n")
    writer.writeheader()
    for name, act in acts.items():
        for key, arm in act.arms.items():
            values = list(arm.final("test_top1").values())
            line = {
                "act": name, "arm": arm.treatment, "n": len(values), "test_top1_mean": mean(values),
                "test_top1_sd": deviation(values), "gradients": act.gradients[key],
                "active_parameters": fmean(arm.final("active_parameters").values()),
                "file_bytes": fmean(one.active for one in sizes[key]) if key in sizes else None,
            }  # fmt: skip
            rows = [row for row in act.rows if row.arm is arm]
            for row in rows:
                d, other = row.difference, row.reference
                assert d is not None
                assert other is not None
                low, high = (d.simultaneous.low, d.simultaneous.high) if d.simultaneous else (None, None)
                writer.writerow(line | {
                    "reference": other.treatment, "difference": d.mean, "simultaneous_low": low,
                    "simultaneous_high": high, "comparisons": d.comparisons, "verdict": row.verdict,
                })  # fmt: skip
            if not rows:
                writer.writerow(line | {"verdict": "reference"})
    return buffer.getvalue()
