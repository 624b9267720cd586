"""Reads finished run folders. A folder that is not whole is refused by name: a report of half a run is no report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from s2sam.outside import (
    COUNT,
    NUMBER,
    OPTIONAL,
    POSITIVE,
    SHARE,
    DamagedError,
    Number,
    fit,
    parse_json,
    parse_yaml,
    reading,
)  # fmt: skip
from s2sam.train.folder import check_sealed

Record = dict[str, Any]
_FINAL = ("test_top1", "test_loss", "sparsity", "step_seconds", "test_images")
_TOP1, _SPEED = (SHARE, None), {"seconds?": OPTIONAL, "images_per_second?": OPTIONAL}
#: what the report relies on in the records of a kind; see `s2sam.outside.misfit`
_RECORDS: dict[str, dict[str, Any]] = {
    "final": {
        "test_top1?": SHARE, "test_loss?": NUMBER, "sparsity?": SHARE, "step_seconds?": POSITIVE,
        "test_images?": Number(1, whole=True), "n_steps?": COUNT, "data_digest?": (str, None),
        **dict.fromkeys(("parameters?", "active_parameters?"), (COUNT, None)),
        **dict.fromkeys(("recalibrated_test_top1?", "ema_test_top1?"), _TOP1),
    },
    "epoch": {
        "epoch": COUNT, "step": COUNT, "sparsity": SHARE, "test_top1": _TOP1, "test_loss": OPTIONAL,
        "train_loss": OPTIONAL, **_SPEED,
    },
    "level": _SPEED,
    "step": {"step": COUNT, "displacement?": OPTIONAL, "alignment?": OPTIONAL},
    "topology": {
        "step": COUNT, "density": {...: SHARE}, "dropped": COUNT, "grown": COUNT, "survival": SHARE, "explored": SHARE,
    },
}  # fmt: skip
_CONFIG = {
    "seed": COUNT, "epochs?": Number(1, whole=True), "sparsity?": SHARE, "rho?": NUMBER,
    **dict.fromkeys(("data?", "model?", "method?", "sharpness?"), str),
    **{key: {} for key in ("sam?", "optim?", "schedule?", "data_options?", "model_options?")},
    "sparse?": {"options?": {...: (NUMBER, str, bool, list, None)}},
}  # fmt: skip


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
    folder = Path(folder)
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} is not a run folder (no config.yaml); give folders that `s2sam train --out` wrote")
    if not (folder / "DONE").exists():
        raise ValueError(f"{folder} is not a finished run (no DONE file); let it finish, or run it again")
    try:
        config = _read_config(folder / "config.yaml")
        with reading(folder / "env.json", "a damaged file", "put it back, or run it again"):
            env = parse_json((folder / "env.json").read_bytes())
        records = _read_lines(folder / "metrics.jsonl")
    except FileNotFoundError as error:
        raise ValueError(f"{folder} is incomplete ({Path(error.filename).name} is missing); run it again") from None
    return _assemble(folder, config, env if isinstance(env, dict) else {}, records)


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


def _read_config(path: Path) -> Record:
    with reading(path, "a damaged file", "put it back, or run it again"):
        config = parse_yaml(path.read_bytes())
        if not isinstance(config, dict) or "seed" not in config:
            raise DamagedError(f"{path} holds no seed, so it was not written by this trainer; run it again")
        fit(config, _CONFIG)
    return config


def _read_lines(path: Path) -> list[Record]:
    records, content = [], path.read_bytes()
    for number, line in enumerate(content.splitlines(), start=1):
        with reading(path, f"torn at line {number}", f"run {path.parent} again"):
            record = parse_json(line)
            fit(record, {"kind": str})
            fit(record, _RECORDS.get(record["kind"], {}))
        records.append(record)
    check_sealed(path, content)
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
    epochs, topology = kinds["epoch"], kinds["topology"]
    wanted = config.get("epochs", len(epochs))
    if wanted != len(epochs) or any(r["epoch"] != number for number, r in enumerate(epochs, start=1)):
        raise ValueError(f"{folder} does not hold epochs 1 to {wanted} once each, in order; run it again")
    for name, found in (("epochs", epochs), ("masks", topology)):
        if any(later["step"] < earlier["step"] for earlier, later in pairwise(found)):
            raise ValueError(f"the records of the {name} of {folder} are not in the order of their steps; run it again")
    if any(r["density"].keys() != topology[0]["density"].keys() or not r["density"] for r in topology):
        raise ValueError(f"the records of the masks of {folder} do not tell of the same layers; run it again")
    unmeasured = [key for key in ("test_top1", "test_loss", "train_loss") if all(r[key] is None for r in epochs)]
    if unmeasured and epochs:
        raise ValueError(f"no epoch of {folder} has a {unmeasured[0]}; run it again")
    return Run(folder, config, env, final, kinds["epoch"], kinds["step"], kinds["topology"], kinds["level"])
