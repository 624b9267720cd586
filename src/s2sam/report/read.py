"""Reads finished run folders. A folder that is not whole is refused by name: a report of half a run is no report."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from s2sam.train.folder import check_sealed

Record = dict[str, Any]
_FINAL = ("test_top1", "test_loss", "sparsity", "step_seconds", "test_images")


@dataclass(frozen=True)
class Run:
    """One finished run: its folder, resolved configuration, environment and records by kind."""

    folder: Path
    config: Mapping[str, Any]
    env: Mapping[str, Any]
    final: Record
    epochs: list[Record]
    steps: list[Record] = field(default_factory=list)
    topology: list[Record] = field(default_factory=list)
    levels: list[Record] = field(default_factory=list)  #: epochs of the trainings before the last one (LT)

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.config["seed"])


def read_run(folder: str | Path) -> Run:
    """The run in `folder`.

    Raises:
        ValueError: not a run folder, an unfinished run, or a torn or foreign file in it; the sentence names the folder.
    """
    import yaml

    folder = Path(folder)
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} is not a run folder (no config.yaml); give folders that `s2sam train --out` wrote")
    if not (folder / "DONE").exists():
        raise ValueError(f"{folder} is not a finished run (no DONE file); let it finish, or run it again")
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        env = _read_env(folder / "env.json")
        records = _read_lines(folder / "metrics.jsonl")
    except FileNotFoundError as error:
        raise ValueError(f"{folder} is incomplete ({Path(error.filename).name} is missing); run it again") from None
    except (yaml.YAMLError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder} holds a damaged file ({type(error).__name__}); run it again") from None
    if not isinstance(config, dict) or not isinstance(config.get("seed"), int):
        raise ValueError(f"{folder}/config.yaml holds no seed, so it was not written by this trainer; run it again")
    return _assemble(folder, config, env, records)


def read_runs(folders: Iterable[str | Path]) -> list[Run]:
    """The runs in `folders`, in order. A folder that only holds run folders stands for all of them, by name.

    Raises:
        ValueError: as :func:`read_run`, or no run at all.
    """
    runs: list[Run] = []
    for folder in map(Path, folders):
        inner = [] if (folder / "config.yaml").exists() else sorted(p.parent for p in folder.glob("*/config.yaml"))
        runs += [read_run(f) for f in (inner or [folder])]
    if not runs:
        raise ValueError("there is no run to report; name at least one run folder")
    return runs


def _read_env(path: Path) -> Record:
    env = json.loads(path.read_text(encoding="utf-8"))
    return env if isinstance(env, dict) else {}


def _read_lines(path: Path) -> list[Record]:
    records, content = [], path.read_bytes()
    check_sealed(path, content)
    for number, line in enumerate(content.decode("utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if not isinstance(record, dict) or "kind" not in record:
            raise ValueError(f"{path} is torn at line {number} (not a record); run {path.parent} again")
        records.append(record)
    return records


def _assemble(folder: Path, config: Record, env: Record, records: list[Record]) -> Run:
    kinds: dict[str, list[Record]] = {"final": [], "epoch": [], "step": [], "topology": [], "level": []}
    for record in records:
        kinds.setdefault(record["kind"], []).append(record)
    if len(kinds["final"]) != 1:
        raise ValueError(f"{folder} has {len(kinds['final'])} final records in metrics.jsonl, not one; run it again")
    final = kinds["final"][0]
    missing = [key for key in _FINAL if not isinstance(final.get(key), int | float)]
    if missing:
        raise ValueError(f"the final record of {folder} lacks {', '.join(missing)}; run it again")
    wanted = config.get("epochs", len(kinds["epoch"]))
    if [r.get("epoch") for r in kinds["epoch"]] != list(range(1, wanted + 1)):
        raise ValueError(f"{folder} does not hold epochs 1 to {wanted} once each, in order; run it again")
    return Run(folder, config, env, final, kinds["epoch"], kinds["step"], kinds["topology"], kinds["level"])
