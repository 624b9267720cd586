"""Which checkpoint a run goes on from, and whether it may."""

from __future__ import annotations

import dataclasses
import filecmp
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2sam.sparse.names import nearest
from s2sam.train.atomic import atomic
from s2sam.train.checkpoint import TornError, load_checkpoint
from s2sam.train.config import TrainConfig
from s2sam.train.folder import RunFolder

ANYWHERE = ("out", "device", "checkpoint_every", "keep_every")  #: settings that do not decide what is trained
_FREE = (
    "model_options",
    "sparse.options",
    "sparse.distribution",
    "data_options.options",
)  #: mappings that are one value each


@dataclass(frozen=True)
class Resume:
    """A checkpoint that fits: where it is, what it holds, and which newer ones were torn."""

    path: Path
    saved: dict[str, Any]
    torn: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"the checkpoint {self.path}"

    @property
    def run(self) -> Path:
        """The run folder it lies in."""
        return self.path.parent.parent


def find_resume(folder: RunFolder, config: TrainConfig, resume: str, *, overwrite: bool = False) -> Resume | None:
    """The checkpoint to go on from, or None to start from the beginning.

    Args:
        folder: where the run goes.
        config: what it is to do.
        resume: "auto": the newest complete checkpoint in the folder, if there is one; "never"; or the path of a
            checkpoint or of a run folder.
        overwrite: what is in the folder may go: "auto" is then "never".

    Raises:
        ValueError: there is none at that path, all are torn, it is of a run with other settings, or the logs that
            belong to it are not beside it; nothing is changed.
    """
    if resume == "never" or (resume == "auto" and overwrite):
        return None
    if resume == "auto":
        found = newest(folder)
        if found is None:
            return None
        fresh = "add --resume never to train anew"
    else:
        found = _at(resume)
        if found.run.resolve() != folder.path.resolve() and not overwrite and _has_own(folder, found):
            raise ValueError(
                f"{folder.path} holds an unfinished run of its own; go on with that one (--resume auto), choose "
                "another --out, or add --overwrite"
            )
        fresh = f"give the settings of that run (--config {found.run / 'config.yaml'})"
    different = list(differences(config.as_dict(), found.saved["config"]))
    if different:
        shown = "; ".join(different[:3]) + (f"; and {len(different) - 3} more" if len(different) > 3 else "")
        raise ValueError(f"{found.name} is of a run with other settings: {shown}; {fresh}, or choose another --out")
    for name, length in found.saved["logs"].items():
        path = found.run / name
        if not path.is_file() or path.stat().st_size < length:
            raise ValueError(
                f"{path} does not hold the records up to {found.path.name}; put the whole run folder back, or train "
                "anew with --resume never"
            )
    return found


def newest(folder: RunFolder) -> Resume | None:
    """The complete checkpoint of the latest step in a run folder; None if there is no checkpoint.

    Raises:
        ValueError: there are some, and all are torn or foreign.
    """
    whole: list[tuple[int, str, Resume]] = []
    torn: list[ValueError] = []
    for path in sorted(folder.checkpoints.glob("*.pt")):
        try:
            saved = load_checkpoint(path)
        except TornError as error:
            torn.append(error)
            continue
        whole.append((saved["step"], path.name, Resume(path, saved)))
    if not whole:
        if torn:
            raise ValueError(f"{torn[-1]} with --resume never")
        return None
    best = max(whole, key=lambda entry: entry[:2])[2]
    return dataclasses.replace(best, torn=tuple(str(error) for error in torn))


def differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> Iterator[str]:
    """Each setting that decides what is trained and differs, as "KEY is A there and B here".

    A setting that `there` does not know yet counts as its default.

    >>> list(differences({"lr": 0.1, "seed": 0, "out": "a"}, {"lr": 0.2, "seed": 0}))
    ['lr is 0.2 there and 0.1 here']
    """
    mine, other = dict(_flat(here)), dict(_flat(there))
    for key in {**mine, **other}:
        default = _defaults().get(key)
        a, b = other.get(key, default), mine.get(key, default)
        if a != b and key not in ANYWHERE:
            yield f"{key} is {a!r} there and {b!r} here"


def take_over(folder: RunFolder, found: Resume) -> None:
    """Make the checkpoint the folder's last.pt; before that, bring its logs and best.pt if it is from another folder.

    Whenever this is interrupted, the same command does it again.
    """
    folder.unfinish()
    if found.run.resolve() != folder.path.resolve():
        for name in (*found.saved["logs"], "checkpoints/best.pt"):
            if (found.run / name).is_file():
                _copy(found.run / name, folder.path / name)
    last = folder.checkpoints / "last.pt"
    if found.path.resolve() != last.resolve():
        _copy(found.path, last)


def _has_own(folder: RunFolder, found: Resume) -> bool:
    """True if a checkpoint in the folder is no copy that :func:`take_over` made of those of the found one."""
    copied = {"last.pt": found.path, "best.pt": found.run / "checkpoints" / "best.pt"}
    return any(
        path.name not in copied
        or not copied[path.name].is_file()
        or not filecmp.cmp(path, copied[path.name], shallow=False)
        for path in folder.checkpoints.glob("*.pt")
    )


def _copy(source: Path, target: Path) -> None:
    with atomic(target) as temporary:
        shutil.copyfile(source, temporary)


def _at(resume: str) -> Resume:
    path = Path(resume)
    if path.is_dir():
        found = newest(RunFolder(path))
        if found is None:
            raise ValueError(f"there is no checkpoint in {path}/checkpoints; give a run folder or a last.pt")
        return found
    if not path.exists() and len(path.parts) == 1 and not path.suffix:
        near = nearest(resume, ["auto", "never"])
        hint = f"; did you mean {near!r}?" if near else ""
        raise ValueError(f"--resume takes auto, never or the path of a checkpoint, not {resume!r}{hint}")
    return Resume(path, load_checkpoint(path))


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name not in _FREE:
            yield from _flat(value, f"{name}.")
        else:
            yield name, value


def _defaults() -> dict[str, Any]:
    return dict(_flat(TrainConfig().as_dict()))
