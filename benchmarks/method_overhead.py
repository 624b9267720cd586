"""What does each sparse training method cost in a step, and what does a change of its topology, against dense SGD?

    python benchmarks/method_overhead.py --rounds 7       # this machine's CPU, half an hour; writes results/*.json
    python benchmarks/method_overhead.py --device cuda
    python benchmarks/method_overhead.py --methods rigl set --networks resnet32
    python benchmarks/method_overhead.py --quick          # a smoke test: tiny, its timings mean nothing

Methods: all rows of the registry, with their defaults, at 90 % (1:4 for n of m), in the middle of a training of 100,000
steps. Networks: ResNet-32 (32x32 pixels, batch 128), and ResNet-50 with 25,557,032 parameters (224x224 pixels, batch 64
on a CPU and 256 on a GPU). What a method adds to a step does not depend on the images, so the ratio falls as batch and
images grow: on a CPU it is measured with 64x64 pixels (`small_ratio`), and set against a dense step at 224x224 that is
timed once after each method (`ratio`, which the bar judges).

    step cost = 1 + ((d - 1) a + u) / (d s) + p / s

s: a whole dense step of SGD. a: what the optimizer takes longer in an ordinary step, with the masks and whatever the
method does in hooks, on fixed gradients and with cold caches. u: the same for a step that changes the topology. d:
steps between two such changes. p: what forward and backward take longer; it is timed only if they call more operators
than the dense ones, else it is 0. In each round the method and SGD take turns. The bar is 1.05, for every method that
takes one forward and backward a step and trains once; the passes are counted, and the others are named.

The arithmetic is dense: zeros save no time here. What a method costs before the first step stands beside it.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from _arms import SGD, SPARSITY, Arm, make_arm
from _counters import OpCounter, count_passes
from _environment import environment, write_result
from _timing import Clock, bootstrap, interleaved, median
from s2sam import sparsify
from s2sam.models import create_model
from s2sam.registry import MethodInfo, list_methods

BAR = 1.05
TOTAL, START = 100_000, 30_000  #: steps of the nominal training, and where in it the measurement begins
Batch = tuple[torch.Tensor, torch.Tensor]
Build = Callable[[], nn.Module]


def suited(row: MethodInfo, sparsity: float) -> float:
    """`sparsity`, or for n of m weights the highest at most that.

    >>> suited(next(row for row in list_methods() if row.name == "nm"), 0.9)
    0.75
    """
    m = row.defaults.get("m")
    return 1 - max(1, math.ceil((1 - sparsity) * m - 1e-9)) / m if isinstance(m, int) else sparsity


class MethodArm:
    """A network under a method; `ordinary` and `update` take its optimizer to a step of that kind and say which.

    A step is of the kind that the method's own plan makes it: the count of finished steps is set to the one before.
    """

    def __init__(self, row: MethodInfo, build: Build, batch: Batch, sparsity: float) -> None:
        model = build().train()
        optimizer = torch.optim.SGD(model.parameters(), **SGD)
        self.arm = Arm(model, optimizer, batch)
        self.row = row
        given: dict[str, Any] = {"batches": [batch], "loss_fn": F.cross_entropy} if row.load().needs_batches else {}
        start = time.perf_counter()
        self.sparsifier = self.arm.sparsifier = sparsify(
            model,
            optimizer,
            method=row.name,
            sparsity=suited(row, sparsity),
            total_steps=TOTAL,
            generator=torch.Generator().manual_seed(0),
            **given,
        )
        self.start_seconds = time.perf_counter() - start
        self.trainings = 1 + self.sparsifier.levels
        while self.sparsifier.next_level():  # of trainings that follow one another the last is the sparse one
            pass
        (self.part,) = self.sparsifier.parts
        self.t = START
        self.updates: list[int] = []  #: the steps at which the topology changed
        self._never = {True: False, False: False}
        self.arm.capture()
        for _ in range(2):  # state exists; a plan that prunes has caught up with START
            if not self.to_update():
                self.to_ordinary()
            self.step()
        self.updates.clear()

    def to_ordinary(self) -> bool:
        """Make the next step one that leaves the topology alone; False if there is none."""
        return self._go(due=False)

    def to_update(self) -> bool:
        """Make the next step one that changes the topology; False if there is none."""
        found = self._go(due=True)
        if found:
            self.updates.append(self.t)
        return found

    def step(self) -> None:
        """The optimizer's part of that step, on the fixed gradients."""
        self.arm.refresh()
        self.arm.optimizer_step()

    @property
    def interval(self) -> int | None:
        """Steps between two changes of the topology, median of those seen; None if it never changes."""
        between = [b - a for a, b in zip(self.updates, self.updates[1:], strict=False)]
        if between:
            return round(statistics.median(between))
        return TOTAL if self.updates else None

    def _go(self, *, due: bool) -> bool:
        if self._never[due]:
            return False
        for t in range(self.t + 1, TOTAL):  # the last step of a training changes nothing, whatever the method
            if self.sparsifier.due(self.part, t) == due:
                self.t, self.part.step = t, t - 1
                return True
        self._never[due] = True
        return False


def measure_method(row: MethodInfo, build: Build, batch: Batch, clock: Clock, options: Any) -> dict[str, Any]:
    """One row of the result."""
    its, sgd = MethodArm(row, build, batch, options.sparsity), make_arm("sgd", build, batch)
    counted = {kind: _calls(arm) for kind, arm in (("sgd", sgd), ("method", its.arm))}
    updates: list[float] = []

    def turn() -> float:
        """A change of the topology, if there is one, and an ordinary step, if there is one; returns the latter."""
        seconds = {}
        for kind, go in (("update", its.to_update), ("ordinary", its.to_ordinary)):
            if go():
                before = its.sparsifier.updates
                seconds[kind] = clock(its.arm.optimizer_step, before=its.arm.refresh, cold=True)
                assert (its.sparsifier.updates > before) == (kind == "update"), f"{row.name}: step {its.t} is no {kind}"
        if "update" in seconds:
            updates.append(seconds["update"])
        return seconds.get("ordinary", seconds.get("update", 0.0))

    works: dict[str, Callable[[], float]] = {
        "sgd": lambda: clock(sgd.optimizer_step, before=sgd.refresh, cold=True),
        "method": turn,
        "step": lambda: clock(sgd.train_step),
    }
    if counted["method"] != counted["sgd"]:
        works |= {"sgd_pass": lambda: clock(sgd.one_pass), "method_pass": lambda: clock(its.arm.one_pass)}
    seconds = interleaved(works, options.rounds)
    added = [m - s for m, s in zip(seconds["method"], seconds["sgd"], strict=True)]
    update_added = [u - s for u, s in zip(updates, seconds["sgd"], strict=False)]
    passes = [m - s for m, s in zip(seconds.get("method_pass", []), seconds.get("sgd_pass", []), strict=True)]
    cost = _cost(its.interval)
    return {
        "kind": row.kind,
        "sparsity": its.sparsifier.sparsity(),
        "options": {name: str(value) for name, value in row.defaults.items()},
        "ratio": bootstrap(cost, added, update_added or [0.0], passes or [0.0], seconds["step"]),
        "ordinary_ratio": bootstrap(_cost(None), added, [0.0], passes or [0.0], seconds["step"]),
        "rounds": {"added": added, "update_added": update_added, "passes": passes},
        "step_seconds": bootstrap(median, seconds["step"]),
        "added_seconds": bootstrap(median, added),
        "update_seconds": bootstrap(median, updates) if updates else None,
        "steps_between_updates": its.interval,
        "added_pass_seconds": bootstrap(median, passes) if passes else None,
        "added_pass_calls": counted["method"] - counted["sgd"],
        "start_seconds": its.start_seconds,
        "trainings": its.trainings,
        "passes": _passes(its),
    }


def against(row: dict[str, Any], steps: list[float]) -> dict[str, Any]:
    """The same costs against dense steps of other images, `steps` in seconds; the old ratio stays as `small_ratio`.

    Raises:
        ValueError: the method adds to forward and backward, whose cost grows with the images.
    """
    rounds = row["rounds"]
    if rounds["passes"]:
        raise ValueError("operators in forward and backward cost more with larger images; measure with these images")
    cost = _cost(row["steps_between_updates"])
    ratio = bootstrap(cost, rounds["added"], rounds["update_added"] or [0.0], [0.0], steps)
    return row | {"ratio": ratio, "small_ratio": row["ratio"]}


def _cost(interval: int | None) -> Callable[..., Any]:
    def cost(added: Any, update: Any, passes: Any, step: Any) -> Any:
        a, s = median(added), median(step)
        spread = a if interval is None else ((interval - 1) * a + median(update)) / interval
        return 1 + (spread + median(passes)) / s

    return cost


def _calls(arm: Arm) -> int:
    """Operators of one forward and backward."""
    with OpCounter() as counter:
        arm.one_pass()
    return counter.calls


def _passes(its: MethodArm) -> dict[str, list[int]]:
    """Forwards and backwards of an ordinary step and of one that changes the topology."""
    kinds = (("ordinary", its.to_ordinary), ("update", its.to_update))
    return {kind: list(count_passes(its.arm.model, its.arm.train_step)) for kind, go in kinds if go()}


def judge(networks: dict[str, Any]) -> list[dict[str, Any]]:
    """The bar for each method on each network; `holds` is None where more than one pass or training is the method."""
    bars = []
    for network, measured in networks.items():
        for name, row in measured["methods"].items():
            if "refused" in row:
                continue
            ratio, more = row["ratio"], by_definition(row)
            bars.append(
                {
                    "bar": f"{name} on {network}",
                    **ratio,
                    "limit": BAR,
                    "holds": None if more else ratio["value"] <= BAR,
                    "interval_below": ratio["interval"][1] <= BAR,
                    "by_definition": more,
                    "small_images": row.get("small_ratio", {}).get("value"),
                }
            )
    return bars


def by_definition(row: dict[str, Any]) -> str | None:
    """Why the bar is not for this method, or None."""
    most = max((passes[1] for passes in row["passes"].values()), default=1)
    if most > 1:
        return f"{most} backward passes in a step"
    return f"{row['trainings']} trainings" if row["trainings"] > 1 else None


def networks(options: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, Build, Batch, Batch | None]]:
    """Name, factory and batch of each network, and the batch of the dense step, if it is another one."""
    known = {"resnet32": (10, 32, 128), "resnet50": (1000, options.image, options.batch)}
    for name in options.networks:
        classes, side, size = known[name]
        full = options.step_image if name == "resnet50" else side
        if options.quick:
            classes, side, size, full = 10, 32, 4, 48 if full != side else 32

        def images(side: int, size: int = size, classes: int = classes) -> Batch:
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(size, 3, side, side, generator=generator).to(device)
            return x, torch.randint(classes, (size,), generator=generator).to(device)

        def build(name: str = name, classes: int = classes, side: int = side) -> nn.Module:
            made = create_model(
                name,
                num_classes=classes,
                image_size=side,
                generator=torch.Generator().manual_seed(0),
                width=0.125 if options.quick else 1.0,
            )
            return made.to(device)

        yield name, build, images(side), None if full == side else images(full)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options; those of ResNet-50 depend on the device."""
    known = [row.name for row in list_methods()]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="CPU threads of torch (default: its own choice)")
    parser.add_argument("--methods", nargs="+", choices=known, default=known, metavar="METHOD", help="default: all")
    parser.add_argument("--networks", nargs="+", choices=("resnet32", "resnet50"), default=["resnet32", "resnet50"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sparsity", type=float, default=SPARSITY)
    parser.add_argument("--image", type=int, help="pixels of ResNet-50's images (default: 64 on a CPU, else 224)")
    parser.add_argument("--step-image", type=int, default=224, help="those of its dense step (default: 224)")
    parser.add_argument("--batch", type=int, help="of ResNet-50 (default: 64 on a CPU, else 256)")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/method_overhead_<hardware>.json")
    parser.add_argument("--quick", action="store_true", help="tiny networks, 2 rounds, for a smoke test")
    options = parser.parse_args(argv)
    cpu = options.device == "cpu"
    options.image = options.image or (64 if cpu else 224)
    options.batch = options.batch or (64 if cpu else 256)
    if options.quick:
        options.rounds = 2
    return options


def main(argv: list[str] | None = None) -> Path:
    """Measure, print a summary, write the JSON and return its path."""
    options = parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    clock = Clock(device, 1 << 20) if options.quick else Clock(device)
    rows = [row for row in list_methods() if row.name in options.methods]
    measured: dict[str, Any] = {}
    for name, build, batch, full in networks(options, device):
        methods: dict[str, Any] = {}
        dense = make_arm("sgd", build, full) if full else None
        steps: list[float] = []
        for row in rows:
            print(f"{name}, {row.name}: {options.rounds} rounds", file=sys.stderr, flush=True)
            try:
                methods[row.name] = measure_method(row, build, batch, clock, options)
            except ValueError as error:  # a sparsity or a layer that this method cannot have
                methods[row.name] = {"refused": str(error)}
            gc.collect()  # hooks and their optimizer hold one another
            if dense:
                steps.append(clock(dense.train_step))
        if steps:
            methods = {key: row if "refused" in row else against(row, steps) for key, row in methods.items()}
        measured[name] = {
            "parameters": sum(p.numel() for p in build().parameters()),
            "batch": list(batch[0].shape),
            "step_batch": list((full or batch)[0].shape),
            "dense_step_seconds": bootstrap(median, steps) if steps else None,
            "methods": methods,
        }
    kept = ("rounds", "sparsity", "image", "step_image", "batch", "methods")
    result = {
        "question": (__doc__ or "").partition("\n")[0],
        **environment(device),
        "quick": options.quick,
        "settings": {name: getattr(options, name) for name in kept}
        | {"sgd": SGD, "total_steps": TOTAL, "first_step": START}
        | {"interval": "95 % percentile bootstrap of medians over rounds"},
        "networks": measured,
        "bars": judge(measured),
    }
    out = write_result(result, options.out, "method_overhead", device)
    report(result)
    return out


def report(result: dict[str, Any]) -> None:
    """The numbers and the bars, as lines."""
    for bar in result["bars"]:
        word = {True: "holds", False: "FAILS", None: "no bar"}[bar["holds"]]
        low, high = bar["interval"]
        more = f", {bar['by_definition']}" if bar["by_definition"] else ""
        more += f", {bar['small_images']:.4f} with small images" if bar["small_images"] else ""
        print(f"{word}  {bar['bar']:<28} {bar['value']:.4f} [{low:.4f}, {high:.4f}] (limit {bar['limit']}{more})")
    for network, measured in result["networks"].items():
        for name, row in measured["methods"].items():
            if "refused" in row:
                print(f"refused  {name} on {network}: {row['refused']}")


if __name__ == "__main__":
    main()
