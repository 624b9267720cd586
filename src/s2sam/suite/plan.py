"""From a table and a budget to its runs: every cell, every column, every seed, what is missing and what was scaled."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from s2sam.sparse.names import unknown
from s2sam.suite.matched import check_matched
from s2sam.suite.schema import BUDGETS, DATA, MEASURED, MODES, Budget, Suite, check_seeds, is_path, methods, models
from s2sam.suite.settings import MERGED, Settings, default_of, make_config, merged
from s2sam.train.config import TrainConfig

CORRUPTED = "corrupted"  #: what `--data` calls the folder of official corrupted images


@dataclass(frozen=True, eq=False)
class Cell:
    """One row at one sparsity in one block; its settings are those of every column."""

    block: str
    row: str
    sparsity: float
    settings: Settings
    missing: str = ""  #: why it cannot be run here; "" = it can

    @property
    def label(self) -> str:
        """As in "CIFAR-10, RigL 90 %"."""
        return f"{self.block}, {self.row} {percent_text(self.sparsity)}"


@dataclass(frozen=True, eq=False)
class Planned:
    """One run of a cell and column; `trial` counts the settings tried in a search."""

    cell: Cell
    column: str
    config: TrainConfig
    trial: int | None = None

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.config.folder.name


@dataclass(frozen=True, eq=False)
class Plan:
    """A table at a budget: its cells, and how each becomes runs."""

    suite: Suite
    budget: Budget
    mode: str
    cells: tuple[Cell, ...]
    seeds: tuple[int, ...]
    out: Path
    device: str = "auto"
    corrupted: str = ""  #: folder of official corrupted images, for the measure robustness; "" = generated ones
    missing: tuple[str, ...] = ()  #: sentences, one for each thing that does not exist
    scaled: tuple[str, ...] = ()  #: what the budget changed, one entry for each key

    @property
    def runnable(self) -> list[Cell]:
        """The cells for which everything exists."""
        return [cell for cell in self.cells if not cell.missing]

    def config(
        self, cell: Cell, column: str, seed: int, extra: Settings | None = None, trial: int | None = None
    ) -> TrainConfig:
        """The configuration of one run.

        Raises:
            ValueError: an impossible value; the sentence names cell and column.
        """
        names = [*map(slug, (cell.block, cell.row)), f"{100 * cell.sparsity:g}", slug(column)]
        names += ([] if trial is None else [f"trial{trial}"]) + [f"seed{seed}"]
        folder = self.out / ("runs" if trial is None else "trials") / "_".join(names)
        flat = merged(cell.settings, self.suite.columns[column], extra or {})
        try:
            return make_config(flat, sparsity=cell.sparsity, seed=seed, out=str(folder), device=self.device)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{cell.label}, {column}: {error}") from None

    def runs(self, chosen: Mapping[tuple[Cell, str], Settings] | None = None) -> list[Planned]:
        """The runs of the table; in mode tuned with the settings `chosen` for each cell and column.

        Raises:
            ValueError: the columns of a cell differ in more than the mode leaves free.
        """
        planned = []
        for cell in self.runnable:
            for seed in self.seeds:
                extra = {column: {} if chosen is None else chosen[cell, column] for column in self.suite.columns}
                configs = {column: self.config(cell, column, seed, extra[column]) for column in self.suite.columns}
                check_matched(configs, self.suite.reference, self.suite.baselines, mode=self.mode)
                planned += [Planned(cell, column, config) for column, config in configs.items()]
        return planned


def make_plan(
    suite: Suite,
    *,
    budget: str = "full",
    mode: str = "matched",
    data: Mapping[str, str] | None = None,
    out: str | Path | None = None,
    seeds: Sequence[int] | None = None,
    device: str = "auto",
    read_only: bool = False,
) -> Plan:
    """The plan of `suite`; nothing is trained or written.

    Args:
        suite: the table.
        budget: full, short or smoke.
        mode: matched or tuned.
        data: places of data sets by name, such as {"cifar10": "data/cifar10"}; else data/NAME, where `s2sam data get`
            puts it, and in a budget with a stand-in the stand-in.
        out: the folder of the runs; None = runs/ and a name made of the table.
        seeds: instead of the table's.
        device: auto, cpu or cuda.
        read_only: nothing will be trained, so data need not be there.

    Raises:
        ValueError: data that a runnable cell needs are not there, unmatched columns, or an impossible value.

    >>> from s2sam.suite.schema import load_suite
    >>> plan = make_plan(load_suite("1"), budget="smoke")
    >>> plan.runs()[0].config.data, len({planned.cell.row for planned in plan.runs()}) >= 8
    ('digits', True)
    """
    for what, value, known in (("budget", budget, BUDGETS), ("mode", mode, MODES)):
        if value not in known:
            raise unknown(what, value, known)
    if budget not in suite.budgets:
        raise ValueError(f"the table {suite.name} declares no budget {budget}; it has {', '.join(suite.budgets)}")
    size, whole, places = suite.budgets[budget], suite, dict(data or {})
    suite = with_columns(suite, size.columns)
    corrupted = places.pop(CORRUPTED, "") if suite.measure == "robustness" else ""
    needed = _data_names(suite)
    for name in places:
        if name not in needed:
            raise unknown("data of this table", name, needed)
    chosen = check_seeds(seeds, "--seeds") if seeds is not None else suite.seeds[: size.seeds]
    scaled, missing = _parts(whole, size, len(chosen), custom=seeds is not None), dict[str, None]()
    cells = []
    for block, in_block in suite.blocks.items():
        for row, in_row in suite.rows.items():
            for sparsity in suite.sparsities:
                if any(
                    kept is not None and name not in kept
                    for kept, name in ((size.blocks, block), (size.rows, row), (size.sparsities, sparsity))
                ):
                    continue
                full = merged({MERGED: {}}, suite.base, in_block, in_row)
                stand_in = size.stand_in if str(full.get("data")) not in places else {}
                flat = merged(full, size.set, stand_in)
                missing |= dict.fromkeys(_absent(full, suite, places))
                why = "; ".join(_absent(flat, suite, places))
                if not why:
                    scaled |= dict.fromkeys(_changes(full, flat))
                    flat["data"] = _place(str(flat.get("data", default_of("data"))), places, budget, read_only)
                cells.append(Cell(block, row, sparsity, flat, why))
    if suite.measure not in MEASURED:
        missing[f"the measure {suite.measure} does not exist yet: test accuracy of the same runs stands here"] = None
    if suite.measure == "robustness" and not corrupted:
        missing[
            f"the official corrupted images (--data {CORRUPTED}=FOLDER): images GENERATED by s2sam stand here, and the "
            "values cannot be compared with those of official ones"
        ] = None
    folder = Path(out) if out is not None else Path("runs", f"table-{slug(suite.name)}-{budget}-{mode}")
    plan = Plan(
        suite, size, mode, tuple(cells), tuple(chosen), folder, device, corrupted, tuple(missing), tuple(scaled)
    )
    _check_distinct(plan)
    plan.runs()  # in mode tuned before any search: what a grid may hold is free anyway
    return plan


def with_columns(suite: Suite, kept: Sequence[str] | None) -> Suite:
    """The table with these of its columns only, in its own order; None = all.

    Raises:
        ValueError: the reference is not among them.
    """
    if kept is None:
        return suite
    if suite.reference not in kept:
        raise ValueError(
            f"the columns {', '.join(kept)} lack {suite.reference}, with which the others are compared; name it too"
        )
    columns = {name: column for name, column in suite.columns.items() if name in kept}
    tuned = suite.tuned and replace(suite.tuned, grids={n: g for n, g in suite.tuned.grids.items() if n in columns})
    baselines, added = (tuple(n for n in names if n in columns) for names in (suite.baselines, suite.not_in_paper))
    return replace(suite, columns=columns, tuned=tuned, baselines=baselines, not_in_paper=added)


def slug(name: str) -> str:
    """A name as part of a folder's name.

    >>> slug("MEST (EM&S)"), slug("A.1")
    ('mest-em-s', 'a.1')
    """
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def percent_text(sparsity: float) -> str:
    """A sparsity in percent; "dense" for 0."""
    return f"{100 * sparsity:g} %" if sparsity else "dense"


def _data_names(suite: Suite) -> list[str]:
    layers = [merged(suite.base, block, row) for block in suite.blocks.values() for row in suite.rows.values()]
    return list(dict.fromkeys(str(layer.get("data", default_of("data"))) for layer in layers))


def _absent(flat: Settings, suite: Suite, places: Mapping[str, str]) -> Iterator[str]:
    """What these settings need and this version does not have, as sentences."""
    for key, known in (("method", methods()), ("model", models())):
        name = flat.get(key)
        if name is not None and name not in known:
            yield f"the {key} {name} does not exist here yet"
    data = str(flat.get("data", default_of("data")))
    if data in suite.planned and data not in DATA and data not in places:
        yield f"the data {data} cannot be fetched by this version; give --data {data}=FOLDER"


def _place(data: str, places: Mapping[str, str], budget: str, read_only: bool) -> str:
    """Where the data are."""
    from s2sam.data import find_row

    if data == "digits" or (is_path(data) and data not in places):
        return data
    place = places.get(data, str(Path("data", data)))
    if not read_only:
        if data not in places and not Path(place).is_dir():
            raise ValueError(
                f"the budget {budget} needs {data}: get it with `s2sam data get {data}`, which writes {place}, or give "
                f"--data {data}=FOLDER; --budget smoke needs no data"
            )
        find_row(place)
    return place


def _changes(full: Settings, flat: Settings) -> Iterator[str]:
    """Each setting that the budget changed, as "KEY a -> b"; only options that the method knows."""
    before, after = _plain(full, flat), _plain(flat, flat)
    for key in dict.fromkeys((*before, *after)):
        a, b = (side.get(key, default_of(key)) for side in (before, after))
        if a != b:
            yield f"{key} {_text(a)} -> {_text(b)}"


def _plain(layer: Settings, final: Settings) -> dict[str, Any]:
    known = str(final.get("method", default_of("method")))
    defaults: Mapping[str, Any] = {}
    if known != "dense":
        from s2sam import registry

        defaults = registry.find(registry.list_methods(), known, "method").defaults
    options = {f"{known}.{k}": v for k, v in {**defaults, **layer.get(MERGED, {})}.items() if k in defaults}
    return {k: v for k, v in layer.items() if k != MERGED} | options


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {v}" for k, v in value.items()) or "-"
    return "all" if value is None else str(value)


def _parts(suite: Suite, size: Budget, seeds: int, *, custom: bool) -> dict[str, None]:
    """What of the table is left out, as texts; a column that the paper does not have may go without a word."""
    notes = []
    for what, kept, names in (
        ("blocks", size.blocks, tuple(suite.blocks)),
        ("rows", size.rows, tuple(suite.rows)),
        ("sparsities", size.sparsities, suite.sparsities),
        ("columns", size.columns, tuple(suite.columns)),
    ):
        if kept is not None and set(names) - set(kept) - set(suite.not_in_paper if what == "columns" else ()):
            some, every = (", ".join(percent_text(n) if isinstance(n, float) else n for n in s) for s in (kept, names))
            notes.append(f"{what} {some} of {every}")
    rounds = suite.budgets["full"].rounds
    if suite.measure == "throughput" and size.rounds != rounds:
        notes.append(f"rounds {rounds} -> {size.rounds}")
    if seeds != len(suite.seeds):
        notes.append(f"seeds {len(suite.seeds)} -> {seeds}" + (" (--seeds)" if custom else ""))
    return dict.fromkeys(notes)


def _check_distinct(plan: Plan) -> None:
    for what, names in (("blocks", plan.suite.blocks), ("rows", plan.suite.rows), ("columns", plan.suite.columns)):
        seen: dict[str, str] = {}
        for name in names:
            if slug(name) in seen or not slug(name):
                raise ValueError(f"{what} {seen.get(slug(name), '')!r} and {name!r} would share a folder; rename one")
            seen[slug(name)] = name
