"""`s2sam robust RUN...`: accuracy and calibration of finished runs on corrupted test images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2sam.cli.arguments import Parser
from s2sam.cli.surface import images, labels, progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

    from s2sam.report.robust_arms import RobustArm

HELP = "accuracy and calibration of finished runs on corrupted images"
#: options that say how to measure
MEASURING = (
    "--corruptions", "--severities", "--images", "--constants", "--seed", "--batch-size", "--weights", "--device",
)  # fmt: skip
COLUMNS = (  # title, measure, factor, digits
    ("clean error", "clean_error", 100.0, 2), ("clean ECE", "clean.ece", 100.0, 2),
    ("mean error", "mean_corruption_error", 100.0, 2),
    ("relative", "relative_mean_corruption_error", 100.0, 2), ("retained", "retained_accuracy", 100.0, 1),
    ("mCE", "mce_alexnet", 100.0, 2), ("relative mCE", "relative_mce_alexnet", 100.0, 2),
    ("ECE", "mean_corruption_ece", 100.0, 2), ("NLL", "mean_corruption_nll", 1.0, 3),
)  # fmt: skip


def run(argv: list[str]) -> int:
    """Measure, write a result into each run folder and the comparison into --out, print the table.

    Raises:
        ValueError: runs that are not finished or cannot be compared, official files that are missing or damaged,
            generated and official images in one table, or an impossible option.
    """
    made = parser()
    args = made.parse_args(argv)
    if args.read_only:
        made.refuse(argv, MEASURING, "with --read-only")
    official = source(args.source)

    from rich.console import Console

    from s2sam.analysis.plain_json import to_json
    from s2sam.analysis.robustness_file import path_of, save
    from s2sam.analysis.robustness_run import RobustSettings, measure, read_of
    from s2sam.data.corruptions import CORRUPTIONS
    from s2sam.report.robust_arms import compare, group, sentence
    from s2sam.train.atomic import write_text

    settings = RobustSettings(
        official=official, corruptions=tuple(args.corruptions or CORRUPTIONS), severities=tuple(args.severities),
        images=args.images, seed=args.seed, constants=args.constants, batch_size=args.batch_size,
        weights=args.weights, device=args.device,
    )  # fmt: skip
    folders = [Path(name) for name in args.runs]
    names, out, console = labels(folders), Path(args.out), Console(highlight=False, stderr=args.json)
    paths = [path_of(folder, settings.kind) for folder in folders]
    out.mkdir(parents=True, exist_ok=True)  # a place that cannot be written is known now, not after hours
    if args.read_only:
        found = [{**read_of(folder, settings.kind), "run": name} for folder, name in zip(folders, names, strict=True)]
    else:
        with progress(console) as show:
            text = f"{len(settings.corruptions)} corruptions x {len(settings.severities)} severities"
            cells = len(settings.corruptions) * len(settings.severities)
            found = measure(folders, names, settings, on_cell=show(text, cells))
    arms = group(found)
    write_text(out / "robustness.json", to_json(found, indent=1) + "\n")
    if not args.read_only:
        for path, result in zip(paths, found, strict=True):
            save(result, path)
    written = [*paths, out / "robustness.json", *write_figures(found, out)]
    if args.json:
        print(to_json(found))
    else:
        table(arms, console)
        for line in [*(sentence(each) for each in compare(arms)), *notes(found)]:
            console.print(f"* {line}", style="dim", markup=False)
    for path in written:
        console.print(str(path), markup=False, soft_wrap=True)
    return 0


def parser() -> Parser:
    """The options."""
    made = Parser(prog="s2sam robust", description=HELP, allow_abbrev=False)
    add: Any = made.add_argument
    add("runs", nargs="+", metavar="RUN", help="a folder that `s2sam train` has finished")
    add(
        "--source", nargs="+", action="append", metavar="generated|official DIR",
        help="corrupted images made here (default), or the official files of CIFAR-10-C, CIFAR-100-C or ImageNet-C",
    )  # fmt: skip
    add("--corruptions", nargs="+", metavar="NAME", help="default: all 15")
    add("--severities", nargs="+", type=int, default=[1, 2, 3, 4, 5], metavar="N", help="default: 1 2 3 4 5")
    add("--images", type=images, default=None, metavar="N", help="of the test set, or `all` (default: all)")
    add("--constants", metavar="TABLE", help="of generated images: cifar, tiny-imagenet or imagenet (default: by size)")
    add("--seed", type=int, default=0, help="of generated images and of the choice of images (default: %(default)s)")
    add("--batch-size", type=int, default=500, help="default: %(default)s")
    add("--weights", choices=("final", "ema"), default="final", help="default: %(default)s")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    add("--out", default="runs/robust", metavar="FOLDER", help="of the comparison (default: %(default)s)")
    add("--read-only", action="store_true", help="measure nothing: compare the results in the run folders")
    add("--json", action="store_true", help="print a JSON list instead of the table")
    return made


def source(given: Sequence[Sequence[str]] | None) -> str | None:
    """The folder of official files; None = generated images.

    Raises:
        ValueError: neither, or both.

    >>> source(None), source([["generated"]]), source([["official", "data/CIFAR-10-C"]])
    (None, None, 'data/CIFAR-10-C')
    """
    words = [word for words in given or [["generated"]] for word in words]
    if words == ["generated"]:
        return None
    if words and words[0] == "official" and len(words) == 2:
        return words[1]
    if {"generated", "official"} <= set(words):
        raise ValueError("generated and official images are never mixed in one table; give one --source")
    raise ValueError(f"--source is `generated` or `official DIR`, not `{' '.join(words)}`")


def write_figures(found: Sequence[dict[str, Any]], out: Path) -> list[Path]:
    """The heat maps, and those of the differences to the first run where there are several."""
    from s2sam.report.robust_plots import draw_differences, draw_heatmaps, write

    figures: dict[str, Figure] = {"accuracy": draw_heatmaps(found)}
    if len(found) > 1:
        figures["difference"] = draw_differences(found[1:], found[0])
    return [path for name, figure in figures.items() for path in write(figure, out / name)]


def table(arms: Sequence[RobustArm], console: Console) -> None:
    """One line an arm; a measure that is defined for none has no column."""
    from rich.table import Table

    shown = Table(box=None, pad_edge=False)
    shown.add_column("run")
    shown.add_column("n", justify="right")
    columns = [column for column in COLUMNS if any(arm.values(column[1]) for arm in arms)]
    for title, _, _, _ in columns:
        shown.add_column(title, justify="right", no_wrap=True)
    for arm in arms:
        cells = [arm.text(measure, factor, digits) for _, measure, factor, digits in columns]
        shown.add_row(arm.name, str(len(arm.results)), *cells)
    console.print(shown)
    console.print()


def notes(found: Sequence[dict[str, Any]]) -> list[str]:
    """What the numbers depend on, in sentences."""
    row = found[0]
    if row["source"] == "generated":
        where = (
            f"GENERATED here with the constants of {row['constants']} (seed {row['corruption_seed']}), not the "
            "official files: compare only with values of the same source; frost has no photographs"
        )
    else:
        where = f"official files in the layout of {row['layout']}"
    lines = [
        f"images: {row['images']:,} of {row['all_images']:,} test images (digest {row['data_digest'][:12]}); {where} "
        f"(digest of the corrupted pixels {row['corrupted_digest'][:12]}); {row['weights']} weights",
        "clean ECE: on the clean images; mean error: the mean over "
        f"{len(row['corruptions'])} corruptions x {len(row['severities'])} severities, not "
        "normalised; relative: that minus the clean error; retained: corrupted accuracy in % of the clean one; ECE ("
        f"{row['ece_bins']} equal bins) and NLL: means over the same cells; all but NLL in %",
    ]
    if row["mce_alexnet"] is not None:
        lines.append("mCE and relative mCE: normalised by AlexNet's errors, as published for ImageNet-C")
    else:
        lines.append("no mCE: AlexNet's constants belong to all cells of the official ImageNet-C and to nothing else")
    if any(len(other["run"]) and other["arm"] != row["arm"] for other in found):
        lines.append("a network that is better on clean images is better on corrupted ones too: look at `relative`")
    return lines
