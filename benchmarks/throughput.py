"""How many images a second does the trainer train, beside a plain loop and beside nothing but forward and backward?

    python benchmarks/throughput.py                            # ResNet-20, batch 128, this machine's CPU
    python benchmarks/throughput.py --device cuda --networks resnet32 --width 2 --precision bf16 --channels-last \
        --compile reduce-overhead --fused --steps 390            # a GPU at its quickest
    python benchmarks/throughput.py --packed 2                 # two trainers at a time against one with all threads
    python benchmarks/throughput.py --quick                    # a smoke test: tiny, its numbers mean nothing

Contestants, in rounds of as many steps each, interleaved, on random images of 32x32 (what they show costs no time):

trainer    s2sam's own epoch: batches, augmentation, step, schedule, records, timers; dense with SGD. Evaluation and
           checkpoints are not in it. Also with S2-SAM, and with RigL and S2-SAM.
plain      what the paper's scripts do: a Dataset that crops, mirrors and normalises one Pillow image at a time, a
           DataLoader with workers, SGD, and loss.item() and accuracy after every step. (Theirs has torchvision's
           transforms; these are the same operations without it.)
pure       forward and backward on one fixed batch on the device, and zero_grad; compiled if the trainer is.

The bars: trainer >= 0.9 pure on a CPU; on a GPU >= 0.85 pure, and for resnet32 at batch 128 >= 5 plain.

With --packed N only trainers are measured, with RigL and S2-SAM: N processes that train at the same time, against one
process; on a CPU they share the threads that the one has to itself.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from _environment import environment, write_result
from _packed import judge_packed, measure_packed, trainer_epoch
from _timing import Clock, bootstrap, interleaved, median
from s2sam.models import create_model
from s2sam.train.config import COMPILE, DataConfig, OptimConfig, SamConfig, SparseConfig, TrainConfig
from s2sam.train.fast import compile_network, quickest_convolutions

PURE_BARS = {"cpu": 0.9, "cuda": 0.85}
PLAIN_BAR = 5.0  #: on a GPU, ResNet-32, batch 128
CLASSES, SIDE = 10, 32
TRAINERS = {"trainer": ("dense", "none"), "trainer+s2sam": ("dense", "s2sam"), "trainer+rigl+s2sam": ("rigl", "s2sam")}
MEAN, STD = torch.tensor([0.4914, 0.4822, 0.4465])[:, None, None], torch.tensor([0.247, 0.243, 0.261])[:, None, None]


class Crops(Dataset[tuple[Tensor, int]]):
    """Images as the paper's scripts serve them: Pillow, padded by 4, cropped, mirrored, normalised, one at a time."""

    def __init__(self, images: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> None:
        self.images, self.labels = images.transpose(0, 2, 3, 1), labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = ImageOps.expand(Image.fromarray(self.images[index]), 4)
        left, top, mirror = (int(torch.randint(n, ())) for n in (9, 9, 2))
        image = image.crop((left, top, left + SIDE, top + SIDE))
        if mirror:
            image = ImageOps.mirror(image)
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
        return x.sub(MEAN).div(STD), int(self.labels[index])


def plain_epoch(
    name: str, data: dict[str, Any], options: argparse.Namespace, device: torch.device, clock: Clock
) -> Callable[[], float]:
    """A function that trains one epoch with a DataLoader and returns its seconds."""
    model = network(name, options, device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
    loader = DataLoader(
        Crops(data["train_x"], data["train_y"]), options.batch, shuffle=True, num_workers=options.workers,
        pin_memory=device.type == "cuda", persistent_workers=options.workers > 0,
    )  # fmt: skip

    def epoch() -> None:
        losses, right = 0.0, 0.0
        for x, y in loader:
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            with autocast(options, device):
                logits = model(x)
            loss = F.cross_entropy(logits.float(), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses += loss.item() * len(x)
            right += (logits.argmax(1) == y).sum().item()

    return lambda: clock(epoch)


def pure_epoch(
    name: str, data: dict[str, Any], options: argparse.Namespace, device: torch.device, clock: Clock
) -> Callable[[], float]:
    """A function that takes as many forwards and backwards on one batch and returns their seconds."""
    model = network(name, options, device)
    x = torch.from_numpy(data["train_x"][: options.batch]).to(device).float().div(255).sub(0.5)
    y = torch.from_numpy(data["train_y"][: options.batch]).to(device)
    if options.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    compile_network(model, options.compile)

    def epoch() -> None:
        for _ in range(options.steps):
            with autocast(options, device):
                logits = model(x)
            F.cross_entropy(logits.float(), y).backward()
            model.zero_grad()

    return lambda: clock(epoch)


def network(name: str, options: argparse.Namespace, device: torch.device) -> torch.nn.Module:
    """The network, in training mode."""
    generator = torch.Generator().manual_seed(0)
    model = create_model(name, num_classes=CLASSES, generator=generator, **model_options(options)).to(device).train()
    return model.to(memory_format=torch.channels_last) if options.channels_last else model


def model_options(options: argparse.Namespace) -> dict[str, Any]:
    """With --quick a narrow network."""
    if options.quick:
        return {"width": 0.25, "shortcut": "A"}
    return {} if options.width == 1 else {"width": options.width}


def autocast(options: argparse.Namespace, device: torch.device) -> Any:
    """As the trainer does it."""
    return nullcontext() if options.precision == "fp32" else torch.autocast(device.type, dtype=torch.bfloat16)


def measure(name: str, data: dict[str, Any], options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Images a second of all contestants on one network, and their ratio to `pure`, round by round."""
    device = torch.device(options.device)
    clock = Clock(device, 4)
    works = {
        "pure": pure_epoch(name, data, options, device, clock),
        "plain": plain_epoch(name, data, options, device, clock),
    }
    for contestant in TRAINERS:
        works[contestant] = trainer_epoch(
            run_config(name, contestant, options, folder), folder / f"{name}-{contestant}"
        )
    for work in works.values():
        work()  # warm-up: allocations, workers, kernels
    seconds = interleaved(works, options.rounds)
    images = options.steps * options.batch
    parameters = sum(p.numel() for p in network(name, options, torch.device("cpu")).parameters())
    found: dict[str, Any] = {"parameters": parameters, "rounds": options.rounds, "contestants": {}}
    for contestant, times in seconds.items():
        found["contestants"][contestant] = {
            "images_per_second": bootstrap(median, [images / t for t in times]),
            "ratio_to_pure": bootstrap(median, [p / t for p, t in zip(seconds["pure"], times, strict=True)]),
            "ratio_to_plain": bootstrap(median, [p / t for p, t in zip(seconds["plain"], times, strict=True)]),
        }
    return found


def run_config(name: str, contestant: str, options: argparse.Namespace, folder: Path) -> TrainConfig:
    """The configuration of a trainer on the images in `folder`."""
    method, sharpness = TRAINERS[contestant]
    return TrainConfig(
        data=str(folder / "images.npz"), model=name, method=method, sharpness=sharpness, epochs=10_000,
        batch_size=options.batch, lr=1e-3, device=options.device, precision=options.precision,
        channels_last=options.channels_last, compile=options.compile, sam=SamConfig(stats_every=50),
        optim=OptimConfig(name="sgd", fused=options.fused), sparse=SparseConfig(options={"delta_t": 100}),
        data_options=DataConfig(val_fraction=0.0), model_options=model_options(options),
    )  # fmt: skip


def main(argv: list[str] | None = None) -> Path:
    """Measure, print a summary, write the JSON and return its path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--networks", nargs="+", default=["resnet20"], help="resnet20, resnet32, ...")
    parser.add_argument("--threads", type=int, help="CPU threads of torch (default: its own choice)")
    parser.add_argument(
        "--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes of the plain loop's DataLoader"
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", choices=COMPILE, default="none", help="of the trainer and of pure")
    parser.add_argument("--fused", action="store_true", help="the trainer's optimizer step is torch's fused one")
    parser.add_argument("--width", type=float, default=1, help="of the networks; the paper's ResNet-32 has 2")
    parser.add_argument("--packed", type=int, metavar="N", help="measure N trainers at a time against one")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--out", type=Path, help="default: in benchmarks/results, throughput_ or packing_<hardware>.json"
    )
    parser.add_argument("--quick", action="store_true", help="narrow networks, 2 rounds, for a smoke test")
    options = parser.parse_args(argv)
    if options.quick:
        options.rounds, options.batch, options.steps, options.workers = 2, 8, 2, 0
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    rng = np.random.default_rng(0)
    n = options.batch * options.steps
    data = {
        "train_x": rng.integers(0, 256, (n, 3, SIDE, SIDE), dtype=np.uint8), "train_y": np.arange(n) % CLASSES,
        "test_x": rng.integers(0, 256, (CLASSES, 3, SIDE, SIDE), dtype=np.uint8), "test_y": np.arange(CLASSES),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, quickest_convolutions(device):
        np.savez(Path(folder) / "images.npz", **data)
        measured = {}
        for name in options.networks:
            print(name, file=sys.stderr, flush=True)
            if options.packed:
                config = run_config(name, "trainer+rigl+s2sam", options, Path(folder))
                measured[name] = measure_packed(
                    config, options.packed, torch.get_num_threads(), options.rounds, n, Path(folder) / name
                )
            else:
                measured[name] = measure(name, data, options, Path(folder))
    kept = ("batch", "steps", "workers", "precision", "channels_last", "compile", "fused", "width", "packed")
    result = {
        "question": (__doc__ or "").partition("\n")[0],
        **environment(device),
        "quick": options.quick,
        "settings": {name: getattr(options, name) for name in kept}
        | {"interval": "95 % percentile bootstrap of medians over rounds"},
        "networks": measured,
        "bars": judge(measured, device, options),
    }
    kind = "packing" if options.packed else "throughput"
    out = write_result(result, options.out, kind, device)
    report(result)
    return out


def judge(measured: dict[str, Any], device: torch.device, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The bars of every network."""
    bars = []
    for name, row in measured.items():
        if options.packed:
            bars += judge_packed(name, options.width, row, device)
            continue
        trainer, limits = row["contestants"]["trainer"], {"pure": PURE_BARS.get(device.type)}
        if device.type == "cuda" and name == "resnet32" and options.batch == 128:
            limits["plain"] = PLAIN_BAR
        for other, limit in limits.items():
            ratio = trainer[f"ratio_to_{other}"]
            holds = None if limit is None else ratio["value"] >= limit
            bars.append({"bar": f"trainer / {other}, {name}", **ratio, "limit": limit, "holds": holds})
    return bars


def report(result: dict[str, Any]) -> None:
    """The numbers and the bars, as lines."""
    for name, row in result["networks"].items():
        if "contestants" not in row:
            one, all_ = (row["images_per_second"][key]["value"] for key in ("single", "packed"))
            print(f"{name} alone {one:.1f} images/s, {row['processes']} together {all_:.1f} images/s")
            continue
        for contestant, found in row["contestants"].items():
            speed, ratio = found["images_per_second"], found["ratio_to_pure"]
            low, high = ratio["interval"]
            print(
                f"{name} {contestant:<20} {speed['value']:9.1f} images/s  {ratio['value']:.3f} [{low:.3f}, {high:.3f}]"
            )
    for bar in result["bars"]:
        word = {True: "holds", False: "FAILS", None: "not judged"}[bar["holds"]]
        print(f"{word}  {bar['bar']}: {bar['value']:.3f} (limit {bar['limit']})")


if __name__ == "__main__":
    main()
