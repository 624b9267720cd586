"""Screening and confirmation of displacement directions; protocol.md says what is done and why.

    python results/direction-study/study.py data --source FOLDER   # proxy.npz from CIFAR-10 as parquet files
    python results/direction-study/study.py baselines|screening|confirmation|nesterov|sparser|control|growth [--jobs 2]
    python results/direction-study/study.py guarded [--jobs 1]     # RigL at 98 % again, no empty filters: guarded.csv
    python results/direction-study/study.py report                 # the tables, on the screen and in report.md

Every stage can be stopped and repeated: finished runs stand in raw.csv (guarded.csv) and are not run again.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import sys
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from safetensors.torch import load_file

from s2sam.suite.pool import finished, train_all
from s2sam.suite.settings import make_config
from s2sam.train.config import TrainConfig

HERE = Path(__file__).resolve().parent
RAW, DATA, RUNS = HERE / "raw.csv", HERE / "proxy.npz", HERE / "runs"
GUARDED, GUARDED_CSV = (
    "guarded",
    HERE / "guarded.csv",
)  #: the stage with a file of its own, see protocol.md, Changes, 21
CHANCE, PAPER = 0.25, "+g-0.05"
CLASSES = ("airplane", "automobile", "ship", "truck")
NOISE, STAGE_4 = "noise like the candidate", "on nesterov"
DENSITY_FACTOR = (0.1 / 0.2) ** 0.5  #: of rho at 90 %, for the root mean square of e at an active weight that 80 % has
SCREENED, CONFIRMED = range(8), range(1000, 1008)
CELLS = {"static80": ("static", 0.8), "static90": ("static", 0.9), "rigl80": ("rigl", 0.8), "rigl90": ("rigl", 0.9)}
SPARSER = {f"{method}{100 * s:.0f}": (method, s) for s in (0.95, 0.98) for method in ("static", "rigl")}  #: stage 5
GUARDED_CELL = "rigl98 guarded"  #: rigl98 with the option below
GUARD = {"min_per_filter": 1}  #: drops spare the strongest weight of each filter, nothing grows in an empty one
COMMON: dict[str, Any] = {
    "data": str(DATA), "model": "resnet8", "epochs": 80, "batch_size": 64, "lr": 0.1, "device": "cpu",
    "channels_last": True, "evaluate_every": 80, "sam.stats_every": 50, "optim.weight_decay": 5e-4,
    "sparse.options": {"delta_t": 50, "min_per_filter": 0}, "data_options.val_fraction": 5 / 7,
}  # fmt: skip
FIELDS = (
    "stage", "cell", "arm", "seed", "lr", "weight_decay", "val_top1", "test_top1", "recalibrated_test_top1",
    "train_loss", "train_top1", "displacement", "weight_norm", "alignment", "sparsity", "step_seconds", "outcome",
    "version", "ema_val_top1", "ema_test_top1",
)  # fmt: skip
Row = dict[str, Any]


def make_data(source: Path) -> None:
    """Four classes, pooled 2x2: 5,600 images for training and validation, 4,000 for the test, always the same ones."""
    sys.path.append(str(HERE.parent))
    from pooled_images import pooled

    pooled(source, DATA, CLASSES, train=1400, test=1000)


def config(cell: str, seed: int, changes: Mapping[str, Any], name: str) -> TrainConfig:
    """The configuration of one run."""
    method, sparsity = (CELLS | SPARSER | {GUARDED_CELL: SPARSER["rigl98"]})[cell]
    flat = COMMON | {"sharpness": "s2sam"} | dict(changes)
    if cell == GUARDED_CELL:
        flat["sparse.options"] = flat["sparse.options"] | GUARD
    if flat["sharpness"] == "none" and (idle := [key for key in changes if key == "rho" or key.startswith("sam.")]):
        raise ValueError(f"{name} sets {', '.join(idle)} for a run that is not displaced; leave out sharpness none")
    return make_config(flat, method=method, sparsity=sparsity, seed=seed, out=str(RUNS / name))


def rows() -> list[Row]:
    """What raw.csv and guarded.csv hold, numbers as numbers."""
    return [row for path in (RAW, GUARDED_CSV) if path.exists() for row in read(path, path.stat().st_mtime_ns)]


@functools.lru_cache(maxsize=2)
def read(path: Path, _: int) -> list[Row]:
    """The rows of a file as it was at that time."""
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    text = {"stage", "cell", "arm", "outcome", "version", "commit"}
    return [{k: v if k in text or v == "" else float(v) for k, v in row.items()} for row in found]


def run(stage: str, wanted: Iterable[tuple[str, str, int, Mapping[str, Any]]], jobs: int) -> None:
    """Train what the files do not hold yet: (cell, arm, seed, changes)."""
    done = {(r["stage"], r["cell"], r["arm"], int(r["seed"])) for r in rows()}
    todo = {}
    for cell, arm, seed, changes in wanted:
        if (stage, cell, arm, seed) not in done:
            name = f"{stage}-{cell}-{arm}-{seed}"
            todo[name] = (cell, arm, seed, config(cell, seed, changes, name))
    if not todo:
        return
    console = Console(highlight=False)
    # in portions, so that an interruption loses no more than one of them
    names = list(todo)
    for start in range(0, len(names), 4 * jobs):
        part = {name: todo[name][3] for name in names[start : start + 4 * jobs]}
        whole = {name: found.final for name, settings in part.items() if (found := finished(settings))}
        outcomes = train_all({name: part[name] for name in part if name not in whole}, jobs, console)
        ended = whole | {name: final for name, final, _ in outcomes}
        reasons = {name: reason for name, _, reason in outcomes}
        write(stage, [record(stage, *todo[name], ended[name], reasons.get(name, "")) for name in part])


def record(
    stage: str, cell: str, arm: str, seed: int, settings: TrainConfig, final: Mapping[str, Any] | None, reason: str
) -> Row:
    """One row of raw.csv or guarded.csv."""
    from s2sam import __version__

    row: Row = {
        "stage": stage, "cell": cell, "arm": arm, "seed": seed, "lr": settings.lr,
        "weight_decay": settings.optim.weight_decay, "outcome": reason or "ok", "version": __version__,
    }  # fmt: skip
    if stage == GUARDED:
        row["commit"] = json.loads((settings.folder / "env.json").read_text())["git_commit"]
    if final is None:
        if "diverged" not in reason:
            raise RuntimeError(f"{stage} {cell} {arm} seed {seed}: {reason}")
        return row | {"val_top1": CHANCE, "test_top1": CHANCE}
    lines = [json.loads(line) for line in (settings.folder / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in lines if r["kind"] == "step"]
    last = [r for r in lines if r["kind"] == "epoch"][-1]
    row |= {key: final[key] for key in ("val_top1", "test_top1", "recalibrated_test_top1", "sparsity", "step_seconds")}
    row |= {key: last[key] for key in ("train_loss", "train_top1")}
    row |= {key: final[key] for key in ("ema_val_top1", "ema_test_top1") if key in final}
    for key in ("displacement", "alignment"):  # means over the run
        values = [r[key] for r in steps if key in r]
        row[key] = float(np.mean(values)) if values else ""
    if settings.sharpness == "s2sam" and not row["displacement"]:
        raise RuntimeError(f"{stage} {cell} {arm} seed {seed} was never displaced; that is a baseline, not this arm")
    weights = load_file(settings.folder / "model.safetensors")
    row["weight_norm"] = sum(float(w.double().square().sum()) for w in weights.values() if w.ndim > 1) ** 0.5
    return row


def write(stage: str, new: Iterable[Row]) -> None:
    """Append rows to the file of the stage; guarded.csv also has the commit of each run."""
    path, fields = (GUARDED_CSV, (*FIELDS, "commit")) if stage == GUARDED else (RAW, FIELDS)
    begin = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields, restval="")
        if begin:
            writer.writeheader()
        writer.writerows({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()} for row in new)


def means(stage: str, cell: str, key: str = "val_top1", seeds: Container[int] | None = None) -> dict[str, float]:
    """Mean over seeds by arm, of the runs that have the value."""
    found: dict[str, list[float]] = {}
    for row in rows():
        here = row["stage"] == stage and row["cell"] == cell and row[key] != ""
        if here and (seeds is None or row["seed"] in seeds):
            found.setdefault(row["arm"], []).append(row[key])
    return {arm: float(np.mean(values)) for arm, values in found.items()}


@functools.cache
def arms() -> dict[str, Any]:
    """What arms.yaml holds."""
    found: dict[str, Any] = yaml.safe_load((HERE / "arms.yaml").read_text())
    return found


def settings_grid(grid: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """The settings of a grid; without one, those of stage 1."""
    grid = grid or arms()["grid"]
    return [{"lr": lr, "optim.weight_decay": wd} for lr in grid["lr"] for wd in grid["optim.weight_decay"]]


def label(arm: str, setting: Mapping[str, Any]) -> str:
    """The name of a trial of stage 1."""
    return f"{arm} lr {setting['lr']:g} wd {setting['optim.weight_decay']:g}"


def baselines(jobs: int) -> None:
    """Stage 1."""
    run(
        "baselines",
        [
            ("static80", label(arm, setting), seed, changes | setting)
            for arm, changes in arms()["baselines"].items()
            for setting in settings_grid()
            for seed in (0, 1)
        ],
        jobs,
    )


def chosen(arm: str) -> dict[str, Any]:
    """The setting of a baseline with the best mean validation accuracy, of those that have run."""
    scores = means("baselines", "static80")
    return max(settings_grid(), key=lambda setting: scores.get(label(arm, setting), 0.0))


def treatments() -> dict[str, dict[str, Any]]:
    """Every arm with its settings: each baseline its own, all others those of SGD."""
    found = arms()
    own = {arm: changes | chosen(arm) for arm, changes in found["baselines"].items()}
    others = {**found["context"], **found["arms"]}
    tuned = {label(arm, setting): changes | setting for arm, changes in others.items() for setting in joint_settings()}
    return own | {arm: chosen("sgd") | changes for arm, changes in others.items()} | tuned


def screening_stage() -> str:
    """Stage 2's name: "screening", or "screening 2" if SGD's choice has moved since (protocol.md, Changes)."""
    setting = chosen("sgd")
    used = {(r["lr"], r["weight_decay"]) for r in rows() if r["stage"] == "screening" and r["arm"] == "sgd"}
    return "screening" if used <= {(setting["lr"], setting["optim.weight_decay"])} else "screening 2"


def first_rounds(jobs: int) -> list[str]:
    """Rounds 1 and 2 of stage 2; returns the best six arms, best first."""
    tried, grid = means("baselines", "static80"), settings_grid()
    if any(label(arm, setting) not in tried for arm in arms()["baselines"] for setting in grid):
        raise SystemExit("stage 1 has not tried its whole grid; run the stage 'baselines' first")
    everything, stage = treatments(), screening_stage()
    rivals = list(arms()["arms"])
    fixed = [*arms()["baselines"], *arms()["context"]]
    for keep, seeds in ((len(rivals), (0, 1)), (6, (2, 3))):
        rivals = by_score(rivals, two_seeds())[:keep]
        run(stage, [("static80", arm, seed, everything[arm]) for arm in (*fixed, *rivals) for seed in seeds], jobs)
    return by_score(rivals, means(stage, "static80", seeds=range(4)))


def by_score(names: Iterable[str], scores: Mapping[str, float]) -> list[str]:
    """Best first; a name without a score comes last."""
    return sorted(names, key=lambda name: -scores.get(name, 0.0))


def joint(jobs: int) -> None:
    """The best four arms and the paper's, each with the three settings at which Nesterov validated best."""
    everything, best = treatments(), first_rounds(jobs)
    names = [label(arm, setting) for arm in dict.fromkeys((*best[:4], PAPER)) for setting in joint_settings()]
    run("joint", [("static80", name, seed, everything[name]) for name in names for seed in (0, 1)], jobs)


def joint_settings() -> list[dict[str, Any]]:
    """The three settings at which Nesterov validated best."""
    scores = means("baselines", "static80")
    return sorted(settings_grid(), key=lambda setting: -scores.get(label("nesterov", setting), 0.0))[:3]


def screening(jobs: int) -> str:
    """Stage 2; returns the candidate."""
    joint(jobs)
    everything, stage = treatments(), screening_stage()
    rivals = by_score([name for name, arm in pool().items() if arm != PAPER], two_seeds())[:2]
    for name in rivals:
        home = "joint" if name in means("joint", "static80") else stage
        run(home, [("static80", name, seed, everything[name]) for seed in range(2, 8)], jobs)
    run(stage, [("static80", name, seed, everything[name]) for name in arms()["baselines"] for seed in SCREENED], jobs)
    scores = means(stage, "static80") | means("joint", "static80")
    return max(rivals, key=lambda name: scores[name])


def pool() -> dict[str, str]:
    """What has been tried: trial -> arm. A trial is an arm with SGD's setting, or one of the stage joint."""
    screened = means(screening_stage(), "static80")
    trials = {arm: arm for arm in arms()["arms"] if arm in screened}
    return trials | {name: name.split(" lr ")[0] for name in means("joint", "static80")}


def two_seeds() -> dict[str, float]:
    """Mean validation accuracy of each trial over the seeds 0 and 1, which all trials have."""
    found: dict[str, list[float]] = {}
    stages = (screening_stage(), "joint")
    for row in rows():
        if row["stage"] in stages and row["seed"] < 2:
            found.setdefault(row["arm"], []).append(row["val_top1"])
    return {name: float(np.mean(values)) for name, values in found.items()}


def paper() -> str:
    """The trial of the paper's arm that validated best."""
    return by_score([name for name, arm in pool().items() if arm == PAPER], two_seeds())[0]


def baseline(stage: str | None = None) -> str:
    """The better of the baselines, by validation accuracy in stage 2."""
    scores = means(stage or screening_stage(), "static80")
    return max(arms()["baselines"], key=lambda arm: scores[arm])


def confirmation(jobs: int) -> None:
    """Stage 3."""
    everything, candidate = treatments(), screening(jobs)
    noise = noise_like(candidate, everything[candidate])
    primary = {baseline(): everything[baseline()], candidate: everything[candidate]}
    context = {NOISE: noise}, {arm: everything[arm] for arm in arms()["baselines"]}
    for wanted in (primary, {paper(): everything[paper()]}, *context):
        confirm("confirmation", wanted, jobs)


def noise_like(trial: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The same trial with a random direction; a length by steps becomes the mean length that it had so far."""
    noise = {**changes, "sam.direction": "random"}
    if noise.get("sam.scale") == "step":
        lengths = [r["displacement"] for r in rows() if r["seed"] in SCREENED and r["arm"] == trial]
        noise |= {"sam.scale": "norm", "rho": float(np.mean(lengths))}
    return noise


def confirm(stage: str, wanted: Mapping[str, Mapping[str, Any]], jobs: int, cells: Iterable[str] = CELLS) -> None:
    """Arms on the fresh seeds, all cells of a seed before the next seed."""
    places = tuple(cells)
    run(stage, [(cell, arm, seed, wanted[arm]) for seed in CONFIRMED for cell in places for arm in wanted], jobs)


def on_nesterov() -> dict[str, dict[str, Any]]:
    """The trials of stage 4: arm and setting -> its changes."""
    found, base = arms()["on nesterov"], {"optim.nesterov": True}
    return {
        label(f"nesterov {arm}", at): base | changes | at
        for arm, changes in found["arms"].items()
        for at in settings_grid(found["grid"])
    }


def second_candidate(jobs: int) -> str:
    """Stage 4's screening; returns the trial that validated best over 8 seeds."""
    trials, control = on_nesterov(), arms()["on nesterov"]["control"]
    run(STAGE_4, [("static80", name, seed, trials[name]) for name in trials for seed in (0, 1)], jobs)
    scores = means(STAGE_4, "static80", seeds=(0, 1))
    best = by_score([name for name in trials if control not in name], scores)[:2]
    run(STAGE_4, [("static80", name, seed, trials[name]) for name in best for seed in range(2, 8)], jobs)
    scores = means(STAGE_4, "static80")
    return max(best, key=lambda name: scores[name])


def repeated() -> bool:
    """Whether today's code gives the stored runs of the better baseline again, as far as "again" has them."""
    keys, found = ("test_top1", "train_loss", "weight_norm"), [r for r in rows() if r["arm"] == baseline()]
    stored, now = (
        {(r["cell"], r["seed"]): [r[key] for key in keys] for r in found if r["stage"] == stage}
        for stage in ("confirmation", "again")
    )
    return all(stored[place] == values for place, values in now.items())


def stage_4(jobs: int) -> None:
    """Displacements on top of Nesterov; the paper's arm with rho x sqrt(density)."""
    everything, reference = treatments(), baseline()
    run("again", [(cell, reference, CONFIRMED[0], everything[reference]) for cell in CELLS], jobs)
    if not repeated():
        confirm("again", {reference: everything[reference]}, jobs)
    candidate = second_candidate(jobs)
    confirm("confirmation 2", {candidate: on_nesterov()[candidate]}, jobs)
    sparser = {**everything[paper()]}
    sparser["rho"] *= DENSITY_FACTOR
    confirm("density", {f"{paper()} x sqrt(density)": sparser}, jobs, [cell for cell in CELLS if cell.endswith("90")])


def stage_5(jobs: int) -> None:
    """The arms at 95 and 98 %."""
    from sparser import run_all  # which is made of what stands here

    run_all(jobs)


def clean_growth(jobs: int) -> None:
    """RigL's growth by gradients at the clean weights."""
    from sparser import run_growth

    run_growth(jobs)


def guarded(jobs: int) -> None:
    """RigL at 98 % again, with a weight kept in every filter."""
    from sparser import run_guarded

    run_guarded(jobs)


def stage_6(jobs: int) -> None:
    """Wrong labels, where two-step SAM gains."""
    from control import run_all

    run_all(jobs)


STAGES = {
    "baselines": baselines, "screening": screening, "confirmation": confirmation, "nesterov": stage_4,
    "sparser": stage_5, "control": stage_6, "growth": clean_growth, "guarded": guarded,
}  # fmt: skip


def main() -> None:
    """One stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("data", *STAGES, "report"))
    parser.add_argument("--source", type=Path, help="folder with train.parquet and test.parquet of CIFAR-10")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    if options.stage == "data":
        if options.source is None:
            parser.error("give --source FOLDER, with train.parquet and test.parquet of CIFAR-10")
        make_data(options.source)
    elif options.stage == "report":
        from analyse import report

        Console(highlight=False).print(report(), markup=False, soft_wrap=True)
    else:
        if not DATA.exists():
            parser.error("proxy.npz is missing; make it with the stage 'data'")
        STAGES[options.stage](options.jobs)


if __name__ == "__main__":
    main()
