"""Does Adam's bias correction by age help weights that RigL has grown? Digits, MLP, RigL 95 %, AdamW, five seeds.

python results/adam-regrowth/study.py             # 20 runs of some seconds: raw.csv and report.md
python results/adam-regrowth/study.py --report    # report.md from raw.csv
"""

from __future__ import annotations

import csv
import itertools
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from s2sam import sparsify
from s2sam.data import load_data
from s2sam.data.augment import normalise
from s2sam.data.loader import Batches
from s2sam.models import create_model
from s2sam.report.stats import deviation, mean, paired_difference
from s2sam.sparse.adam import BiasByAge

HERE = Path(__file__).resolve().parent
SEEDS, RATES, EPOCHS, ARMS = range(5), (1e-3, 1e-2), 40, ("torch", "by age")
COLUMNS = ("arm", "lr", "seed", "steps", "sparsity", "first_update_over_lr", "test_top1")


def train(seed: int, lr: float, arm: str) -> dict[str, float | int | str]:
    """One run: accuracy on the test images, and mean |w| / lr of grown weights after their first update."""
    data = load_data("digits", val_fraction=0.0, seed=seed)
    x, test = (normalise(images, data.mean, data.std) for images in (data.train_x, data.test_x))
    batches = Batches(x, data.train_y, 64, torch.Generator().manual_seed(seed), drop_last=True)
    generator = torch.Generator().manual_seed(seed)
    net = create_model("mlp", num_classes=10, in_channels=1, image_size=8, generator=generator)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr)
    steps = EPOCHS * len(batches)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    options = {"delta_t": 20, "min_per_filter": 0, "generator": generator}
    rigl = sparsify(net, optimizer, method="rigl", sparsity=0.95, total_steps=steps, **options)
    if arm == "by age":
        BiasByAge(rigl)
    first: list[float] = []
    grown: dict[str, torch.Tensor] = {}
    for _ in range(EPOCHS):
        for images, labels in batches:
            old, updates = {name: mask.clone() for name, mask in rigl.masks.items()}, rigl.updates
            rate = optimizer.param_groups[0]["lr"]
            optimizer.zero_grad()
            F.cross_entropy(net(images), labels).backward()
            optimizer.step()
            schedule.step()
            sizes = [net.get_parameter(name).detach()[new].abs() for name, new in grown.items()]
            first += [float(size.mean()) / rate for size in sizes if size.numel()]
            changed = rigl.updates > updates
            grown = {name: mask & ~old[name] for name, mask in rigl.masks.items()} if changed else {}
    net.eval()
    with torch.no_grad():
        right = int((net(test).argmax(1) == data.test_y).sum())
    return {
        "arm": arm, "lr": lr, "seed": seed, "steps": steps, "sparsity": round(rigl.sparsity(), 6),
        "first_update_over_lr": round(mean(first), 4), "test_top1": round(100 * right / len(test), 4),
    }  # fmt: skip


def report(rows: list[dict[str, str]]) -> str:
    """The table and what it says."""
    lines = [
        "# Adam and grown weights: an ablation", "",
        "MLP on scikit-learn's digits, RigL at 95 %, AdamW with a cosine, batch 64, 40 epochs, 5 seeds; test accuracy",
        "in % (359 images) at the end. *first* is the mean |update| / lr of grown weights in their first step.", "",
        "| lr | torch | by age | first, torch | first, by age | by age - torch, paired, 95 % |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for lr in sorted({row["lr"] for row in rows}, key=float):
        of = {arm: {int(r["seed"]): r for r in rows if r["lr"] == lr and r["arm"] == arm} for arm in ARMS}
        top = {arm: {seed: float(r["test_top1"]) for seed, r in found.items()} for arm, found in of.items()}
        values = [list(top[arm].values()) for arm in ARMS]
        cells = [f"{mean(v):.2f} +- {deviation(v) or 0:.2f}" for v in values]
        cells += [f"{mean([float(r['first_update_over_lr']) for r in of[arm].values()]):.2f}" for arm in ARMS]
        found = paired_difference(top["by age"], top["torch"])
        band = "" if found.interval is None else f" [{found.interval.low:+.2f}, {found.interval.high:+.2f}]"
        lines.append(f"| {lr} | {' | '.join(cells)} | {found.mean:+.2f}{band} |")
    lines += [
        "", "An interval that holds 0 shows no difference.", "",
        "Data: [raw.csv](raw.csv). Command: `python results/adam-regrowth/study.py`.", "",
    ]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "--report" not in sys.argv:
        with open(HERE / "raw.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            for seed, lr, arm in itertools.product(SEEDS, RATES, ARMS):
                writer.writerow(train(seed, lr, arm))
                file.flush()
    with open(HERE / "raw.csv", newline="", encoding="utf-8") as file:
        (HERE / "report.md").write_text(report(list(csv.DictReader(file))), encoding="utf-8")
