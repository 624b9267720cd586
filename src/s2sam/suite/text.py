"""A table in words: the text of an entry, Markdown, CSV of the cells, CSV of the runs, and a table for the terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from s2sam.report.formats import markdown_grid
from s2sam.report.stats import Interval
from s2sam.report.tables import percent
from s2sam.suite.plan import Cell, percent_text
from s2sam.suite.pooled import Pooled, side
from s2sam.suite.provenance import code_of, digest_of
from s2sam.suite.result import Entry, SuiteTable, one_line, possible
from s2sam.suite.schema import Suite
from s2sam.suite.tuned import trials_of

if TYPE_CHECKING:
    from rich.table import Table as RichTable

DASH = "-"
NOT_IN_PAPER = "not in the paper"
CELL_HEAD = (
    "block", "row", "model", "data", "sparsity", "column", "reference", "measure", "n", "seeds", "value", "sd",
    "difference", "low", "high", "level", "comparisons", "shows", "state", "setting", "low_over_seeds",
    "high_over_seeds", "correlation", "in_paper", "distinct_images_per_second",
)  # fmt: skip
RUN_HEAD = (
    "block", "row", "sparsity", "column", "trial", "seed", "state", "test_top1", "val_top1", "test_loss", "best_epoch",
    "measured_sparsity", "step_seconds", "epochs", "train_images", "test_images", "data_digest", "code", "folder",
)  # fmt: skip
ROUND_HEAD = ("block", "row", "sparsity", "column", "round", "images_per_second", "distinct_images_per_second")


def value_text(entry: Entry, measure: str) -> str:
    """The value with its deviation, as in "92.50 +- 0.15"; why there is none where there is none."""
    if entry.center is None:
        return entry.state.partition(":")[0] or DASH
    if measure == "throughput":
        twice = "" if entry.distinct is None else f", {entry.distinct:.0f} distinct"
        return f"{entry.center:.0f} images/s{twice}"
    return percent(entry.center) + ("" if entry.spread is None else f" +- {percent(entry.spread)}")


def difference_text(entry: Entry, measure: str) -> str:
    """The difference with its interval, as in "+0.40 [-0.30, +1.10]"; "" without one."""
    if entry.difference is None:
        return ""
    if measure == "throughput":
        return f"{entry.difference:.2f}x" + interval_text(entry.interval, measure)
    return percent(entry.difference, sign=True) + interval_text(entry.interval, measure)


def interval_text(interval: Interval | None, measure: str = "accuracy") -> str:
    """As in " [-0.30, +1.10]"; "" for None."""
    if interval is None:
        return ""
    if measure == "throughput":
        return f" [{interval.low:.2f}, {interval.high:.2f}]"
    return f" [{percent(interval.low, sign=True)}, {percent(interval.high, sign=True)}]"


def pooled_text(column: str, pooled: Pooled, reference: str) -> str:
    """One sentence on a pooled difference."""
    of = f" of {pooled.planned}" if pooled.planned > pooled.cells else ""
    start = (
        f"{column} minus {reference}, mean over {pooled.cells}{of} cell{'s' if pooled.cells != 1 or of else ''}: "
        f"{percent(pooled.mean, sign=True)} points"
    )
    if pooled.interval is None:
        return f"{start}; no interval."
    words = {1: "higher", -1: "lower", 0: "no difference shown"}
    verdict, inside = words[pooled.shows], interval_text(possible(pooled.interval)).strip()
    start = f"{start}, {100 * pooled.interval.level:g} % interval {inside}, df {pooled.freedom}"
    if pooled.cells == 1:
        return f"{start}: {verdict}."
    if pooled.over_seeds is None:
        return f"{start}, if the cells are independent; no interval over the seeds alone: {verdict}."
    outside, seeds = interval_text(possible(pooled.over_seeds)).strip(), pooled.freedom // pooled.cells
    if pooled.shows == 0 and side(pooled.interval) != 0:
        verdict = f"{words[side(pooled.interval)]} if they are, else not shown"
    linked = "" if pooled.correlation is None else f"; their correlation over seeds is {pooled.correlation:.2f}"
    return f"{start}, if the cells are independent, and {outside}, df {seeds}, whatever links them{linked}: {verdict}."


def to_markdown(table: SuiteTable) -> str:
    """The table in the paper's structure: one part for each block, rows = methods, column groups = sparsities."""
    suite, parts = table.plan.suite, [f"# {heading(table)}", ""]
    for block in blocks_of(table):
        parts += [f"## {block}", ""]
        groups = sparsities_of(table, block)
        titles = [column_title(suite, column) for column in suite.columns]
        head = ["", *(f"{percent_text(s)}: {title}" for s in groups for title in titles), "n"]
        grid = [head, *(_row(table, block, row, groups) for row in rows_of(table, block))]
        parts += [*markdown_grid(grid), ""]
    if table.pooled:
        sentences = (pooled_text(column, pooled, suite.reference) for column, pooled in table.pooled.items())
        parts += ["## Pooled", "", *(f"- {sentence}" for sentence in sentences), ""]
    return "\n".join([*parts, "## Notes", "", *(f"- {note}" for note in table.notes), ""])


def heading(table: SuiteTable) -> str:
    """The headline of a table."""
    paper = f"{table.plan.suite.paper}: " if table.plan.suite.paper else ""
    return f"{paper}{table.plan.suite.title}"


def column_title(suite: Suite, column: str) -> str:
    """The head of a column, which says so if the paper does not have it."""
    return f"{column} ({NOT_IN_PAPER})" if column in suite.not_in_paper else column


def cells_csv(table: SuiteTable) -> str:
    """One line for each cell and column, unrounded; accuracies and differences are fractions."""
    reference = table.plan.suite.reference
    shared = {"reference": reference, "measure": table.measure}
    lines: list[dict[str, Any]] = []
    for e in table.entries:
        line = {
            "block": e.cell.block, "row": e.cell.row, "sparsity": e.cell.sparsity, "column": e.column,
            "model": e.cell.settings.get("model"), "data": e.cell.settings.get("data"), "n": e.n,
            "seeds": " ".join(map(str, e.values)) if table.measure != "throughput" else table.plan.seeds[0],
            "value": e.center, "sd": e.spread, "difference": e.difference, "comparisons": table.comparisons,
            "shows": e.shows, "state": e.state, "setting": e.setting, "distinct_images_per_second": e.distinct,
        }  # fmt: skip
        lines.append(shared | line | _in_paper(table, e.column) | _ends(e.interval))
    for column, p in table.pooled.items():
        line = {
            "block": "pooled", "row": f"{p.cells} cells", "column": column, "sd": p.deviation, "difference": p.mean,
            "comparisons": p.comparisons, "shows": p.shows, "state": f"df {p.freedom}", "correlation": p.correlation,
        }  # fmt: skip
        over_seeds = {f"{key}_over_seeds": value for key, value in _ends(possible(p.over_seeds)).items()}
        name = column.rpartition(" at ")[0] if column not in table.plan.suite.columns else column
        lines.append(shared | line | _in_paper(table, name) | _ends(possible(p.interval)) | over_seeds)
    return _csv(CELL_HEAD, lines)


def runs_csv(table: SuiteTable) -> str:
    """One line for each run, those that screened settings first; or for each round of a throughput measurement.

    What a trial reached on the test images is left out, as it is nobody's business before the choice or after it.
    """
    lines: list[dict[str, Any]] = []
    for e in table.entries if table.measure == "throughput" else ():
        share = e.distinct / e.center if e.distinct is not None and e.center else None
        for index, speed in e.values.items():
            distinct = None if share is None else share * speed
            numbers = {"round": index, "images_per_second": speed, "distinct_images_per_second": distinct}
            lines.append(_place(e.cell, e.column) | numbers)
    for planned, run in (*table.screening.items(), *table.runs.items()):
        line = {key: run.final.get(key) for key in RUN_HEAD} | _place(planned.cell, planned.column)
        line |= {
            "trial": planned.trial, "seed": run.seed, "state": "finished", "measured_sparsity": run.final["sparsity"],
            "epochs": run.config.get("epochs"), "data_digest": digest_of(run), "code": code_of(run),
            "folder": run.folder,
        }  # fmt: skip
        lines.append(line if planned.trial is None else line | {"test_top1": None, "test_loss": None})
    for planned, reason in (*table.screening_failed.items(), *table.failed.items()):
        config, state = planned.config, f"failed: {one_line(reason)}"
        line = {"trial": planned.trial, "seed": config.seed, "state": state, "folder": config.folder}
        lines.append(_place(planned.cell, planned.column) | line)
    return _csv(ROUND_HEAD if table.measure == "throughput" else RUN_HEAD, lines)


def to_rich(table: SuiteTable) -> list[RichTable]:
    """One table for each block, for a terminal; intervals stand in the files."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    result = []
    for block in blocks_of(table):
        shown = RichTable(box=box.SIMPLE_HEAD, title=block, title_justify="left", title_style="bold", show_edge=False)
        shown.add_column("")
        for column in table.plan.suite.columns:
            shown.add_column(column_title(table.plan.suite, column), justify="right")
        for sparsity in sparsities_of(table, block):
            shown.add_section()
            shown.add_row(Text(percent_text(sparsity), style="bold"))
            for row in rows_of(table, block):
                cell = cell_at(table, block, row, sparsity)
                if cell is None:
                    continue
                texts = []
                for column in table.plan.suite.columns:
                    entry = table.entry(cell, column)
                    tail = difference_text(entry, table.measure).partition(" ")[0]
                    style = {1: "bold green", -1: "bold red"}.get(entry.better, "dim" if entry.center is None else "")
                    texts.append(Text(value_text(entry, table.measure) + (f" ({tail})" if tail else ""), style=style))
                shown.add_row(Text(f"  {row}"), *texts)
        result.append(shown)
    return result


def blocks_of(table: SuiteTable) -> list[str]:
    """The blocks, in order."""
    return list(dict.fromkeys(cell.block for cell in table.plan.cells))


def rows_of(table: SuiteTable, block: str) -> list[str]:
    """The rows of a block, in order."""
    return list(dict.fromkeys(cell.row for cell in table.plan.cells if cell.block == block))


def sparsities_of(table: SuiteTable, block: str) -> list[float]:
    """The sparsities of a block, in order."""
    return list(dict.fromkeys(cell.sparsity for cell in table.plan.cells if cell.block == block))


def cell_at(table: SuiteTable, block: str, row: str, sparsity: float) -> Cell | None:
    """The cell there, if the table has one."""
    wanted = (block, row, sparsity)
    return next((cell for cell in table.plan.cells if (cell.block, cell.row, cell.sparsity) == wanted), None)


def counts(table: SuiteTable, block: str, row: str) -> str:
    """The numbers of seeds (or rounds) in a row."""
    found = sorted({e.n for e in table.entries if (e.cell.block, e.cell.row) == (block, row) and e.center is not None})
    return " to ".join(map(str, dict.fromkeys((found[0], found[-1])))) if found else DASH


def search_size(table: SuiteTable) -> int:
    """Settings tried in each column; 0 in mode matched."""
    tuned = table.plan.suite.tuned
    if table.plan.mode != "tuned" or tuned is None:
        return 0
    return len(trials_of(next(iter(tuned.grids.values()))))


def _row(table: SuiteTable, block: str, row: str, groups: Iterable[float]) -> list[str]:
    texts = [row]
    for sparsity in groups:
        cell = cell_at(table, block, row, sparsity)
        for column in table.plan.suite.columns:
            entry = None if cell is None else table.entry(cell, column)
            if entry is None:
                texts.append(DASH)
                continue
            difference = difference_text(entry, table.measure)
            texts.append(value_text(entry, table.measure) + (f" ({difference})" if difference else ""))
    return [*texts, counts(table, block, row)]


def _place(cell: Cell, column: str) -> dict[str, Any]:
    return {"block": cell.block, "row": cell.row, "sparsity": cell.sparsity, "column": column}


def _in_paper(table: SuiteTable, column: str) -> dict[str, Any]:
    suite = table.plan.suite
    return {"in_paper": "no" if column in suite.not_in_paper else "yes"} if suite.paper else {}


def _ends(interval: Interval | None) -> dict[str, float]:
    return {} if interval is None else {"low": interval.low, "high": interval.high, "level": interval.level}


def _csv(head: Sequence[str], lines: Iterable[Mapping[str, Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, head, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(lines)
    return buffer.getvalue()
