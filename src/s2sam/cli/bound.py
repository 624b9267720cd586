"""`s2sam bound --suite`: check the theorem, its corollary and the stability boundary where everything is known."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from s2sam.cli.arguments import Parser

HELP = "check the convergence theorem and the stability limits on problems with known constants"
CLOSING = """\
The corollary holds for any displacement that is fixed before its batch is drawn, and is smallest at rho = 0: a
certificate that S2-SAM does no harm beyond its third term, not a proof that it gains anything."""


def run(argv: list[str]) -> int:
    """Run the experiments, print a line for each, write JSON and plots on request.

    Returns:
        0; 1 if a bound is violated, or a control fails to violate the bound it must.

    Raises:
        ValueError: neither runs nor --suite, runs (not supported), or an option out of range.
    """
    parser = Parser(prog="s2sam bound", description=HELP, allow_abbrev=False)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="trained networks are not supported yet")
    parser.add_argument("--suite", action="store_true", help="run all verification experiments (under a minute)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write bound.json and three plots there")
    parser.add_argument("--seed", type=int, default=0, help="of every random draw (default: %(default)s)")
    group = parser.add_argument_group("of the stability boundary")
    group.add_argument("--lr", type=float, default=0.1, help="learning rate eta (default: %(default)s)")
    group.add_argument("--momentum", type=float, default=0.9, help="mu, at most 0.99 (default: %(default)s)")
    group.add_argument("--c", type=float, default=0.05, help="rho / ||d||, held fixed (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.runs:
        raise ValueError(
            "the constants of a trained network are not estimated yet: leave the runs out and use `s2sam bound "
            "--suite`, which checks the theorem on problems whose constants are known"
        )
    if not args.suite:
        raise ValueError("nothing to do: give --suite to run the verification experiments (see `s2sam bound --help`)")
    if args.seed < 0:
        raise ValueError(f"--seed must be at least 0, got {args.seed}")

    from s2sam.analysis.bound import ASSUMPTIONS
    from s2sam.analysis.bound_suite import run_suite
    from s2sam.analysis.stability import Setting
    from s2sam.cli.list import show
    from s2sam.report.bound_plots import make_folder, write_suite

    setting = Setting(lr=args.lr, momentum=args.momentum, c=args.c)
    if args.out is not None:
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
    if args.out is not None:
        for path in write_suite(suite, args.out, command=shlex.join(["s2sam", "bound", *argv])):
            print(path)
    failed = [c for c in suite.checks if not c.holds]
    print(f"{len(rows) - len(failed)} of {len(rows)} checks hold")
    return 1 if failed else 0


def _progress(name: str) -> None:
    print(f"\r\033[K{name} ...", end="", file=sys.stderr, flush=True)
