"""Writes the tables in README.md, docs/measured.md and docs/when-it-helps.md from the committed files.

python results/readme_table.py            # rewrites the parts between the two markers
python results/readme_table.py --check    # exit code 1 if one of them is not what the files say
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README, WHOLE, WHEN = ROOT / "README.md", ROOT / "docs" / "measured.md", ROOT / "docs" / "when-it-helps.md"
BEGIN, END = "<!-- measured: results/readme_table.py -->", "<!-- end of measured -->"
NAMES = {
    "s2sam-gradient": "S2-SAM", "s2sam-momentum": "S2-SAM, direction momentum", "echo": "echo", "sam": "SAM",
    "rigl": "RigL", "rigl+s2sam": "RigL + S2-SAM", "resnet20": "ResNet-20", "resnet32": "ResNet-32",
    "vit-tiny-64-tokens": "ViT-Tiny, 64 tokens",
    "trainer": "dense, SGD", "trainer+s2sam": "dense, S2-SAM", "trainer+rigl+s2sam": "RigL, S2-SAM",
}  # fmt: skip
Row = tuple[str, str, str, str]


def step_cost(path: Path) -> Iterator[Row]:
    """1 + added optimizer time / SGD step, by network and method."""
    found = json.loads(path.read_text())
    for network, measured in found["networks"].items():
        for method, values in measured["alone"]["contestants"].items():
            yield (
                f"step time / SGD's, {NAMES.get(network, network)}, {NAMES.get(method, method)}",
                *interval(values["ratio"], 4), source(path, found),
            )  # fmt: skip


def throughput(path: Path) -> Iterator[Row]:
    """Trainer / pure forward and backward."""
    found = json.loads(path.read_text())
    for network, measured in found["networks"].items():
        for contestant, values in measured["contestants"].items():
            if contestant.startswith("trainer"):
                what = f"{NAMES[network]}{setting(found['settings'])}, {NAMES[contestant]}"
                yield (
                    f"images/s of the trainer / of forward + backward alone, {what}",
                    *interval(values["ratio_to_pure"], 3), source(path, found),
                )  # fmt: skip
                if found["hardware"]["gpu"] and "ratio_to_plain" in values:
                    yield (
                        f"images/s of the trainer / of a DataLoader loop, {what}",
                        *interval(values["ratio_to_plain"], 2), source(path, found),
                    )  # fmt: skip


def packing(path: Path) -> Iterator[Row]:
    """Several trainers at a time / one."""
    found = json.loads(path.read_text())
    for network, measured in found["networks"].items():
        what = f"{NAMES[network]}{setting(found['settings'])}, batch {found['settings']['batch']}"
        yield (
            f"images/s of {measured['processes']} runs at a time / of one, {what}, RigL, S2-SAM",
            *interval(measured["gain"], 2), source(path, found),
        )  # fmt: skip


def setting(settings: dict[str, Any]) -> str:
    """What differs from a network of its own width in fp32, as it is."""
    width, words = settings.get("width", 1), [settings["precision"], settings.get("compile", "none")]
    told = [f"width x {width:g}"] * (width != 1) + [word for word in words if word not in ("fp32", "none")]
    return "".join(f", {word}" for word in told)


def surface(path: Path) -> Iterator[Row]:
    """A loss surface / the forward passes it needs."""
    found = json.loads(path.read_text())
    size = "{points} x {points} points on {images} images".format(**found["settings"])
    yield (
        f"time of a loss surface / of its forward passes, {NAMES[found['settings']['network']]}, {size}",
        *interval(found["bars"][0], 3), source(path, found),
    )  # fmt: skip


def study(folder: Path) -> Iterator[Row]:
    """The contrasts of the direction study, once its confirmation has run."""
    sys.path.insert(0, str(folder))
    from analyse import findings

    link = f"[{folder.name}]({folder.relative_to(ROOT)}/report.md), proxy on a CPU"
    for what, gap, within in findings():
        bounds = "none" if within is None else f"[{within.low:+.2f}, {within.high:+.2f}], n = {gap.n}"
        yield what, f"{gap.mean:+.2f} points", bounds, link


def control(folder: Path) -> Iterator[Row]:
    """The primary contrasts of the control study, once it has run."""
    path = folder / "summary.json"
    if not path.exists():
        return
    scopes = {
        "gate": "mean over the {cells} cells that pass the gate",
        "noisy": "mean over all {cells} cells with wrong labels",
    }
    report = (folder / "report.md").relative_to(ROOT)
    link = f"[control study]({report}), digits, `python studies/control/run.py report`"
    for one in json.loads(path.read_text())["primaries"]:
        if not one["n"]:
            continue
        where = scopes.get(one["scope"], "").format(**one)
        what = one["contrast"].partition(": ")[2] + (f", {where}" if where else "")
        bounds = f"[{one['low']:+.2f}, {one['high']:+.2f}], n = {one['n']}" if "low" in one else "none"
        yield what, f"{one['mean']:+.2f} points", bounds, link


def interval(values: dict[str, Any], digits: int) -> tuple[str, str]:
    """Value and interval as text."""
    low, high = values["interval"]
    return f"{values['value']:.{digits}f}", f"[{low:.{digits}f}, {high:.{digits}f}], n = {values['n']}"


def source(path: Path, found: dict[str, Any]) -> str:
    """Link to the file, hardware, command."""
    hardware = found["hardware"]
    where = hardware["gpu"] or f"{hardware['cpu']}, {hardware['torch_threads']} threads"
    return f"[{where}]({path.relative_to(ROOT)}), `{found['command']}`"


def rows() -> list[Row]:
    """Everything there is."""
    results = ROOT / "benchmarks" / "results"
    found: list[Row] = []
    for path in sorted(results.glob("step_overhead_*.json")):
        found += step_cost(path)
    for path in sorted(results.glob("throughput_*.json")):
        found += throughput(path)
    for path in sorted(results.glob("packing_*.json")):
        found += packing(path)
    for path in sorted(results.glob("surface_cost_*.json")):
        found += surface(path)
    found += control(ROOT / "studies" / "control")
    found += study(ROOT / "results" / "direction-study")
    return found


FIRST = (
    "step time / SGD's, ResNet-32, S2-SAM", "step time / SGD's, ResNet-32, echo", "step time / SGD's, ResNet-32, SAM",
    "echo minus the better baseline, mean over all", "+g minus the better baseline, mean over all",
)  # fmt: skip
"""How the rows of the README begin."""


def first(every: list[Row]) -> list[Row]:
    """The five rows of the README; of a row for several machines, or with a longer name, the first."""

    def begins(row: Row, name: str) -> bool:
        return f"{row[0]}, ".startswith((f"{name}, ", f"{name} "))

    found = [next((row for row in every if begins(row, name)), None) for name in FIRST]
    return [row for row in found if row is not None]


def table(of: list[Row], page: Path) -> str:
    """A Markdown table, with links as seen from the page."""
    up = "" if page.parent == ROOT else "../"
    head = [("measured", "value", "95 % interval", "file and command"), ("---",) * 4]
    lines = [(*row[:3], row[3].replace("](", f"]({up}")) for row in of]
    return "\n".join("| " + " | ".join(row) + " |" for row in (*head, *lines))


def cells() -> str:
    """The control study, cell by cell: tuned, and at one learning rate and weight decay."""
    found = json.loads((ROOT / "studies" / "control" / "summary.json").read_text())
    arms = ("sam", "echo", "+g")
    names = ["SAM", "echo", "+g"]
    head = ["wrong labels", "network", "masks", "tuned baseline", *names, "untuned SGD", *names]
    lines = []
    for name, cell in found["cells"].items():
        noise, network, masks = name.split("-")
        untuned = found["at one setting"].get(name)
        masks = masks.replace("static", "").replace("rigl", "RigL ")
        line = [f"{noise} %", {"bn": "BatchNorm", "plain": "plain"}[network], masks]
        line.append(f"{cell['accuracy'][cell['baseline']]:.1f}")
        line += [_gap(cell["minus"][arm]) for arm in arms]
        if untuned:
            line += [f"{untuned['sgd']:.1f}", *(_gap(untuned["minus sgd"][arm]) for arm in arms)]
        lines.append([*line, *[""] * (len(head) - len(line))])
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *lines))


def _gap(gap: dict[str, Any]) -> str:
    """A difference; bold if its interval, which holds together with those of the other cells, does not contain 0."""
    shown = f"{gap['mean']:+.1f}"
    return f"**{shown}**" if "low" in gap and gap["low"] * gap["high"] > 0 else shown


def rewritten(page: Path, made: str) -> tuple[str, str]:
    """The text of a page as it is and as it should be."""
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        sys.exit(f"{page.name} lacks the markers {BEGIN} and {END}; put them where the table belongs")
    return text, f"{before}{BEGIN}\n\n{made}\n\n{END}{after}"


def main() -> int:
    """Rewrite or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check, every = parser.parse_args().check, rows()
    for page, made in ((README, table(first(every), README)), (WHOLE, table(every, WHOLE)), (WHEN, cells())):
        text, new = rewritten(page, made)
        if check and new != text:
            sys.exit(f"the table in {page.name} is not what the files say; run python results/readme_table.py")
        if not check:
            page.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
