"""Checkpoints that are whole or not there, hold tensors and plain values only, and are refused when torn or foreign."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from s2sam.train.atomic import atomic

FORMAT, VERSION = "s2sam-checkpoint", 3
#: what a checkpoint holds, by kind; see `Trainer.state_dict`
CONTENT: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("config", "model", "optimizer", "scheduler", "scaler", "batches", "record", "logs"), (dict,)),
    **dict.fromkeys(("best", "sparsifier", "ema"), (dict, type(None))),
    **dict.fromkeys(("epoch", "step"), (int,)),
    **dict.fromkeys(("rng", "meter", "step_seconds"), (torch.Tensor,)),
    "cuda_rng": (torch.Tensor, type(None)), "skipped": (list, type(None)), "data_digest": (str,),
    "seconds": (float, int),
}  # fmt: skip
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
        ValueError: there is no such file, it is torn (:class:`TornError`), no checkpoint of this trainer, of another
            version, or something is missing in it; the sentence names it.
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
        newer = isinstance(version, int) and version > VERSION
        advice = "upgrade s2sam" if newer else "continue it with the s2sam that wrote it, or train again"
        raise ValueError(f"{path} has version {version!r} of the format, this s2sam reads version {VERSION}; {advice}")
    damage = _damage(state)
    if damage:
        raise ValueError(f"{path} is damaged: {damage}; delete it and use an older one, or train again")
    return state


def kept_name(epoch: int, step: int, every: int) -> list[str]:
    """The name under which the checkpoint after this epoch stays if each `every`-th does; [] if this one does not.

    >>> kept_name(4, 320, 2), kept_name(3, 240, 2), kept_name(3, 240, 0)
    (['step-00000320.pt'], [], [])
    """
    return [f"step-{step:08d}.pt"] if every and epoch % every == 0 else []


@contextmanager
def fitting(name: str) -> Iterator[None]:
    """Whatever the block, which loads parts of the checkpoint `name`, stumbles over becomes one sentence.

    Raises:
        ValueError: that sentence.
    """
    try:
        yield
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = " ".join((repr(error) if isinstance(error, KeyError) else str(error)).split())[:300]
        raise ValueError(
            f"{name} does not fit this model, its masks or its optimizer ({reason}); train anew with --resume never"
        ) from error


def _damage(state: Mapping[str, Any]) -> str:
    """What is missing or of another kind than :data:`CONTENT` says; "" if nothing is."""
    for key, kinds in CONTENT.items():
        if key not in state:
            return f"it has no {key!r}"
        if not isinstance(state[key], kinds):
            return f"its {key!r} is no {kinds[0].__name__}"
    lengths = (state["epoch"], state["step"], *state["logs"].values())
    if not all(isinstance(number, int) and number >= 0 for number in lengths):
        return "its counts of epochs, steps and records are no whole numbers"
    return ""


def _reason(error: BaseException) -> str:
    """What the system said, if it said something: the first cause of all."""
    root: BaseException | None = error
    while root is not None:
        if isinstance(root, OSError) and root.strerror:
            return root.strerror
        root = root.__cause__ or root.__context__
    return str(error).splitlines()[0][:100]
