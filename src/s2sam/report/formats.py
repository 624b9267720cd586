"""The table of a report as Markdown, CSV and for a terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from s2sam.report.beside import BESIDE
from s2sam.report.stats import LEVEL, Interval
from s2sam.report.tables import Row, Table, cells, headers

if TYPE_CHECKING:
    from rich.table import Table as RichTable


def to_markdown(table: Table) -> str:
    """A Markdown table with its notes below."""
    grid = [headers(table), *(cells(table, row) for row in table.rows)]
    lines = markdown_grid([list(line.values()) for line in grid])
    return "\n".join([*lines, "", *(f"- {note}" for note in table.notes), ""])


def markdown_grid(grid: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table; the first row is its head.

    >>> markdown_grid([["arm", "%"], ["SGD", "9"]])
    ['| arm | % |', '|-----|---|', '| SGD | 9 |']
    """
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in grid]
    widths = [max(map(len, column)) for column in zip(*escaped, strict=True)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in escaped]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return lines


def to_csv(table: Table) -> str:
    """Unrounded numbers, one line per arm; accuracies and differences are fractions, empty where there is none."""
    buffer = io.StringIO()
    lines = [_line(table, row) for row in table.rows]
    writer = csv.DictWriter(buffer, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return buffer.getvalue()


def _line(table: Table, row: Row) -> dict[str, object]:
    d, cost, arm = row.difference, row.cost, row.arm
    line: dict[str, object] = {
        "arm": arm.name, "base": arm.base, "treatment": arm.treatment, "n": row.n,
        "seeds": " ".join(map(str, arm.runs)), "test_images": row.test_images,
        "test_top1_mean": row.mean, "test_top1_sd": row.deviation,
    }  # fmt: skip
    for one in BESIDE:
        found = row.beside.get(one.key)
        line[f"{one.key}_mean"] = found.mean if found else None
        line[f"{one.key}_sd"] = found.deviation if found else None
    line["difference"] = d.mean if d else None
    line |= _ends("interval", d.interval if d else None)
    line |= _ends("simultaneous", d.simultaneous if d else None)
    line |= {"comparisons": table.comparisons, "level": LEVEL, "verdict": row.verdict}
    same, dense = ("step_ratio_same_network", "step_ratio_dense_network")
    line |= {same: cost.ratio if cost else None, **_ends(same, cost.interval if cost else None)}
    line |= {dense: cost.dense if cost else None, **_ends(dense, cost.dense_interval if cost else None)}
    low, high = row.sparsity
    return line | {"step_seconds": cost.step_seconds if cost else None, "sparsity_min": low, "sparsity_max": high}


def to_rich(table: Table) -> RichTable:
    """The table for a terminal of 80 columns, to be printed with its notes; the interval is the one that decides."""
    from rich.text import Text

    head, rows = headers(table), table.rows
    counts = sorted({row.n for row in rows})
    span = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    networks = "same and on the dense network" if table.has_dense else "same network"
    title = (
        f"n = {span} seeds an arm, {rows[0].test_images} test images\nstep time against {table.plain} on the {networks}"
    )
    result = _rich(title)
    interval = f"95 %, all {table.comparisons}" if table.comparisons > 1 else head["interval"]
    for name in ("test % (sd)", head["difference"], interval):
        result.add_column(name, justify="right", no_wrap=name is not interval)
    result.add_column("verdict", min_width=13)
    times = {"cost": "same\nnet", "dense_cost": "dense\nnet"}
    for name in (*(times[key] for key in times if key in head), "zero\n%"):
        result.add_column(name, justify="right", no_wrap=True)
    for row in _by_base(result, table):
        text, shows = cells(table, row), row.difference.shows if row.difference else 0
        line = [f"  {row.arm.treatment}", _accuracy(text), text["difference"], text["simultaneous"]]
        verdict = Text(row.verdict, style={1: "bold green", -1: "bold red"}.get(shows, "dim"))
        ratios = [Text(text[key].split(" ")[0]) for key in times if key in head]
        result.add_row(*map(Text, line), verdict, *ratios, Text(text["sparsity"]))
    return result


def to_rich_beside(table: Table) -> RichTable | None:
    """The accuracies that stand beside the plain one, for a terminal of 80 columns; None if no run has any."""
    from rich.text import Text

    if not table.beside:
        return None
    result = _rich("measured beside it")
    for name in ("test % (sd)", *(one.header for one in table.beside)):
        result.add_column(name, justify="right")
    for row in _by_base(result, table):
        text = cells(table, row)
        line = [f"  {row.arm.treatment}", _accuracy(text), *(text[one.key] for one in table.beside)]
        result.add_row(*map(Text, line))
    return result


def _rich(title: str) -> RichTable:
    from rich import box
    from rich.table import Table as RichTable

    result = RichTable(box=box.SIMPLE_HEAD, title=title, padding=0, show_edge=False)
    result.title_justify, result.title_style = "left", "bold"
    result.add_column("arm")
    return result


def _by_base(result: RichTable, table: Table) -> Iterator[Row]:
    """The rows, each group below a line with the name of its base."""
    from rich.text import Text

    for base in dict.fromkeys(row.arm.base for row in table.rows):
        result.add_section()
        result.add_row(Text(base, style="bold"))
        yield from (row for row in table.rows if row.arm.base == base)


def _accuracy(text: Mapping[str, str]) -> str:
    return text["accuracy"] + ("" if text["deviation"] == "-" else f" ({text['deviation']})")


def _ends(name: str, interval: Interval | None) -> dict[str, object]:
    ends = (interval.low, interval.high) if interval else (None, None)
    return dict(zip((f"{name}_low", f"{name}_high"), ends, strict=True))
