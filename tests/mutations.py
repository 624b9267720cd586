"""Seeded damage to files: values replaced or gone, bytes flipped, cut out, put in; and what a verb may do with them."""

from __future__ import annotations

import copy
import random
from typing import Any

from s2sam.cli.main import main

STRANGE: list[Any] = [
    None, [], {}, [None], [[1]], {"a": {"b": [1]}}, -1, 0, 0.5, 10**30, 10**400, 1e300, 2**64 - 1, float("nan"),
    float("inf"), "abc", "", "\x00", "$\\x$", True,
]  # fmt: skip


def places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something is in nested mappings and lists."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place, *(inner for key in keys for inner in places(value[key], (*place, key)))]


def changed(value: Any, draw: random.Random) -> Any:
    """A copy in which one value is another one, or gone."""
    value = copy.deepcopy(value)
    *path, last = draw.choice(places(value)[1:])
    inside = value
    for key in path:
        inside = inside[key]
    if draw.random() < 0.2:
        del inside[last]
    else:
        inside[last] = copy.deepcopy(draw.choice(STRANGE))
    return value


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Bytes with some of them flipped, lost or new, or cut off."""
    at, how = draw.randrange(len(content)), draw.randrange(4)
    if how == 0:
        return content[:at]
    if how == 1:
        return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]
    if how == 2:
        return content[:at] + content[at + draw.randrange(1, 30) :]
    return content[:at] + draw.randbytes(draw.randrange(1, 9)) + content[at:]


def ends_well(capsys, *argv: object) -> bool:
    """Run a verb: True if it did its work, False if it refused with one sentence; anything else fails the test."""
    capsys.readouterr()
    code = main([str(word) for word in argv])
    said = capsys.readouterr().err
    assert code in (0, 2), argv
    assert "Traceback" not in said
    errors = [line for line in said.splitlines() if line.startswith("s2sam: error: ")]
    assert len(errors) == (0 if code == 0 or (argv[:2] == ("data", "check") and not said) else 1), said
    return code == 0
