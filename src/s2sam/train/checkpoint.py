"""Checkpoints that are whole or not there, hold tensors and plain values only, and are refused when torn or foreign.

The file is what `torch.save` writes, a zip archive whose comment is a SHA-256 of all bytes before the digest. torch
compares no checksum, so without it a flipped bit loads as other weights. Version 3 had no digest: such a file
still loads, and damage in it is noticed only where it no longer loads or a value is of another kind.

Cost of the digest: 0.07 s per 100 MB to write and to read, on an AMD EPYC with instructions for SHA-256.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from s2sam.train.atomic import atomic

FORMAT, VERSION = "s2sam-checkpoint", 4
UNSIGNED = 3  #: the last version without a digest
#: what a checkpoint holds, by kind; see `Trainer.state_dict`
CONTENT: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("config", "model", "optimizer", "scheduler", "scaler", "batches", "record", "logs"), (dict,)),
    **dict.fromkeys(("best", "sparsifier", "ema"), (dict, type(None))),
    **dict.fromkeys(("epoch", "step"), (int,)),
    **dict.fromkeys(("rng", "meter", "step_seconds"), (torch.Tensor,)),
    "cuda_rng": (torch.Tensor, type(None)), "skipped": (list, type(None)), "data_digest": (str,),
    "seconds": (float, int),
}  # fmt: skip
_MEASURED = ("test_top1", "val_top1", "sparsity")  #: what the best epoch and the record of an epoch tell
_MARK = b"s2sam sha256 "  #: begins the comment of the archive; the digest in hexadecimal digits follows
_COMMENT = len(_MARK) + 64


class TornError(ValueError):
    """The file is damaged or no checkpoint at all, and an older one may serve."""


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write `state` (see `Trainer.state_dict`) to `path`; an older file there is replaced in one move.

    Raises:
        RuntimeError: it cannot be written, for instance because the disk is full; the older file is still there.
    """
    try:
        with atomic(path) as temporary, open(temporary, "w+b") as file:
            torch.save({"format": FORMAT, "version": VERSION, **state}, file)
            _sign(file)
    except (OSError, RuntimeError) as error:
        kept = "the one before it is whole" if path.exists() else "there is none before it"
        raise RuntimeError(
            f"the checkpoint {path} could not be written ({_reason(error)}; is the disk full?), {kept}; make room and "
            "run the same command again"
        ) from error


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The state in `path`, on the CPU. Nothing but tensors and plain values is unpickled.

    Raises:
        ValueError: there is no such file, it is torn or damaged (:class:`TornError`), no checkpoint of this trainer, or
            of another version; the sentence names it.
        RuntimeError: it is whole, and there is not enough memory for it.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no checkpoint at {path}; give the path of a last.pt or best.pt")
    with open(path, "rb") as file:
        signed = _signed(file)
        if signed is False:
            raise _torn(path, "damaged: its content is not what was written")
        file.seek(0)
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever torch's reader stumbles over in damaged bytes
            if signed:
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                raise RuntimeError(
                    f"{path} is whole and cannot be loaded ({reason}); make memory free, or use the torch that wrote it"
                ) from error
            raise _torn(path, f"torn or no checkpoint ({type(error).__name__})") from error
    found = state.get("format") if isinstance(state, dict) else None
    if not isinstance(found, str) or not found.startswith(FORMAT):
        raise ValueError(
            f"{path} was not written by s2sam train (no format {FORMAT!r} in it); give one of its checkpoints"
        )
    version = state.get("version", 1)
    if type(version) is not int or not UNSIGNED <= version <= VERSION:
        newer = isinstance(version, int) and version > VERSION
        advice = "upgrade s2sam" if newer else "continue it with the s2sam that wrote it, or train again"
        raise ValueError(
            f"{path} has version {version!r} of the format, this s2sam reads versions {UNSIGNED} and {VERSION}; "
            f"{advice}"
        )
    if version > UNSIGNED and not signed:
        raise _torn(path, "torn or no checkpoint (no digest)")
    damage = _damage(state)
    if damage:
        raise _torn(path, f"damaged: {damage}")
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
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError, ArithmeticError) as error:
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
    best, record = state["best"], state["record"]
    for name, kept, wanted in (("best", best, ("epoch", *_MEASURED)), ("record", record, ("test_loss", *_MEASURED))):
        lacking = [key for key in wanted if kept and not isinstance(kept.get(key, ""), (int, float, type(None)))]
        if lacking:
            return f"its {name!r} has no number {lacking[0]!r}"
    if state["epoch"] > 0 and not best and record.get("test_top1") is not None:
        return "it has no 'best' epoch though epochs were measured"
    return ""


def _torn(path: Path, how: str) -> TornError:
    return TornError(f"{path} is {how}; delete it and use an older one, or train again")


def _sign(file: BinaryIO) -> None:
    """Give the zip archive that was just written its comment: the digest of all that stands before it."""
    file.seek(-2, 2)
    if file.read(2) != b"\0\0":
        raise RuntimeError("torch.save ended its file with a comment, where s2sam's digest belongs; report this")
    file.seek(-2, 2)
    file.write(struct.pack("<H", _COMMENT))  # the last field of the archive: how long its comment is
    length = file.tell()
    digest = _digest(file, length)
    file.seek(length)
    file.write(_MARK + digest)


def _signed(file: BinaryIO) -> bool | None:
    """True if the file is what was written, False if it has a digest of something else, None if it has no digest."""
    length = file.seek(0, 2) - _COMMENT
    if length < 0:
        return None
    file.seek(length)
    mark, digest = file.read(len(_MARK)), file.read()
    return None if mark != _MARK else digest == _digest(file, length)


def _digest(file: BinaryIO, length: int) -> bytes:
    """The SHA-256 of the first `length` bytes, in hexadecimal digits."""
    file.seek(0)
    found = hashlib.sha256()
    while length > 0 and (block := file.read(min(length, 1 << 20))):
        found.update(block)
        length -= len(block)
    return found.hexdigest().encode()


def _reason(error: BaseException) -> str:
    """What the system said, if it said something: the first cause of all."""
    root: BaseException | None = error
    while root is not None:
        if isinstance(root, OSError) and root.strerror:
            return root.strerror
        root = root.__cause__ or root.__context__
    return str(error).splitlines()[0][:100]
