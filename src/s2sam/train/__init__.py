"""Training runs from a configuration: `run(TrainConfig(...))`. Names load at first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "TrainConfig": "s2sam.train.config",
    "load_config": "s2sam.train.config_files",
    "run": "s2sam.train.loop",
}

__all__ = ["TrainConfig", "load_config", "run"]

if TYPE_CHECKING:
    from s2sam.train.config import TrainConfig
    from s2sam.train.config_files import load_config
    from s2sam.train.loop import run


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 's2sam.train' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
