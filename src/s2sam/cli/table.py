"""`s2sam table NAME|FILE.yaml`: a whole table of the paper, or of yours: trained, resumed, compared and written."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from s2sam.cli.arguments import Parser
from s2sam.suite.pool import cores
from s2sam.suite.schema import BUDGETS, MODES, Suite, load_suite
from s2sam.suite.schema import tables as tables

if TYPE_CHECKING:
    from rich.console import Console

    from s2sam.suite.execute import Runner
    from s2sam.suite.plan import Plan

HELP = "run and write a table of the paper: 1, A.1, 2 to 6"
SINGULAR = {"blocks": "block", "rows": "row", "sparsities": "sparsity", "columns": "column"}
LAUNCHERS = ("local", "ray", "slurm")


def run(argv: list[str]) -> int:
    """Train what is not there yet, print the table, write table.md, table.csv, runs.csv and table.html.

    Returns:
        0; 1 if a run failed, which the table then says.

    Raises:
        ValueError: an impossible option or table, data that are not there, or missing runs with --read-only.
    """
    args = parser().parse_args(argv)
    if args.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {args.jobs}")

    from s2sam.suite.plan import make_plan

    parts = {"blocks": args.blocks, "rows": args.rows, "sparsities": args.sparsities, "columns": args.columns}
    suite = narrowed(load_suite(args.table), args.budget, parts)
    suite = changed(suite, args.budget, pairs(args.set, "--set", "KEY=VALUE"))
    plan = make_plan(
        suite, budget=args.budget, mode=args.mode, data=pairs(args.data, "--data", "cifar10=FOLDER"), out=args.out,
        seeds=args.seeds, device=args.device, read_only=args.read_only or args.dry_run,
    )  # fmt: skip
    if args.dry_run:
        return dry_run(plan)

    from rich.console import Console

    from s2sam.suite.execute import run_plan
    from s2sam.suite.write import write_table

    console = Console(highlight=False)
    for sentence in plan.missing:
        console.print(f"missing: {sentence}", style="bold yellow", markup=False, soft_wrap=True)
    runner = launcher(args.launcher, plan, pairs(args.launcher_option, "--launcher-option", "KEY=VALUE"))
    table = run_plan(plan, console=console, jobs=args.jobs, runner=runner, read_only=args.read_only)
    paths = write_table(table, plan.out, how=shlex.join(["s2sam", "table", *argv]))
    show(table, console)
    for path in paths:
        console.print(str(path), markup=False, soft_wrap=True)
    return 1 if table.failed else 0


def parser() -> Parser:
    """The options."""
    made = Parser(prog="s2sam table", description=HELP, allow_abbrev=False)
    add: Any = made.add_argument
    add("table", metavar="NAME|FILE.yaml", help="a name from `s2sam list tables`, or a table of yours")
    add(
        "--budget",
        choices=BUDGETS,
        default="full",
        help="full: the paper's epochs; smoke: minutes, no data (default: full)",
    )
    add("--mode", choices=MODES, default="matched", help="matched: columns differ in sharpness only (default); tuned")
    add("--data", nargs="+", default=[], metavar="NAME=PATH", help="where data are, such as cifar10=data/cifar10")
    add("--out", metavar="FOLDER", help="where runs and table go (default: runs/table-NAME-BUDGET-MODE)")
    add("--jobs", type=int, default=min(cores(), 8), help="runs at a time (default: one a core, at most 8)")
    add("--launcher", choices=LAUNCHERS, default="local", help="who runs them (default: processes of this machine)")
    add("--launcher-option", nargs="+", default=[], metavar="KEY=VALUE", help="of submitit or of ray.remote")
    add("--seeds", nargs="+", type=int, metavar="SEED", help="instead of the table's")
    add("--blocks", nargs="+", metavar="BLOCK", help="only these blocks of the table; it says so")
    add("--rows", nargs="+", metavar="ROW", help="only these rows of the table; it says so")
    add("--sparsities", nargs="+", type=float, metavar="SPARSITY", help="only these, such as 0.9 0.95; it says so")
    add("--columns", nargs="+", metavar="COLUMN", help="only these, the reference among them, such as the paper's")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of all runs alike; the table says so")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: CUDA where there is one")
    add("--read-only", action="store_true", help="train nothing: write the table of runs that are there, or refuse")
    add("--dry-run", "--list", action="store_true", help="list the runs and which are finished, and stop")
    return made


def narrowed(suite: Suite, budget: str, parts: Mapping[str, Sequence[Any] | None]) -> Suite:
    """The table with the budget limited to these parts of it; None leaves what the budget has.

    Raises:
        ValueError: there is no such part; the nearest is named.
    """
    from dataclasses import replace

    from s2sam.sparse.names import unknown

    size = suite.budgets.get(budget)
    given: dict[str, Any] = {what: tuple(names) for what, names in parts.items() if names}
    for what, names in given.items():
        known = {str(name): name for name in getattr(suite, what)}
        for name in names:
            if str(name) not in known:
                raise unknown(SINGULAR[what], str(name), known)
    if size is None or not given:
        return suite
    return replace(suite, budgets={**suite.budgets, budget: replace(size, **given)})


def changed(suite: Suite, budget: str, given: Mapping[str, str]) -> Suite:
    """The table with these settings in all runs of the budget, whatever the budget and its stand-in say.

    Raises:
        ValueError: an unknown key, one that a column sets, or one that makes a column what it is.
    """
    from dataclasses import replace

    from s2sam.suite.matched import TREATMENT, among
    from s2sam.suite.settings import merged, settings

    size = suite.budgets.get(budget)
    flat = settings({key: yaml_value("--set", key, text) for key, text in given.items()}, "in --set")
    for key in flat:
        own = [name for name, column in suite.columns.items() if key in column]
        if own or among(key, TREATMENT):
            why = f"the column {own[0]} sets it" if own else "it is what columns differ in"
            raise ValueError(f"{key} cannot stand in --set, as {why}; --set is for what all columns have alike")
    if size is None or not flat:
        return suite
    size = replace(size, set=merged(size.set, flat), stand_in=merged(size.stand_in, flat) if size.stand_in else {})
    return replace(suite, budgets={**suite.budgets, budget: size})


def pairs(given: Sequence[str], option: str, example: str) -> dict[str, str]:
    """NAME=VALUE texts as a mapping.

    Raises:
        ValueError: one of them has no name or no value.
    """
    result = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise ValueError(f"{option} takes {example}, not {text!r}")
        result[name] = value
    return result


def launcher(name: str, plan: Plan, options: dict[str, str]) -> Runner | None:
    """What runs the plan; None = processes of this machine.

    Raises:
        RuntimeError: the package it needs is not installed, or there is no SLURM here.
        ValueError: options that it does not take, or options without a launcher that takes some.
    """
    values = {key: yaml_value("--launcher-option", key, text) for key, text in options.items()}
    if name == "slurm":
        from s2sam.suite.launch_slurm import slurm_runner

        own = {key: values.pop(key) for key in ("cluster", "array_size") if key in values}
        return slurm_runner(plan.out / "slurm", values, **own)
    if name == "ray":
        from s2sam.suite.launch_ray import ray_runner

        return ray_runner(values)
    if values:
        raise ValueError("--launcher-option needs --launcher ray or --launcher slurm")
    return None


def yaml_value(option: str, key: str, text: str) -> Any:
    """What a text means in YAML: 3 is a number, true a truth value.

    >>> yaml_value("--launcher-option", "gpus_per_node", "1")
    1

    Raises:
        ValueError: it is not valid YAML.
    """
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"{option} {key} takes a value in YAML, not {text!r}") from None


def dry_run(plan: Plan) -> int:
    """Print what is missing, what is scaled, and each run (or cell of a table of speed) with its state."""
    from s2sam.suite.execute import is_done
    from s2sam.suite.throughput import is_measured, path_of
    from s2sam.suite.tuned import plan_trials

    for sentence in plan.missing:
        print(f"missing: {sentence}")
    for change in plan.scaled:
        print(f"scaled: {change}")
    if plan.suite.measure == "throughput":
        measured = [is_measured(plan, cell) for cell in plan.runnable]
        for cell, done_already in zip(plan.runnable, measured, strict=True):
            print(f"{'measured' if done_already else 'to do'}\t{path_of(plan, cell)}")
        print(f"{len(measured)} cells, {sum(measured)} measured")
        return 0
    tuned = plan.mode == "tuned"
    planned = plan_trials(plan) if tuned else plan.runs()
    done = 0
    for p in planned:
        finished = is_done(p)
        done += finished
        state = "finished" if finished else "begun" if (p.config.folder / "config.yaml").exists() else "to do"
        print(f"{state}\t{p.config.folder}")
    later = f", then {len(plan.runnable) * len(plan.suite.columns) * len(plan.seeds)} of the settings chosen"
    print(f"{len(planned)} runs, {done} finished{later if tuned else ''}")
    return 0


def show(table: Any, console: Console) -> None:
    """Print the table, its notes, and what it supports."""
    from s2sam.suite.page import summary_sentences
    from s2sam.suite.text import to_rich

    for part in to_rich(table):
        console.print(part)
    console.print()
    for note in table.notes:
        console.print(f"* {note}", style="dim", markup=False)
    console.print()
    for sentence in summary_sentences(table):
        console.print(sentence, style="bold", markup=False)
