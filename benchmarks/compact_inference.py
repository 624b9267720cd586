"""How much faster are trained sparse layers and networks when they store and multiply their active weights only?

    python benchmarks/compact_inference.py --threads 1        # linear layers, convolutions, an MLP and ResNet-50
    python benchmarks/compact_inference.py --threads 2
    python benchmarks/compact_inference.py --quick            # a smoke test: tiny, its numbers mean nothing

Layers: each as a dense layer with zeros, with single weights stored (csr) and in blocks of 4 (bsr4), with masks of
random weights and of random 4 x 4 blocks, in rounds, interleaved; and sparselab.SparseLinear where it is installed.

Networks: dense with masks of random weights, the first layer and the classifier included, against what
`s2sam.compact.accelerate` makes of it; the report of its choices is part of the result.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from _environment import environment, write_result
from _timing import Clock, bootstrap, interleaved, median
from compact_training import INPUTS, bar, network, random_masks
from s2sam import compact
from s2sam.models import create_model

SPARSITIES = (0.8, 0.9, 0.95, 0.98)
NETWORK_BARS = {"mlp": 5.0, "resnet50": 1.5}  #: dense / accelerated at 95 %
LAYERS = {  #: (layer, shape of the input)
    "linear 1024, batch 32": (lambda: nn.Linear(1024, 1024), (32, 1024)),
    "linear 1024, batch 256": (lambda: nn.Linear(1024, 1024), (256, 1024)),
    "linear 2048, batch 256": (lambda: nn.Linear(2048, 2048), (256, 2048)),
    "linear 384 to 1536, 2048 tokens": (lambda: nn.Linear(384, 1536), (32, 64, 384)),
    "1x1, 256 to 1024 at 14x14": (lambda: nn.Conv2d(256, 1024, 1, bias=False), (8, 256, 14, 14)),
    "3x3, 64 at 56x56": (lambda: nn.Conv2d(64, 64, 3, padding=1, bias=False), (4, 64, 56, 56)),
    "3x3, 256 at 14x14": (lambda: nn.Conv2d(256, 256, 3, padding=1, bias=False), (8, 256, 14, 14)),
    "3x3, 512 at 7x7": (lambda: nn.Conv2d(512, 512, 3, padding=1, bias=False), (8, 512, 7, 7)),
}
QUICK = {
    "linear": (lambda: nn.Linear(16, 24), (4, 16)),
    "3x3": (lambda: nn.Conv2d(4, 8, 3, padding=1, bias=False), (2, 4, 6, 6)),
}


def block_mask(shape: torch.Size, sparsity: float, block: int, generator: torch.Generator) -> Tensor:
    """Random blocks of a weight seen as a matrix."""
    rows, cols = shape[0], shape[1:].numel()
    kept = max(1, round((1 - sparsity) * rows * cols / block**2))
    grid = compact.SparsePattern.random(rows // block, cols // block, kept, generator).mask()
    return grid.repeat_interleave(block, 0).repeat_interleave(block, 1).view(shape)


def measure_layer(name: str, sparsity: float, blocks: int, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every form of a layer, and how many times as fast as the dense one each is."""
    make, shape = options.layers[name]
    generator = torch.Generator().manual_seed(0)
    layer = make()
    mask = block_mask(layer.weight.shape, sparsity, blocks, generator)
    x = torch.randn(shape, generator=generator)
    with torch.no_grad():
        layer.weight.normal_(generator=generator).mul_(mask)
    kind = compact.SparseConv2d if isinstance(layer, nn.Conv2d) else compact.SparseLinear
    forms: dict[str, nn.Module] = {
        "dense": layer,
        "csr": kind.from_dense(layer),
        "bsr4": kind.from_dense(layer, block=4),
    }
    if importlib.util.find_spec("sparselab") and isinstance(layer, nn.Linear):
        sparselab = importlib.import_module("sparselab")
        forms["sparselab"] = sparselab.SparseLinear(layer.in_features, layer.out_features, sparsity=sparsity)
    clock = Clock(torch.device("cpu"), 4)
    with torch.no_grad():
        y = layer(x)
        errors = {form: float((forms[form](x) - y).abs().max() / y.abs().max()) for form in ("csr", "bsr4")}
        works = {form: (lambda one=one: clock(lambda: one(x))) for form, one in forms.items()}
        for work in works.values():
            work()
        seconds = interleaved(works, options.rounds)
    faster = {
        form: bootstrap(median, [d / t for d, t in zip(seconds["dense"], times, strict=True)])
        for form, times in seconds.items()
    }
    return {
        "layer": name,
        "sparsity": sparsity,
        "mask": "random weights" if blocks == 1 else f"random {blocks}x{blocks} blocks",
        "seconds": {form: bootstrap(median, times) for form, times in seconds.items()},
        "times_as_fast_as_dense": faster,
        "max_error": errors,
    }


def measure_network(name: str, sparsity: float, options: argparse.Namespace) -> dict[str, Any]:
    """A network after `accelerate`."""
    if name == "mlp":
        net: nn.Module = network(32 if options.quick else 4096, 48 if options.quick else INPUTS)
        x = torch.randn(options.batch, 48 if options.quick else INPUTS, generator=torch.Generator().manual_seed(3))
        masks = random_masks(net, sparsity)
    else:
        side = 32 if options.quick else 224
        net = create_model(name, num_classes=10, image_size=side, generator=torch.Generator().manual_seed(0))
        x = torch.randn(options.images, 3, side, side, generator=torch.Generator().manual_seed(3))
        generator = torch.Generator().manual_seed(1)
        masks = {n: block_mask(w.shape, sparsity, 1, generator) for n, w in net.named_parameters() if w.dim() > 1}
    net.eval()
    with torch.no_grad():
        for key, w in net.named_parameters():
            if key in masks:
                w.mul_(masks[key])
        fast, rows = compact.accelerate(net, x, rounds=options.rounds)
        clock = Clock(torch.device("cpu"), 4)
        works = {"dense": lambda: clock(lambda: net(x)), "accelerated": lambda: clock(lambda: fast(x))}
        seconds = interleaved(works, options.rounds)
    return {
        "network": name,
        "sparsity": sparsity,
        "batch": len(x),
        "seconds": {form: bootstrap(median, times) for form, times in seconds.items()},
        "dense_to_accelerated": bootstrap(
            median, [d / t for d, t in zip(seconds["dense"], seconds["accelerated"], strict=True)]
        ),
        "max_error": rows[-1].max_error,
        "chosen": dict(Counter(row.chosen for row in rows[:-1])),
        "report": [str(row) for row in rows],
    }


def main(argv: list[str] | None = None) -> Path:
    """Measure, print a summary, write the JSON and return its path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="CPU threads of torch (default: its own choice)")
    parser.add_argument(
        "--networks", nargs="*", default=list(NETWORK_BARS), help="mlp, resnet50, ...; none: layers only"
    )
    parser.add_argument("--sparsities", type=float, nargs="+", default=list(SPARSITIES))
    parser.add_argument("--batch", type=int, default=128, help="of the MLP")
    parser.add_argument("--images", type=int, default=8, help="of the other networks")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="default: in benchmarks/results, compact_inference_<hardware>.json")
    parser.add_argument("--quick", action="store_true", help="tiny layers and networks, 2 rounds, for a smoke test")
    options = parser.parse_args(argv)
    options.layers = QUICK if options.quick else LAYERS
    if options.quick:
        options.networks, options.sparsities, options.batch = ["mlp", "resnet20"], [0.95], 8
        options.rounds, options.images = 2, 2
    if options.threads:
        torch.set_num_threads(options.threads)
    layers, networks = [], []
    for sparsity in options.sparsities:
        for name in options.layers:
            print(f"{name} at {sparsity:.0%}", file=sys.stderr, flush=True)
            layers += [measure_layer(name, sparsity, blocks, options) for blocks in (1, 4)]
        for name in options.networks:
            print(f"{name} at {sparsity:.0%}", file=sys.stderr, flush=True)
            networks.append(measure_network(name, sparsity, options))
    device = torch.device("cpu")
    bars = []
    for row in networks:
        judged = row["sparsity"] == 0.95 and not options.quick
        limit = NETWORK_BARS.get(row["network"]) if judged else None
        where = f"{row['network']} at {row['sparsity']:.0%}"
        bars.append(bar(f"inference, dense / accelerated, {where}", row["dense_to_accelerated"], limit))
    result = {
        "question": (__doc__ or "").partition("\n")[0],
        **environment(device),
        "quick": options.quick,
        "settings": {name: getattr(options, name) for name in ("batch", "images", "rounds")}
        | {"threads": torch.get_num_threads(), "interval": "95 % percentile bootstrap of medians over rounds"},
        "layers": layers,
        "networks": networks,
        "bars": bars,
    }
    out = write_result(result, options.out, "compact_inference", device)
    for row in layers:
        found = ", ".join(
            f"{form} {r['value']:.2f}" for form, r in row["times_as_fast_as_dense"].items() if form != "dense"
        )
        print(f"{row['layer']}, {row['mask']}, {row['sparsity']:.0%}: {found}")
    for row in bars:
        word = {True: "holds", False: "FAILS", None: "not judged"}[row["holds"]]
        print(f"{word}  {row['bar']}: {row['value']:.2f} (limit {row['limit']})")
    return out


if __name__ == "__main__":
    main()
