"""The folder of a run: which files it holds, when it may be replaced, and that DONE is written last."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from s2sam.outside import fit, parse_json
from s2sam.train.atomic import atomic, meant_for, write_text
from s2sam.train.config import TrainConfig
from s2sam.train.config_files import dump
from s2sam.train.environment import differences
from s2sam.train.lock import LOCK

FILES = (
    "DONE", "config.yaml", "env.json", "metrics.jsonl", "summary.csv", "model.safetensors", "masks.safetensors",
    "ema.safetensors", "report.html", "checkpoints", "plots", "sharpness.json", "premise.json",
    "robustness-generated.json", "robustness-official.json", "bound.json",
)  # fmt: skip
#: what DONE tells the SHA-256 of: the files of results, which nothing but a damaged disk changes
SEALED = ("metrics.jsonl", "model.safetensors", "masks.safetensors", "ema.safetensors")


class RunFolder:
    """`path` with config.yaml, env.json, metrics.jsonl, summary.csv, checkpoints/, *.safetensors and, last, DONE."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def checkpoints(self) -> Path:
        """Where last.pt and best.pt are."""
        return self.path / "checkpoints"

    @property
    def done(self) -> bool:
        """True if a run finished here."""
        return (self.path / "DONE").exists()

    def check(self, overwrite: bool = False) -> None:
        """Raise ValueError if no run may be written here: a finished one is here, or files that belong to no run."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file; choose another folder with --out")
        if self.done and not overwrite:
            raise ValueError(
                f"{self.path} holds a finished run; choose another --out, or add --overwrite to replace it"
            )
        strange = self.path.is_dir() and any(
            (meant_for(p.name) or p.name) not in (*FILES, LOCK) for p in self.path.iterdir()
        )
        if strange and not (self.path / "config.yaml").exists():
            raise ValueError(f"{self.path} holds files that belong to no run; choose another folder with --out")

    def create(self, config: TrainConfig, env: Mapping[str, Any], *, overwrite: bool = False) -> None:
        """Start a run here: what an earlier one left goes, and config.yaml and env.json are written.

        Wherever this is interrupted it can begin anew: DONE goes first, then the checkpoints, while the records that
        belong to them are there; config.yaml, by which a folder with other files is known, is replaced in one move.
        """
        self.check(overwrite)
        for name in dict.fromkeys(("DONE", "checkpoints", *FILES)):
            path = self.path / name
            if name == "config.yaml":
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        self.tidy()
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / "config.yaml", dump(config))
        write_text(self.path / "env.json", json.dumps(env, indent=1) + "\n")
        self.checkpoints.mkdir()

    def reopen(self, step: int, env: Mapping[str, Any]) -> list[str]:
        """Go on with the run here: note in env.json at which step and on what; half-written files go.

        Returns:
            What a user should know: that env.json was torn and is written anew, or that this is another machine.
        """
        self.tidy()
        path = self.path / "env.json"
        notes: list[str] = []
        try:
            known = parse_json(path.read_bytes())
            fit(known, {"hardware?": ({}, None), "versions?": ({}, None), "resumed?": [{}]})
        except (OSError, ValueError, RecursionError):
            known, earlier = dict(env), []
            notes.append(
                f"{path} was torn or not there; it is written anew, without what was known before step {step:,}"
            )
        else:
            earlier = known.pop("resumed", [])
            notes += differences(known | (earlier[-1] if earlier else {}), env)
        write_text(path, json.dumps({**known, "resumed": [*earlier, {"step": step, **env}]}, indent=1) + "\n")
        return notes

    def unfinish(self) -> None:
        """Take DONE away, before anything that it vouches for changes."""
        (self.path / "DONE").unlink(missing_ok=True)

    def tidy(self) -> None:
        """Remove what a process that was killed while writing left behind."""
        for path in (*self.path.glob(".*.tmp"), *self.checkpoints.glob(".*.tmp")):
            if meant_for(path.name):
                path.unlink()

    def save_tensors(self, name: str, tensors: Mapping[str, torch.Tensor]) -> Path:
        """Write one safetensors file, whole or not at all; OSError as :func:`~s2sam.train.atomic.atomic`."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        path = self.path / name
        copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        with atomic(path) as temporary:
            try:
                save_file(copies, temporary, {"format": "pt"})
            except SafetensorError as error:  # what the system said is in its text only
                said = re.search(r"\(os error (\d+)\)", str(error))
                number = int(said[1]) if said else errno.EIO
                raise OSError(number, os.strerror(number), str(path)) from error
        return path

    def finish(self) -> None:
        """Write DONE: everything else is there. It holds the digests of the results as JSON."""
        found = {name: self.path / name for name in SEALED if (self.path / name).is_file()}
        digests = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in found.items()}
        write_text(self.path / "DONE", json.dumps({"sha256": digests}, indent=1) + "\n")


def check_sealed(path: Path, content: bytes) -> None:
    """Raise ValueError unless this content of a finished run's file is what the run wrote, as DONE beside it tells.

    Runs of an earlier s2sam have an empty DONE, which cannot tell.
    """
    done = path.with_name("DONE")
    try:
        text = done.read_text(encoding="utf-8")
        digest = json.loads(text)["sha256"][path.name] if text else None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{done} is damaged; put that file back, or train the run again") from error
    if digest is not None and digest != hashlib.sha256(content).hexdigest():
        raise ValueError(f"{path} is damaged: it is not what the run wrote; put that file back, or train the run again")
