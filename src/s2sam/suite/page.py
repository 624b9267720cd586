"""A table as one self-contained page, in the style of the report: no script, no network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from string import Template

from s2sam import __version__
from s2sam.report.html import style_sheet
from s2sam.report.tables import percent
from s2sam.suite.plan import percent_text
from s2sam.suite.result import TRIPWIRE, Entry, SuiteTable, listed, stands_in
from s2sam.suite.text import (
    NOT_IN_PAPER,
    blocks_of,
    cell_at,
    counts,
    difference_text,
    heading,
    pooled_text,
    rows_of,
    search_size,
    sparsities_of,
    value_text,
)

LEADS = {  #: what the entries of a table are
    "accuracy": "Test accuracy after the last epoch",
    "robustness": "Accuracy on corrupted test images after the last epoch",
    "throughput": "Training speed",
}


def render(table: SuiteTable, *, how: str = "") -> str:
    """The page as a string; `how` is the command that made it."""
    plan = table.plan
    facts = {
        "budget": plan.budget.name,
        "mode": plan.mode,
        "cells": len(plan.runnable),
        "runs": len(table.runs),
        "seeds": ", ".join(map(str, plan.seeds)),
    }
    if search_size(table):
        facts["settings tried in each column"] = search_size(table)
    if len(plan.cells) > len(plan.runnable):
        facts["cells are missing"] = len(plan.cells) - len(plan.runnable)
    return Template(files("s2sam.suite").joinpath("page.html").read_text(encoding="utf-8")).substitute(
        title=_text(heading(table)),
        kicker=_text(f"s2sam table {plan.suite.name} / {plan.budget.name} / {plan.mode}"),
        lead=_text(_lead(table)),
        facts="".join(f"<li><b>{_text(str(value))}</b> {_text(name)}</li>" for name, value in facts.items()),
        summary=_summary(table),
        blocks="".join(_block(table, block) for block in blocks_of(table)),
        notes=_items(table.notes),
        how=_text(how or f"s2sam table {plan.suite.name} --budget {plan.budget.name} --mode {plan.mode}"),
        runs=_runs(table),
        style=style_sheet(),
        version=_text(__version__),
    )


def summary_sentences(table: SuiteTable) -> list[str]:
    """What may be said: how many differences are shown, then the pooled ones."""
    reference = table.plan.suite.reference
    if not table.plan.runnable:
        return ["Nothing of this table can run here yet; see what is missing below."]
    if table.measure == "throughput":
        return [f"Step times against {reference}, measured side by side; see the table."]
    compared = [entry for entry in table.entries if entry.difference is not None]
    if len(table.plan.suite.columns) == 1:
        first = f"{reference} is the only column, so nothing is compared."
    elif not any(entry.interval for entry in compared):
        first = "Without intervals nothing can be concluded; run more seeds."
    else:
        shown = sum(entry.shows != 0 for entry in compared)
        first = f"{shown} of {len(compared)} comparisons with {reference} show a difference."
    if stands_in(table.plan):
        first = f"Digits stand in here, so nothing below is evidence about the table's networks. {first}"
    void = sum(note.startswith(TRIPWIRE) for note in table.notes)
    if void:
        first = f"{void} {reference} are below what a well-tuned pipeline reaches, so nothing below counts. {first}"
    return [first, *(pooled_text(column, pooled, reference) for column, pooled in table.pooled.items())]


def _lead(table: SuiteTable) -> str:
    what = LEADS[table.measure]
    suite = table.plan.suite
    lead = f"{what}: {listed(list(suite.columns))}, in rows of methods and groups of sparsities."
    if suite.not_in_paper:
        lead += f" {listed(suite.not_in_paper)} {'is' if len(suite.not_in_paper) == 1 else 'are'} {NOT_IN_PAPER}."
    return lead


def _summary(table: SuiteTable) -> str:
    first, *rest = summary_sentences(table)
    return f"<p><b>{_text(first)}</b></p>" + (f"<ul>{_items(rest)}</ul>" if rest else "")


def _block(table: SuiteTable, block: str) -> str:
    columns, groups = list(table.plan.suite.columns), sparsities_of(table, block)
    top = "".join(
        f'<th scope="colgroup" class="group" colspan="{len(columns)}">{_text(percent_text(s))}</th>' for s in groups
    )
    small = f"<small>{NOT_IN_PAPER}</small>"
    second = "".join(
        f'<th scope="col"{_first(i)}>{_text(column)}{small if column in table.plan.suite.not_in_paper else ""}</th>'
        for _ in groups
        for i, column in enumerate(columns)
    )
    body = []
    for row in rows_of(table, block):
        line = [f'<th scope="row">{_text(row)}</th>']
        for sparsity in groups:
            cell = cell_at(table, block, row, sparsity)
            for i, column in enumerate(columns):
                line.append(_entry(None if cell is None else table.entry(cell, column), table.measure, i))
        body.append("<tr>" + "".join(line) + f'<td class="first">{_text(counts(table, block, row))}</td></tr>')
    head = f'<tr><th></th>{top}<th></th></tr><tr><th></th>{second}<th scope="col">n</th></tr>'
    grid = f"<table><thead>{head}</thead><tbody>{''.join(body)}</tbody></table>"
    region = f'<div class="scroll" tabindex="0" role="region" aria-label="{_text(block)}">{grid}</div>'
    return f'<section><h2>{_text(block)}</h2><div class="card">{region}</div></section>'


def _entry(entry: Entry | None, measure: str, index: int) -> str:
    if entry is None:
        return f"<td{_first(index)}>-</td>"
    names = ["first"] if index == 0 else []
    names += ["absent"] if entry.center is None else []
    names += {1: ["up"], -1: ["down"]}.get(entry.better, [])
    classes = f' class="{" ".join(names)}"' if names else ""
    difference = difference_text(entry, measure)
    title = f' title="{_text(entry.state or entry.setting)}"' if entry.state or entry.setting else ""
    small = f"<small>{_text(difference)}</small>" if difference else ""
    return f"<td{classes}{title}>{_text(value_text(entry, measure))}{small}</td>"


def _first(index: int) -> str:
    return ' class="first"' if index == 0 else ""


def _runs(table: SuiteTable) -> str:
    lines: list[Sequence[str]] = [
        (p.cell.label, p.column, str(run.seed), percent(run.final["test_top1"]), str(run.folder))
        for p, run in table.runs.items()
    ]
    lines += [(p.cell.label, p.column, str(p.config.seed), "failed", reason) for p, reason in table.failed.items()]
    head = "".join(f'<th scope="col">{h}</th>' for h in ("cell", "column", "seed", "test accuracy %", "folder"))
    body = "".join("<tr>" + "".join(f"<td>{_text(c)}</td>" for c in line) + "</tr>" for line in lines)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _text(value: str) -> str:
    """Escaped, with the percent sign kept at its number and a real plus-minus."""
    return escape(value, quote=True).replace(" %", "&nbsp;%").replace("+-", "&plusmn;")


def _items(sentences: Iterable[str]) -> str:
    return "".join(f"<li>{_text(sentence)}</li>" for sentence in sentences)
