"""Which learning rate and weight decay suit plain SGD in `s2sam demo`? The answer that its recipe was chosen by.

    python benchmarks/demo_settings.py      # minutes; writes benchmarks/results/demo_settings.json (not committed)

Mean validation accuracy (never test accuracy) over the dense, the static and the RigL network and over seeds that the
demo does not use. S2-SAM and SAM are not in it: the demo gives them what suits plain SGD.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
from pathlib import Path

import torch

from _environment import ROOT, environment
from s2sam.cli.demo import EPOCHS
from s2sam.train import TrainConfig, run
from s2sam.train.config import OptimConfig

LEARNING_RATES, WEIGHT_DECAYS = (0.02, 0.05, 0.1, 0.2), (5e-4, 5e-3)
METHODS, SEEDS = ("dense", "static", "rigl"), (100, 101, 102)


def main(argv: list[str] | None = None) -> Path:
    """Train the grid and write what came out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "demo_settings.json")
    options = parser.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for lr, decay in itertools.product(LEARNING_RATES, WEIGHT_DECAYS):
            accuracies = []
            for method, seed in itertools.product(METHODS, SEEDS):
                config = TrainConfig(
                    method=method,
                    sharpness="none",
                    lr=lr,
                    epochs=options.epochs,
                    seed=seed,
                    optim=OptimConfig(weight_decay=decay),
                    out=f"{folder}/{lr}-{decay}-{method}-{seed}",
                )
                accuracies.append(run(config)["val_top1"])
            rows.append({"lr": lr, "weight_decay": decay, "mean_val_top1": statistics.mean(accuracies)})
    result = {
        **environment(torch.device("cpu")),
        "epochs": options.epochs,
        "methods": METHODS,
        "seeds": SEEDS,
        "rows": sorted(rows, key=lambda row: -row["mean_val_top1"]),
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    return options.out


if __name__ == "__main__":
    print(main())
