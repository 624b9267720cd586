"""Checkpoints that are whole or not there, hold tensors and plain values only, and are refused when torn or foreign."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from s2sam.train.atomic import atomic

FORMAT = "s2sam-checkpoint-1"
_TORN = (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, ValueError, AttributeError, TypeError, OSError)


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write `state` (see `TrainState.state_dict`) to `path`; an older file there is replaced in one move."""
    with atomic(path) as temporary:
        torch.save({"format": FORMAT, **state}, temporary)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The state in `path`, on the CPU. Nothing but tensors and plain values is unpickled.

    Raises:
        ValueError: there is no such file, it is torn, or no checkpoint of this trainer; the sentence names it.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no checkpoint at {path}; give the path of a last.pt or best.pt")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except _TORN as error:
        raise ValueError(
            f"{path} is torn or no checkpoint ({type(error).__name__}); delete it and use an older one, or train again"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(
            f"{path} was not written by s2sam train (no format {FORMAT!r} in it); give one of its checkpoints"
        )
    return state
