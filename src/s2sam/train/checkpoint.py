"""Checkpoints that are whole or not there, hold tensors and plain values only, and are refused when torn or foreign."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from s2sam.train.atomic import atomic

FORMAT, VERSION = "s2sam-checkpoint", 2
_TORN = (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, ValueError, AttributeError, TypeError, OSError)


class TornError(ValueError):
    """The file is damaged, or no checkpoint at all."""


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write `state` (see `Trainer.state_dict`) to `path`; an older file there is replaced in one move.

    Raises:
        RuntimeError: it cannot be written, for instance because the disk is full; the older file is still there.
    """
    try:
        with atomic(path) as temporary, open(temporary, "wb") as file:
            torch.save({"format": FORMAT, "version": VERSION, **state}, file)
    except (OSError, RuntimeError) as error:
        kept = "the one before it is whole" if path.exists() else "there is none before it"
        raise RuntimeError(
            f"the checkpoint {path} could not be written ({_reason(error)}; is the disk full?), {kept}; make room and "
            "run the same command again"
        ) from error


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The state in `path`, on the CPU. Nothing but tensors and plain values is unpickled.

    Raises:
        ValueError: there is no such file, it is torn (:class:`TornError`), no checkpoint of this trainer, or of another
            version; the sentence names it.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no checkpoint at {path}; give the path of a last.pt or best.pt")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except _TORN as error:
        raise TornError(
            f"{path} is torn or no checkpoint ({type(error).__name__}); delete it and use an older one, or train again"
        ) from error
    found = state.get("format") if isinstance(state, dict) else None
    if not isinstance(found, str) or not found.startswith(FORMAT):
        raise ValueError(
            f"{path} was not written by s2sam train (no format {FORMAT!r} in it); give one of its checkpoints"
        )
    version = state.get("version", 1)
    if version != VERSION:
        advice = "upgrade s2sam" if version > VERSION else "continue it with the s2sam that wrote it, or train again"
        raise ValueError(f"{path} has version {version} of the format, this s2sam reads version {VERSION}; {advice}")
    return state


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    cause = error.__cause__ or error.__context__
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return str(error).splitlines()[0][:100]
