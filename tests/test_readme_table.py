"""The tables of measurements and the pictures in README and docs are what the committed files and scripts say."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "results" / "readme_table.py"


def test_the_table_is_what_the_files_say():
    found = subprocess.run([sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True, timeout=100)
    assert found.returncode == 0, found.stderr + "run python results/readme_table.py"


def test_the_readme_has_the_first_rows_only_and_the_page_has_all():
    root = SCRIPT.parents[1]
    rows = {
        page: [line for line in (root / page).read_text().splitlines() if line.startswith("| step time")]
        for page in ("README.md", "docs/measured.md")
    }
    assert 2 <= len(rows["README.md"]) <= 5 < len(rows["docs/measured.md"])
    whole = [line.replace("](../", "](") for line in rows["docs/measured.md"]]
    assert all(line in whole for line in rows["README.md"])


def test_the_picture_is_what_its_script_draws():
    script = SCRIPT.parents[1] / "docs" / "pictures" / "flow.py"
    assert script.with_name("flow.svg").read_text() == runpy.run_path(str(script))["draw"]()
