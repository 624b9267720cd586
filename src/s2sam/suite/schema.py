"""A table as data: the keys of its YAML file, each checked, each typo answered with the nearest valid name.

`docs/tables.md` explains the keys. Standard library and yaml only, so that listing tables is quick.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from s2sam import registry
from s2sam.outside import parse_yaml, reading
from s2sam.sparse.names import unknown
from s2sam.suite.settings import Settings, settings
from s2sam.train.config import whole

MEASURES = ("accuracy", "throughput", "robustness")
MEASURED = ("accuracy", "throughput", "robustness")  #: those that exist
BUDGETS = ("full", "short", "smoke")
MODES = ("matched", "tuned")
DATA = ("digits", "cifar10", "cifar100")  #: that `s2sam data get` or scikit-learn brings
KEYS = (
    "title", "paper", "measure", "base", "blocks", "rows", "sparsities", "columns", "reference", "baselines",
    "not_in_paper", "planned", "seeds", "budgets", "tuned", "tripwires",
)  # fmt: skip
BUDGET_KEYS = ("seeds", "blocks", "rows", "sparsities", "columns", "rounds", "set", "stand_in")


@dataclass(frozen=True)
class Budget:
    """How much of a table is run: which part of it, and settings that replace those of the rows."""

    name: str
    seeds: int | None = None  #: that many of the seeds; None = all
    blocks: tuple[str, ...] | None = None
    rows: tuple[str, ...] | None = None
    sparsities: tuple[float, ...] | None = None
    columns: tuple[str, ...] | None = None
    rounds: int = 15  #: of a throughput measurement
    set: Settings = field(default_factory=dict)
    stand_in: Settings = field(default_factory=dict)  #: on top of `set` where the data are not given


@dataclass(frozen=True)
class Tuned:
    """The search of mode tuned: a grid for every column, all of one size, and seeds that are used for nothing else."""

    seeds: tuple[int, ...]
    grids: dict[str, dict[str, list[Any]]]


@dataclass(frozen=True)
class Suite:
    """A whole table: what is trained (blocks x rows x sparsities), how (columns), how often (seeds)."""

    name: str
    description: str
    title: str
    paper: str
    measure: str
    base: Settings
    blocks: dict[str, Settings]
    rows: dict[str, Settings]
    sparsities: tuple[float, ...]
    columns: dict[str, Settings]
    reference: str
    baselines: tuple[str, ...]  #: columns that are another plain optimizer: these may set optim.nesterov
    not_in_paper: tuple[str, ...]  #: columns that were added to those of the paper
    planned: tuple[str, ...]  #: methods, models and data that this version may not have yet
    seeds: tuple[int, ...]
    budgets: dict[str, Budget]
    tuned: Tuned | None = None
    tripwires: dict[str, dict[str, list[float]]] = field(default_factory=dict)


def load_suite(source: str | Path) -> Suite:
    """The table in a YAML file, or one of the package's by name.

    >>> load_suite("1").columns["S2-SAM"]["sharpness"]
    's2sam'
    >>> load_suite("A1")
    Traceback (most recent call last):
    ValueError: unknown table 'A1'; did you mean 'A.1'? (one of: 1, 2, 3, 4, 5, 6, A.1)

    Raises:
        ValueError: no such file or table, not YAML, an unknown key or an impossible value; one sentence says which.
    """
    path = Path(source)
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        if not path.is_file():
            raise ValueError(f"there is no table at {path}; give a YAML file or a name (`s2sam list tables`)")
    else:
        path = tables().get(str(source), path)
        if path.suffix != ".yaml":
            raise unknown("table", str(source), tables())
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text in UTF-8; a table is a YAML file") from None
    with reading(path, "not valid YAML", "write one `key: value` a line"):
        content = parse_yaml(text)
    first = text.partition("\n")[0]
    name = path.stem.removeprefix("table_")
    return parse_suite(content, name=name, description=first.lstrip("# ") if first.startswith("#") else "")


def tables() -> dict[str, Path]:
    """The tables that come with the package: name -> file.

    >>> sorted(tables())
    ['1', '2', '3', '4', '5', '6', 'A.1']
    """
    folder = Path(__file__).parent / "tables"
    return {path.stem.removeprefix("table_"): path for path in sorted(folder.glob("*.yaml"))}


def parse_suite(content: Any, *, name: str = "table", description: str = "") -> Suite:
    """The table that a mapping describes.

    Raises:
        ValueError: an unknown key or name (the nearest valid one is named), a missing key or an impossible value.
    """
    top = _mapping(content, "a table")
    _only(top, KEYS, "key")
    for key in ("title", "rows", "sparsities", "columns", "reference", "seeds"):
        if key not in top:
            raise ValueError(f"the table {name} lacks the key {key}")
    blocks = _layers(top.get("blocks", {"all": {}}), "block")
    rows, columns = _layers(top["rows"], "row"), _layers(top["columns"], "column")
    sparsities, reference = _sparsities(top["sparsities"]), str(top["reference"])
    baselines = _subset(top.get("baselines", ()), columns, "column of baselines")
    not_in_paper = _subset(top.get("not_in_paper", ()), columns, "column of not_in_paper")
    if not_in_paper and not top.get("paper"):
        raise ValueError(f"not_in_paper needs the key paper: in which table is there no column {not_in_paper[0]}?")
    planned = tuple(map(str, _list(top.get("planned", ()), "planned")))
    measure = str(top.get("measure", "accuracy"))
    if measure not in MEASURES:
        raise unknown("measure", measure, MEASURES)
    if reference not in columns:
        raise unknown("reference column", reference, columns)
    base = settings(top.get("base"), "in base")
    for layer in (base, *blocks.values(), *rows.values()):
        check_names(layer, planned)
    budgets = {"full": Budget("full")}
    given = _mapping(top.get("budgets", {}), "budgets")
    _only(given, BUDGETS, "budget")
    for key, value in given.items():
        budgets[key] = _budget(key, _mapping(value or {}, f"the budget {key}"), blocks, rows, sparsities, columns)
    return Suite(
        name=name, description=description, title=str(top["title"]), paper=str(top.get("paper", "")), measure=measure,
        base=base, blocks=blocks, rows=rows, sparsities=sparsities, columns=columns, reference=reference,
        baselines=baselines, not_in_paper=not_in_paper, planned=planned, seeds=check_seeds(top["seeds"], "seeds"),
        budgets=budgets,
        tuned=_tuned(top["tuned"], columns) if "tuned" in top else None,
        tripwires=_tripwires(top.get("tripwires", {}), blocks, rows, sparsities),
    )  # fmt: skip


def check_names(layer: Settings, planned: Iterable[str]) -> None:
    """Raise ValueError for a method, model or data set that neither exists nor is planned: it is a typo then."""
    planned = tuple(planned)
    for key, known in (("method", methods()), ("model", models()), ("data", DATA)):
        name = layer.get(key)
        if name is None or name in known or name in planned or (key == "data" and is_path(str(name))):
            continue
        raise ValueError(
            f"{unknown(key, str(name), [*known, *planned])}, or name it in `planned` if it is still to come"
        )


def methods() -> list[str]:
    """Names that `method` takes."""
    return ["dense", *(row.name for row in registry.list_methods())]


def models() -> list[str]:
    """Names that `model` takes."""
    return [row.name for row in registry.list_models()]


def is_path(data: str) -> bool:
    """True if `data` names a place, not a data set.

    >>> is_path("./cifar10"), is_path("images.npz"), is_path("cifar10")
    (True, True, False)
    """
    return data != Path(data).name or bool(Path(data).suffix)


def check_seeds(value: Any, what: str) -> tuple[int, ...]:
    """The seeds; each a whole number, none twice.

    Raises:
        ValueError: they are not.
    """
    seeds = tuple(_list(value, what))
    for seed in seeds:
        whole(f"each of {what}", seed, 0)
    if len(set(seeds)) < len(seeds) or not seeds:
        raise ValueError(f"{what} must name at least one seed, and none twice, got {list(seeds)}")
    return seeds


def _budget(
    name: str,
    content: Mapping[str, Any],
    blocks: Iterable[str],
    rows: Iterable[str],
    sparsities: tuple[float, ...],
    columns: Iterable[str],
) -> Budget:
    _only(content, BUDGET_KEYS, f"key of the budget {name}")
    for key in ("seeds", "rounds"):
        if key in content:
            whole(f"{key} of the budget {name}", content[key], 1)
    chosen = _sparsities(content["sparsities"]) if "sparsities" in content else None
    for sparsity in chosen or ():
        if sparsity not in sparsities:
            raise ValueError(f"the budget {name} names the sparsity {sparsity}, which is none of {list(sparsities)}")
    parts = [set_ if (set_ := settings(content.get(k), f"in {k} of {name}")) else {} for k in ("set", "stand_in")]
    for part in parts:
        check_names(part, ())
    return Budget(
        name, content.get("seeds"),
        _subset(content["blocks"], blocks, f"block in the budget {name}") if "blocks" in content else None,
        _subset(content["rows"], rows, f"row in the budget {name}") if "rows" in content else None,
        chosen,
        _subset(content["columns"], columns, f"column in the budget {name}") if "columns" in content else None,
        content.get("rounds", 15), *parts,
    )  # fmt: skip


def _tuned(content: Any, columns: Mapping[str, Settings]) -> Tuned:
    given = _mapping(content, "tuned")
    _only(given, ("seeds", "grids"), "key of tuned")
    grids = _mapping(given.get("grids", {}), "grids of tuned")
    _only(grids, columns, "column in the grids of tuned")
    checked: dict[str, dict[str, list[Any]]] = {}
    for column, grid in grids.items():
        flat = settings(grid, f"in the grid of {column}")
        checked[column] = {key: _list(values, f"{key} in the grid of {column}") for key, values in flat.items()}
        for key, values in checked[column].items():
            if not values:
                raise ValueError(f"{key} in the grid of {column} names no value; give at least one, as in [a, b]")
    return Tuned(check_seeds(given.get("seeds", ()), "seeds of tuned"), checked)


def _tripwires(
    content: Any, blocks: Mapping[str, Any], rows: Mapping[str, Any], sparsities: tuple[float, ...]
) -> dict[str, dict[str, list[float]]]:
    given = _mapping(content, "tripwires")
    _only(given, blocks, "block in tripwires")
    for block, lines in given.items():
        _only(_mapping(lines, f"tripwires of {block}"), rows, "row in tripwires")
        for row, least in lines.items():
            numbers = [isinstance(n, (int, float)) for n in _list(least, f"the tripwires of {row}")]
            if not all(numbers) or len(numbers) != len(sparsities):
                raise ValueError(f"the tripwires of {block}, {row} need one accuracy in % for each sparsity")
    return {block: {row: list(map(float, least)) for row, least in lines.items()} for block, lines in given.items()}


def _layers(content: Any, what: str) -> dict[str, Settings]:
    """Names with their settings; at least one."""
    given = _mapping(content, f"the {what}s")
    if not given:
        raise ValueError(f"a table needs at least one {what}")
    return {str(name): settings(value, f"in the {what} {name}") for name, value in given.items()}


def _sparsities(value: Any) -> tuple[float, ...]:
    found = _list(value, "sparsities")
    for number in found:
        valid = isinstance(number, (int, float)) and not isinstance(number, bool) and math.isfinite(number)
        if not valid or not 0 <= number < 1:
            raise ValueError(f"each of sparsities must be a number of at least 0 and below 1, got {number!r}")
    if not found or len(set(found)) < len(found):
        raise ValueError("sparsities must name at least one value, and none twice")
    return tuple(map(float, found))


def _subset(value: Any, names: Iterable[str], what: str) -> tuple[str, ...]:
    known = list(names)
    for name in _list(value, what):
        if name not in known:
            raise unknown(what, str(name), known)
    return tuple(value)


def _only(mapping: Mapping[Any, Any], allowed: Iterable[str], what: str) -> None:
    allowed = list(allowed)
    for key in mapping:
        if key not in allowed:
            raise unknown(what, str(key), allowed)


def _mapping(value: Any, what: str) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} must be `key: value` pairs, not {value!r}")
    return value


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{what} must be a list, as in [a, b], not {value!r}")
    return list(value)
