"""`s2sam bound RUN...`: the terms of the theory's bounds for finished runs, beside what was measured."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from s2sam.cli import theory
from s2sam.cli.arguments import Parser

HELP = "evaluate the terms of the convergence theorem for finished runs"
OUT = "runs/bound"
MOVED = "s2sam bound --suite is now called `s2sam theory check`"
#: options of runs, with their defaults
RUNS: dict[str, Any] = {"images": 1000, "steps": 10, "examples": 16, "power": 5, "device": "auto", "json": False}


def run(argv: list[str]) -> int:
    """Probe finished runs; print tables, write JSON and plots. With --suite, the old name, do `s2sam theory check`.

    Returns:
        0; 1 if --suite finds that a check fails.

    Raises:
        ValueError: neither runs nor --suite or both, runs that are not finished or cannot be compared, or an option out
            of range or without effect.
    """
    args = _parser().parse_args(argv)
    if bool(args.runs) == args.suite:
        raise ValueError(
            f"{MOVED}, which is about problems with known constants and takes no runs"
            if args.suite
            else "nothing to do: name finished runs (see `s2sam bound --help`); the checks where constants are known "
            "are `s2sam theory check`"
        )
    for name in RUNS if args.suite else theory.BOUNDARY:
        if getattr(args, name) is not None:
            why = "with --suite" if args.suite else "on runs, it belongs to `s2sam theory check`"
            raise ValueError(f"--{name} has no effect {why}; leave it out")
    command = shlex.join(["s2sam", "bound", *argv])
    if args.suite:
        code = theory.check_all(args, command)
        print(f"s2sam: {MOVED}", file=sys.stderr)
        return code
    for name, default in RUNS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    theory.check_seed(args.seed)
    return _runs(args, command)


def _parser() -> Parser:
    from s2sam.cli.surface import images

    parser = Parser(prog="s2sam bound", description=HELP, allow_abbrev=False)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="a folder that `s2sam train` has finished")
    parser.add_argument("--suite", action="store_true", help="the old name of `s2sam theory check`")
    parser.add_argument(
        "--out", type=Path, default=Path(OUT), metavar="FOLDER", help="of JSON and plots (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of every random draw (default: %(default)s)")
    group = parser.add_argument_group("for runs")
    group.add_argument("--images", type=images, metavar="N", help=f"or `all` (default: {RUNS['images']})")
    group.add_argument("--steps", type=int, help=f"taken at the start and each checkpoint (default: {RUNS['steps']})")
    group.add_argument("--examples", type=int, help=f"images looked at one by one for B (default: {RUNS['examples']})")
    group.add_argument("--power", type=int, help=f"steps towards the largest curvature (default: {RUNS['power']})")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), help=f"default: {RUNS['device']}")
    group.add_argument("--json", action="store_true", default=None, help="print a JSON list instead of the tables")
    theory.add_boundary(group, hidden=True)  # of --suite
    return parser


def _runs(args: argparse.Namespace, command: str) -> int:
    """Probe each run, write its bound.json, then what puts them side by side."""
    import torch
    from rich.console import Console

    from s2sam.analysis.bound_run import ProbeSettings, check_common, measure_run
    from s2sam.analysis.bound_words import sentences
    from s2sam.analysis.plain_json import to_json
    from s2sam.cli.surface import labels, progress
    from s2sam.report.bound_bars import draw_bars
    from s2sam.report.bound_plots import make_folder
    from s2sam.report.read import read_run
    from s2sam.train.atomic import write_text
    from s2sam.train.environment import environment
    from s2sam.train.processes import terminable

    settings = ProbeSettings(
        images=args.images, steps=args.steps, examples=args.examples, power=args.power, seed=args.seed
    )
    folders = [Path(name) for name in args.runs]
    names = labels(folders)
    check_common(folders)
    make_folder(args.out)
    console = Console(highlight=False, stderr=args.json)
    results: list[dict[str, Any]] = []
    paths: list[Path] = []
    with terminable(), progress(console) as show:
        for folder, label in zip(folders, names, strict=True):
            records = read_run(folder)
            begun: dict[int, Any] = {}

            def tell(done: int, total: int, label: str = label, begun: dict[int, Any] = begun) -> None:
                if total not in begun:
                    begun[total] = show(label, total)
                begun[total](done)

            result = measure_run(
                folder, settings, label=label, epochs=records.epochs, steps=records.steps, device=args.device, tell=tell
            )
            result |= {"command": command, **environment(torch.device("cpu"))}
            paths.append(folder / "bound.json")
            write_text(paths[-1], to_json(result, indent=1) + "\n")
            results.append(result)
    paths.append(args.out / "bounds.json")
    write_text(paths[-1], to_json([{k: v for k, v in r.items() if k != "probes"} for r in results], indent=1) + "\n")
    paths += draw_bars(results, args.out / "bounds")
    if args.json:
        print(to_json(results, indent=1))
    else:
        _tables(results)
        for line in sentences(results):
            console.print(f"* {line}", style="dim", markup=False)
    for path in paths:
        console.print(str(path), markup=False, soft_wrap=True)
    return 0


def _tables(results: Sequence[Mapping[str, Any]]) -> None:
    """The constants of every run with their side, and the terms beside what was measured."""
    from s2sam.analysis.bound_words import BESIDE, factors
    from s2sam.cli.list import show

    number = lambda value: "-" if value is None else f"{value:.3g}"  # noqa: E731
    header = ("run", "L >=", "mu <=", "mu if F* = 0", "sigma^2 >=", "mean sigma^2", "B >=", "F(w_0)", "F* <=")
    keys = ("smooth", "pl", "pl_if_fitted", "largest_variance", "variance", "lipschitz", "start", "best")
    show("constants", header, [(r["run"], *(number(r["constants"][key]) for key in keys)) for r in results])
    parts = ("start", "noise", "radius", "generalisation", "total")
    rows = [
        (r["run"], name, *(number(terms[part]) for part in parts), number(r["measured"][BESIDE[name][0]]),
         number(factors(r)[name]))
        for r in results for name, terms in r["terms"].items()
    ]  # fmt: skip
    show("terms, each from below", ("run", "bound", *parts, "measured", "factor"), rows)
