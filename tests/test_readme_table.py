"""The README's table of measurements is what the committed files say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "results" / "readme_table.py"


def test_the_table_is_what_the_files_say():
    found = subprocess.run([sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True, timeout=100)
    assert found.returncode == 0, found.stderr + "run python results/readme_table.py"
