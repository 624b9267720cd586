"""Writes a table: Markdown, the cells and the runs as CSV, and the page. Files appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

from s2sam.suite.page import render
from s2sam.suite.result import SuiteTable
from s2sam.suite.text import cells_csv, runs_csv, to_markdown
from s2sam.train.atomic import write_text


def write_table(table: SuiteTable, folder: str | Path, *, how: str = "") -> list[Path]:
    """Write table.md, table.csv (cells), runs.csv and table.html into `folder`; returns the paths, the page last.

    Raises:
        ValueError: a file stands where the folder should be.
        OSError: it cannot be written there.
    """
    folder = Path(folder)
    contents = {
        "table.md": to_markdown(table),
        "table.csv": cells_csv(table),
        "runs.csv": runs_csv(table),
        "table.html": render(table, how=how),
    }
    make_folder(folder)
    for name, text in contents.items():
        write_text(folder / name, text)
    return [folder / name for name in contents]


def make_folder(folder: Path) -> None:
    """Make `folder` and write a file there for a moment, so that hours of training do not end in an error.

    Raises:
        ValueError: a file stands where the folder should be, or nothing can be written there.
    """
    probe = folder / ".s2sam-can-write"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(probe, "yes")
        probe.unlink()
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"cannot write into {folder}: a file stands there; choose another --out") from None
    except OSError as error:
        raise ValueError(f"cannot write into {folder}: {error.strerror}; make room or choose another --out") from None
