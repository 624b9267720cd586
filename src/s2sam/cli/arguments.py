"""An argparse parser that raises instead of printing its usage, so that every wrong use ends in one sentence."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any, NoReturn

from s2sam.sparse.names import nearest


class Parser(argparse.ArgumentParser):
    """For verbs with a few arguments of their own; `s2sam.cli.main` prints what it raises.

    >>> parser = Parser(prog="s2sam look", allow_abbrev=False)
    >>> _ = parser.add_argument("--points")
    >>> parser.parse_args(["--pionts", "5"])
    Traceback (most recent call last):
    ValueError: there is no option --pionts; did you mean --points? (see `s2sam look --help`)
    """

    def error(self, message: str) -> NoReturn:
        """Raise ValueError."""
        raise ValueError(f"{message} (see `{self.prog} --help`)")

    def refuse(self, argv: Sequence[str], options: Iterable[str], when: str) -> None:
        """Raise ValueError if a command line gives one of these options, which have no effect `when` something is so.

        >>> Parser(prog="s2sam look").refuse(["--points=5"], ["--points"], "with --lines")
        Traceback (most recent call last):
        ValueError: --points has no effect with --lines; leave it out
        """
        given = {word.partition("=")[0] for word in argv}
        for option in options:
            if option in given:
                raise ValueError(f"{option} has no effect {when}; leave it out")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:  # type: ignore[override]
        """As of argparse, but what is left over raises ValueError: an unknown option with the nearest one that exists.

        Options come first, as an unknown one may also be why another argument is missing. Those of a verb's own verbs
        (`s2sam data get`) are looked at by their parser.
        """
        given = list(sys.argv[1:] if args is None else args)
        if self._subparsers is None:
            self._check(word for word in takewhile(lambda word: word != "--", given) if word.startswith("--"))
        found, rest = super().parse_known_args(given, namespace)
        self._check(word for word in rest if word.startswith("-"))
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return found, rest

    def _check(self, given: Iterable[str]) -> None:
        known = [option for action in self._actions for option in action.option_strings]
        for word in given:
            name = word.partition("=")[0]
            if name not in known and not (self.allow_abbrev and any(option.startswith(name) for option in known)):
                self.error(f"there is no option {name}{_hint(name, known)}")


def _hint(name: str, known: Sequence[str]) -> str:
    by_word = {option.lstrip("-"): option for option in known}
    close = nearest(name.lstrip("-"), by_word)
    return f"; did you mean {by_word[close]}?" if close else ""
