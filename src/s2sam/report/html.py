"""The report as one self-contained page: no script, no network, readable on a phone, in the dark and on paper."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from statistics import median
from string import Template
from typing import Any

from s2sam import __version__
from s2sam.report.arms import Arm, flatten
from s2sam.report.beside import Beside
from s2sam.report.markup import arm_table, grid, items, pairs, text
from s2sam.report.panels import Section, treatments
from s2sam.report.plots import draw_all
from s2sam.report.surface_views import rules
from s2sam.report.svg import PALETTE
from s2sam.report.tables import Row, Table, cells, headers, interval_text, percent

_DATA = {
    "digits": (
        "scikit-learn's handwritten digits",
        "The data are 1,797 grey images of 8 x 8 pixels. This is a toy that shows the whole path from training to "
        "report; what holds here "
        "need not hold for large networks or real images.",
    )
}

_RUNS = ("arm", "seed", "test accuracy %", "test loss", "sparsity %")


def render(
    table: Table,
    *,
    title: str = "Sparse and sharpness-aware training, side by side",
    how: str = "",
    remarks: Sequence[str] = (),
    sections: Sequence[Section] = (),
    costs: Section | None = None,
) -> str:
    """The page as a string.

    Args:
        table: what :func:`s2sam.report.tables.build_table` returned.
        title: the headline.
        how: the command that made the runs or the page.
        remarks: further sentences for the section on what is not shown, as plain text.
        sections: further figures, which come after those that every run has.
        costs: what :func:`s2sam.report.cost_section.cost_section` returned, to stand after the results.
    """
    arms = [row.arm for row in table.rows]
    names, drawn = treatments(arms), draw_all(table)
    config = flatten(next(iter(arms[0].runs.values())).config)
    data, model = str(config.get("data", "?")), str(config.get("model", "?"))
    seeds = sorted({seed for arm in arms for seed in arm.runs})
    facts = {
        "arms": len(arms),
        "runs": sum(row.n for row in table.rows),
        "seeds": ", ".join(map(str, seeds)),
        "test images": table.rows[0].test_images,
        "epochs": config.get("epochs", "?"),
    }
    return Template(files("s2sam.report").joinpath("page.html").read_text(encoding="utf-8")).substitute(
        title=text(title),
        kicker=text(f"s2sam report / {data} / {model}"),
        lead=text(_lead(arms, data, model)),
        facts="".join(f"<li><b>{text(str(v))}</b> {text(k)}</li>" for k, v in facts.items()),
        summary=_summary(table),
        table=_table(table, names),
        notes=items(table.notes),
        legend=_legend(names),
        sections="".join(map(draw_section, [*drawn[:1], *([costs] if costs else []), *drawn[1:], *sections])),
        caveats=items([*_caveats(table, data), *remarks]),
        how=text(how or "s2sam report " + " ".join(str(run.folder) for arm in arms for run in arm.runs.values())),
        configuration=pairs(_common(arms)),
        arm_settings=grid(["arm", "network", "optimizer"], [_settings(arm) for arm in arms]),
        environment=environment_tables(arms),
        runs=grid([*_RUNS, *(one.header for one in table.beside), "folder"], _runs(arms, table.beside)),
        version=text(__version__),
        light=_palette(0),
        dark=_palette(1),
        views=rules(),
        toggles="\n".join(
            f"body:has(#show-{i}:not(:checked)) svg .s{i} {{ opacity: .06; }}" for i in range(len(names))
        ),
    )


def summary_sentences(table: Table) -> list[str]:
    """What may be said: first the count, then each comparison with its interval, the resolution and the price."""
    compared = [row for row in table.rows if row.difference is not None]
    if not compared:
        return [
            "There is no arm to compare with another one here: a comparison needs the plain optimizer on the same "
            "network."
        ]
    shown = [row for row in compared if row.difference is not None and row.difference.shows]
    none = (
        "The comparison shows no difference."
        if len(compared) == 1
        else f"None of the {len(compared)} comparisons shows a difference."
    )
    first = (
        none
        if not shown
        else f"{len(shown)} of {_count(len(compared), 'comparison')} {'shows' if len(shown) == 1 else 'show'} a "
        f"difference."
    )
    return [first, *map(_sentence, compared), *_resolution(compared), *_price(compared)]


def _sentence(row: Row) -> str:
    d = row.difference
    assert d is not None
    assert row.reference is not None
    start = (
        f"{row.arm.base}: {row.arm.treatment} minus {row.reference.treatment} is {percent(d.mean, sign=True)} points"
    )
    covering = f" for all {d.comparisons} together" if d.comparisons > 1 else ""
    interval = f", 95 % interval{covering} {interval_text(d.simultaneous)}" if d.simultaneous else ""
    return f"{start}{interval} (n = {_count(d.n, 'seed')}): {row.verdict}."


def _resolution(compared: Sequence[Row]) -> list[str]:
    widths = [
        row.difference.simultaneous.half_width for row in compared if row.difference and row.difference.simultaneous
    ]
    if not widths:
        return ["Without intervals nothing can be concluded; train more seeds."]
    low, high = percent(min(widths), 1), percent(max(widths), 1)
    reach = low if low == high else f"{low} to {high}"
    return [
        f"The intervals reach {reach} points to either side: smaller differences could not have been shown here, in "
        f"either direction."
    ]


def _price(compared: Sequence[Row]) -> list[str]:
    parts = []
    for treatment in dict.fromkeys(row.arm.treatment for row in compared):
        ratios = [row.cost.ratio for row in compared if row.arm.treatment == treatment and row.cost and row.cost.ratio]
        if ratios:
            parts.append(f"{median(ratios):.2f} times as long with {treatment}")
    return (
        [f"On the same network a training step took, against the plain optimizer, {' and '.join(parts)}."]
        if parts
        else []
    )


def _summary(table: Table) -> str:
    first, *rest = summary_sentences(table)
    return f"<p><b>{text(first)}</b></p><ul>{items(rest)}</ul>" if rest else f"<p>{text(first)}</p>"


def _lead(arms: Sequence[Arm], data: str, model: str) -> str:
    where = _DATA.get(data, (data, ""))[0]
    networks = list(dict.fromkeys(arm.base.replace("Dense", "dense").replace("Static", "static") for arm in arms))
    listed = " and ".join(filter(None, [", ".join(networks[:-1]), networks[-1]]))
    return (
        f"The network {model} on {where}, trained {listed}, with {_either(treatments(arms))}. In all runs of one "
        f"seed the initial "
        "weights, the order of the data and every setting that does not make the arm are the same."
    )


def _either(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + f" or {names[-1]}"


def _caveats(table: Table, data: str) -> list[str]:
    n = min(row.n for row in table.rows)
    caveats = [_DATA[data][1]] if data in _DATA else []
    caveats.append(
        f"With {_count(n, 'seed')} an arm an interval is wide, and an interval that contains 0 is not proof that two "
        f"arms are equal."
        if n > 1
        else "With one seed there is no interval, and no difference in this table means anything by itself."
    )
    caveats += [
        "All arms share one test set, so its chance composition is common to them and is in no interval.",
        "The report cannot know how settings were chosen: an arm whose rho was searched, against a plain optimizer "
        "that was not, looks better "
        "than it is.",
        "Short runs reward fast optimisation, and flat minima are said to pay late; an effect of full training "
        "budgets cannot be seen in a short run.",
        "Times hold for the machine and the network named below. On small networks the overhead of every method "
        "looks large.",
    ]
    return caveats


def _table(table: Table, names: Sequence[str]) -> str:
    head = headers(table)
    rows = []
    for row in table.rows:
        shows = row.difference.shows if row.difference else 0
        pill = f'<span class="pill{ {1: " up", -1: " down"}.get(shows, "") }">{text(row.verdict)}</span>'
        texts = {name: text(value) for name, value in cells(table, row).items() if name != "arm"}
        rows.append((row.arm, list((texts | {"verdict": pill}).values())))
    return arm_table(list(head.values()), rows, names, words=(head["verdict"],))


def _legend(names: Sequence[str]) -> str:
    if len(names) < 2:
        return ""
    labels = "".join(
        f'<label><input type="checkbox" id="show-{i}" checked style="accent-color:var(--s{i % len(PALETTE)})">'
        f'<span style="color:var(--s{i % len(PALETTE)})">{text(name)}</span></label>'
        for i, name in enumerate(names)
    )
    opening = '<div class="card legend" role="group" aria-label="Colours of the figures">'
    return f'{opening}<span class="hint">Show</span>{labels}</div>'


def draw_section(section: Section) -> str:
    """A section as HTML: its sentences, its caption, its figures in rows without gaps."""
    figures = "".join(
        f'<figure class="card{" wide" if figure.wide else ""}">{figure.svg}</figure>' for figure in section.figures
    )
    count = sum(not figure.wide for figure in section.figures)
    size = " one" if count == len(section.figures) == 1 else " three" if count % 6 == 3 else ""  # rows without gaps
    says = f'<ul class="says">{items(section.says)}</ul>' if section.says else ""
    head = f'<h2>{text(section.title)}</h2>{says}<p class="caption">{text(section.caption)}</p>'
    return f'<section>{head}<div class="grid{size}">{figures}</div></section>'


def _settings(arm: Arm) -> list[str]:
    def words(key: Sequence[tuple[str, Any]]) -> str:
        return ", ".join(f"{k} {v}" for k, v in key if v not in (None, (), ""))

    return [arm.name, words(arm.base_key), words(arm.treatment_key)]


def _runs(arms: Sequence[Arm], beside: Sequence[Beside]) -> list[list[str]]:
    return [
        [
            arm.name,
            str(seed),
            percent(run.final["test_top1"]),
            f"{run.final['test_loss']:.4f}",
            percent(run.final["sparsity"], 1),
            *(percent(run.final.get(one.key)) for one in beside),
            str(run.folder),
        ]
        for arm in arms
        for seed, run in arm.runs.items()
    ]


def _common(arms: Sequence[Arm]) -> dict[str, Any]:
    """The settings with one value in all runs."""
    flat = [flatten(run.config) for arm in arms for run in arm.runs.values()]
    return {k: v for k, v in flat[0].items() if k != "out" and all(other.get(k) == v for other in flat)}


def environment_tables(arms: Sequence[Arm]) -> str:
    """What the runs ran on: a table for each environment."""
    environments: list[Mapping[str, Any]] = []
    for arm in arms:
        for run in arm.runs.values():
            if run.env not in environments:
                environments.append(run.env)
    several = (
        f'<p class="caption">The runs come from {len(environments)} environments.</p>' if len(environments) > 1 else ""
    )
    return several + "".join(pairs(flatten(env)) for env in environments)


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def style_sheet(views: str = "") -> str:
    """The style of the report's page with its palette, for pages of another layout; `views` as of `surface_views`."""
    page = files("s2sam.report").joinpath("page.html").read_text(encoding="utf-8")
    found = re.search(r"<style>.*?</style>", page, re.DOTALL)
    assert found is not None
    return Template(found.group()).substitute(light=_palette(0), dark=_palette(1), views=views, toggles="")


def _palette(mode: int) -> str:
    return " ".join(f"--s{i}: {colours[mode]};" for i, colours in enumerate(PALETTE))
