"""Writes a report: the page, the table as Markdown and CSV. Files appear whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from s2sam.report.arms import group_runs
from s2sam.report.cost import cost_from_rounds
from s2sam.report.cost_section import cost_section
from s2sam.report.formats import to_csv, to_markdown
from s2sam.report.html import render
from s2sam.report.panels import Section
from s2sam.report.read import read_runs
from s2sam.report.tables import Table, build_table
from s2sam.train.atomic import write_text


def make_table(folders: Iterable[str | Path], rounds: Mapping[str, Sequence[float]] | None = None) -> Table:
    """The table of finished run folders; `rounds` are step times by arm name, see :mod:`s2sam.report.cost`.

    Raises:
        ValueError: a run is not finished or whole, or the runs do not form a matched design; names the folder.
    """
    arms = group_runs(read_runs(folders))
    return build_table(arms, None if rounds is None else cost_from_rounds(rounds, arms))


def write_report(
    table: Table,
    page: str | Path,
    *,
    tables: bool = True,
    title: str = "Sparse and sharpness-aware training, side by side",
    how: str = "",
    remarks: Sequence[str] = (),
    sections: Sequence[Section] = (),
) -> list[Path]:
    """Write `page` and, with `tables`, table.md and table.csv beside it; returns the paths, the page last.

    Raises:
        ValueError: the page's folder cannot be made because a file is in the way.
    """
    page = Path(page)
    contents = (
        {page.with_name("table.md"): to_markdown(table), page.with_name("table.csv"): to_csv(table)} if tables else {}
    )
    costs = cost_section([row.arm for row in table.rows])
    contents[page] = render(table, title=title, how=how, remarks=remarks, sections=sections, costs=costs)
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(
            f"cannot write {page}: a file stands where its folder should be; choose another --out"
        ) from None
    if page.is_dir():
        raise ValueError(f"{page} is a folder; give the name of the page to write, such as {page / 'report.html'}")
    for path, text in contents.items():
        write_text(path, text)
    return list(contents)
