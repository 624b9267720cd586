"""Mode tuned: every column tries equally many settings, and the validation images choose, on seeds of their own."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from s2sam.report.read import Run
from s2sam.report.stats import mean
from s2sam.sparse.names import unknown
from s2sam.suite.matched import TUNABLE, among
from s2sam.suite.plan import Cell, Plan, Planned
from s2sam.suite.schema import Suite, Tuned
from s2sam.suite.settings import Settings


@dataclass(frozen=True)
class Choice:
    """The setting that validated best in one cell and column."""

    settings: Settings
    trial: int  #: its place in the grid
    val_top1: float  #: mean over the screening seeds, after the last epoch
    trials: int

    @property
    def text(self) -> str:
        """As in "lr 0.1, rho 0.05 (validation 91.20 %, 1 of 6)"."""
        values = ", ".join(f"{key} {value}" for key, value in self.settings.items())
        return f"{values} (validation {100 * self.val_top1:.2f} %, trial {self.trial + 1} of {self.trials})"


def trials_of(grid: Mapping[str, list[Any]]) -> list[Settings]:
    """All combinations of the values, the last key running fastest.

    >>> trials_of({"lr": [0.1, 0.2], "rho": [0.05]})
    [{'lr': 0.1, 'rho': 0.05}, {'lr': 0.2, 'rho': 0.05}]
    """
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def check_tuned(suite: Suite) -> Tuned:
    """The search of the table.

    Raises:
        ValueError: it declares none; a column has no grid or another number of trials; a key that must not be tuned; or
            a screening seed that is also a seed of the table.
    """
    tuned = suite.tuned
    if tuned is None:
        raise ValueError(f"the table {suite.name} declares no search (key `tuned`); use --mode matched")
    sizes = {}
    for column in suite.columns:
        if column not in tuned.grids:
            raise ValueError(f"mode tuned needs a grid for every column; {column} has none")
        for key in tuned.grids[column]:
            if not among(key, TUNABLE):
                raise unknown(f"key to tune in the grid of {column}", key, TUNABLE)
            values = tuned.grids[column][key]
            if any(value in values[:i] for i, value in enumerate(values)):
                raise ValueError(
                    f"{key} in the grid of {column} has a value twice, which is no further trial: {values}"
                )
        sizes[column] = len(trials_of(tuned.grids[column]))
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{column} {size}" for column, size in sizes.items())
        raise ValueError(f"mode tuned needs equally many trials in every column, not {listed}")
    return tuned


def plan_trials(plan: Plan) -> list[Planned]:
    """The screening runs: every cell, column, trial and screening seed.

    Raises:
        ValueError: as :func:`check_tuned`, or screening seeds among the plan's.
    """
    tuned = check_tuned(plan.suite)
    shared = sorted(set(tuned.seeds) & set(plan.seeds))
    if shared:
        raise ValueError(f"seed {shared[0]} screens settings, so it cannot measure them as well; give fresh --seeds")
    return [
        Planned(cell, column, plan.config(cell, column, seed, trial, index), index)
        for cell in plan.runnable
        for column in plan.suite.columns
        for index, trial in enumerate(trials_of(tuned.grids[column]))
        for seed in tuned.seeds
    ]


def edge_notes(plan: Plan, choices: Mapping[tuple[Cell, str], Choice]) -> list[str]:
    """A sentence for each column whose choices lie on an edge of its grid: a better setting may lie beyond it."""
    found: dict[tuple[str, str, Any], int] = {}
    for (_, column), choice in choices.items():
        for key, values in check_tuned(plan.suite).grids[column].items():
            ordered = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
            if len(ordered) == len(values) > 1 and choice.settings[key] in (min(ordered), max(ordered)):
                edge = column, key, choice.settings[key]
                found[edge] = found.get(edge, 0) + 1
    cells = len(plan.runnable)
    return [
        f"On the edge of its grid: {column} chose {key} {value} in {count} of {cells} cells; a better one may lie "
        "beyond, so widen the grid before believing the comparison."
        for (column, key, value), count in found.items()
    ]


def choose(plan: Plan, runs: Mapping[Planned, Run]) -> dict[tuple[Cell, str], Choice]:
    """For each cell and column the trial with the best mean validation accuracy of the last epoch; ties: the first.

    Test accuracies do not count. A trial of which a run failed (is not in `runs`) is out.

    Raises:
        ValueError: all trials of a column failed, or the runs kept no validation images.
    """
    tuned = check_tuned(plan.suite)
    scores: dict[tuple[Cell, str], dict[int, list[float]]] = {}
    for planned, run in runs.items():
        value = run.final.get("val_top1")
        if value is None:
            raise ValueError("mode tuned chooses on validation images; give data_options.val_fraction above 0")
        assert planned.trial is not None
        scores.setdefault((planned.cell, planned.column), {}).setdefault(planned.trial, []).append(float(value))
    chosen = {}
    for cell in plan.runnable:
        for column in plan.suite.columns:
            whole = {k: mean(v) for k, v in scores.get((cell, column), {}).items() if len(v) == len(tuned.seeds)}
            if not whole:
                raise ValueError(f"no trial of {cell.label}, {column} went through; nothing can be chosen there")
            best = min(whole, key=lambda index: (-whole[index], index))
            trials = trials_of(tuned.grids[column])
            chosen[cell, column] = Choice(trials[best], best, whole[best], len(trials))
    return chosen
