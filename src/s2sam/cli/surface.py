"""`s2sam surface RUN...`: the loss around finished runs, along random directions, and its roughness Ra."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2sam.cli.arguments import Parser

if TYPE_CHECKING:
    from rich.console import Console

    from s2sam.analysis.surface_file import Surface

HELP = "loss surfaces of finished runs on one scale, and their roughness"


def run(argv: list[str]) -> int:
    """Measure what is not measured yet, write the figures, print Ra.

    Raises:
        ValueError: runs that are not finished or cannot be compared, an impossible grid, or a file of other settings.
    """
    parser = Parser(prog="s2sam surface", description=HELP, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a folder that `s2sam train` has finished")
    parser.add_argument("--points", type=int, default=21, help="along each side, odd (default: %(default)s)")
    parser.add_argument(
        "--span", type=float, default=1.0, help="sides go from -span to span filter norms (default: %(default)s)"
    )
    parser.add_argument("--pairs", type=int, default=3, help="of random directions (default: %(default)s)")
    parser.add_argument("--dims", type=int, choices=(1, 2), default=2, help="of the grid (default: %(default)s)")
    parser.add_argument("--images", type=images, default=1000, metavar="N", help="or `all` (default: %(default)s)")
    parser.add_argument("--split", choices=("train", "val", "test"), default="train", help="default: %(default)s")
    parser.add_argument(
        "--bn", choices=("eval", "recalibrated"), default="eval",
        help="BatchNorm statistics: the run's, or estimated anew at every point (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--weights", choices=("final", "ema"), default="final", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of directions and images (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default: %(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    parser.add_argument("--out", default="runs/surface", metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of the table")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {args.jobs}")

    from rich.console import Console

    from s2sam.analysis.opened import load_common
    from s2sam.analysis.plain_json import to_json
    from s2sam.analysis.surface import SurfaceSettings
    from s2sam.analysis.surface_run import measure, open_run
    from s2sam.report.surface_plots import cut_points, draw_profiles, draw_surfaces
    from s2sam.train.atomic import write_text
    from s2sam.train.processes import terminable

    settings = SurfaceSettings(
        points=args.points, span=args.span, pairs=args.pairs, dims=args.dims, bn=args.bn, seed=args.seed
    )
    out, folders = Path(args.out), [Path(name) for name in args.runs]
    console = Console(highlight=False, stderr=args.json)
    data = load_common(folders)
    surfaces = []
    with terminable(), progress(console) as show:
        for folder, label in zip(folders, labels(folders), strict=True):
            landscape, surface = open_run(
                folder, data, settings, label=label, split=args.split, images=args.images, weights=args.weights,
                device=args.device,
            )  # fmt: skip
            path = out / label / "surface.npz"
            surfaces.append(measure(landscape, surface, path, jobs=args.jobs, on_point=show(label, surface.loss.size)))
    found = [surface.summary() for surface in surfaces]
    write_text(out / "surfaces.json", to_json(found, indent=1) + "\n")
    paths = [out / surface.label / "surface.npz" for surface in surfaces] + [out / "surfaces.json"]
    paths += draw_surfaces(surfaces, out / "surfaces") if args.dims == 2 else []
    paths += draw_profiles(surfaces, out / "profiles")
    if args.json:
        print(to_json(found))
    else:
        table(found, console)
        for line in notes(surfaces, found, cut_points(surfaces)):
            console.print(f"* {line}", style="dim", markup=False)
    for path in paths:
        console.print(str(path), markup=False, soft_wrap=True)
    return 0


def images(text: str) -> int | None:
    """A number of images; None for `all`."""
    return None if text == "all" else int(text)


def labels(folders: Sequence[Path]) -> list[str]:
    """A name for each folder: its own, with as many of its parents in front as it takes to tell all apart.

    >>> labels([Path("runs/rigl"), Path("runs/set")]), labels([Path("a/seed0"), Path("b/seed0")])
    (['rigl', 'set'], ['a-seed0', 'b-seed0'])
    """
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["-".join(p[-length:]).strip("/") for p in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError("the same run is named twice; name every run once")


@contextmanager
def progress(console: Console, unit: str = "points") -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """Gives a function that begins a run's progress: a bar with the time left on a terminal, else a line at the end."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:

        def begin(label: str, total: int) -> Callable[[int], None]:
            task = bar.add_task(label, total=total)

            def on_point(done: int) -> None:
                bar.update(task, completed=done)
                if done == total and not console.is_terminal:
                    console.print(f"{label}: {total:,} {unit}", markup=False, soft_wrap=True)

            return on_point

        yield begin


def table(found: Sequence[dict[str, Any]], console: Console) -> None:
    """Loss, accuracy and Ra of every run."""
    from rich.table import Table

    shown = Table(box=None, pad_edge=False)
    shown.add_column("run")
    for name in ("loss", "top-1", "largest loss", "Ra_raw", "Ra_detrended"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in found:
        ra = [with_spread(row[f"{name}_mean"], row[f"{name}_spread"]) for name in ("ra_raw", "ra_detrended")]
        top1 = f"{100 * row['top1']:.2f} %"
        shown.add_row(row["run"], f"{row['loss']:.4f}", top1, f"{row['largest_loss']:.4g}", *ra)
    console.print(shown)
    console.print()


def with_spread(mean: float, spread: float | None) -> str:
    """A mean with its standard deviation, as text.

    >>> with_spread(1.25, 0.0312), with_spread(0.00125, None)
    ('1.25 +- 0.031', '0.00125')
    """
    return f"{mean:.3g}" if spread is None else f"{mean:.3g} +- {spread:.2g}"


def notes(surfaces: Sequence[Surface], found: Sequence[dict[str, Any]], cut: dict[str, int]) -> list[str]:
    """What the numbers depend on, and what was done to them, in sentences."""
    row = found[0]
    pairs = f"{row['pairs']} {'set' if row['pairs'] == 1 else 'sets'} of {row['dims']} random direction(s)"
    spread = "" if row["pairs"] == 1 else ", mean +- standard deviation over the sets"
    norms = "the run's own statistics"
    if row["bn"] == "recalibrated":
        norms = f"statistics of {row['calibration_images']:,} augmented training images, anew at every point"
    lines = [
        f"grid: {row['points']} points a side from {-row['span']:g} to {row['span']:g}; {pairs}{spread}; directions "
        "are filter-normalised, on the active weights, and move no biases or normalisation layers",
        f"loss: mean cross entropy in nats over {row['images']:,} of {row['all_images']:,} {row['split']} images, not "
        f"augmented (digest {row['data_digest'][:12]}); linear scale; {row['weights']} weights; seed {row['seed']}",
        f"BatchNorm: {norms}",
        "Ra_raw is the mean deviation from the mean loss and grows with the height of the bowl; Ra_detrended is what "
        "is left of it after the nearest quadratic. Neither alone says that a minimum is flat",
    ]
    wild = {one["run"]: one["not_finite"] for one in found if one["not_finite"]}
    lines += [
        f"{label}: {number:,} losses are not finite; Ra takes the largest finite one of their grid instead"
        for label, number in wild.items()
    ]
    total = surfaces[0].loss.size
    lines += [
        f"{label}: {number:,} of {total:,} points lie above the end of the figures' axis"
        for label, number in cut.items()
    ]
    return lines
