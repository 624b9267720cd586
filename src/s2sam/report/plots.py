"""The figures of a report. Colour = optimizer, panel = network; what to look for stands in the caption."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from s2sam.report.arms import Arm
from s2sam.report.curves import Curve, density_curve, epoch_curve, has, limits, record_curve, smooth
from s2sam.report.draw import DASHES, End, end_labels, log_scale, spread
from s2sam.report.mask_plots import evolution
from s2sam.report.panels import Figure, Section, treatments
from s2sam.report.svg import GRID, INK, MUTED, mark, new_axes, series_colour, shorten, style, to_svg
from s2sam.report.tables import Row, Table, percent

if TYPE_CHECKING:
    from matplotlib.artist import Artist


def draw_all(table: Table) -> list[Section]:
    """All sections for which the runs hold data."""
    arms = [row.arm for row in table.rows]
    with style():
        sections = [
            _results(table),
            _curves(arms, "test_top1", "Test accuracy", "%", "Test accuracy after each epoch"),
            _curves(arms, "test_loss", "Test loss", "", "Test loss after each epoch"),
            _curves(arms, "train_loss", "Training loss", "", "Training loss of each epoch"),
            _layers(arms),
            _masks(arms),
            evolution(arms),
            _sharpness(arms),
        ]
    return [section for section in sections if section.figures]


def _results(table: Table) -> Section:
    compared, costed = [row for row in table.rows if row.difference], [row for row in table.rows if row.cost]
    height = 0.9 + max(0.48 * len(compared), 0.34 * len(costed))
    names = treatments(row.arm for row in table.rows)
    title = "Difference to the plain optimizer"
    figures = [differences_figure(compared, names, title, "differences", height)] if compared else []
    figures += [_costs(costed, table, height)] if costed else []
    return Section(
        "Difference in accuracy, and its price",
        "Differences: test accuracy minus that of the plain optimizer on the same network and seed. Each dot is one "
        "seed, the diamond their mean; the thick line is the 95 % "
        "interval of that comparison, the thin one covers all comparisons together. Look whether the thin line "
        "crosses 0: if it does, "
        "nothing has been shown. Times: median time of one training step; the number is the ratio to the plain "
        "optimizer on the same network.",
        tuple(figures),
    )


def differences_figure(rows: Sequence[Row], names: Sequence[str], title: str, key: str, height: float) -> Figure:
    """Paired differences: a dot a seed, a diamond at their mean, a thick and a thin line for the two intervals.

    Args:
        rows: comparisons.
        names: the treatments of the whole report, in the order of their colours.
        title: of the panel.
        key: unique on the page.
        height: in inches; the width is that of all panels.
    """
    figure, axes = new_axes(title, "percentage points of test accuracy", height=height)
    for place, row in enumerate(rows):
        d, series = row.difference, names.index(row.arm.treatment)
        assert d is not None
        colour, y = series_colour(series), -place
        artists: list[Artist] = []
        for interval, width in ((d.simultaneous, 1.2), (d.interval, 3.2)):
            if interval is not None:
                artists += axes.plot([100 * interval.low, 100 * interval.high], [y, y], color=colour, lw=width)
        artists += axes.plot(
            [100 * v for v in d.per_seed.values()], [y - 0.2] * d.n, "o", ms=3.4, color=colour, mew=0, alpha=0.75
        )
        artists += axes.plot([100 * d.mean], [y], "D", ms=4.5, color=colour)
        artists.append(
            axes.annotate(
                shorten(row.arm.name, 56),
                (0, y + 0.2),
                (0, 1),
                axes.get_yaxis_transform(),
                "offset points",
                color=colour,
                va="bottom",
            )
        )
        for index, artist in enumerate(artists):
            mark(artist, series, unique=f"{key}{place}-{index}")
    axes.axvline(0, color=INK, lw=0.9)
    axes.set_ylim(-len(rows) + 0.6, 0.75)
    axes.set_yticks([])
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    words = "; ".join(f"{r.arm.name}: {percent(r.difference.mean, sign=True)} points" for r in rows if r.difference)
    return Figure(to_svg(figure, key, f"Paired differences. {words}."), words)


def _costs(rows: Sequence[Row], table: Table, height: float) -> Figure:
    names = treatments(row.arm for row in table.rows)
    figure, axes = new_axes("Time of one training step", "milliseconds", height=height)
    top = max(1000 * row.cost.step_seconds for row in rows if row.cost)
    for place, row in enumerate(rows):
        assert row.cost is not None
        milliseconds, series = 1000 * row.cost.step_seconds, names.index(row.arm.treatment)
        (bar,) = axes.barh(-place, milliseconds, height=0.34, color=series_colour(series))
        ratio = "" if row.cost.ratio is None else f", {row.cost.text}"
        text = axes.text(
            0,
            -place + 0.22,
            f"{shorten(row.arm.name, 34)}: {milliseconds:.3g} ms{ratio}",
            va="bottom",
            color=INK,
            fontsize=8.5,
        )
        mark(bar, series, unique=f"c{place}")
        mark(text, series, unique=f"ct{place}")
    axes.set_xlim(0, 1.02 * top)
    axes.set_ylim(-len(rows) + 0.7, 0.75)
    axes.set_yticks([])
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    words = "; ".join(f"{r.arm.name}: {r.cost.text}" for r in rows if r.cost)
    return Figure(
        to_svg(figure, "costs", f"Time of a training step against the plain optimizer on the same network. {words}."),
        words,
    )


def _curves(arms: Sequence[Arm], key: str, title: str, unit: str, label: str) -> Section:
    names, scale = treatments(arms), 100.0 if unit == "%" else 1.0
    panels = [base for base in _bases(arms) if len(_bases(arms)) == 1 or not _only_context(arms, base)]
    context = [arm for arm in arms if arm.base not in panels]
    data = {arm.name: epoch_curve(arm, key, scale) for arm in arms}
    y_limits = limits(list(data.values()), logarithmic=unit != "%")
    figures = []
    for number, base in enumerate(panels):
        figure, axes = new_axes(base, "epoch", f"{title.lower()} {unit}".strip())
        ends: list[End] = []
        for arm in context:
            x, y = data[arm.name]
            axes.plot(x, y.mean(0), color=MUTED, lw=1, ls=(0, (4, 2)))
            ends.append((float(y.mean(0)[-1]), arm.base.lower(), MUTED, None))
        for arm in (a for a in arms if a.base == base):
            series = names.index(arm.treatment)
            ends.append(spread(axes, data[arm.name], series, arm.treatment, f"{key}{number}"))
        if unit != "%":
            log_scale(axes, y_limits)
        axes.set_ylim(*y_limits)
        end_labels(axes, ends, f"{key}{number}")
        words = f"{label}, {base}: " + ", ".join(
            f"{a.treatment} ends at {data[a.name][1][:, -1].mean():.3g}" for a in arms if a.base == base
        )
        figures.append(Figure(to_svg(figure, f"{key}{number}", words), words))
    looks = (
        "the axis starts where most epochs are, so the first ones may be cut off"
        if unit == "%"
        else "the axis is logarithmic"
    )
    more = f" Dashed: {context[0].base.lower()}, for orientation." if context else ""
    return Section(
        title,
        f"Line: mean of the seeds; band: from the lowest to the highest seed; {looks}.{more} Bands may overlap "
        "although the paired differences above show something; only those decide.",
        tuple(figures),
    )


def _layers(arms: Sequence[Arm]) -> Section:
    figures = []
    for number, base in enumerate(b for b in _bases(arms) if not _arms_of(arms, b)[0].dense):
        last = [
            run.topology[-1]["density"] for arm in _arms_of(arms, base) for run in arm.runs.values() if run.topology
        ]
        if not last:
            continue
        layers = list(last[0])
        values = 100 * np.array([[density.get(layer, np.nan) for layer in layers] for density in last])
        figure, axes = new_axes(base, "active weights, % of the layer", height=0.8 + max(0.3 * len(layers), 1.2))
        for place, layer in enumerate(layers):
            low, high = float(values[:, place].min()), float(values[:, place].max())
            axes.barh(-place, 100, height=0.22, color=GRID)
            axes.barh(-place, values[:, place].mean(), height=0.22, color=MUTED)
            span = f"{low:.1f} %" if f"{low:.1f}" == f"{high:.1f}" else f"{low:.1f} to {high:.1f} %"
            axes.text(0, -place + 0.16, layer.removesuffix(".weight"), va="bottom", color=INK, fontsize=8.5)
            axes.text(100, -place + 0.16, span, va="bottom", ha="right", color=MUTED, fontsize=8.5)
        axes.set_xlim(0, 100)
        axes.set_ylim(-len(layers) + 0.7, 0.75)
        axes.set_yticks([])
        axes.grid(visible=False)
        axes.spines["left"].set_visible(False)
        words = f"Active weights per layer at the end, {base}: " + ", ".join(
            f"{n} {v:.1f} %" for n, v in zip(layers, values.mean(0), strict=True)
        )
        figures.append(Figure(to_svg(figure, f"layers{number}", words), words))
    return Section(
        "Sparsity per layer",
        "Share of each prunable layer that is active at the end, mean over all runs of the network (a span where "
        "runs differ). Small layers "
        "stay denser when the budget is set by ERK; a layer near 0 would be a bottleneck.",
        tuple(figures),
    )


def _masks(arms: Sequence[Arm]) -> Section:
    sparse = [arm for arm in arms if not arm.dense and all(run.topology for run in arm.runs.values())]
    metrics: list[tuple[str, str, str, Callable[[Arm], Curve]]] = [
        (
            "survival",
            "Survival",
            "first connections left, %",
            lambda arm: record_curve(arm, "topology", "survival", 100.0),
        ),
        (
            "explored",
            "Exploration",
            "weights ever active, %",
            lambda arm: record_curve(arm, "topology", "explored", 100.0),
        ),
        ("density", "Density", "weights active, %", density_curve),
    ]
    figures = []
    names = treatments(arms)
    for key, title, y_label, curve_of in metrics if sparse else ():
        curves = {arm: curve_of(arm) for arm in sparse}
        moving = [b for b in _bases(sparse) if any(np.ptp(curves[arm][1]) > 1e-6 for arm in _arms_of(sparse, b))]
        figure, axes = new_axes(f"{title}, {moving[0]}" if len(moving) == 1 else title, "training step", y_label)
        ends: list[End] = []
        for base in _bases(sparse):
            if base not in moving:
                x, y = curves[_arms_of(sparse, base)[0]]
                axes.plot(x, y[0], color=MUTED, lw=1.2, ls=(0, (4, 2)) if ends else "-")
                ends.append((float(y[0, -1]), base, MUTED, None))
                continue
            for arm in _arms_of(sparse, base):
                text = arm.treatment if len(moving) == 1 else arm.name
                series, dash = names.index(arm.treatment), DASHES[moving.index(base) % 3]
                width = 1.5 + 1.3 * max(0, len(names) - 1 - series)  # equal curves stay visible below each other
                ends.append(spread(axes, curves[arm], series, text, f"{key}{base}", ls=dash, lw=width))
        axes.set_ylim(0, 1.08 * max(float(y.max()) for _, y in curves.values()))
        end_labels(axes, ends, key)
        figures.append(Figure(to_svg(figure, f"mask-{key}", f"{title} over training: {y_label}"), y_label))
    return Section(
        "How the masks move",
        "Survival: what is left of the first mask. Exploration: every weight that was active at some time. A method "
        "that changes its topology "
        "loses the first and gains the second; a fixed mask is a flat grey line. Density must stay on target all "
        "along.",
        tuple(figures),
    )


def _sharpness(arms: Sequence[Arm]) -> Section:
    metrics = (
        ("displacement", "Realised displacement", "||x - w||, measured"),
        ("alignment", "Alignment", "cos(new gradient, displacement)"),
    )
    names = treatments(arms)
    figures = []
    for key, title, y_label in metrics:
        measured = [arm for arm in arms if all(has(run.steps, key) for run in arm.runs.values())]
        for number, treatment in enumerate(t for t in names if any(arm.treatment == t for arm in measured)):
            figure, axes = new_axes(f"{title}, {treatment}", "training step", y_label)
            ends: list[End] = []
            for place, arm in enumerate(a for a in measured if a.treatment == treatment):
                curve = (
                    smooth(record_curve(arm, "steps", key, 1.0))
                    if key == "alignment"
                    else record_curve(arm, "steps", key, 1.0)
                )
                ends.append(
                    spread(axes, curve, names.index(treatment), arm.base, f"{key}{number}{place}", ls=DASHES[place % 3])
                )
            if key == "alignment":
                axes.axhline(0, color=INK, lw=0.8)
            else:
                axes.set_ylim(0, 1.25 * max(end[0] for end in ends) or 1)
            end_labels(axes, ends, f"{key}{number}")
            words = f"{title} of {treatment}: " + ", ".join(f"{text} ends at {value:.3g}" for value, text, _, _ in ends)
            figures.append(Figure(to_svg(figure, f"{key}{number}", words), words))
    return Section(
        "What the displacement does",
        "Displacement: the distance between the weights and the point where the gradient is taken, measured at the "
        "weights and not copied from the settings; "
        "it must sit at rho from the second step on. Alignment: the cosine between the gradient and the displacement "
        "it was taken at, smoothed. Near 0 means "
        "that the direction used says little about the present gradient; below 0, that it points downhill.",
        tuple(figures),
    )


def _bases(arms: Sequence[Arm]) -> list[str]:
    return list(dict.fromkeys(arm.base for arm in arms))


def _arms_of(arms: Sequence[Arm], base: str) -> list[Arm]:
    return [arm for arm in arms if arm.base == base]


def _only_context(arms: Sequence[Arm], base: str) -> bool:
    """True for a dense network trained by the plain optimizer alone: it is drawn into the other panels."""
    own = _arms_of(arms, base)
    return len(own) == 1 and own[0].dense and own[0].plain
