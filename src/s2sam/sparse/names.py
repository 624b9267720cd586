"""Names that a user types: which ones a pattern means, and which one was meant. Standard library only."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

LAYERWISE = ("uniform", "uniform-first-dense", "uniform-first-last-dense", "er", "erk")  #: see s2sam.sparse.budget
DISTRIBUTIONS = ("auto", *LAYERWISE, "global")  #: what `distribution` can be, besides a map of layers


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The name most like `name`, or None if nothing is similar.

    >>> nearest("rigel", ["set", "rigl"])
    'rigl'
    """
    by_lower = {known.lower(): known for known in reversed(list(names))}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    return by_lower[found[0]] if found else None


def unknown(what: str, name: str, names: Iterable[str]) -> ValueError:
    """The error for a name that does not exist; it offers the nearest one and lists them all if they are few.

    >>> print(unknown("method", "rigel", ["set", "rigl"]))
    unknown method 'rigel'; did you mean 'rigl'? (one of: set, rigl)
    """
    known = list(names)
    close = nearest(name, known)
    hint = f"; did you mean {close!r}?" if close else ""
    few = f" (one of: {', '.join(known)})" if 0 < len(known) <= 40 else ""
    return ValueError(f"unknown {what} {name!r}{hint}{few}")


def select(pattern: str, names: Sequence[str]) -> list[str]:
    """The parameter names that `pattern` means.

    In this order: the one called exactly so, those of the module called exactly so, those in which the regular
    expression is found.

    >>> select("fc", ["fc.weight", "fc2.weight"]), select("fc", ["a.fc1.weight", "a.fc2.weight"])
    (['fc.weight'], ['a.fc1.weight', 'a.fc2.weight'])

    Raises:
        ValueError: the pattern is no regular expression.
    """
    if pattern in names:
        return [pattern]
    of_module = [name for name in names if name.rpartition(".")[0] == pattern]
    if of_module:
        return of_module
    return [name for name in names if compiled(pattern).search(name)]


def compiled(pattern: str) -> re.Pattern[str]:
    """`re.compile` with a ValueError that shows the pattern."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no valid regular expression: {error}") from error
