"""s2sam: single-step sharpness-aware minimization and sparse training for PyTorch, as hooks on an optimizer.

Names are loaded at first use (PEP 562), so `import s2sam` alone loads nothing but the standard library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "S2SAM": "s2sam.sam.single_step",
    "SAM": "s2sam.sam.two_step",
    "sparsify": "s2sam.attach",
    "Sparsifier": "s2sam.sparse.base",
}

__all__ = ["S2SAM", "SAM", "Sparsifier", "__version__", "compact", "sparsify"]

if TYPE_CHECKING:
    from s2sam import compact
    from s2sam.attach import sparsify
    from s2sam.sam.single_step import S2SAM
    from s2sam.sam.two_step import SAM
    from s2sam.sparse.base import Sparsifier


def __getattr__(name: str) -> Any:
    if name == "compact":
        return importlib.import_module("s2sam.compact")
    if name not in _HOME:
        raise AttributeError(f"module 's2sam' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
