"""Learning rate and radius of each method on the diagonal linear network, chosen on problems of their own.

python results/theory/tune_diagonal_network.py     (about 5 minutes on one core; writes diagonal_network_tuning.json)

Every method gets the full grid (SGD, which has no radius, more learning rates instead); the pair with the smallest mean
test error over 200 problems of seed 10000 is chosen; one that diverges on any of them is out.
`s2sam.analysis.diagonal_network.ARMS` holds what this chose, and `s2sam theory check` draws fresh problems.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import torch

from s2sam.analysis.diagonal_network import ARMS, GRADIENTS, DiagonalNetworks, train

SEED, PROBLEMS = 10_000, 200
RATES = (0.02, 0.05, 0.1)
RADII = (0.1, 0.3, 1.0, 3.0, 10.0)
RATES_OF_SGD = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
OUT = Path(__file__).with_name("diagonal_network_tuning.json")


def main() -> None:
    """Train the grid and write every mean and the choices."""
    torch.set_num_threads(1)
    found = {}
    for arm in ARMS:
        grid = [(r, 0.0) for r in RATES_OF_SGD] if arm.direction == "none" else [(r, e) for r in RATES for e in RADII]
        tried = []
        for lr, rho in grid:
            generator = torch.Generator().manual_seed(SEED)
            problem = DiagonalNetworks.drawn(PROBLEMS, generator)
            w = train(replace(arm, lr=lr, rho=rho), problem, gradients=GRADIENTS, generator=generator)
            mean = float(problem.test_error(w).mean())
            tried.append({"lr": lr, "rho": rho, "test_error": mean if math.isfinite(mean) else None})
        finite = [t for t in tried if t["test_error"] is not None]
        best = min(finite, key=lambda t: t["test_error"])
        found[arm.name] = {"chosen": {"lr": best["lr"], "rho": best["rho"]}, "tried": tried}
    about = {"seed": SEED, "problems": PROBLEMS, "gradients": GRADIENTS, "torch": torch.__version__}
    OUT.write_text(json.dumps(about | {"arms": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
