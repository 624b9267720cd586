"""An argparse parser that raises instead of printing its usage, so that every wrong use ends in one sentence."""

from __future__ import annotations

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """For verbs with a few arguments of their own; `s2sam.cli.main` prints what it raises."""

    def error(self, message: str) -> NoReturn:
        """Raise ValueError."""
        raise ValueError(f"{message} (see `{self.prog} --help`)")
