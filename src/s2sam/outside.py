"""Bytes from outside: one boundary for whatever a reader stumbles over, plain values of bounded size, and their shapes.

Whoever reads a file that this process did not write reads *and checks* it inside :func:`reading`; what comes after can
rely on it, and an error there is a fault of the program that keeps its traceback.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LARGEST = 1e39  #: numbers beyond it are no measurement; those of fp32 end at 3.4e38
DEEPEST, MOST = 60, 3_000_000  #: nesting and number of values of a file, so that nothing recurses or swells without end


class DamagedError(ValueError):
    """A file from outside cannot be used; the sentence names it and says what to do."""


@contextmanager
def reading(path: Path | str, what: str, advice: str) -> Iterator[None]:
    """Turns any error of the block into one sentence; put only what reads and checks outside bytes into it.

    A DamagedError of the block is such a sentence already. What the system says (no such file, no permission) passes,
    and so does a missing package.

    Raises:
        DamagedError: "PATH is WHAT (the reason); ADVICE".

    >>> with reading("run/env.json", "damaged", "train the run again"):
    ...     [][0]
    Traceback (most recent call last):
    s2sam.outside.DamagedError: run/env.json is damaged (IndexError: list index out of range); train the run again
    """
    try:
        yield
    except (DamagedError, ImportError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:  # not a seek to where a damaged file points
            raise
        mark = getattr(error, "problem_mark", None)  # where YAML went wrong
        told = " ".join(str(error).split()) if mark is None else f"line {mark.line + 1}"
        kind = "" if told and (mark is not None or type(error) is ValueError) else f"{type(error).__name__}: "
        reason = f"{kind}{told[:157] + '...' if len(told) > 160 else told}".removesuffix(": ").rstrip(".")
        raise DamagedError(f"{path} is {what} ({reason}); {advice}") from error


def parse_json(text: str | bytes) -> Any:
    """Plain values from JSON by the standard; numbers that are not finite or above :data:`LARGEST` are refused.

    >>> parse_json('{"loss": NaN}')
    Traceback (most recent call last):
    ValueError: the number NaN is none that was measured
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    return bounded(json.loads(text, parse_constant=_no_number, parse_float=_float, parse_int=_int))


def parse_yaml(text: str | bytes) -> Any:
    """Plain values from YAML; a value may be named and repeated, but not contain itself.

    >>> parse_yaml("sam: {rho: 0.1}")
    {'sam': {'rho': 0.1}}
    """
    import yaml

    return bounded(yaml.safe_load(text.decode("utf-8") if isinstance(text, bytes) else text))


def bounded(value: Any) -> Any:
    """`value`, if it is nested no deeper than :data:`DEEPEST`, no larger than :data:`MOST`, and all keys are texts.

    >>> endless = []; endless.append(endless)
    >>> bounded(endless)
    Traceback (most recent call last):
    ValueError: it is nested deeper than 60 levels, or contains itself
    """
    todo, count = [(value, 0)], 0
    while todo:
        one, depth = todo.pop()
        count += 1
        if depth > DEEPEST:
            raise ValueError(f"it is nested deeper than {DEEPEST} levels, or contains itself")
        if count > MOST:
            raise ValueError(f"it holds more than {MOST:,} values")
        if isinstance(one, Mapping):
            strange = next((key for key in one if not isinstance(key, str)), None)
            if strange is not None:
                raise ValueError(f"its key {_short(strange)} is no text")
            todo += ((inner, depth + 1) for inner in one.values())
        elif isinstance(one, list | tuple | set):
            todo += ((inner, depth + 1) for inner in one)
    return value


@dataclass(frozen=True)
class Number:
    """A number in [low, high]; a whole one if `whole`."""

    low: float = -LARGEST
    high: float = LARGEST
    whole: bool = False

    def __contains__(self, value: Any) -> bool:
        kinds = int if self.whole else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool) and self.low <= value <= self.high


@dataclass(frozen=True)
class Row:
    """A list of at least one element, each of this shape."""

    shape: Any


NUMBER, SHARE, COUNT, POSITIVE = Number(), Number(0, 1), Number(0, whole=True), Number(0)
OPTIONAL = (NUMBER, None)


def misfit(value: Any, shape: Any, name: str = "it") -> str:
    """Where a plain value is not of a shape, in words; "" if it is.

    A shape is a :class:`Number`, a type, None, a tuple of which one must fit, a list with the shape of every element
    (:class:`Row`: at least one), a mapping with those of its keys ("key?" may be missing, others are left alone),
    or {...: shape} for any keys.

    >>> misfit({"step": 3, "density": {"fc": 1.5}}, {"step": COUNT, "density": {...: SHARE}})
    'density.fc is 1.5'
    >>> misfit({"top1": None}, {"top1": (SHARE, None), "loss": NUMBER})
    'it has no loss'
    """
    wrong = f"{name} is {_short(value)}"
    if isinstance(shape, tuple):
        found = [misfit(value, one, name) for one in shape]
        return "" if "" in found else max(found, key=lambda text: text != wrong)
    if isinstance(shape, Number):
        return "" if value in shape else wrong
    if shape is None or isinstance(shape, type):
        return "" if (value is None if shape is None else isinstance(value, shape)) else wrong
    if isinstance(shape, list | Row):
        inner = shape.shape if isinstance(shape, Row) else shape[0]
        if not isinstance(value, list) or (isinstance(shape, Row) and not value):
            return wrong
        return next((text for i, one in enumerate(value) if (text := misfit(one, inner, f"{name}[{i}]"))), "")
    if not isinstance(value, Mapping):
        return wrong
    inside = "" if name == "it" else f"{name}."
    for key, inner in shape.items():
        if key is ...:
            wrongs = (misfit(one, inner, f"{inside}{own}") for own, one in value.items())
            if text := next(filter(None, wrongs), ""):
                return text
        elif key.removesuffix("?") in value:
            if text := misfit(value[key.removesuffix("?")], inner, f"{inside}{key.removesuffix('?')}"):
                return text
        elif not key.endswith("?"):
            return f"{name} has no {key}"
    return ""


def fit(value: Any, shape: Any) -> None:
    """Raise ValueError, saying where, unless `value` is of this shape; inside of :func:`reading`."""
    wrong = misfit(value, shape)
    if wrong:
        raise ValueError(wrong)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _no_number(text: str) -> float:
    raise ValueError(f"the number {text[:20]} is none that was measured")


def _float(text: str) -> float:
    value = float(text)
    return value if abs(value) <= LARGEST else _no_number(text)


def _int(text: str) -> int | float:
    return int(text) if len(text) <= 40 else _no_number(text)
