"""`s2sam data list|check|get`: which data there is, whether it is sound, and the only place that downloads anything."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from s2sam.cli.arguments import Parser
from s2sam.cli.list import TABLES, show
from s2sam.sparse.names import unknown

HELP = "list, check or download data"
ACTIONS = ("list", "check", "get")


def run(argv: list[str]) -> int:
    """Do one of them.

    Returns:
        0; 2 if `check` found problems.
    """
    if argv and not argv[0].startswith("-") and argv[0] not in ACTIONS:
        raise unknown("data action", argv[0], ACTIONS)
    parser = Parser(prog="s2sam data", description=HELP)
    actions = parser.add_subparsers(dest="action", required=True, metavar="|".join(ACTIONS), parser_class=Parser)
    actions.add_parser("list", help="the forms of data that can be read, and the archives that can be downloaded")
    check = actions.add_parser("check", help="read everything; print shapes, classes, counts, digest and problems")
    check.add_argument("data", metavar="NAME|PATH", help="digits, a folder, or an .npz file")
    check.add_argument("--labels", choices=("fine", "coarse"), help="of CIFAR-100")
    check.add_argument(
        "--resize", type=int, metavar="PIXELS", help="scale the centre square of each image to this side"
    )
    get = actions.add_parser(
        "get",
        help="download an archive, check its sum, unpack it; nothing else ever downloads",
        description="Download an archive, check its sum and unpack it. One that is a file here already: add "
        "--url file:///PATH/cifar-10-python.tar.gz",
    )
    get.add_argument("name", metavar="NAME", help="cifar10, cifar100, cifar10-c or cifar100-c")
    get.add_argument("--out", type=Path, metavar="FOLDER", help="the folder to make (default: data/NAME)")
    get.add_argument("--url", help="another address of the same archive; file:///PATH for a file")
    args = parser.parse_args(argv)
    return {"list": _list, "check": _check, "get": _get}[args.action](args)


def _list(args: argparse.Namespace) -> int:
    from s2sam.data.fetch import ARCHIVES

    show("data", *TABLES["data"]())
    rows = [(a.name, f"{a.size / 1e6:.0f} MB", f"{a.checksum[0]} {a.checksum[1]}", a.url) for a in ARCHIVES]
    show("archives", ("name", "size", "checksum", "address"), rows)
    return 0


def _check(args: argparse.Namespace) -> int:
    from s2sam.data import find_row, load_data
    from s2sam.data.check import class_counts, examine

    options = {key: value for key in ("labels", "resize") if (value := getattr(args, key)) is not None}
    data = load_data(args.data, val_fraction=0.0, **options)
    found = examine(data)
    channels, height, width = data.image_shape
    facts = [
        ("name", data.name),
        ("form", find_row(args.data).name),
        ("images", f"{channels} channels, {height}x{width} pixels (height x width)"),
        ("train", f"{len(data.train_x)} images, before any are held out for validation"),
        ("test", f"{len(data.test_x)} images"),
        ("classes", str(data.num_classes)),
        ("mean", " ".join(f"{m:.4f}" for m in data.mean.tolist())),
        ("std", " ".join(f"{s:.4f}" for s in data.std.tolist())),
        ("digest", data.digest),
        ("notes", data.notes),
    ]
    show("data", ("what", "value"), facts)
    counts = class_counts(data)[:, [0, 2]].tolist()
    show(
        "classes",
        ("class", "train", "test"),
        [(n, str(a), str(b)) for n, (a, b) in zip(data.classes, counts, strict=True)],
    )
    if found.remarks:
        show("remarks", ("remark",), [(remark,) for remark in found.remarks])
    if found.problems:
        show("problems", ("problem",), [(problem,) for problem in found.problems])
    return 2 if found.problems else 0


def _get(args: argparse.Namespace) -> int:
    from s2sam.data.fetch import get

    with _progress() as progress:
        folder = get(args.name, args.out, url=args.url, progress=progress)
    print(folder)
    return 0


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("download")
        yield lambda done, total: bar.update(task, completed=done, total=total)
