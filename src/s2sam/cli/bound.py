"""`s2sam bound --suite`: check the theory where everything is known; `s2sam bound RUN...`: its terms for networks."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from s2sam.cli.arguments import Parser

HELP = "check the convergence theorem where constants are known, or evaluate its terms for finished runs"
CLOSING = """\
The corollary holds for any displacement that is fixed before its batch is drawn, and is smallest at rho = 0: a
certificate that S2-SAM does no harm beyond its third term, not a proof that it gains anything. It is not proved for
two-step SAM and echo, whose direction is that of the same batch; echo's pairs of steps have a bound of their own."""
OUT = "runs/bound"
#: options that belong to one of the two uses, with their defaults
SUITE = {"lr": 0.1, "momentum": 0.9, "c": 0.05}
RUNS: dict[str, Any] = {"images": 1000, "steps": 10, "examples": 16, "power": 5, "device": "auto", "json": False}


def run(argv: list[str]) -> int:
    """Run the experiments, or probe finished runs; print tables, write JSON and plots.

    Returns:
        0; 1 if a bound of the suite is violated, or a control fails to violate the bound it must.

    Raises:
        ValueError: neither runs nor --suite or both, runs that are not finished or cannot be compared, or an option out
            of range or without effect.
    """
    args = _parser().parse_args(argv)
    if bool(args.runs) == args.suite:
        raise ValueError(
            "give runs or --suite, not both: the suite is about problems with known constants"
            if args.suite
            else "nothing to do: name finished runs, or give --suite to run the verification experiments (see `s2sam "
            "bound --help`)"
        )
    for name in RUNS if args.suite else SUITE:
        if getattr(args, name) is not None:
            raise ValueError(f"--{name} has no effect {'with' if args.suite else 'without'} --suite; leave it out")
    for name, default in (SUITE | RUNS).items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed must be at least 0 and below 2^63, got {args.seed}")
    command = shlex.join(["s2sam", "bound", *argv])
    return _suite(args, command) if args.suite else _runs(args, command)


def _parser() -> Parser:
    from s2sam.cli.surface import images

    parser = Parser(prog="s2sam bound", description=HELP, allow_abbrev=False)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="a folder that `s2sam train` has finished")
    parser.add_argument("--suite", action="store_true", help="run all verification experiments (about a minute)")
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
    group = parser.add_argument_group("of the suite's stability boundary")
    group.add_argument("--lr", type=float, help=f"learning rate eta (default: {SUITE['lr']})")
    group.add_argument("--momentum", type=float, help=f"mu, at most 0.99 (default: {SUITE['momentum']})")
    group.add_argument("--c", type=float, help=f"rho / ||d||, held fixed (default: {SUITE['c']})")
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


def _suite(args: argparse.Namespace, command: str) -> int:
    """All verification experiments, a line each."""
    from s2sam.analysis.bound import ASSUMPTIONS
    from s2sam.analysis.bound_suite import run_suite
    from s2sam.analysis.stability import Setting
    from s2sam.analysis.stability_measured import check_measurable
    from s2sam.cli.list import show
    from s2sam.report.bound_plots import make_folder, write_suite

    setting = Setting(lr=args.lr, momentum=args.momentum, c=args.c)
    check_measurable(setting)
    make_folder(args.out)
    suite = run_suite(setting, seed=args.seed, tell=_progress if sys.stderr.isatty() else lambda name: None)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    rows = [
        (
            c.experiment,
            c.setting,
            f"{c.measured:.4g}" + (f" +- {c.error:.1g}" if c.error else ""),
            c.limit,
            "yes" if c.holds else "NO",
        )
        for c in suite.checks
    ]
    show("bounds", ("experiment", "setting", "measured", "bound", "holds"), rows)
    used = [(a.name, *("yes" if x else "-" for x in (a.theorem, a.corollary)), a.says) for a in ASSUMPTIONS]
    show("assumptions", ("assumption", "theorem 1", "corollary", "says"), used)
    print(CLOSING)
    for path in write_suite(suite, args.out, command=command):
        print(path)
    failed = [c for c in suite.checks if not c.holds]
    print(f"{len(rows) - len(failed)} of {len(rows)} checks hold")
    return 1 if failed else 0


def _progress(name: str) -> None:
    print(f"\r\033[K{name} ...", end="", file=sys.stderr, flush=True)
