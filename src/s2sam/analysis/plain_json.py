"""JSON that every reader takes: numbers that it does not have, NaN and the infinite ones, become null."""

from __future__ import annotations

import json
import math
from typing import Any


def finite(value: Any) -> Any:
    """Plain values with None in place of numbers that are not finite.

    >>> finite({"a": [1.0, math.inf], "b": (math.nan, 2)})
    {'a': [1.0, None], 'b': [None, 2]}
    """
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(value: Any, indent: int | None = None) -> str:
    """The JSON of plain values, with null for what is not finite.

    >>> to_json([0.5, math.nan])
    '[0.5, null]'
    """
    return json.dumps(finite(value), indent=indent, allow_nan=False)
