"""Which scale lets one radius of echo serve every network and density? A pilot on tuning seeds, which confirms nothing.

python studies/control/scale.py run [--width 0.5] [--threads 1]     # appends to scale.csv what is not there yet
python studies/control/scale.py report                              # scale.csv -> scale.md
"""

from __future__ import annotations

import argparse
import csv
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

import torch

from batched import Arm, Cell, Run, accuracies, train

HERE = Path(__file__).resolve().parent
TABLE, PAGE = HERE / "scale.csv", HERE / "scale.md"
FIELDS = ("width", "norm", "sparsity", "lr", "weight_decay", "scale", "rho", "seed", "val", "train", "seconds")
RADII = {
    "norm": (0.2, 0.4, 0.8, 1.6, 3.2, 6.4),
    "relative": (0.01, 0.02, 0.04, 0.08, 0.16, 0.32),
    "rms": (0.002, 0.004, 0.008, 0.016, 0.032, 0.064),
    "filter": (0.01, 0.02, 0.04, 0.08, 0.16, 0.32),
}
SPARSITIES, SEEDS, NOISE = (0.0, 0.9, 0.95, 0.98), (0, 1), 0.4
Key = tuple[float, bool, float, float, float]  #: width, norm, sparsity, lr, weight decay


def rows() -> list[dict[str, str]]:
    """What scale.csv holds."""
    if not TABLE.exists():
        return []
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


def run(width: float, lr: float, decay: float) -> None:
    """Train what is missing, one scale of one cell at a time."""
    done = {tuple(row[key] for key in FIELDS[:6]) for row in rows()}
    for norm in (True, False):
        for sparsity in SPARSITIES:
            for scale in ("none", *RADII):
                place = (width, norm, sparsity, lr, decay, scale)
                if tuple(map(str, place)) in done:
                    continue
                arm = Arm() if scale == "none" else Arm("echo", scale=scale, visits=2)
                radii = RADII.get(scale, (0.0,))
                runs = [Run(seed, lr, decay, rho) for rho in radii for seed in SEEDS]
                method = "static" if sparsity else "dense"
                cell = Cell(noise=NOISE, sparsity=sparsity, norm=norm, method=method, width=width)
                began = time.perf_counter()
                found = accuracies(cell, train(cell, arm, runs), runs)
                seconds = (time.perf_counter() - began) / len(runs)
                append(
                    (*place, one.rho, one.seed, f"{at['val']:.6f}", f"{at['train']:.6f}", f"{seconds:.2f}")
                    for one, at in zip(runs, found, strict=True)
                )


def append(lines: object) -> None:
    """Add rows to scale.csv."""
    begin = not TABLE.exists()
    with TABLE.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if begin:
            writer.writerow(FIELDS)
        writer.writerows(lines)  # type: ignore[arg-type]


def report() -> str:
    """scale.md: a table for each setting, and for each scale the radius whose worst loss is smallest."""
    found: dict[tuple[str, ...], dict[tuple[str, str], dict[tuple[str, str], list[float]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for row in rows():
        setting = tuple(row[key] for key in ("width", "lr", "weight_decay"))
        found[setting][row["scale"], row["rho"]][row["norm"], row["sparsity"]].append(100 * float(row["val"]))
    parts = [INTRODUCTION]
    for setting, by_radius in found.items():
        means = {radius: {cell: fmean(v) for cell, v in cells.items()} for radius, cells in by_radius.items()}
        parts += section(setting, means)
    text = "\n\n".join(parts) + "\n"
    PAGE.write_text(text, encoding="utf-8")
    return text


def section(setting: tuple[str, ...], means: Mapping[tuple[str, str], Mapping[tuple[str, str], float]]) -> list[str]:
    """One setting of width, learning rate and weight decay."""
    cells = list(next(iter(means.values())))
    best = {cell: max(by[cell] for by in means.values() if cell in by) for cell in cells}
    names = [
        f"{'BN' if norm == 'True' else 'no BN'} {100 * float(s):.0f} %".replace(" 0 %", " dense") for norm, s in cells
    ]
    head = ["scale", "rho", *names, "worst loss", "worst, own scale"]
    lines, picks = [head, ["---"] * len(head)], []
    for scale in ("none", *RADII):
        own = {c: max(by[c] for (s, _), by in means.items() if s == scale) for c in cells}
        losses = {}
        for (name, rho), by in means.items():
            if name == scale and set(by) == set(cells):
                losses[rho] = max(best[c] - by[c] for c in cells)
                mine = max(own[c] - by[c] for c in cells)
                shown = [f"**{by[c]:.1f}**" if by[c] > best[c] - 1 else f"{by[c]:.1f}" for c in cells]
                lines.append([name, rho, *shown, f"{losses[rho]:.1f}", f"{mine:.1f}"])
        if losses and scale != "none":
            rho = min(losses, key=losses.__getitem__)
            within = sum(best[c] - means[scale, rho][c] < 1 for c in cells)
            picks.append(
                f"{scale} {rho} (at most {losses[rho]:.1f} points below a cell's best, "
                f"within one point in {within} of {len(cells)})"
            )
    width, lr, decay = setting
    return [
        f"## Width {width}, learning rate {lr}, weight decay {decay}",
        "\n".join("| " + " | ".join(line) + " |" for line in lines),
        "One radius for all cells, by its worst loss: " + "; ".join(picks) + ".",
    ]


INTRODUCTION = """# Echo's scale: a pilot on tuning seeds

Made from scale.csv by `python studies/control/scale.py report`; the runs are those of `python studies/control/scale.py
run` with `--width`, `--lr` and `--wd` as in the headings. **This is tuning** (seeds 0 and 1, validation images): it
chooses a scale for the study and confirms nothing. 600 digits, 40 % wrong labels, batch 32, 1,900 steps, cosine
schedule, static masks.

Validation accuracy in %, mean of two seeds, 719 images; "none" is SGD on distinct batches. Bold: within a point of the
best of the cell (column), over all scales and radii. *Worst loss*: how far below that best the radius is in its worst
cell; *own scale*: the same against the best radius of its own scale in each cell."""


def main() -> None:
    """One command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("--width", type=float, default=0.5, help="hidden units over 256")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--wd", type=float, default=5e-4)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.command == "run":
        run(options.width, options.lr, options.wd)
    print(report())


if __name__ == "__main__":
    main()
