"""A loop of your own that survives being killed: three state dicts (model, optimizer, sparsifier) and the loader's.

python examples/own_loop_resume.py             # trains 60 steps, saving every 10; run it again after a Ctrl-C or a kill
python examples/own_loop_resume.py --die-at 33 # kills itself in the middle of step 33, to be tried
"""

from __future__ import annotations

import argparse
import hashlib
import os
import pickle
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from s2sam import S2SAM, sparsify
from s2sam.data import load_data
from s2sam.data.loader import Batches

#: what loading a file that is torn, or that another program wrote, ends in
BAD = (OSError, EOFError, pickle.UnpicklingError, RuntimeError, ValueError, LookupError, TypeError, AttributeError)
STEPS, SAVE_EVERY, BATCH, PARTS = 60, 10, 64, 2


def main(argv: list[str] | None = None) -> None:
    """Train from the beginning, or from the checkpoint if there is one; print a digest of all weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("own_loop.pt"))
    parser.add_argument("--die-at", type=int, default=0, metavar="STEP")
    options = parser.parse_args(argv)
    resume = options.checkpoint.exists()

    data = load_data("digits")
    images = (data.train_x.float() / 255 - 0.5) / 0.3
    batches = Batches(images, data.train_y, BATCH, torch.Generator().manual_seed(1))
    model = network(torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    sparsifier = sparsify(
        model, optimizer, method="rigl", sparsity=0.9, total_steps=STEPS, delta_t=5,
        generator=torch.Generator().manual_seed(2), init=not resume,
    )  # fmt: skip
    S2SAM(optimizer, model=model, rho=0.05)  # its direction is part of the optimizer's state dict

    parts = {"model": model, "optimizer": optimizer, "sparsifier": sparsifier, "schedule": schedule, "batches": batches}
    step = 0
    if resume:
        try:
            step = load(options.checkpoint, parts)
            sparsifier.verify()
        except BAD as error:
            reason = " ".join(str(error).split())[:150] or type(error).__name__
            print(f"{options.checkpoint} is torn or of another program ({reason}); delete it to start", file=sys.stderr)
            raise SystemExit(2) from None
        print(f"going on after step {step}")

    while step < STEPS:
        for x, y in batches:
            for i, (x_part, y_part) in enumerate(zip(x.chunk(PARTS), y.chunk(PARTS), strict=True)):
                (F.cross_entropy(model(x_part), y_part) * len(x_part) / len(x)).backward()
                if step + 1 == options.die_at and i == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            step += 1
            if step % SAVE_EVERY == 0:
                save(options.checkpoint, {name: part.state_dict() for name, part in parts.items()} | {"step": step})
            if step == STEPS:
                break

    digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
    print(
        f"steps     {step}\nsparsity  {sparsifier.sparsity():.4f}\nupdates   {sparsifier.updates}\nweights   {digest}"
    )


def load(path: Path, parts: dict[str, Any]) -> int:
    """Put the checkpoint into the parts; returns its step."""
    saved = torch.load(path, weights_only=True)
    if not isinstance(saved, dict) or not isinstance(saved.get("step"), int):
        raise ValueError("it holds no step")
    for name, part in parts.items():
        if name not in saved:
            raise ValueError(f"it holds no {name}")
        part.load_state_dict(saved[name])
    return int(saved["step"])


def save(path: Path, state: dict[str, object]) -> None:
    """Whole or not at all: a kill while it is written leaves the checkpoint before."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def network(generator: torch.Generator) -> nn.Module:
    """A small network with BatchNorm, whose statistics are in the model's state dict too."""
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(256, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.kaiming_normal_(p, generator=generator)
        elif p.shape == (10,):
            nn.init.zeros_(p)
    return model


if __name__ == "__main__":
    main()
