"""The plan of a study: cells, arms, trials, and the table of its runs. settings.yaml holds the numbers.

`Plan` is that of the control study; studies/images has one of its own, with other cells and arms.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import json
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

import torch
import yaml

from batched import Arm, Cell
from s2sam import __version__

HERE = Path(__file__).resolve().parent
FIELDS = (
    "stage", "cell", "arm", "lr", "weight_decay", "rho", "seed", "epochs", "val", "test", "train", "seconds",
    "environment",
)  # fmt: skip
BASELINES = ("sgd", "nesterov")
MAIN = (*BASELINES, "sam", "+g", "echo")  #: the arms of the primary contrasts
TIMED = "sam, echo's time"  #: SAM for as long as echo takes, on fresh seeds only
Point = tuple[float, float, float]  #: learning rate, weight decay, radius
Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What settings.yaml says, of the whole study or of the smoke run."""

    settings: Mapping[str, Any]
    table: Path  #: of the runs
    grain: ClassVar[float] = 100 / 359  #: points of one test image
    equal_arms: ClassVar[tuple[str, ...]] = MAIN  #: what runs at the common learning rate and weight decay

    @classmethod
    def read(cls, *, smoke: bool = False) -> Plan:
        """The settings; a smoke run has a table of its own, which git ignores."""
        settings = yaml.safe_load((HERE / "settings.yaml").read_text(encoding="utf-8"))
        changes = settings.pop("smoke")
        if smoke:
            settings |= {key: settings[key] | value for key, value in changes.items()}
        return cls(settings, HERE / ("smoke" if smoke else ".") / "runs.csv")

    @cached_property
    def cells(self) -> dict[str, Cell]:
        """Name -> cell, such as "40-bn-static95": wrong labels in %, network, masks."""
        found, common = self.settings["cells"], self.settings["training"]
        return {
            f"{100 * noise:.0f}-{network}-{name}": Cell(
                noise=noise, norm=network == "bn", method=method, sparsity=sparsity, split_seed=None, **common
            )
            for noise, network, (name, (method, sparsity)) in product(
                found["noise"], found["networks"], found["masks"].items()
            )
        }

    @cached_property
    def arms(self) -> dict[str, Arm]:
        """Name -> arm."""
        return {name: Arm(**options) for name, options in self.settings["arms"].items()}

    def arms_in(self, cell: str) -> dict[str, Arm]:
        """The arms of a cell: the controls run only in the cells that `cells.controls` names by patterns."""
        spared = self.settings["cells"].get("controls", {"arms": [], "in": []})
        if any(fnmatch(cell, pattern) for pattern in spared["in"]):
            return self.arms
        return {name: arm for name, arm in self.arms.items() if name not in spared["arms"]}

    def fresh_arms(self, cell: str) -> list[str]:
        """What runs on the fresh seeds of a cell: its arms, and SAM for as long as echo takes."""
        return [*self.arms_in(cell), TIMED]

    def rounds(self, cell: str) -> int:
        """How often the arms of a cell get more trials while a choice is on an edge."""
        sizes = self.settings["trials"]
        return int(sizes["extensions"] + sizes.get("more", {}).get(cell, 0))

    def chosen_cells(self, patterns: Sequence[str]) -> list[str]:
        """The cells whose names match one of the patterns.

        Raises:
            ValueError: a pattern matches none.
        """
        for pattern in patterns:
            if not any(fnmatch(name, pattern) for name in self.cells):
                raise ValueError(f"no cell is called {pattern!r}; they are {', '.join(self.cells)}")
        return [name for name in self.cells if any(fnmatch(name, pattern) for pattern in patterns)]

    @property
    def screen(self) -> list[int]:
        """The seeds of every trial."""
        return list(self.settings["seeds"]["screen"])

    @property
    def tuning(self) -> list[int]:
        """The seeds of the finalists."""
        return self.screen + list(self.settings["seeds"]["finals"])

    @property
    def fresh(self) -> list[int]:
        """The seeds of the confirmation."""
        first, last = self.settings["seeds"]["fresh"]
        return list(range(first, last + 1))

    # -- the trials of an arm -----------------------------------------------------------------------------------------

    def axes(self, arm: str) -> tuple[list[float], list[float], list[float]]:
        """The values that each coordinate of a trial can have."""
        lr, decay, rho = (one["values"] for one in self._lattice(arm))
        return lr, decay, rho

    def _lattice(self, arm: str) -> tuple[Mapping[str, list[float]], ...]:
        found, made = self.settings["lattice"], self.arms[arm]
        rho = found["rho"][made.scale] if made.displace else {"values": [0.0], "start": [0.0]}
        return found["lr"], found["weight_decay"], rho

    def start(self, arm: str) -> list[Point]:
        """The first trials."""
        return list(product(*(one["start"] for one in self._lattice(arm))))

    def first_trials(self, cell: str, arm: str, rows: Sequence[Row]) -> list[Point]:
        """The first trials of an arm in a cell: here the same in all cells."""
        return self.start(arm)

    def number(self, cell: str) -> int:
        """How many trials each arm of a cell has before any round for edges."""
        return int(self.settings["trials"]["number"])

    def next_runs(self, cell: str, arm: str, number: int, rows: Sequence[Row]) -> list[tuple[Point, int]]:
        """What the tuning of an arm trains next, as (trial, seed), given the runs so far; nothing if it is complete.

        The first trials, then neighbours of the best ones until there are `number`, a few at once; the best go on to
        all seeds.

        Raises:
            ValueError: there are more first trials than `number`, or the lattice has fewer points.
        """
        sizes, tried, first = self.settings["trials"], self.tried(cell, arm, rows), self.first_trials(cell, arm, rows)
        if number < len(first):
            raise ValueError(f"{arm} begins with {len(first)} trials, and trials.number is only {number}")
        points = [point for point, by_seed in tried.items() if not set(self.screen) <= set(by_seed)]
        if not points and len(tried) < len(first):
            points = [point for point in first if point not in tried]
        if not points and len(tried) < number:
            points = self.next_trials(arm, self.screened(tried), number - len(tried), self.choice(tried))
            if not points:
                raise ValueError(f"the lattice of {arm} has fewer than {number} points; give it more values")
        if points:
            some = points[: sizes["at_once"]]
            return [(point, seed) for point in some for seed in self.screen if seed not in tried.get(point, {})]
        scores = self.screened(tried)
        best = sorted(scores, key=lambda point: (-scores[point], point))[: sizes["finalists"]]
        return [(point, seed) for point in best for seed in self.tuning if seed not in tried[point]]

    def neighbours(self, arm: str, point: Point) -> list[Point]:
        """The points of the lattice one step away, those of the radius first, then weight decay, then learning rate."""
        found = []
        for i in (2, 1, 0):
            axis = self.axes(arm)[i]
            at = axis.index(point[i])
            for there in (at + 1, at - 1):
                if 0 <= there < len(axis):
                    found.append((*point[:i], axis[there], *point[i + 1 :]))
        return found

    def next_trials(
        self, arm: str, tried: Mapping[Point, float], count: int, first: Point | None = None
    ) -> list[Point]:
        """Up to `count` untried neighbours: of `first`, if given, then of the best trial, of the second best, ..."""
        ranked = sorted(tried, key=lambda point: (-tried[point], point))
        found: list[Point] = []
        for point in ([first] if first else []) + ranked:
            found += [p for p in self.neighbours(arm, point) if p not in tried and p not in found]
            if len(found) >= count:
                break
        return found[:count]

    def on_edge(self, arm: str, tried: Iterable[Point], choice: Point) -> list[Point]:
        """Neighbours of the choice that have not been tried."""
        known = set(tried)
        return [point for point in self.neighbours(arm, choice) if point not in known]

    def at_end(self, arm: str, choice: Point) -> list[str]:
        """The coordinates in which the choice is at an end of the lattice where better ones may lie beyond.

        The smallest weight decay and radius are as good as none, so nothing lies beyond them.
        """
        names = ("lr", "weight_decay", "rho")
        found = []
        for name, axis, value in zip(names, self.axes(arm), choice, strict=True):
            if len(axis) > 1 and (value == axis[-1] or (name == "lr" and value == axis[0])):
                found.append(f"{name} {value:g}")
        return found

    # -- the table -----------------------------------------------------------------------------------------------------

    def rows(self) -> list[Row]:
        """All runs so far."""
        return read_table(self.table)

    def tried(self, cell: str, arm: str, rows: Iterable[Row] | None = None) -> dict[Point, dict[int, float]]:
        """Trial -> seed -> validation accuracy, of the tuning of an arm."""
        found: dict[Point, dict[int, float]] = {}
        for row in self.rows() if rows is None else rows:
            if (row["stage"], row["cell"], row["arm"]) == ("tune", cell, arm):
                found.setdefault((row["lr"], row["weight_decay"], row["rho"]), {})[row["seed"]] = row["val"]
        return found

    def screened(self, tried: Mapping[Point, Mapping[int, float]]) -> dict[Point, float]:
        """Mean validation accuracy over the seeds that every trial has."""
        return {p: fmean(v[s] for s in self.screen) for p, v in tried.items() if set(self.screen) <= set(v)}

    def choice(self, tried: Mapping[Point, Mapping[int, float]]) -> Point | None:
        """The trial with the best mean over all tuning seeds; None before there is one that has them all."""
        whole = {p: fmean(v[s] for s in self.tuning) for p, v in tried.items() if set(self.tuning) <= set(v)}
        return max(whole, key=lambda p: (whole[p], [-x for x in p])) if whole else None

    def at_equal_decay(self, arm: str, tried: Mapping[Point, Mapping[int, float]]) -> Point:
        """The common learning rate and weight decay, with the best of the radii that the tuning has tried there.

        Raises:
            ValueError: the tuning has not tried this learning rate and weight decay.
        """
        common = tuple(self.settings["equal"].values())
        scores = {point: score for point, score in self.screened(tried).items() if point[:2] == common}
        if not scores:
            raise ValueError(
                f"the tuning has no trial of {arm} at lr and weight decay {common}; run `run.py tune` first"
            )
        return max(scores, key=lambda point: (scores[point], -point[2]))

    def chosen(self, cell: str, arm: str, rows: Iterable[Row] | None = None) -> Point:
        """The choice of an arm that is tuned."""
        choice = self.choice(self.tried(cell, arm, rows))
        assert choice is not None
        return choice

    def untuned(self, cell: str, rows: Sequence[Row]) -> list[str]:
        """What is missing in the tuning of a cell, a sentence for each arm."""
        found, trials = [], {arm: self.tried(cell, arm, rows) for arm in self.arms_in(cell)}
        wanted = max(self.number(cell), *(len(self.screened(t)) for t in trials.values()))
        rounds = (wanted - self.number(cell)) // self.settings["trials"]["extension"]
        for arm, tried in trials.items():
            done, choice = self.screened(tried), self.choice(tried)
            finalists = sum(set(self.tuning) <= set(v) for v in tried.values())
            if len(done) < wanted or choice is None or finalists < self.settings["trials"]["finalists"]:
                found.append(f"{arm} has {len(done)} of {wanted} trials and {finalists} finalists")
            elif self.on_edge(arm, tried, choice) and rounds < self.rounds(cell):
                found.append(f"{arm} chose a trial with untried neighbours")
        return found

    def refusals(self, cell: str, rows: Sequence[Row]) -> list[str]:
        """Why a cell cannot go on to the fresh seeds; nothing if it can."""
        found = self.untuned(cell, rows)
        for arm in self.arms_in(cell) if self.settings["trials"]["ends"] and not found else ():
            found += [
                f"{arm} chose {end}, an end of its lattice: give it more values in settings.yaml, say so in protocol.md"
                for end in self.at_end(arm, self.chosen(cell, arm, rows))
            ]
        return found


def read_table(path: Path) -> list[Row]:
    """The rows of a table of runs, numbers as numbers."""
    if not path.exists():
        return []
    text = {"stage", "cell", "arm", "environment"}
    with path.open(newline="", encoding="utf-8") as file:
        rows: list[Row] = [
            {k: v if k in text else float(v) if v else None for k, v in row.items()} for row in csv.DictReader(file)
        ]
    for row in rows:
        row["seed"] = int(row["seed"])
    return rows


def append(path: Path, rows: Sequence[Mapping[str, Any]], fields: Sequence[str] = FIELDS) -> None:
    """Add rows to a table in one write, one process at a time."""
    path.parent.mkdir(exist_ok=True)
    with path.open("a+", newline="", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        text = io.StringIO()
        writer = csv.DictWriter(text, fields, restval="", lineterminator="\n")
        if file.seek(0, io.SEEK_END) == 0:
            writer.writeheader()
        writer.writerows(rows)
        file.write(text.getvalue())


@cache
def environment(
    table: Path,
    folder: Path = HERE,
    code: tuple[str, ...] = (".", "../../src"),
    facts: tuple[tuple[str, str], ...] = (),
) -> str:
    """A short name of this machine, these versions and this commit; environments.jsonl beside the table tells them.

    Args:
        table: the table of runs.
        folder: of the study.
        code: where its code is, seen from there; files in it that differ from the commit are named.
        facts: what else is to be told.
    """
    git = ["git", "-C", str(folder)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", *code], capture_output=True, text=True, check=True
    ).stdout
    dirty = sorted(line[3:] for line in changed.splitlines() if line.endswith((".py", ".yaml")))
    found = {
        "commit": commit, "changed": dirty, "s2sam": __version__, "torch": torch.__version__,
        "python": platform.python_version(), "machine": platform.machine(), "processor": processor(), **dict(facts),
    }  # fmt: skip
    text = json.dumps(found, sort_keys=True)
    name, path = hashlib.sha256(text.encode()).hexdigest()[:8], table.with_name("environments.jsonl")
    path.parent.mkdir(exist_ok=True)
    line = json.dumps({"environment": name} | found)
    if not path.exists() or line not in path.read_text(encoding="utf-8").splitlines():
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    return name


def processor() -> str:
    """What the system calls its processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
