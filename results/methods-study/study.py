"""Does every sparse training method beat a random mask that never moves? The commands are in README.md.

    python results/methods-study/study.py data --source FOLDER    # cifar10-16.npz from CIFAR-10 as parquet files
    python results/methods-study/study.py filters                 # the finished networks -> filters.csv
    python results/methods-study/study.py report                  # these and methods.csv, n-of-m.csv ... -> report.md

The training itself is done by `s2sam table`.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Iterable
from pathlib import Path

from s2sam.report.formats import markdown_grid
from s2sam.report.stats import LEVEL, deviation, mean
from s2sam.suite.pooled import pooled_difference

HERE = Path(__file__).resolve().parent
CONTROLS = ("Static ERK", "Static, stem dense")
#: channel sparsity -> that of the weights, 1 - (1 - channels)^2, under which CHEX stands in the table
CHANNELS = {0.684: 0.9, 0.776: 0.95, 0.859: 0.98}
Values = dict[str, dict[float, dict[int, float]]]  #: method -> sparsity -> seed -> accuracy in points


def make_data(source: Path) -> None:
    """All ten classes, pooled 2x2: 4,000 images for training and 10,000 for the test, always the same ones."""
    sys.path.append(str(HERE.parent))
    from pooled_images import pooled

    pooled(source, HERE / "cifar10-16.npz", None, train=400, test=1000)


def load(name: str) -> tuple[Values, list[dict[str, str]]]:
    """Accuracies of the finished runs of one table, and the lines of the failed ones."""
    with (HERE / name).open(newline="") as file:
        lines = list(csv.DictReader(file))
    values: Values = {}
    for line in lines:
        if line["state"] == "finished":
            cell = values.setdefault(line["row"], {}).setdefault(float(line["sparsity"]), {})
            cell[int(line["seed"])] = 100 * float(line["test_top1"])
    return values, [line for line in lines if line["state"] != "finished"]


def control(values: Values) -> str:
    """The row that the others are compared with."""
    return next(name for name in CONTROLS if name in values)


def differences(values: Values, method: str) -> dict[float, list[float]]:
    """Method minus control, paired over seeds, for each sparsity that both have."""
    mine, static = values[method], values[control(values)]
    return {
        sparsity: [mine[sparsity][seed] - static[sparsity][seed] for seed in sorted(mine[sparsity])]
        for sparsity in sorted(mine)
        if set(mine[sparsity]) == set(static.get(sparsity, {}))
    }


def half_width(values: Values, sparsity: float, comparisons: int) -> float:
    """Of the interval of any method's difference at one sparsity.

    t_{1 - a/2, nu} s / sqrt(n): s^2 is the variance of paired differences pooled over the methods, nu its degrees of
    freedom, a = 0.05 / comparisons. It takes the variance to be the same for all methods.
    """
    others = [name for name in values if name != control(values)]
    return pooled_half_width([d[sparsity] for n in others if sparsity in (d := differences(values, n))], comparisons)


def pooled_half_width(found: list[list[float]], comparisons: int) -> float:
    """The same for paired differences of several methods, equally many of each."""
    from scipy import stats

    freedom = sum(len(d) - 1 for d in found)
    squares = math.fsum((x - mean(d)) ** 2 for d in found for x in d)
    quantile = float(stats.t.ppf(1 - (1 - LEVEL) / (2 * comparisons), freedom))
    return quantile * math.sqrt(squares / freedom / len(found[0]))


def verdict(low: float, high: float) -> str:
    """In words.

    >>> verdict(0.1, 2.0), verdict(-1.0, 2.0), verdict(-2.0, -0.1)
    ('above static', 'not told from static', 'below static')
    """
    return "above static" if low > 0 else "below static" if high < 0 else "not told from static"


def look_at_filters() -> None:
    """filters.csv: of each run the share of convolution filters without a weight, and the largest norm of a layer.

    Lines of tables whose runs are not here stay as they are.
    """
    from safetensors.numpy import load_file

    with (HERE / "filters.csv").open(newline="") as file:
        before = list(csv.reader(file))[1:]
    lines: list[list[str]] = []
    for table in ("methods", "follow-up", "guarded", "unguarded"):
        if not (HERE / "runs" / table).exists():
            lines += [line for line in before if line[0] == table]
            continue
        with (HERE / f"{table}.csv").open(newline="") as file:
            runs = [line for line in csv.DictReader(file) if line["state"] == "finished"]
        for run in runs:
            weights = load_file(HERE / "runs" / table / "runs" / Path(run["folder"]).name / "model.safetensors")
            layers = [w.reshape(len(w), -1) for w in weights.values() if w.ndim == 4]
            empty = sum(int((~w.any(1)).sum()) for w in layers) / sum(len(w) for w in layers)
            largest = max(float((w.astype(float) ** 2).sum()) ** 0.5 for w in layers)
            lines.append([table, run["row"], run["sparsity"], run["seed"], f"{empty:.4f}", f"{largest:.5g}"])
    with (HERE / "filters.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["table", "row", "sparsity", "seed", "empty_filters", "largest_norm"], *lines])


def filters_section() -> list[str]:
    """A line for each method at the highest sparsity: filters without a weight, norms, and accuracy with clipping."""
    with (HERE / "filters.csv").open(newline="") as file:
        lines = [line for line in csv.DictReader(file) if float(line["sparsity"]) == 0.98]
    lines = [line for line in lines if line["table"] in ("methods", "follow-up")]
    clipped, _ = load("follow-up.csv")
    values, _ = load("methods.csv")
    rows: list[tuple[float, list[str]]] = []
    for method in dict.fromkeys(line["row"] for line in lines if line["table"] == "methods"):
        cells = {}
        for table in ("methods", "follow-up"):
            mine = [line for line in lines if (line["table"], line["row"]) == (table, method)]
            empty = f"{100 * mean([float(line['empty_filters']) for line in mine]):.0f} %" if mine else "-"
            norm = f"{max(float(line['largest_norm']) for line in mine):.3g}" if mine else "-"
            cells[table] = [empty, norm]
        with_clip = accuracy(clipped[method][0.98].values()) if method in clipped else "-"
        plain = accuracy(values[method][0.98].values())
        text = [method, *cells["methods"], plain, *cells["follow-up"], with_clip]
        rows.append((-max(float(line["largest_norm"]) for line in lines if line["row"] == method), text))
    head = ["98 %", "empty filters", "largest norm", "accuracy", "clipped: empty filters", "largest norm", "accuracy"]
    return [
        "## Filters without a weight, and the gradient's norm clipped at 1",
        "\n".join(markdown_grid([head, *(text for _, text in sorted(rows))])),
        "Empty filters: mean over seeds of the share of convolution filters that end without a weight. Largest norm: "
        "that of a convolution's ||w||, over layers and seeds. The right half is the same runs with clipping.",
    ]


def guarded_section() -> list[str]:
    """The same runs with and without the guard, side by side, and the guarded ones against the random mask."""
    with (HERE / "filters.csv").open(newline="") as file:
        looked = list(csv.DictReader(file))
    with_guard, failed = load("guarded.csv")
    without, failed_too = load("unguarded.csv")
    rows, single = [], dict[float, list[list[float]]]()
    for method, cells in without.items():
        paired = []
        for sparsity in sorted(cells):
            mine = [method, f"{100 * sparsity:g} %"]
            for table, values in (("unguarded", without), ("guarded", with_guard)):
                here = [line for line in looked if (line["table"], line["row"]) == (table, method)]
                here = [line for line in here if float(line["sparsity"]) == sparsity]
                mine.append(f"{100 * mean([float(line['empty_filters']) for line in here]):.1f} %")
                mine.append(f"{max(float(line['largest_norm']) for line in here):.3g}")
                mine.append(accuracy(values[method][sparsity].values()))
            seeds = sorted(set(cells[sparsity]) & set(with_guard[method][sparsity]))
            paired.append([with_guard[method][sparsity][seed] - cells[sparsity][seed] for seed in seeds])
            single.setdefault(sparsity, []).append(paired[-1])
            rows.append([*mine, f"{mean(paired[-1]):+.1f}"])
        pooled = pooled_difference(paired, comparisons=len(without))
        assert pooled.interval is not None
        rows[-1].append(f"{pooled.mean:+.2f} [{pooled.interval.low:+.2f}, {pooled.interval.high:+.2f}]")
        rows[-2].append("")
    halves = {s: pooled_half_width(found, len(without) * len(single)) for s, found in sorted(single.items())}
    widths = ", ".join(f"{100 * s:g} %: +-{h:.2f}" for s, h in halves.items())
    head = ["method", "", "as published: empty filters", "largest norm", "accuracy"]
    head += ["guarded: empty filters", "largest norm", "accuracy", "diff", "mean difference"]
    return [
        "## Filters that keep their strongest weight (min_per_filter = 1)",
        "\n".join(markdown_grid([head, *rows])),
        "Both halves have run on one machine; the tables above are of another. Diff: guarded minus as published, "
        "paired over seeds. The mean difference counts both sparsities once; its "
        f"{len(without)} intervals hold together with 95 %, if differences of one seed at both sparsities are "
        "independent. Simultaneous 95 % half-widths of a single difference (variance pooled over the methods): "
        f"{widths}.",
        *(f"Failed: {line['row']} at {line['sparsity']}, seed {line['seed']}: {line['state']}." for line in failed_too),
        *section("Guarded filters against the random mask", with_guard, failed),
    ]


def section(title: str, values: Values, failed: list[dict[str, str]]) -> list[str]:
    """One table: a line for each method, best first."""
    static = control(values)
    sparsities = sorted({s for cells in values.values() for s in cells})
    others = [method for method in values if method != static]
    comparisons = len(others)
    halves = {s: half_width(values, s, comparisons * len(sparsities)) for s in sparsities}
    rows: list[tuple[float, list[str]]] = []
    for method in others:
        paired = differences(values, method)
        pooled = pooled_difference(list(paired.values()), comparisons=comparisons)
        interval = pooled.interval
        assert interval is not None
        texts = [method]
        for s in sparsities:
            here = s in paired
            texts += [accuracy(values[method][s].values()), f"{mean(paired[s]):+.1f}"] if here else ["-", "-"]
        texts.append(f"{pooled.mean:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]")
        texts.append(verdict(interval.low, interval.high))
        rows.append((pooled.mean, texts))
    first = [static, *(text for s in sparsities for text in (accuracy(values[static][s].values()), "")), "", ""]
    head = ["method", *(text for s in sparsities for text in (f"{100 * s:g} %", "diff")), "mean difference", "in words"]
    grid = [head, first, *(texts for _, texts in sorted(rows, key=lambda row: -row[0]))]
    widths = ", ".join(f"{100 * s:g} %: +-{h:.2f}" for s, h in halves.items())
    return [
        f"## {title}",
        "\n".join(markdown_grid(grid)),
        f"Simultaneous 95 % half-widths of a single difference (variance pooled over the methods): {widths}. The mean "
        f"difference counts each sparsity once; its {comparisons} intervals hold together with 95 %, if differences of "
        f"one seed at several sparsities are independent.",
        *(f"Failed: {line['row']} at {line['sparsity']}, seed {line['seed']}: {line['state']}." for line in failed),
    ]


def accuracy(found: Iterable[float]) -> str:
    """Mean and standard deviation.

    >>> accuracy([50.0, 52.0])
    '51.0 +- 1.4'
    """
    values = list(found)
    spread = deviation(values)
    return f"{mean(values):.1f}" + ("" if spread is None else f" +- {spread:.1f}")


def report() -> str:
    """The whole report, which is also written to report.md."""
    main, failed = load("methods.csv")
    channels, failed_channels = load("channels.csv")
    main["CHEX (channels)"] = {CHANNELS[s]: cell for s, cell in channels["CHEX"].items()}
    n_of_m, failed_groups = load("n-of-m.csv")
    dense, _ = load("dense.csv")
    parts = [
        "# Methods study: results",
        "Made by `python results/methods-study/study.py report`. Test accuracy after the last epoch in %, mean and "
        "standard deviation over the seeds; diff: minus the random mask of the first line, paired over seeds.",
        f"The dense network: {accuracy(dense['Dense'][0.0].values())}.",
        *section("90, 95 and 98 %", main, failed + failed_channels),
        *section("N of 16 weights", n_of_m, failed_groups),
        *filters_section(),
        *guarded_section(),
    ]
    text = "\n\n".join(parts) + "\n"
    (HERE / "report.md").write_text(text, encoding="utf-8")
    return text


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("data", "filters", "report"))
    parser.add_argument("--source", type=Path, help="CIFAR-10, in any form that s2sam reads")
    options = parser.parse_args()
    if options.what == "data":
        if options.source is None:
            parser.error("data needs --source")
        make_data(options.source)
    elif options.what == "filters":
        look_at_filters()
    else:
        report()


if __name__ == "__main__":
    main()
