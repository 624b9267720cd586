"""How much faster is a whole training step when layers store and multiply their active weights only?

    python benchmarks/compact_training.py --threads 1         # the MLP of 1024 and 4096 units at 90, 95, 98 and 99 %
    python benchmarks/compact_training.py --threads 2
    python benchmarks/compact_training.py --quick             # a smoke test: tiny, its numbers mean nothing

The network is 3072-h-h-10 with ReLU, all three layers at one sparsity, random masks, batches of 128; a step is
forward, cross-entropy, backward and SGD with momentum. Contestants, in rounds of as many steps each, interleaved:

masked           dense layers, and after the step w <- m w: the least that a mask costs, less than `sparsify` does
compact          the same weights and masks in `s2sam.compact.SparseLinear`
masked+s2sam     both with S2SAM on the optimizer
compact+s2sam
dense            no mask at all
sparselab        sparselab.SparseLinear in the place of each layer, where that package is installed

Ratios are taken round by round. The losses of masked and compact are compared over the first steps, and the bytes of
their parameters, gradients, optimizer state, S2SAM's buffer, masks and patterns are counted.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from _environment import environment, write_result
from _timing import Clock, bootstrap, interleaved, median
from s2sam import S2SAM, compact
from s2sam.models.init import build

INPUTS, CLASSES = 3072, 10
STEP_BARS = {0.9: 2.5, 0.95: 5.0, 0.98: 10.0, 0.99: 17.0}  #: masked / compact on one thread, 4096 units, batch 128
TWO_THREADS = 0.7  #: of these bars on two threads
MEMORY_BAR = 20.0  #: bytes of masked / compact at 98 %, with S2SAM


class Contestant:
    """A network that takes training steps on one batch."""

    def __init__(self, net: nn.Module, masks: dict[str, Tensor], s2sam: bool, batch: tuple[Tensor, Tensor]) -> None:
        self.net, self.batch = net, batch
        weights = dict(net.named_parameters())
        self.masked = [(weights[name], mask) for name, mask in masks.items()]
        self.optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
        if s2sam:
            S2SAM(self.optimizer, model=net, rho=0.05)

    def step(self) -> Tensor:
        """One training step; its loss."""
        x, y = self.batch
        loss = F.cross_entropy(self.net(x), y)
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for w, mask in self.masked:
                w.mul_(mask)
        self.optimizer.zero_grad()
        return loss.detach()

    def bytes(self) -> int:
        """What it keeps for its parameters: values, gradients, optimizer state, masks, patterns."""
        parameters = list(self.net.parameters())
        kept = [*parameters, *parameters, *self.net.buffers(), *(mask for _, mask in self.masked)]
        kept += [v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        return sum(t.numel() * t.element_size() for t in kept)


def network(hidden: int, inputs: int) -> nn.Sequential:
    """The dense network, W ~ N(0, 2 / fan_in)."""

    def make() -> nn.Sequential:
        sizes = [inputs, hidden, hidden, CLASSES]
        layers = [f(a, b) for a, b in itertools.pairwise(sizes) for f in (nn.Linear, lambda *_: nn.ReLU())]
        return nn.Sequential(*layers[:-1])

    return build(make, torch.Generator().manual_seed(0))


def random_masks(net: nn.Module, sparsity: float) -> dict[str, Tensor]:
    """Exactly this share of each weight matrix False."""
    generator = torch.Generator().manual_seed(1)
    masks = {}
    for name, w in net.named_parameters():
        if w.dim() == 2:
            kept = round((1 - sparsity) * w.numel())
            masks[name] = compact.SparsePattern.random(*w.shape, kept, generator).mask()
    return masks


def contestants(hidden: int, sparsity: float, options: argparse.Namespace) -> dict[str, Contestant]:
    """All of them, with the same weights, masks and batch."""
    generator = torch.Generator().manual_seed(2)
    batch = (
        torch.randn(options.batch, options.inputs, generator=generator),
        torch.randint(CLASSES, (options.batch,), generator=generator),
    )
    masks = random_masks(network(hidden, options.inputs), sparsity)
    found = {}
    for name in ("masked", "compact", "masked+s2sam", "compact+s2sam", "dense"):
        net: nn.Module = network(hidden, options.inputs)
        if name != "dense":
            with torch.no_grad():
                for key, w in net.named_parameters():
                    if key in masks:
                        w.mul_(masks[key])
        if name.startswith("compact"):
            net = compact.from_dense(net, masks)
        found[name] = Contestant(net, masks if name.startswith("masked") else {}, name.endswith("s2sam"), batch)
    if importlib.util.find_spec("sparselab"):
        sparselab = importlib.import_module("sparselab")
        layers = [
            sparselab.SparseLinear(m.in_features, m.out_features, sparsity=sparsity) if isinstance(m, nn.Linear) else m
            for m in network(hidden, options.inputs)
        ]
        found["sparselab"] = Contestant(nn.Sequential(*layers), {}, False, batch)
    return found


def measure(hidden: int, sparsity: float, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step of every contestant, and ratios round by round."""
    clock = Clock(torch.device("cpu"), 4)
    all_of_them = contestants(hidden, sparsity, options)
    losses = {
        name: torch.stack([one.step() for _ in range(3)]).double() for name, one in all_of_them.items()
    }  # warms up as well

    def seconds_of_a_step(one: Contestant) -> Callable[[], float]:
        return lambda: clock(lambda: [one.step() for _ in range(options.steps)]) / options.steps

    seconds = interleaved({name: seconds_of_a_step(one) for name, one in all_of_them.items()}, options.rounds)

    def ratio(a: str, b: str) -> dict[str, Any]:
        return bootstrap(median, [s / t for s, t in zip(seconds[a], seconds[b], strict=True)])

    bytes_ = {name: one.bytes() for name, one in all_of_them.items() if name != "sparselab"}
    return {
        "hidden": hidden,
        "sparsity": sparsity,
        "step_seconds": {name: bootstrap(median, times) for name, times in seconds.items()},
        "masked_to_compact": ratio("masked", "compact"),
        "masked_to_compact_s2sam": ratio("masked+s2sam", "compact+s2sam"),
        "dense_to_compact": ratio("dense", "compact"),
        "sparselab_to_compact": ratio("sparselab", "compact") if "sparselab" in seconds else None,
        "largest_loss_difference": float(((losses["masked"] - losses["compact"]) / losses["masked"]).abs().max()),
        "bytes": bytes_,
        "bytes_masked_to_compact_s2sam": bytes_["masked+s2sam"] / bytes_["compact+s2sam"],
    }


def judge(rows: list[dict[str, Any]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """The bars; those of time are for 4096 units at batch 128, on one thread and on two."""
    bars = []
    share = {1: 1.0, 2: TWO_THREADS}.get(torch.get_num_threads())
    for row in rows:
        where = f"{row['hidden']} units at {row['sparsity']:.0%}"
        limit = STEP_BARS.get(row["sparsity"])
        if limit is not None:
            limit = limit * share if share and row["hidden"] == 4096 and options.batch == 128 else None
        found = [
            (f"step, masked / compact, {where}", row["masked_to_compact"], limit),
            (f"step with S2SAM, masked / compact, {where}", row["masked_to_compact_s2sam"], limit),
        ]
        if row["sparselab_to_compact"] is not None:
            found.append((f"step, sparselab / compact, {where}", row["sparselab_to_compact"], 1.0))
        if row["sparsity"] == 0.98:
            ratio = {"value": row["bytes_masked_to_compact_s2sam"]}
            found.append((f"bytes with S2SAM, masked / compact, {where}", ratio, MEMORY_BAR))
        bars += [bar(name, value, None if options.quick else at) for name, value, at in found]
    return bars


def bar(name: str, ratio: dict[str, Any], limit: float | None) -> dict[str, Any]:
    """A row of the judgement."""
    return {"bar": name, **ratio, "limit": limit, "holds": None if limit is None else ratio["value"] >= limit}


def main(argv: list[str] | None = None) -> Path:
    """Measure, print a summary, write the JSON and return its path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="CPU threads of torch (default: its own choice)")
    parser.add_argument("--hidden", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--sparsities", type=float, nargs="+", default=list(STEP_BARS))
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=2, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="default: in benchmarks/results, compact_training_<hardware>.json")
    parser.add_argument("--quick", action="store_true", help="a tiny network, 2 rounds, for a smoke test")
    options = parser.parse_args(argv)
    options.inputs = 48 if options.quick else INPUTS
    if options.quick:
        options.hidden, options.sparsities, options.batch, options.rounds = [32], [0.9, 0.98], 8, 2
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = []
    for hidden in options.hidden:
        for sparsity in options.sparsities:
            print(f"{hidden} units at {sparsity:.0%}", file=sys.stderr, flush=True)
            rows.append(measure(hidden, sparsity, options))
    device = torch.device("cpu")
    result = {
        "question": (__doc__ or "").partition("\n")[0],
        **environment(device),
        "quick": options.quick,
        "settings": {name: getattr(options, name) for name in ("inputs", "batch", "steps", "rounds")}
        | {"threads": torch.get_num_threads(), "interval": "95 % percentile bootstrap of medians over rounds"},
        "networks": rows,
        "bars": judge(rows, options),
    }
    out = write_result(result, options.out, "compact_training", device)
    for row in result["bars"]:
        word = {True: "holds", False: "FAILS", None: "not judged"}[row["holds"]]
        print(f"{word}  {row['bar']}: {row['value']:.2f} (limit {row['limit']})")
    return out


if __name__ == "__main__":
    main()
