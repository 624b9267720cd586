"""`s2sam list [methods|models|data|recipes|tables]`: what there is, from the registries."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from s2sam import registry
from s2sam.cli.arguments import Parser
from s2sam.sparse.names import unknown

HELP = "list methods, models, data, recipes and tables"
Rows = tuple[Sequence[str], list[Sequence[str]]]


def run(argv: list[str]) -> int:
    """Print one table, or all."""
    parser = Parser(prog="s2sam list", description=HELP)
    parser.add_argument("what", nargs="?", metavar="|".join(TABLES), help="one of them; all by default")
    what = parser.parse_args(argv).what
    if what is not None and what not in TABLES:
        raise unknown("list", what, list(TABLES))
    for name in TABLES if what is None else (what,):
        header, rows = TABLES[name]()
        show(name, header, rows)
    return 0


def show(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A rich table on a terminal; elsewhere lines of tab-separated cells under a `# title` line, for other programs."""
    if not sys.stdout.isatty():
        print("\n".join([f"# {title}", "\t".join(header), *("\t".join(row) for row in rows)]))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*header, title=title, title_justify="left", box=None, header_style="bold")
    for row in rows:
        table.add_row(*map(Text, row))  # brackets are no markup here
    Console().print(table)


def _methods() -> Rows:
    rows = [
        (m.name, m.kind, " ".join(f"{k}={json.dumps(v)}" for k, v in m.defaults.items()) or "-", m.paper)
        for m in registry.list_methods()
    ]
    return ("name", "kind", "options", "paper"), [("dense", "-", "-", "-"), *rows]


def _models() -> Rows:
    return ("name", "description", "paper"), [(m.name, m.description, m.paper) for m in registry.list_models()]


def _data() -> Rows:
    return ("name", "description", "source"), [(d.name, d.description, d.source) for d in registry.list_data()]


def _recipes() -> Rows:
    return ("name", "description"), [(r.name, r.description) for r in registry.list_recipes()]


def _tables() -> Rows:
    from s2sam.suite.schema import load_suite, tables

    suites = [load_suite(name) for name in tables()]
    return ("name", "description", "title"), [(s.name, s.description, s.title) for s in suites]


TABLES = {"methods": _methods, "models": _models, "data": _data, "recipes": _recipes, "tables": _tables}
