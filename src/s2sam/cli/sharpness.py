"""`s2sam sharpness RUN...`: curvature and the rise of the loss around finished runs; with --premise, along a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2sam.cli.arguments import Parser
from s2sam.cli.surface import images, labels, progress

if TYPE_CHECKING:
    import argparse

    from rich.console import Console

HELP = "curvature of finished runs, how far the loss rises around them, and the premise of S2-SAM"
#: measure -> what the table calls it
ROWS = {
    "train_loss": "train loss", "loss": "loss", "gradient_norm": "gradient norm", "weight_norm": "||w||",
    "lambda_max": "lambda_max", "lowest_eigenvalue": "lambda_min", "trace": "trace", "worst": "worst case",
    "worst_one_step": "  of it in one step (SAM)", "m_sharpness": "m-sharpness", "average": "average",
    "average_relative": "average, relative", "lambda_w2": "lambda_max ||w||^2", "trace_w2_n": "trace ||w||^2 / n",
    "worst_adaptive": "adaptive worst case", "average_adaptive": "adaptive average", "rho_over_w": "rho / ||w||",
    "c_lambda_max": "c lambda_max",
}  # fmt: skip
PREMISE = {
    "cosine": "cos(g_t, g_{t-1})", "previous_odd": "odd, +g_{t-1}", "previous_even": "even, +g_{t-1}",
    "own_odd": "odd, own gradient", "own_even": "even, own gradient", "random_even": "even, random",
    "batch_sharpness": "batch sharpness", "lambda_max": "lambda_max", "rho_over_w": "rho / ||w||",
    "c_lambda_max": "c lambda_max",
}  # fmt: skip
#: options of one of the two uses
ONLY_PLAIN = (
    "--split", "--weights", "--adaptive-rho", "--steps", "--sigma", "--draws", "--group", "--eigenvalues", "--queries",
    "--probes", "--density-steps", "--batch", "--tolerance",
)  # fmt: skip
ONLY_PREMISE = ("--looks",)


def run(argv: list[str]) -> int:
    """Measure the runs, write JSON and figures, print a table and what it supports in words.

    Raises:
        ValueError: runs that are not finished or were trained on different images, an impossible setting, or an option
            without effect.
        RuntimeError: a loss or a curvature that is not finite.
    """
    made = parser()
    args = made.parse_args(argv)
    useless, when = (ONLY_PLAIN, "with --premise") if args.premise else (ONLY_PREMISE, "without --premise")
    made.refuse(argv, useless, when)
    from rich.console import Console

    from s2sam.analysis.plain_json import to_json

    if args.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {args.jobs}")
    if args.premise and args.jobs > 1:
        raise ValueError("--premise takes the steps of a run one after another in one process; leave out --jobs")
    folders = [Path(name) for name in args.runs]
    console = Console(highlight=False, stderr=args.json)
    records, paths = (premise if args.premise else sharpness)(args, folders, console)
    if args.json:
        print(to_json(records))
    for path in paths:
        console.print(str(path), markup=False, soft_wrap=True)
    return 0


def parser() -> Parser:
    """The options; what is None has a default that depends on --premise."""
    found = Parser(prog="s2sam sharpness", description=HELP, allow_abbrev=False)
    found.add_argument("runs", nargs="+", metavar="RUN", help="a folder that `s2sam train` has finished")
    found.add_argument("--premise", action="store_true", help="probe each checkpoint of the runs instead")
    found.add_argument("--images", type=images, default=1000, metavar="N", help="or `all` (default: %(default)s)")
    found.add_argument("--split", choices=("train", "val", "test"), default="train", help="default: %(default)s")
    found.add_argument(
        "--bn", choices=("eval", "train"),
        help="BatchNorm statistics: the run's, or those of each batch (default: eval; train with --premise)",
    )  # fmt: skip
    found.add_argument("--weights", choices=("final", "ema"), default="final", help="default: %(default)s")
    found.add_argument("--rho", type=float, help="radius (default: 0.05; with --premise that of the run)")
    found.add_argument("--adaptive-rho", type=float, default=0.5, help="of the adaptive ball (default: %(default)s)")
    found.add_argument("--steps", type=int, default=10, help="of the worst case (default: %(default)s)")
    found.add_argument(
        "--sigma", type=float, default=0.05, help="of relative random moves, in ||w|| (default: %(default)s)"
    )
    found.add_argument("--draws", type=int, default=5, help="random directions (default: %(default)s)")
    found.add_argument("--group", type=int, default=128, metavar="M", help="of m-sharpness (default: %(default)s)")
    found.add_argument("--eigenvalues", type=int, default=3, metavar="K", help="default: %(default)s")
    found.add_argument("--max-steps", type=int, default=60, help="of Lanczos (default: %(default)s)")
    found.add_argument("--queries", type=int, default=30, help="for the trace, 0 = none (default: %(default)s)")
    found.add_argument("--probes", type=int, default=2, help="of the density, 0 = none (default: %(default)s)")
    found.add_argument("--density-steps", type=int, default=30, help="of Lanczos (default: %(default)s)")
    found.add_argument("--precision", choices=("fp32", "fp64"), default="fp32", help="default: %(default)s")
    found.add_argument("--batch", type=int, default=250, help="images at once (default: %(default)s)")
    found.add_argument(
        "--tolerance", type=float, default=0.1, help="of train losses that match, relative (default: %(default)s)"
    )
    found.add_argument("--looks", type=int, default=20, help="steps of a probe of --premise (default: %(default)s)")
    found.add_argument("--seed", type=int, default=0, help="of vectors and images (default: %(default)s)")
    found.add_argument(
        "--jobs", type=int, default=1, help="processes that share the batches of images (default: %(default)s)"
    )
    found.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    found.add_argument("--out", default="runs/sharpness", metavar="FOLDER", help="default: %(default)s")
    found.add_argument("--json", action="store_true", help="print a JSON list instead of the table")
    return found


def sharpness(
    args: argparse.Namespace, folders: Sequence[Path], console: Console
) -> tuple[list[dict[str, Any]], list[Path]]:
    """The verb without --premise: (records, files written)."""
    from s2sam.analysis.opened import load_common
    from s2sam.analysis.sharpness import SharpnessSettings
    from s2sam.analysis.sharpness_compare import words
    from s2sam.analysis.sharpness_run import FILE, measure_run, save_record
    from s2sam.report.bound_plots import check_folder
    from s2sam.report.sharpness_plots import draw_bars, draw_densities
    from s2sam.train.config import number
    from s2sam.train.processes import terminable

    number("tolerance", args.tolerance, 0.0, 1.0)
    settings = SharpnessSettings(
        rho=0.05 if args.rho is None else args.rho, adaptive_rho=args.adaptive_rho, steps=args.steps, sigma=args.sigma,
        draws=args.draws, group=args.group, eigenvalues=args.eigenvalues, max_steps=args.max_steps,
        queries=args.queries, probes=args.probes, density_steps=args.density_steps, bn=args.bn or "eval",
        precision=args.precision, batch_size=args.batch, seed=args.seed,
    )  # fmt: skip
    data, records, out = load_common(folders), [], Path(args.out)
    check_folder(out)
    with terminable(), progress(console, "passes") as show:
        for folder, label in zip(folders, labels(folders), strict=True):
            records.append(
                measure_run(
                    folder, data, settings, label=label, split=args.split, images=args.images, weights=args.weights,
                    device=args.device, jobs=args.jobs, on_pass=show(label, settings.passes),
                )
            )  # fmt: skip
            save_record(folder / FILE, records[-1])
    paths = [*(folder / FILE for folder in folders), save_record(out / FILE, records)]
    paths += draw_bars(records, out / "sharpness")
    paths += draw_densities(records, out / "density") if settings.probes else []
    if not args.json:
        table(records, ROWS, console)
        for line in [*notes(records), *words(records, args.tolerance)]:
            console.print(f"* {line}", style="dim", markup=False)
    return records, paths


def premise(
    args: argparse.Namespace, folders: Sequence[Path], console: Console
) -> tuple[list[dict[str, Any]], list[Path]]:
    """The verb with --premise: (records, files written)."""
    from s2sam.analysis.opened import load_common
    from s2sam.analysis.premise_run import FILE, PremiseSettings, find_checkpoints, measure_premise
    from s2sam.analysis.sharpness_run import save_record
    from s2sam.report.bound_plots import check_folder
    from s2sam.report.sharpness_plots import draw_premise

    settings = PremiseSettings(
        looks=args.looks, rho=args.rho, bn=args.bn or "train", images=args.images, max_steps=args.max_steps,
        precision=args.precision, seed=args.seed,
    )  # fmt: skip
    load_common(folders)
    records, out = [], Path(args.out)
    check_folder(out)
    counts = [len(find_checkpoints(folder)) for folder in folders]
    with progress(console, "looks") as show:
        for folder, label, count in zip(folders, labels(folders), counts, strict=True):
            on_look = show(label, count * settings.looks)
            records.append(measure_premise(folder, settings, label=label, device=args.device, on_look=on_look))
            save_record(folder / FILE, records[-1])
    paths = [*(folder / FILE for folder in folders), save_record(out / FILE, records)]
    paths += draw_premise(records, out / "premise")
    if not args.json:
        for record in records:
            points = [point | {"run": f"step {point['step']:,}"} for point in record["points"]]
            console.print(f"{record['run']}: rho {record['rho']:g}", markup=False)
            table(points, PREMISE, console)
    return records, paths


def table(rows: Sequence[dict[str, Any]], names: dict[str, str], console: Console) -> None:
    """A line for each measure, a column for each record."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, pad_edge=False)
    shown.add_column("")
    for row in rows:
        shown.add_column(Text(row["run"]), justify="right")
    for key, name in names.items():
        shown.add_row(Text(name), *(Text(cell(row, key)) for row in rows))
    console.print(shown)
    console.print()


def cell(row: dict[str, Any], key: str) -> str:
    """A measure as text, with its spread; one that did not converge is marked as the bound that it is.

    >>> cell({"a": {"value": 2.0, "converged": False}}, "a"), cell({"a": {"value": 0.5, "sd": 0.01}}, "a")
    ('>= 2 ?', '0.5 +- 0.01')
    """
    value = row["worst"]["one_step"] if key == "worst_one_step" else row[key]
    spread = None
    sign, mark = "", ""
    if isinstance(value, dict):
        if not value.get("converged", True):
            sign, mark = "<= " if key == "lowest_eigenvalue" else ">= ", " ?"
        spread = value.get("sd", value.get("error") if "converged" not in value else None)
        value = value.get("value", value.get("mean"))
    if value is None:
        return "-"
    return f"{sign}{value:.4g}{mark}" + ("" if spread is None else f" +- {spread:.2g}")


def notes(records: Sequence[dict[str, Any]]) -> list[str]:
    """What the numbers depend on, in sentences."""
    from s2sam.analysis.hessian import batch_sizes

    row = records[0]
    given = row["settings"]
    sizes = batch_sizes(row["images"], given["batch_size"])
    each = " or ".join(map(str, sorted(set(sizes))))
    norms = "the run's own statistics" if given["bn"] == "eval" else f"those of each batch, {each} images, or group"
    lines = [
        f"mean cross entropy in nats over {row['images']:,} of {row['all_images']:,} {row['split']} images, not "
        f"augmented (digest {row['data_digest'][:12]}); train loss over {row['train_images']:,}; BatchNorm: {norms}; "
        f"{row['weights']} weights; {given['precision']}; seed {given['seed']}",
        "on the active weights: " + ", ".join(f"{r['run']} {r['active_weights']:,}" for r in records),
        f"worst case: the largest rise found within {given['rho']:g} in {given['steps']} steps; m-sharpness: the first "
        f"step's, by groups of {row['m_sharpness']['images']}; average: {given['draws']} random directions of that "
        "length, mean of both sides; relative and adaptive ones: "
        f"{given['sigma']:g} of the weights' size; adaptive worst case: ||e / w|| <= {given['adaptive_rho']:g}",
        "c = rho / mean gradient norm of these groups; +- is the standard deviation over draws or groups, and of the "
        "trace the standard error",
    ]
    ends = {"largest": "lambda_max", "lowest": "lowest_eigenvalue"}
    unfit = {which: [r["run"] for r in records if not r[key]["converged"]] for which, key in ends.items()}
    lines += [
        f"? = a bound only: the {which} eigenvalue of {', '.join(runs)} did not converge; raise --max-steps"
        for which, runs in unfit.items()
        if runs
    ]
    return lines
