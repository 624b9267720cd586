"""Which settings suit the arms of `s2sam demo`? The answer that its numbers come from.

    python benchmarks/demo_settings.py      # ten minutes on one core; writes benchmarks/results/demo_settings.json

Seeds are such as the demo does not use, and a choice is the trial with the best mean validation accuracy (never test
accuracy; validation images have right labels). Act 1 has one choice of learning rate and weight decay for all its
networks, by the mean over them, out of 9 trials each. In act 2 the arms that displace choose their radius at the
trainer's default learning rate and weight decay, SGD, the reference, chooses both of these, and tuned echo all three,
out of 12 trials each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from _environment import ROOT, environment, rounded
from s2sam.cli import demo
from s2sam.suite.pool import train_all
from s2sam.train.config import TrainConfig

SEEDS = (100, 101, 102)
CLEAN = {"lr": (0.05, 0.1, 0.2), "weight_decay": (2e-3, 5e-3, 1.5e-2)}  #: of act 1
FLAT: dict[str, dict[str, Sequence[float]]] = {  # radii in steps of the square root of 2, about
    "s2sam": {"rho": (0.1, 0.14, 0.2, 0.28, 0.4, 0.56, 0.8, 1.1, 1.6, 2.2, 3.2, 4.5)},
    "echo": {"rho": (0.01, 0.014, 0.02, 0.028, 0.04, 0.056, 0.08, 0.11, 0.16, 0.22, 0.32, 0.45)},
    "sam": {"rho": (0.005, 0.007, 0.01, 0.014, 0.02, 0.028, 0.04, 0.056, 0.08, 0.11, 0.16, 0.22)},
    "echo-tuned": {"lr": (0.01, 0.03, 0.1), "weight_decay": (0.005, 0.015), "rho": (0.08, 0.16)},
    "sgd-tuned": {"lr": (0.001, 0.003, 0.01, 0.03), "weight_decay": (0.015, 0.05, 0.15)},
}
Trial = dict[str, float]


def trials(axes: Mapping[str, Sequence[float]]) -> list[Trial]:
    """Every combination of the values.

    >>> trials({"lr": (0.1, 0.3), "rho": (1.0,)})
    [{'lr': 0.1, 'rho': 1.0}, {'lr': 0.3, 'rho': 1.0}]
    """
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


def at_end(trial: Trial, axes: Mapping[str, Sequence[float]]) -> list[str]:
    """The settings of a choice that are the first or last value tried.

    >>> at_end({"lr": 0.1, "rho": 2.0}, {"lr": (0.03, 0.1, 0.3), "rho": (1.0, 2.0)})
    ['rho']
    """
    return [name for name, values in axes.items() if trial[name] in (min(values), max(values))]


def main(argv: Sequence[str] | None = None) -> Path:
    """Train every trial and write what came out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two epochs, one seed and two trials an arm, for tests")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "demo_settings.json")
    options = parser.parse_args(sys.argv[1:] if argv is None else argv)
    seeds, most = (SEEDS[:1], 2) if options.quick else (SEEDS, None)
    epochs = (2, 2) if options.quick else (demo.SPARSITY_EPOCHS, demo.FLATNESS_EPOCHS)

    plans: dict[str, dict[str, TrainConfig]] = {}  # arm -> trial and seed, as text -> run
    with tempfile.TemporaryDirectory() as folder:

        def out() -> str:
            return os.path.join(folder, str(sum(map(len, plans.values()))))

        for name, arm in demo.SPARSITY.items():
            plans[name] = {}
            for trial, seed in product(trials(CLEAN)[:most], seeds):
                plans[name][key(trial, seed)] = demo.sparsity_config(replace(arm, **trial), seed, out(), epochs[0])
        for name, axes in FLAT.items():
            plans[name] = {}
            for trial, seed in product(trials(axes)[:most], seeds):
                arm = replace(demo.FLATNESS[name], **trial)
                plans[name][key(trial, seed)] = demo.flatness_config(arm, seed, out(), epochs[1])
        every = {f"{name} {k}": config for name, plan in plans.items() for k, config in plan.items()}
        outcomes = train_all(every, options.jobs, Console(highlight=False, stderr=True), shown="val_top1")
    found = {name: 0.0 if final is None else float(final["val_top1"]) for name, final, _ in outcomes}  # diverged: 0
    failed = {name: reason for name, final, reason in outcomes if final is None}

    def mean(arms: Sequence[str], trial: Trial) -> float:
        return statistics.fmean(found[f"{name} {key(trial, seed)}"] for name in arms for seed in seeds)

    def act(arms: Sequence[str], axes: Mapping[str, Sequence[float]]) -> dict[str, Any]:
        rows = [{**trial, "mean_val_top1": mean(arms, trial)} for trial in trials(axes)[:most]]
        best = max(rows, key=lambda row: row["mean_val_top1"])  # the first of equals
        choice = {name: best[name] for name in axes}
        return {"trials": len(rows), "choice": choice, "at_end_of_axis": at_end(choice, axes), "rows": rows}

    result = {
        **environment(torch.device("cpu")),
        "quick": options.quick,
        "seeds": seeds,
        "epochs": dict(zip(("sparsity", "flatness"), epochs, strict=True)),
        "sparsity": act(list(demo.SPARSITY), CLEAN),
        "flatness": {name: act([name], axes) for name, axes in FLAT.items()},
        "failed": failed,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(rounded(result), indent=1) + "\n")
    return options.out


def key(trial: Trial, seed: int) -> str:
    """A run's name within its arm.

    >>> key({"lr": 0.1}, 100)
    'lr 0.1 seed 100'
    """
    return " ".join(f"{name} {value:g}" for name, value in trial.items()) + f" seed {seed}"


if __name__ == "__main__":
    print(main())
