"""Faster optimisation or a flatter minimum? Forks, swaps and a longer baseline on the proxy (protocol.md, "Mechanism").

    python results/direction-study/diagnostics.py run [--jobs 2]   # after the screening; appends to diagnostics.csv
    python results/direction-study/diagnostics.py report           # diagnostics.csv -> diagnostics.md

fork   every arm is copied after epochs 20, 40 and 60, and each copy trained for 4 epochs more by plain SGD at the clean
       weights, with the arm's own learning rate falling linearly to 0. A gap that vanishes there was noise, not place
swap   one arm for the first half of the run, another for the second
long   the better baseline with twice the epochs
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from s2sam.report.stats import deviation, t_interval
from s2sam.sam.single_step import S2SAM
from s2sam.train.averages import recalibrated
from s2sam.train.evaluate import evaluate, evaluate_split
from s2sam.train.seeding import generator
from s2sam.train.state import TrainState, build, make_sharpness
from s2sam.train.step import train_step
from study import baseline, config, paper, rows, screening_stage, treatments

HERE = Path(__file__).resolve().parent
RAW = HERE / "diagnostics.csv"
CELL, SEEDS, FORKS, ANNEAL = "static80", (100, 101, 102), (20, 40, 60), 4
FIELDS = ("part", "arm", "seed", "epoch", "val_top1", "val_loss", "clean_train_loss", "clean_train_top1", "weight_norm")
Row = dict[str, Any]
Job = tuple[str, str, str, int]  # part, arm, arm of the second half, seed


def make(arm: str, seed: int, epochs: int = 80) -> TrainState:
    """A run of an arm before its first step."""
    return build(config(CELL, seed, treatments()[arm] | {"epochs": epochs}, "diagnostics"))


def epoch(state: TrainState) -> None:
    """One pass over the training images."""
    state.model.train()
    for batch in state.batches:
        train_step(state, *state.mix(*batch))
        state.advance()
    state.epoch += 1


def measure(state: TrainState) -> Row:
    """Accuracy on validation images, loss on training images as stored; BatchNorm re-estimated at the clean weights."""
    twin = recalibrated(
        state.model, state.batches.data_x, state.config.batch_size, state.augment,
        generator(state.config.seed, "recalibrate"),
    )  # fmt: skip
    assert twin is not None
    val_loss, val_top1 = evaluate_split(twin, state.data, "val", state.augment)
    loss, top1 = evaluate(twin, state.data.train_x, state.data.train_y, state.augment)
    squares = sum(float(p.detach().double().square().sum()) for p in twin.parameters() if p.ndim > 1)
    return {
        "val_top1": val_top1, "val_loss": val_loss, "clean_train_loss": loss, "clean_train_top1": top1,
        "weight_norm": squares**0.5,
    }  # fmt: skip


def fork(state: TrainState, arm: str) -> Row:
    """A copy of the run, trained for ANNEAL epochs by plain SGD from the learning rate it has down to 0."""
    copy = make(arm, state.config.seed)
    copy.load_state_dict(state.state_dict())
    if isinstance(copy.sharpness, S2SAM):
        copy.sharpness.remove()
        copy.sharpness = None
    (group,) = copy.optimizer.param_groups
    group["nesterov"], first = False, group["lr"]
    steps = ANNEAL * len(copy.batches)
    copy.model.train()
    done = 0
    for _ in range(ANNEAL):
        for batch in copy.batches:
            group["lr"] = first * (1 - done / steps)
            train_step(copy, *copy.mix(*batch))
            done += 1
    return measure(copy)


def become(state: TrainState, arm: str) -> None:
    """Go on as another arm: its displacement, learning rate, weight decay and Nesterov; the schedule stays in step."""
    if isinstance(state.sharpness, S2SAM):
        state.sharpness.remove()
    state.config = config(CELL, state.config.seed, treatments()[arm], "diagnostics")
    if state.config.sam.rho_schedule != "constant":
        raise ValueError(f"{arm} has a schedule of its own and cannot be swapped in")
    (group,) = state.optimizer.param_groups
    group["weight_decay"], group["nesterov"] = state.config.optim.weight_decay, state.config.optim.nesterov
    state.scheduler.base_lrs = [state.config.lr]
    group["lr"] = state.config.lr * state.scheduler.lr_lambdas[0](state.scheduler.last_epoch)
    state.sharpness = make_sharpness(state.model, state.optimizer, state.config, state.n_steps)


def work(job: Job) -> list[Row]:
    """All measurements of one job."""
    torch.set_num_threads(1)
    part, arm, late, seed = job
    state = make(arm, seed, 160 if part == "long" else 80)
    label = {"fork": arm, "swap": f"{arm} then {late}", "long": f"{arm}, 160 epochs"}[part]
    found = []
    for finished in range(1, state.config.epochs + 1):
        epoch(state)
        if part == "fork" and finished in FORKS:
            found.append({"part": "fork", "arm": label, "seed": seed, "epoch": finished} | fork(state, arm))
        if part == "swap" and finished == state.config.epochs // 2:
            become(state, late)
    return [*found, {"part": "end", "arm": label, "seed": seed, "epoch": state.config.epochs} | measure(state)]


def candidate() -> str:
    """The trial with the most seeds in the screening and the best mean over them, that is not a baseline."""
    found: dict[str, list[float]] = {}
    for row in rows():
        if row["stage"] in (screening_stage(), "joint") and row["arm"] not in ("sgd", "nesterov"):
            found.setdefault(row["arm"], []).append(row["val_top1"])
    return max(found, key=lambda name: (len(found[name]), sum(found[name])))


def jobs() -> Iterator[Job]:
    """Everything that is to be measured."""
    best = baseline()
    for seed in SEEDS:
        yield from (("fork", arm, "", seed) for arm in ("sgd", "nesterov", candidate(), paper()))
        yield from (("swap", *pair, seed) for pair in ((best, candidate()), (candidate(), best)))
        yield "long", best, "", seed


def measured() -> list[Row]:
    """What diagnostics.csv holds, numbers as numbers."""
    if not RAW.exists():
        return []
    with RAW.open(newline="") as file:
        return [{k: v if k in ("part", "arm") else float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def run(workers: int) -> None:
    """Measure what is missing, job by job."""
    ended = {(row["arm"], int(row["seed"])) for row in measured() if row["part"] == "end"}
    labels = {"fork": "{1}", "swap": "{1} then {2}", "long": "{1}, 160 epochs"}
    todo = [job for job in jobs() if (labels[job[0]].format(*job), job[3]) not in ended]
    begin, console = not RAW.exists(), Console(highlight=False)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for number, future in enumerate(as_completed([pool.submit(work, job) for job in todo]), 1):
            new = future.result()
            with RAW.open("a", newline="") as file:
                writer = csv.DictWriter(file, FIELDS)
                if begin:
                    writer.writeheader()
                begin = False
                writer.writerows({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()} for row in new)
            console.print(f"[{number}/{len(todo)}] {new[-1]['arm']} seed {new[-1]['seed']}", markup=False)


def report() -> str:
    """The tables, which are also written to diagnostics.md."""
    from analyse import table

    found, reference = measured(), baseline()
    groups: dict[tuple[str, str, float], list[Row]] = {}
    for row in found:
        groups.setdefault((row["part"], row["arm"], row["epoch"]), []).append(row)
    lines = []
    for (part, arm, at), members in groups.items():
        own = {int(r["seed"]): 100 * r["val_top1"] for r in members}
        other = {int(r["seed"]): 100 * r["val_top1"] for r in groups.get((part, reference, at), [])}
        gaps = [own[seed] - other[seed] for seed in own if seed in other] if arm != reference else []
        lines.append([part, arm, f"{at:g}", *summary(members), *gap_cells(gaps)])
    head = [
        "part",
        "arm",
        "epoch",
        "n",
        "validation",
        "sd",
        "clean train loss",
        "clean train top-1",
        f"minus {reference}",
    ]
    parts = [
        "# Mechanism diagnostics",
        "Made from `diagnostics.csv` by `python results/direction-study/diagnostics.py report`; what the parts are is "
        "told at the top of that script. Proxy, static ERK 80 %, validation accuracy in %, BatchNorm statistics "
        "re-estimated. Three seeds: the intervals (95 %, each by itself) are wide; nothing here is a finding alone.",
        table([*head, "95 % interval"], lines),
    ]
    text = "\n\n".join(parts) + "\n"
    (HERE / "diagnostics.md").write_text(text, encoding="utf-8")
    return text


def summary(members: Sequence[Mapping[str, Any]]) -> list[str]:
    """n, mean and sd of the validation accuracy, mean loss and accuracy on clean training images."""
    values = [100 * row["val_top1"] for row in members]
    sd = deviation(values)
    loss = sum(row["clean_train_loss"] for row in members) / len(members)
    top1 = sum(row["clean_train_top1"] for row in members) / len(members)
    mean = sum(values) / len(values)
    return [f"{len(values)}", f"{mean:.2f}", "-" if sd is None else f"{sd:.2f}", f"{loss:.4f}", f"{100 * top1:.1f}"]


def gap_cells(gaps: Sequence[float]) -> list[str]:
    """Mean and interval of the differences, or dashes."""
    if not gaps:
        return ["-", "-"]
    interval = t_interval(gaps)
    bounds = "-" if interval is None else f"[{interval.low:+.2f}, {interval.high:+.2f}]"
    return [f"{sum(gaps) / len(gaps):+.2f}", bounds]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("run", "report"))
    parser.add_argument("--jobs", type=int, default=2)
    chosen = parser.parse_args()
    if chosen.stage == "run":
        run(chosen.jobs)
    else:
        Console(highlight=False).print(report(), markup=False, soft_wrap=True)
