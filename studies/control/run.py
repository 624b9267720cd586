"""The control study: where does a sharpness method gain, and does echo gain there? protocol.md says what is done.

    python studies/control/run.py tune   [--cells "40-bn-*" ...] [--threads 2] [--smoke]   # tuning seeds, validation
    python studies/control/run.py fresh  [--cells ...] [--threads 2] [--smoke]             # fresh seeds, test images
    python studies/control/run.py equal  [--cells ...] [--threads 2] [--smoke]             # fresh seeds, equal decay
    python studies/control/run.py report [--smoke]                                         # report.md, pictures

It can be stopped and started again: a run that stands in runs.csv is not run a second time. `--threads N` works on N
cells at once, each with one thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from statistics import median

import torch

from batched import VAL_FRACTION, Cell, Run, accuracies, train
from plan import TIMED, Plan, Point, append, environment, read_table
from s2sam.train.config import DataConfig, OptimConfig, SamConfig, SparseConfig, TrainConfig
from s2sam.train.state import build
from s2sam.train.step import train_step

TIME_FIELDS = ("stage", "cell", "arm", "seed", "seconds", "environment")
STEPS_TIMED, REPEATS = 100, 5


def execute(
    plan: Plan, stage: str, cell: str, arm: str, wanted: Sequence[tuple[Point, int]], epochs: int | None = None
) -> None:
    """Train what the table does not hold yet, as one batch; every trial counts as what it is, a collapse too."""
    done = {
        (r["lr"], r["weight_decay"], r["rho"], r["seed"])
        for r in plan.rows()
        if (r["stage"], r["cell"], r["arm"]) == (stage, cell, arm)
    }
    todo = [(point, seed) for point, seed in wanted if (*point, seed) not in done]
    if not todo:
        return
    where, made = plan.cells[cell], plan.arms["sam" if arm == TIMED else arm]
    where = where if epochs is None else replace(where, epochs=epochs)
    runs = [Run(seed, *point) for point, seed in todo]
    began = time.process_time()
    found = accuracies(where, train(where, made, runs), runs)
    seconds = (time.process_time() - began) / len(runs)
    common = {
        "stage": stage, "cell": cell, "arm": arm, "epochs": where.epochs, "seconds": round(seconds, 3),
        "environment": environment(plan.table),
    }  # fmt: skip
    append(
        plan.table,
        [
            common
            | {"lr": run.lr, "weight_decay": run.weight_decay, "rho": run.rho, "seed": run.seed}
            | {"val": round(at["val"], 6), "train": round(at["train"], 6)}
            | (
                {"test": round(at["test"], 6)} if stage in ("fresh", "equal") else {}
            )  # nothing is chosen by test images
            for run, at in zip(runs, found, strict=True)
        ],
    )


def tune(plan: Plan, cell: str) -> None:
    """All arms of a cell, with the same number of trials; more for all of them while a choice is on an edge."""
    sizes = plan.settings["trials"]
    for extension in range(plan.rounds(cell) + 1):
        most = max(
            len(plan.screened(plan.tried(cell, arm))) for arm in plan.arms_in(cell)
        )  # by other settings, perhaps
        for arm in plan.arms_in(cell):
            tune_arm(plan, cell, arm, max(most, plan.number(cell) + extension * sizes["extension"]))
        rows = plan.rows()
        if not plan.untuned(cell, rows):
            return


def tune_arm(plan: Plan, cell: str, arm: str, number: int) -> None:
    """Train what :meth:`plan.Plan.next_runs` says, until the arm has `number` trials and its finalists all seeds."""
    while wanted := plan.next_runs(cell, arm, number, plan.rows()):
        execute(plan, "tune", cell, arm, wanted)


def fresh(plan: Plan, cell: str) -> None:
    """All arms of a cell at their choices, on the fresh seeds; and SAM for as long as echo takes.

    Raises:
        ValueError: the tuning of the cell is not complete.
    """
    rows = plan.rows()
    if missing := plan.refusals(cell, rows):
        raise ValueError(f"the tuning of {cell} is not complete ({'; '.join(missing)}); run `run.py tune` first")
    for arm in plan.arms_in(cell):
        execute(plan, "fresh", cell, arm, [(chosen(plan, cell, arm), seed) for seed in plan.fresh])
    times = read_table(plan.table.with_name("times.csv"))
    of = {arm: median(r["seconds"] for r in times if r["cell"] == cell and r["arm"] == arm) for arm in ("sam", "echo")}
    epochs = max(1, round(plan.cells[cell].epochs * of["echo"] / of["sam"]))
    execute(plan, "fresh", cell, TIMED, [(chosen(plan, cell, "sam"), seed) for seed in plan.fresh], epochs)


def equal(plan: Plan, cell: str) -> None:
    """The main arms on the fresh seeds at one common learning rate and weight decay, each at its best radius there."""
    for arm in plan.equal_arms:
        point = plan.at_equal_decay(arm, plan.tried(cell, arm))
        execute(plan, "equal", cell, arm, [(point, seed) for seed in plan.fresh])


def chosen(plan: Plan, cell: str, arm: str) -> Point:
    """The choice of an arm that is tuned."""
    return plan.chosen(cell, arm)


def measure_times(plan: Plan, cell: str) -> None:
    """Seconds a gradient in the library's own loop, SGD, SAM and echo in turns: in times.csv, once for each cell."""
    path = plan.table.with_name("times.csv")
    if any(row["cell"] == cell for row in read_table(path)):
        return
    states = {arm: build(library_config(plan.cells[cell], sharpness)) for arm, sharpness in LIBRARY.items()}
    batches = {arm: iter_forever(state) for arm, state in states.items()}
    rows = []
    for repeat in range(-1, REPEATS):  # the first round warms up
        for arm, state in states.items():
            gradients = 2 if arm == "sam" else 1
            began = time.process_time()
            for _ in range(STEPS_TIMED // gradients):
                x, y = next(batches[arm])
                train_step(state, x, y)
            seconds = (time.process_time() - began) / STEPS_TIMED
            if repeat >= 0:
                common = {"stage": "time", "cell": cell, "environment": environment(plan.table)}
                rows.append(common | {"arm": arm, "seed": repeat, "seconds": round(seconds, 7)})
    append(path, rows, TIME_FIELDS)


LIBRARY = {"sgd": "none", "sam": "sam", "echo": "echo"}


def iter_forever(state):  # type: ignore[no-untyped-def]
    """Batches of a run, epoch after epoch."""
    state.model.train()
    while True:
        yield from state.batches


def library_config(cell: Cell, sharpness: str) -> TrainConfig:
    """A run of the library in this cell, with a small radius."""
    return TrainConfig(
        method=cell.method, sparsity=cell.sparsity, sharpness=sharpness, rho=0.01, batch_size=cell.batch_size,
        epochs=cell.epochs, lr=0.01, device="cpu", model_options={"width": cell.width, "norm": cell.norm},
        optim=OptimConfig(weight_decay=5e-4), sam=SamConfig(scale="filter", stats_every=0),
        sparse=SparseConfig(options={"delta_t": cell.delta_t}),
        data_options=DataConfig(
            train_size=cell.images, val_fraction=VAL_FRACTION, label_noise=cell.noise, augment="none"
        ),
    )  # fmt: skip


def work(command: str, smoke: bool, cell: str) -> str:
    """One cell, in a process of its own."""
    torch.set_num_threads(1)
    plan = Plan.read(smoke=smoke)
    {"tune": tune, "fresh": fresh, "equal": equal}[command](plan, cell)
    return cell


def main() -> None:
    """One command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("tune", "fresh", "equal", "report"))
    parser.add_argument("--cells", nargs="+", default=["*"], metavar="NAME", help="names of cells, or patterns of them")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="a few small runs, in the folder smoke; no findings")
    options = parser.parse_args()
    plan = Plan.read(smoke=options.smoke)
    if options.command == "report":
        from analyse import report
        from pictures import draw

        print(report(plan))
        for path in draw(plan):
            print(path)
        return
    try:
        cells = plan.chosen_cells(options.cells)
        if options.command == "fresh":
            torch.set_num_threads(1)
            rows = plan.rows()
            for cell in cells:
                if missing := plan.refusals(cell, rows):
                    raise ValueError(f"the tuning of {cell} is not complete ({'; '.join(missing)}); tune it first")
            for cell in cells:  # alone, before several processes disturb one another
                measure_times(plan, cell)
        with ProcessPoolExecutor(options.threads, mp_context=get_context("spawn")) as pool:
            count, smoke = len(cells), [options.smoke] * len(cells)
            for i, cell in enumerate(pool.map(work, [options.command] * count, smoke, cells), 1):
                print(f"{i} of {count}: {cell}", flush=True)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
