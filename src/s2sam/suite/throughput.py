"""Tables of speed: the columns of a row take steps in turn in one process, round after round, and are compared there.

Wall clocks of different runs are never compared: what disturbs the machine would decide.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from s2sam.outside import DamagedError, fit, parse_json, reading
from s2sam.report.cost import load_rounds
from s2sam.report.stats import LEVEL, median_interval
from s2sam.suite.plan import Cell, Plan, slug
from s2sam.suite.provenance import made_by
from s2sam.suite.result import Entry, SuiteTable, plan_notes
from s2sam.train.atomic import write_text
from s2sam.train.config import TrainConfig

if TYPE_CHECKING:
    from rich.console import Console

Rounds = dict[str, list[float]]  #: column -> seconds a step, one number for each round


def measure_cells(plan: Plan, console: Console, *, read_only: bool = False) -> dict[Cell, Rounds]:
    """The rounds of every runnable cell; what is measured already, with the same settings, is read from its file.

    Raises:
        ValueError: with `read_only`, a cell is not measured yet; it is named.
    """
    found, absent = {}, []
    for cell in plan.runnable:
        path = path_of(plan, cell)
        if not is_measured(plan, cell):
            if read_only:
                absent.append(cell.label)
                continue
            console.print(f"measuring {cell.label}", markup=False)
            _measure(path, _configs(plan, cell), plan.budget.rounds)
        seconds = load_rounds(path)
        found[cell] = {column: seconds[column] for column in plan.suite.columns}
    if absent:
        raise ValueError(f"not measured yet: {', '.join(absent)}; run the table without --read-only")
    return found


def is_measured(plan: Plan, cell: Cell) -> bool:
    """True if the rounds of a cell, with these settings, are in their file."""
    return _same(path_of(plan, cell), _configs(plan, cell), plan.budget.rounds)


def path_of(plan: Plan, cell: Cell) -> Path:
    """The file of the rounds of a cell."""
    return plan.out / "rounds" / f"{slug(cell.block)}_{slug(cell.row)}_{100 * cell.sparsity:g}.json"


def environments(plan: Plan) -> list[Mapping[str, Any]]:
    """On what the rounds of each cell were measured."""
    return [json.loads(path_of(plan, cell).read_text(encoding="utf-8"))["environment"] for cell in plan.runnable]


def build_throughput(
    plan: Plan,
    rounds: Mapping[Cell, Mapping[str, Sequence[float]]],
    environments: Iterable[Mapping[str, Any]] = (),
) -> SuiteTable:
    """The table of training speeds.

    The value is images a second at the median step; the comparison is the median, over the rounds, of the step time
    divided by that of the reference in the same round, with its order-statistics interval (Bonferroni over the table).
    """
    reference = plan.suite.reference
    comparisons = len(rounds) * (len(plan.suite.columns) - 1)
    entries = []
    for cell in plan.cells:
        for column in plan.suite.columns:
            if cell.missing:
                entries.append(Entry(cell, column, state=f"missing: {cell.missing}"))
                continue
            own, base = rounds[cell][column], rounds[cell][reference]
            batch = plan.config(cell, column, plan.seeds[0]).batch_size
            speeds = {index: batch / seconds for index, seconds in enumerate(own)}
            ratios = [a / b for a, b in zip(own, base, strict=True)]
            visits = plan.config(cell, column, plan.seeds[0]).visits
            distinct = batch / median(own) / visits if visits > 1 else None
            entry = Entry(cell, column, speeds, batch / median(own), distinct=distinct)
            if column != reference:
                interval = median_interval(ratios, level=1 - (1 - LEVEL) / comparisons)
                entry = replace(entry, difference=median(ratios), interval=interval, equal=1.0)
            entries.append(entry)
    notes = plan_notes(plan)
    if rounds:
        count = len(next(iter(next(iter(rounds.values())).values())))
        notes.append(
            f"Values: images a second of whole training steps (forward, backward, optimizer), measured in turn in one "
            f"process with one CPU thread, median of {count} rounds; in brackets the step time against {reference}, "
            f"taken within each round, with intervals that hold together for all {comparisons} comparisons (95 %; none "
            "where there are too few rounds). On another machine the numbers are others."
        )
        notes += made_by(environments)
    return SuiteTable(plan, "throughput", tuple(entries), {}, comparisons, tuple(notes))


def steps_of(configs: Mapping[str, TrainConfig]) -> int:
    """Steps of a round: those between two changes of the topology, so that one is in every round; 20 to 200.

    Twice as many where that is an odd number and batches come twice: first and second visits cost differently, and
    every round then has as many of one as of the other.
    """
    intervals = [config.method_options.get("delta_t", 0) for config in configs.values()]
    steps = min(200, max(20, *intervals))
    return 2 * steps if steps % 2 and any(config.visits == 2 for config in configs.values()) else steps


def _configs(plan: Plan, cell: Cell) -> dict[str, TrainConfig]:
    return {column: plan.config(cell, column, plan.seeds[0]) for column in plan.suite.columns}


def _measure(path: Path, configs: Mapping[str, TrainConfig], rounds: int) -> None:
    from s2sam.report.measure import measure_rounds
    from s2sam.suite.pool import one_thread
    from s2sam.train.environment import environment
    from s2sam.train.state import choose_device

    with one_thread():
        seconds = measure_rounds(configs, rounds=rounds, steps=steps_of(configs))
        measured_on = environment(choose_device(next(iter(configs.values())).device))
    content = {
        "seconds_per_step": seconds,
        "configs": {column: config.as_dict() for column, config in configs.items()},
        "environment": measured_on,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=1) + "\n")


def _same(path: Path, configs: Mapping[str, TrainConfig], rounds: int) -> bool:
    """True if the file holds that many rounds of these settings, and where they were measured; False if damaged.

    It may hold more columns than are asked for (`--columns`): these were measured beside them.
    """
    from s2sam.train.resume import differences

    if not path.is_file():
        return False
    try:
        with reading(path, "not a speed measurement", "measure it again"):
            content = parse_json(path.read_bytes())
            fit(content, {"environment": {...: object}, "configs": {...: {...: object}}})
            seconds, saved = load_rounds(path), content["configs"]
            made_by([content["environment"]])
            return seconds.keys() == saved.keys() >= configs.keys() and not any(
                len(seconds[column]) != rounds or any(differences(config.as_dict(), saved[column]))
                for column, config in configs.items()
            )
    except DamagedError:
        return False
