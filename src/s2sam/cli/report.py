"""`s2sam report RUN_FOLDER... --out report.html`: compare finished runs in one self-contained page."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from s2sam.cli.arguments import Parser

if TYPE_CHECKING:
    from rich.console import Console

    from s2sam.report.tables import Table

HELP = "compare finished runs in one self-contained page"


def run(argv: list[str]) -> int:
    """Write the page and print the table.

    Raises:
        ValueError: runs that are not finished or cannot be compared, or a place that cannot be written.
    """
    parser = Parser(prog="s2sam report", description=HELP, allow_abbrev=False)
    parser.add_argument("folders", nargs="+", metavar="RUN_FOLDER", help="a finished run, or a folder of finished runs")
    parser.add_argument("--out", default="report.html", metavar="FILE", help="page to write (default: %(default)s)")
    parser.add_argument(
        "--cost", metavar="FILE", help="cost.json with step times measured side by side, as the demo writes it"
    )
    parser.add_argument(
        "--surfaces", metavar="FOLDER", help="the --out folder of `s2sam surface`, to show its grids of these runs"
    )
    parser.add_argument("--tables", action="store_true", help="write table.md and table.csv beside the page as well")
    args = parser.parse_args(argv)

    from rich.console import Console

    from s2sam.report.cost import load_rounds
    from s2sam.report.sections import measured_sections
    from s2sam.report.surface_section import find_surfaces, surface_section
    from s2sam.report.write import make_table, write_report

    table = make_table(args.folders, load_rounds(args.cost) if args.cost else None)
    arms = [row.arm for row in table.rows]
    sections = []
    if args.surfaces:
        sections.append(surface_section(find_surfaces(args.surfaces, arms), arms))
    sections += measured_sections(arms)
    how = shlex.join(["s2sam", "report", *argv])
    paths = write_report(table, args.out, tables=args.tables, how=how, sections=sections)
    console = Console(highlight=False)
    show(table, console)
    console.print(str(paths[-1]), markup=False, soft_wrap=True)
    return 0


def show(table: Table, console: Console) -> None:
    """Print the tables, their notes, and in one sentence how many comparisons show a difference."""
    from s2sam.report.formats import to_rich, to_rich_beside
    from s2sam.report.html import summary_sentences

    for part in (to_rich(table), to_rich_beside(table)):
        if part is not None:
            console.print(part)
            console.print()
    for note in table.notes:
        console.print(f"* {note}", style="dim", markup=False)
    console.print()
    console.print(summary_sentences(table)[0], style="bold", markup=False)
