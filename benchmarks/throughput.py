"""How many images a second does the trainer train, beside a plain loop and beside nothing but forward and backward?

    python benchmarks/throughput.py                            # ResNet-20, batch 128, this machine's CPU
    python benchmarks/throughput.py --device cuda --networks resnet20 resnet32 --precision bf16 --channels-last
    python benchmarks/throughput.py --quick                    # a smoke test: tiny, its numbers mean nothing

Contestants, in rounds of as many steps each, interleaved, on random images of 32x32 (what they show costs no time):

trainer    s2sam's own epoch: batches, augmentation, step, schedule, records, timers; dense with SGD. Evaluation and
           checkpoints are not in it. Also with S2-SAM, and with RigL and S2-SAM.
plain      what the paper's scripts do: a Dataset that crops, mirrors and normalises one Pillow image at a time, a
           DataLoader with workers, SGD, and loss.item() and accuracy after every step. (Theirs has torchvision's
           transforms; these are the same operations without it.)
pure       forward and backward on one fixed batch on the device, and zero_grad. The bar: trainer >= 0.9 pure on a CPU.
"""

from __future__ import annotations

import argparse
import json
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

from _environment import ROOT, environment, slug
from _timing import Clock, bootstrap, interleaved, median
from s2sam.models import create_model
from s2sam.track.base import Loggers
from s2sam.track.files import FileLogger
from s2sam.train.config import DataConfig, OptimConfig, SamConfig, SparseConfig, TrainConfig
from s2sam.train.folder import RunFolder
from s2sam.train.loop import Trainer
from s2sam.train.state import build

BAR = 0.9
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


def trainer_epoch(config: TrainConfig, folder: Path) -> Callable[[], float]:
    """A function that trains one epoch with the trainer and returns its seconds, as the run's records have them."""
    state = build(config)
    run = RunFolder(folder)
    run.create(config, {})
    logger = FileLogger(folder)
    logger.start({}, {})
    trainer = Trainer(state, Loggers([logger]), run)
    return lambda: float(trainer.epoch()["seconds"])


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
    return {"width": 0.25, "shortcut": "A"} if options.quick else {}


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
    for contestant, (method, sharpness) in TRAINERS.items():
        config = TrainConfig(
            data=str(folder / "images.npz"), model=name, method=method, sharpness=sharpness, epochs=10_000,
            batch_size=options.batch, lr=1e-3, device=options.device, precision=options.precision,
            channels_last=options.channels_last, sam=SamConfig(stats_every=50), optim=OptimConfig(name="sgd"),
            sparse=SparseConfig(options={"delta_t": 100}), data_options=DataConfig(val_fraction=0.0),
            model_options=model_options(options),
        )  # fmt: skip
        works[contestant] = trainer_epoch(config, folder / f"{name}-{contestant}")
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
        }
    return found


def main(argv: list[str] | None = None) -> Path:
    """Measure, print a summary, write the JSON and return its path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--networks", nargs="+", default=["resnet20"], help="resnet20, resnet32, ...")
    parser.add_argument("--threads", type=int, help="CPU threads of torch (default: its own choice)")
    parser.add_argument("--workers", type=int, default=2, help="processes of the plain loop's DataLoader")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/throughput_<hardware>.json")
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
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "images.npz", **data)
        measured = {}
        for name in options.networks:
            print(name, file=sys.stderr, flush=True)
            measured[name] = measure(name, data, options, Path(folder))
    kept = ("batch", "steps", "workers", "precision", "channels_last")
    result = {
        "question": (__doc__ or "").partition("\n")[0],
        **environment(device),
        "quick": options.quick,
        "settings": {name: getattr(options, name) for name in kept}
        | {"interval": "95 % percentile bootstrap of medians over rounds"},
        "networks": measured,
        "bars": judge(measured, device),
    }
    out: Path = options.out or ROOT / "benchmarks" / "results" / f"throughput_{slug(device)}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(rounded(result), indent=2) + "\n")
    report(result)
    return out


def judge(measured: dict[str, Any], device: torch.device) -> list[dict[str, Any]]:
    """The bar, for every network; set for CPUs, elsewhere `limit` is null and nothing is judged."""
    bars = []
    for name, row in measured.items():
        ratio = row["contestants"]["trainer"]["ratio_to_pure"]
        limit = BAR if device.type == "cpu" else None
        holds = None if limit is None else ratio["value"] >= limit
        bars.append({"bar": f"trainer / pure, {name}", **ratio, "limit": limit, "holds": holds})
    return bars


def rounded(value: Any) -> Any:
    """Five significant digits are more than a clock has."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, (list, tuple)) else value


def report(result: dict[str, Any]) -> None:
    """The numbers and the bars, as lines."""
    for name, row in result["networks"].items():
        for contestant, found in row["contestants"].items():
            speed, ratio = found["images_per_second"], found["ratio_to_pure"]
            low, high = ratio["interval"]
            print(
                f"{name} {contestant:<20} {speed['value']:9.1f} images/s  {ratio['value']:.3f} [{low:.3f}, {high:.3f}]"
            )
    for bar in result["bars"]:
        word = {True: "holds", False: "FAILS", None: "no bar"}[bar["holds"]]
        print(f"{word}  {bar['bar']}: {bar['value']:.3f} (at least {bar['limit']})")


if __name__ == "__main__":
    main()
