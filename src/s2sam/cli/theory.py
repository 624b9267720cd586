"""`s2sam theory check`: the theory's statements, checked on problems where everything is known."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from s2sam.cli.arguments import Parser
from s2sam.sparse.names import unknown

HELP = "check the theory where constants are known: bounds, rates, stability limits"
ACTIONS = ("check",)
CLOSING = """\
The corollary holds for any displacement that is fixed before its batch is drawn, and is smallest at rho = 0: a
certificate that S2-SAM does no harm beyond its third term, not a proof that it gains anything. It is not proved for
two-step SAM and echo, whose direction is that of the same batch; echo's pairs of steps have a bound of their own."""
OUT = "runs/theory"
BOUNDARY = {"lr": 0.1, "momentum": 0.9, "c": 0.05}  #: where the stability limits are measured


def run(argv: list[str]) -> int:
    """Do what the first word says; without one, say what there is.

    Returns:
        0; 1 if a bound is violated, or a control fails to violate the bound it must.

    Raises:
        ValueError: an unknown word or option, or a value out of range.
    """
    if argv and not argv[0].startswith("-") and argv[0] not in ACTIONS:
        raise unknown("theory action", argv[0], ACTIONS)
    parser = Parser(
        prog="s2sam theory", description=HELP, epilog="The bounds for finished runs: `s2sam bound RUN...`.",
        allow_abbrev=False,
    )  # fmt: skip
    actions = parser.add_subparsers(dest="action", metavar="|".join(ACTIONS), parser_class=Parser)
    about = "run all experiments on problems with known constants; exit code 1 if a check fails"
    check = actions.add_parser("check", help=about, description=about, allow_abbrev=False)
    check.add_argument(
        "--out", type=Path, default=Path(OUT), metavar="FOLDER", help="of JSON and plots (default: %(default)s)"
    )
    check.add_argument("--seed", type=int, default=0, help="of every random draw (default: %(default)s)")
    group = check.add_argument_group("of the stability boundary")
    add_boundary(group)
    args = parser.parse_args(argv)
    if args.action is None:
        parser.print_help()
        return 0
    return check_all(args, shlex.join(["s2sam", "theory", *argv]))


def add_boundary(group: argparse._ArgumentGroup, *, hidden: bool = False) -> None:
    """The options of the stability boundary; None where they are not given."""
    helps = {"lr": "learning rate eta", "momentum": "mu, at most 0.99", "c": "rho / ||d||, held fixed"}
    for name, text in helps.items():
        shown = argparse.SUPPRESS if hidden else f"{text} (default: {BOUNDARY[name]})"
        group.add_argument(f"--{name}", type=float, help=shown)


def check_seed(seed: int) -> None:
    """Raise ValueError unless it is one that a generator takes."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed must be at least 0 and below 2^63, got {seed}")


def check_all(args: argparse.Namespace, command: str) -> int:
    """All experiments, a line each; JSON and plots into `args.out`.

    Args:
        args: out, seed, lr, momentum and c.
        command: what is written down as having made the results.
    """
    check_seed(args.seed)
    from s2sam.analysis.bound import ASSUMPTIONS
    from s2sam.analysis.bound_suite import run_suite
    from s2sam.analysis.stability import Setting
    from s2sam.analysis.stability_measured import check_measurable
    from s2sam.cli.list import show
    from s2sam.report.bound_plots import make_folder, write_suite

    given = {name: getattr(args, name) for name in BOUNDARY if getattr(args, name) is not None}
    setting = Setting(**(BOUNDARY | given))
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
