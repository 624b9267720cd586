"""Runs a plan: what is finished is read, what is begun goes on, what is not there is trained; then the table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from s2sam.report.read import Run, read_run
from s2sam.suite.plan import Plan, Planned
from s2sam.suite.pool import Outcome, finished, train_all
from s2sam.suite.provenance import provenance
from s2sam.suite.result import SuiteTable, build_accuracy, failure_notes
from s2sam.suite.throughput import build_throughput, environments, measure_cells
from s2sam.suite.tuned import choose, edge_notes, plan_trials
from s2sam.suite.write import make_folder

if TYPE_CHECKING:
    from rich.console import Console

    from s2sam.train.config import TrainConfig

Runner = Callable[[Mapping[str, "TrainConfig"], int], Iterable[Outcome]]
SHOWN = 5  #: names in a sentence


def run_plan(
    plan: Plan, *, console: Console, jobs: int = 1, runner: Runner | None = None, read_only: bool = False
) -> SuiteTable:
    """Train or measure what is missing, and build the table.

    Args:
        plan: what to do.
        console: where progress goes.
        jobs: runs at a time.
        runner: what trains, such as :func:`s2sam.suite.launch_slurm.slurm_runner`; None = processes of this machine.
        read_only: train nothing.

    Raises:
        ValueError: a folder holds a finished run of other settings; nothing can be written, or there is no such device;
            or with `read_only` runs are missing: they are named.

    Example:
        >>> import io, tempfile
        >>> from rich.console import Console
        >>> from s2sam.suite.plan import make_plan
        >>> from s2sam.suite.schema import parse_suite
        >>> suite = parse_suite({
        ...     "title": "S2-SAM on digits", "base": {"epochs": 1}, "rows": {"RigL": {"method": "rigl"}},
        ...     "sparsities": [0.9], "seeds": [0], "reference": "SGD",
        ...     "columns": {"SGD": {"sharpness": "none"}, "S2-SAM": {"sharpness": "s2sam", "rho": 0.05}},
        ... })
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     table = run_plan(make_plan(suite, out=folder), console=Console(file=io.StringIO()))
        >>> [(entry.column, entry.n) for entry in table.entries]
        [('SGD', 1), ('S2-SAM', 1)]
    """
    from s2sam.train.state import choose_device

    trials = plan_trials(plan) if plan.mode == "tuned" else []
    if not read_only:
        if runner is None:  # elsewhere there may be other devices
            choose_device(plan.device)
        make_folder(plan.out)
    if plan.suite.measure == "throughput":
        rounds = measure_cells(plan, console, read_only=read_only)
        return build_throughput(plan, rounds, environments(plan))
    if plan.mode == "matched":
        runs, failed = ensure(plan.runs(), console=console, jobs=jobs, runner=runner, read_only=read_only)
        return build_accuracy(plan, runs, failed, robust=_robust(plan, runs, console, read_only))
    tried, broken = ensure(trials, console=console, jobs=jobs, runner=runner, read_only=read_only, shown="val_top1")
    choices = choose(plan, tried) if trials else {}
    final = plan.runs({key: choice.settings for key, choice in choices.items()})
    runs, failed = ensure(final, console=console, jobs=jobs, runner=runner, read_only=read_only)
    remarks = [*_declared(plan, len(trials)), *failure_notes(broken)]
    remarks += [f"Screening: {note}" for note in provenance(tried) if "All runs" not in note]
    texts = {key: choice.text for key, choice in choices.items()}
    remarks += [f"Chosen for {cell.label}, {column}: {text}." for (cell, column), text in texts.items()]
    remarks += edge_notes(plan, choices)
    table = build_accuracy(plan, runs, failed, texts, remarks, robust=_robust(plan, runs, console, read_only))
    return replace(table, screening=tried, screening_failed=broken)


def ensure(
    planned: Sequence[Planned],
    *,
    console: Console,
    jobs: int = 1,
    runner: Runner | None = None,
    read_only: bool = False,
    shown: str = "test_top1",
) -> tuple[dict[Planned, Run], dict[Planned, str]]:
    """The finished runs, in order, after training those that are not finished; and what went wrong with the others.

    `shown` is the accuracy that progress prints.

    Raises:
        ValueError: as :func:`run_plan`.
    """
    done = {p for p in planned if is_done(p)}
    todo = [p for p in planned if p not in done]
    if todo and read_only:
        shown = ", ".join(p.name for p in todo[:SHOWN]) + (f" and {len(todo) - SHOWN} more" if todo[SHOWN:] else "")
        raise ValueError(f"{len(todo)} of {len(planned)} runs are missing: {shown}; run the table without --read-only")
    if done:
        console.print(f"{len(done)} finished runs of {len(planned)} are reused", markup=False)
    failed: dict[Planned, str] = {}
    if todo:
        by_name = {str(p.config.folder): p for p in todo}
        configs = {p.name: p.config for p in todo}
        assert len(configs) == len(by_name)
        done_now = train_all(configs, jobs, console, runner=runner, shown=shown)
        outcomes = {name: (final, reason) for name, final, reason in done_now}
        for p in todo:
            final, reason = outcomes.get(p.name, (None, "RuntimeError: it never came back"))
            if final is None:
                failed[p] = reason
    return {p: read_run(p.config.folder) for p in planned if p not in failed}, failed


def is_done(planned: Planned) -> bool:
    """True if the run is finished.

    Raises:
        ValueError: a finished run of other settings, or a damaged one, is in its folder.
    """
    from s2sam.train.resume import differences

    folder = planned.config.folder
    if not (folder / "DONE").exists():
        return False
    if finished(planned.config) is not None:
        return True
    found = read_run(folder)  # raises if it is damaged, and names it
    different = next(iter(differences(planned.config.as_dict(), found.config)))
    raise ValueError(f"{folder} holds a finished run with other settings: {different}; choose another --out")


def _robust(
    plan: Plan, runs: Mapping[Planned, Run], console: Console, read_only: bool
) -> dict[Planned, dict[str, Any]] | None:
    """The robustness of the runs if the table is about it; that is measured here and not by a launcher."""
    if plan.suite.measure != "robustness":
        return None
    from s2sam.suite.robust import measure_robustness

    return measure_robustness(plan, runs, console, read_only=read_only)


def _declared(plan: Plan, trials: int) -> list[str]:
    tuned = plan.suite.tuned
    if tuned is None or not trials:
        return []
    per_arm = trials // (len(plan.runnable) * len(plan.suite.columns) * len(tuned.seeds))
    grids = "; ".join(
        f"{column}: " + " x ".join(f"{key} {values}" for key, values in grid.items())
        for column, grid in tuned.grids.items()
    )
    return [
        f"Mode tuned: in every cell each column tried {per_arm} settings ({grids}) on the screening seeds "
        f"{', '.join(map(str, tuned.seeds))}; the mean validation accuracy of the last epoch chose, the test images "
        "did not (what the trials reach on them stands in their run folders only), and the chosen setting was trained "
        "again on fresh seeds. Intervals speak of training the chosen settings again, not of searching again."
    ]
