"""Checks of what a user gives as an option: each raises ValueError with one sentence that names it."""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class NoOptions:
    """A method without options."""


def check_whole(name: str, value: Any, least: int = 1) -> None:
    """Raise ValueError unless `value` is a whole number of at least `least`.

    >>> check_whole("delta_t", 1.5)
    Traceback (most recent call last):
    ValueError: delta_t must be a whole number of at least 1, got 1.5
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def check_flag(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is True or False; a text such as "no" would count as true."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")


def check_batches(value: Any) -> None:
    """Raise ValueError unless `value` is None or something to iterate over."""
    if not hasattr(value, "__iter__") and value is not None:
        raise ValueError(f"batches must be a list or a loader of (input, target) pairs, got {type(value).__name__}")


def check_list(name: str, value: Any, example: str) -> None:
    """Raise ValueError unless `value` is a list or a tuple that holds something."""
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"{name} must be a list such as {example}, got {value!r}")


def check_steps(total_steps: int | None) -> int | None:
    """The length of a training as a whole number; ValueError if it is none."""
    if total_steps is None:
        return None
    real = isinstance(total_steps, numbers.Real) and not isinstance(total_steps, bool)
    if not real or total_steps % 1 or total_steps < 1:
        raise ValueError(f"total_steps must be a whole number of optimizer steps, at least 1, got {total_steps!r}")
    return int(total_steps)
