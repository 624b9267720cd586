"""The image study: does echo gain on images that a ResNet memorises? protocol.md says what is done and why.

    python studies/images/run.py data --source FOLDER                       # pooled.npz, from CIFAR-10
    python studies/images/run.py tune   [--cells "40-raw-*" ...] [--threads 2]   # tuning seeds, validation images
    python studies/images/run.py fresh  [--cells ...] [--threads 2]              # fresh seeds, test images
    python studies/images/run.py report                                     # report.md, summary.json

It can be stopped and started again: a run that stands in runs.csv is not run a second time. `--threads N` trains N runs
at once, each with one thread. `--budget large` is the longer plan, with seeds and a table of its own; `--device cuda`
trains either plan on a GPU. `--smoke` is a few small runs in the folder smoke, on random images if there are no others.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE.parent / "control"), str(HERE.parents[1] / "results")]

from image_plan import ImagePlan, fresh, tune  # noqa: E402
from image_report import report  # noqa: E402
from pooled_images import pooled  # noqa: E402
from s2sam.train.lock import hold  # noqa: E402
from s2sam.train.state import choose_device  # noqa: E402

TRAIN, TEST = 500, 1000  #: images of each class that there are


def random_images(path: Path) -> None:
    """Images of noise with the form of the real ones, for a smoke run."""
    rng, arrays = np.random.default_rng(0), {"classes": np.array([str(label) for label in range(10)])}
    for split, each in (("train", 12), ("test", 10)):
        arrays[f"{split}_x"] = rng.integers(256, size=(10 * each, 3, 16, 16), dtype=np.uint8)
        arrays[f"{split}_y"] = np.repeat(np.arange(10), each)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)


def images(options: argparse.Namespace) -> Path:
    """The file with the images; a smoke run makes random ones if it is not there.

    Raises:
        ValueError: it is not there, and this is no smoke run.
    """
    if options.data.is_file():
        return options.data
    if not options.smoke:
        raise ValueError(f"there is no {options.data}; make it by `run.py data --source FOLDER`, or name it by --data")
    path = options.out / "smoke" / "random.npz"
    if not path.is_file():
        random_images(path)
    return path


def main(arguments: list[str] | None = None) -> None:
    """One command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("data", "tune", "fresh", "report"))
    parser.add_argument("--cells", nargs="+", default=["*"], metavar="NAME", help="names of cells, or patterns of them")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", choices=("small", "large"), default="small")
    parser.add_argument("--smoke", action="store_true", help="a few small runs; no findings")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--data", type=Path, default=HERE / "pooled.npz", help="the pooled images")
    parser.add_argument("--source", type=Path, help="CIFAR-10, in any form that `s2sam list data` names")
    parser.add_argument("--out", type=Path, default=HERE, help="where the table of runs and the report go")
    options = parser.parse_args(arguments)
    variant = "smoke" if options.smoke else {"small": "", "large": "large"}[options.budget]
    try:
        if options.command == "data":
            if options.source is None:
                raise ValueError("data needs --source, the folder of CIFAR-10")
            pooled(options.source, options.data, None, train=TRAIN, test=TEST)
            return
        plan = ImagePlan.read(variant, out=options.out, data=options.data, device=options.device)
        if options.command == "report":
            print(report(plan))
            return
        choose_device(options.device)
        cells = plan.chosen_cells(options.cells)
        plan = ImagePlan.read(variant, out=options.out, data=images(options), device=options.device)
        torch.set_num_threads(1)
        with hold(plan.table.parent), workers(options.threads) as pool:  # two processes would train the same runs
            for i, cell in enumerate(cells, 1):
                (tune if options.command == "tune" else fresh)(plan, cell, pool)
                seconds = sum(row["seconds"] for row in plan.rows())
                print(f"{i} of {len(cells)}: {cell}, {seconds:,.0f} processor seconds so far", flush=True)
    except ValueError as error:
        parser.error(str(error))


def workers(threads: int) -> ProcessPoolExecutor | nullcontext[None]:
    """Processes with one thread each; none if one run at a time is enough.

    Raises:
        ValueError: fewer than one.
    """
    if threads < 1:
        raise ValueError(f"--threads must be at least 1, got {threads}")
    if threads == 1:
        return nullcontext()
    context = get_context("spawn")
    return ProcessPoolExecutor(threads, mp_context=context, initializer=torch.set_num_threads, initargs=(1,))


if __name__ == "__main__":
    main()
