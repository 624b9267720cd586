"""What does a training step cost with S2-SAM, echo, SAM, and with RigL's masks, against plain SGD?

    python benchmarks/step_overhead.py                  # this machine's CPU, minutes; writes benchmarks/results/*.json
    python benchmarks/step_overhead.py --device cuda
    python benchmarks/step_overhead.py --quick          # a smoke test: tiny, its timings mean nothing

Networks: ResNet-32 and a transformer with the shape of ViT-Tiny (width 192, 12 layers, 3 heads, MLP x4, but 4x4 patches
of 32x32 images: 64 tokens), batch 128. Two answers for each contestant:

(i)  alone: 1 + (its optimizer time - SGD's optimizer time) / (one whole SGD step), each timed alone. Optimizer time is
     displace + restore + base step + masks + next direction, on fixed gradients, with cold caches. SAM's second forward
     and backward is timed alone too and added. For RigL, mask work is that of an ordinary step, and what a topology
     update costs beyond an ordinary SGD step is spread over the 100 steps between two updates; echo's time is the mean
     of its two visits. The bars are on this number, as it resolves differences far below the noise of a whole step.
(ii) paired: (whole step) / (whole SGD step), in ABBA rounds. RigL's updates fall outside unless there are > 100 steps.

Besides: calls, bytes and host syncs added to the base step (rule: `_counters.py`), memory kept, passes per step.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from _arms import BASES, DELTA_T, RHO, SGD, SPARSITY, VARIANTS, Arm, make_arm
from _counters import OpCounter, count_passes, live_bytes
from _environment import environment, write_result
from _timing import Clock, abba, bootstrap, interleaved, median
from _vit import ViTTiny
from s2sam.models import create_model

KINDS = ("s2sam-gradient", "s2sam-momentum", "echo", "sam", "rigl", "rigl+s2sam")
COUNTED = (*KINDS, *(kind for kind in VARIANTS if kind not in KINDS))  #: not all of them are timed
RATIO_BAR, ECHO_BAR, CALLS_BAR, BYTES_BAR, BUFFERS_BAR = 1.03, 1.01, 20, 64, 1.0
Batch = tuple[torch.Tensor, torch.Tensor]


def measure_alone(build: Callable[[], nn.Module], batch: Batch, clock: Clock, rounds: int) -> dict[str, Any]:
    """Answer (i) for every contestant."""
    arms = {kind: make_arm(kind, build, batch, delta_t=2) for kind in ("sgd", *KINDS)}
    works: dict[str, Callable[[], float]] = {}
    updates: dict[str, list[float]] = {kind: [] for kind in KINDS if "rigl" in kind}
    for kind, arm in arms.items():
        works[kind] = _rigl_timer(arm, clock, updates[kind]) if kind in updates else _timer(arm, clock)
    _progress(f"  optimizer alone, {rounds} rounds")
    seconds = interleaved(works, rounds)
    _progress(f"  whole SGD steps alone, {rounds} rounds")
    sgd = arms["sgd"]
    sgd.train_step()
    passes = interleaved({"step": lambda: clock(sgd.train_step), "pass": lambda: clock(sgd.one_pass)}, rounds)

    out: dict[str, Any] = {
        "rounds": rounds,
        "sgd_step_seconds": bootstrap(median, passes["step"]),
        "forward_backward_seconds": bootstrap(median, passes["pass"]),
        "sgd_optimizer_seconds": bootstrap(median, seconds["sgd"]),
        "contestants": {},
    }
    for kind in KINDS:
        added = [t - s for t, s in zip(seconds[kind], seconds["sgd"], strict=True)]
        row = {"optimizer_seconds": bootstrap(median, seconds[kind])}
        samples = [added, passes["step"]]
        if kind in updates:
            row["update_seconds"] = bootstrap(median, updates[kind])
            samples.append([t - s for t, s in zip(updates[kind], seconds["sgd"], strict=True)])
        elif kind == "sam":
            samples.append(passes["pass"])
        row["ratio"] = bootstrap(_spread_update if kind in updates else _added, *samples)
        out["contestants"][kind] = row
    return out


def _added(added: Any, step: Any, passes: Any = (0.0,)) -> Any:
    return 1 + (median(added) + median(passes)) / median(step)


def _spread_update(added: Any, step: Any, update: Any) -> Any:
    return 1 + ((DELTA_T - 1) * median(added) + median(update)) / DELTA_T / median(step)


def _timer(arm: Arm, clock: Clock) -> Callable[[], float]:
    """Seconds of an optimizer step, the mean over the arm's visits."""
    return lambda: sum(clock(arm.optimizer_step, before=arm.refresh, cold=True) for _ in range(arm.visits)) / arm.visits


def _rigl_timer(arm: Arm, clock: Clock, updates: list[float]) -> Callable[[], float]:
    """Time two steps, one of them a topology update, whose time goes to `updates`; the other's is returned."""

    def work() -> float:
        times: dict[bool, float] = {}
        for _ in range(2):
            updates_before = arm.sparsifier.updates
            seconds = clock(arm.optimizer_step, before=arm.refresh, cold=True)
            times[arm.sparsifier.updates > updates_before] = seconds
        updates.append(times[True])
        return times[False]

    return work


def measure_pairs(build: Callable[[], nn.Module], batch: Batch, clock: Clock, rounds: int) -> dict[str, Any]:
    """Answer (ii) for every contestant."""
    out: dict[str, Any] = {"rounds": rounds, "contestants": {}}
    sgd = make_arm("sgd", build, batch)
    for kind in KINDS:
        _progress(f"  whole steps, {kind} beside sgd, {rounds} rounds")
        arm = make_arm(kind, build, batch)
        sgd.train_step()
        arm.train_step()

        def whole(a: Arm = arm) -> float:
            return sum(clock(a.train_step) for _ in range(a.visits)) / a.visits

        base, its = abba(lambda: clock(sgd.train_step), whole, rounds)
        ratios = [b / a for a, b in zip(base, its, strict=True)]
        out["contestants"][kind] = {"ratio": bootstrap(median, ratios), "step_seconds": statistics.median(its)}
    return out


class HundredTensors(nn.Module):
    """100 weights of 64 x 72: about as many tensors, and entries, as ResNet-32 has; and `norms` LayerNorms behind."""

    def __init__(self, norms: int = 0) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(72, 64, bias=False) for _ in range(100)])
        self.norms = nn.ModuleList([nn.LayerNorm(64) for _ in range(norms)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Every layer sees the first 72 pixels; the first 10 outputs of their sum, normalised, are the logits."""
        x = x.flatten(1)[:, :72]
        x = torch.stack([layer(x) for layer in self.layers]).sum(0)
        for norm in self.norms:
            x = norm(x)
        return x[:, :10]


def measure_counters(batch: Batch) -> dict[str, Any]:
    """Calls, bytes, syncs and memory that S2-SAM and RigL's masks add to the base step, for 100 tensors, one group.

    "s2sam-norm-layers" is counted on a network with 30 LayerNorms more, against SGD on the same network.
    """

    def build() -> nn.Module:
        return HundredTensors().to(batch[0].device)

    def normed() -> nn.Module:
        return HundredTensors(norms=30).to(batch[0].device)

    out: dict[str, Any] = {"tensors": 100, "bases": {}}
    for base in BASES:
        rows = {"sgd": _counted("sgd", build, batch, base)}
        beside = _counted("sgd", normed, batch, base)
        for kind in COUNTED:
            scoped = "scope" in VARIANTS.get(kind, {})  # needs layers that the others do not have
            plain = beside if scoped else rows["sgd"]
            its = _counted(kind, normed if scoped else build, batch, base)
            rows[kind] = {**its, **{f"added_{key}": round(its[key] - plain[key], 3) for key in plain}}
        out["bases"][base] = rows
    return out


def _counted(kind: str, build: Callable[[], nn.Module], batch: Batch, base: str) -> dict[str, float]:
    before = live_bytes()
    arm = make_arm(kind, build, batch, base=base)
    parameters = sum(p.numel() for p in arm.model.parameters())
    arm.refresh()
    with OpCounter() as counter:
        arm.optimizer_step()
    arm.optimizer.zero_grad()
    arm.gradients.clear()
    kept = live_bytes() - before
    return {
        "calls": counter.calls,
        "bytes_per_parameter": round(counter.bytes / parameters, 3),
        "host_syncs": counter.syncs,
        "buffers": round(kept / (4 * parameters), 3),
    }


def measure_passes(build: Callable[[], nn.Module], batch: Batch) -> dict[str, dict[str, float]]:
    """Forward and backward passes of a training step, the mean over the arm's visits."""
    out = {}
    for kind in ("sgd", *KINDS):
        arm = make_arm(kind, build, batch)
        seen = [count_passes(arm.model, arm.train_step) for _ in range(arm.visits)]
        forwards, backwards = (sum(one) / arm.visits for one in zip(*seen, strict=True))
        out[kind] = {"forwards": forwards, "backwards": backwards}
    return out


def judge(networks: dict[str, Any], counters: dict[str, Any], passes: dict[str, Any]) -> list[dict[str, Any]]:
    """Each bar with its value and whether it holds; for ratios also whether the interval's upper end is below it."""
    bars = []
    for network, row in networks.items():
        for kind in ("s2sam-gradient", "s2sam-momentum", "rigl"):
            ratio = row["alone"]["contestants"][kind]["ratio"]
            bar = _bar(f"(i) {kind} on {network}", ratio["value"], RATIO_BAR)
            bars.append({**bar, "interval": ratio["interval"], "interval_below": ratio["interval"][1] <= RATIO_BAR})
        echo, paper = (row["alone"]["contestants"][kind]["ratio"] for kind in ("echo", "s2sam-gradient"))
        bars.append(_bar(f"(i) echo / s2sam-gradient on {network}", echo["value"] / paper["value"], ECHO_BAR))
    for base, rows in counters["bases"].items():
        row = rows["s2sam-gradient"]
        bars.append(_bar(f"calls added to {base} SGD, 100 tensors", row["added_calls"], CALLS_BAR))
        bars.append(_bar(f"bytes per parameter added to {base} SGD", row["added_bytes_per_parameter"], BYTES_BAR))
        bars.append(_bar(f"buffers added to {base} SGD", row["added_buffers"], BUFFERS_BAR, slack=0.01))
    for kind, wanted in (("s2sam-gradient", 1), ("echo", 1), ("sam", 2)):
        for name, count in passes[kind].items():
            bars.append({**_bar(f"{kind}'s {name} a step", count, wanted), "holds": count == wanted})
    return bars


def _bar(name: str, value: float, limit: float, slack: float = 0.0) -> dict[str, Any]:
    return {"bar": name, "value": value, "limit": limit, "holds": value <= limit + slack}


def networks(quick: bool, device: torch.device) -> dict[str, Callable[[], nn.Module]]:
    """The two networks; with `quick` shrunken ones of the same kinds."""

    def resnet() -> nn.Module:
        name, width = ("resnet20", 0.25) if quick else ("resnet32", 1.0)
        generator = torch.Generator().manual_seed(0)
        return create_model(name, num_classes=10, generator=generator, width=width).to(device)

    def vit() -> nn.Module:
        return ViTTiny(depth=1 if quick else 12, generator=torch.Generator().manual_seed(0)).to(device)

    return {"resnet32": resnet, "vit-tiny-64-tokens": vit}


def main(argv: list[str] | None = None) -> Path:
    """Measure, print a summary, write the JSON and return its path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="CPU threads of torch (default: its own choice)")
    parser.add_argument("--rounds", type=int, default=30, help="rounds of (i), at least 30 for a result")
    parser.add_argument("--pair-rounds", type=int, nargs=2, default=(15, 5), help="ABBA rounds of ResNet and ViT")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/step_overhead_<hardware>.json")
    parser.add_argument("--quick", action="store_true", help="tiny networks, 2 rounds, for a smoke test")
    options = parser.parse_args(argv)
    if options.quick:
        options.rounds, options.pair_rounds, options.batch = 2, (2, 2), 4
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    clock = Clock(device, 1 << 20) if options.quick else Clock(device)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(options.batch, 3, 32, 32, generator=generator).to(device)
    batch = images, torch.randint(10, (options.batch,), generator=generator).to(device)

    built = networks(options.quick, device)
    measured: dict[str, Any] = {}
    for (name, build), pair_rounds in zip(built.items(), options.pair_rounds, strict=True):
        _progress(name)
        parameters = [p.numel() for p in build().parameters()]
        measured[name] = {
            "parameters": sum(parameters),
            "tensors": len(parameters),
            "alone": measure_alone(build, batch, clock, options.rounds),
            "paired": measure_pairs(build, batch, clock, pair_rounds),
        }
    counters = measure_counters(batch)
    passes = measure_passes(built["resnet32"], batch)
    result = {
        "question": (__doc__ or "").partition("\n")[0],
        **environment(device),
        "quick": options.quick,
        "settings": {
            "batch": options.batch,
            "sgd": SGD,
            "rho": RHO,
            "sparsity": SPARSITY,
            "delta_t": DELTA_T,
            "interval": "95 % percentile bootstrap of medians over rounds",
        },
        "networks": measured,
        "counters": counters,
        "passes": passes,
        "bars": judge(measured, counters, passes),
    }
    out = write_result(result, options.out, "step_overhead", device)
    _print(result)
    return out


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _print(result: dict[str, Any]) -> None:
    for name, network in result["networks"].items():
        step = network["alone"]["sgd_step_seconds"]["value"]
        print(f"{name}: one SGD step {1e3 * step:.2f} ms")
        for kind in KINDS:
            alone, paired = (network[way]["contestants"][kind]["ratio"] for way in ("alone", "paired"))
            texts = [f"{r['value']:.4f} [{r['interval'][0]:.4f}, {r['interval'][1]:.4f}]" for r in (alone, paired)]
            print(f"  {kind:<16} alone {texts[0]}   paired {texts[1]}  (n = {paired['n']})")
    for bar in result["bars"]:
        print(f"{'holds' if bar['holds'] else 'FAILS'}  {bar['bar']}: {bar['value']:.4g} (limit {bar['limit']:g})")


if __name__ == "__main__":
    main()
