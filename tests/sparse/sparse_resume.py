"""A run that stops and goes on in a fresh process: `python sparse_resume.py FOLDER` finishes every FOLDER/METHOD.pt."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from sparse_support import attach, make_batches, make_net, one_step, usable

from s2sam.registry import MethodInfo, list_methods


def start_run(info: MethodInfo, *, init: bool = True, seed: int = 3) -> tuple[Any, Any, Any, Any]:
    net = make_net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    return net, optimizer, scheduler, attach(info, net, optimizer, init=init, seed=seed)


def continue_run(net: Any, optimizer: Any, scheduler: Any, sparsifier: Any, *, first: int, last: int) -> dict[str, Any]:
    for batch in make_batches(last)[first:]:
        one_step(net, optimizer, batch)
        scheduler.step()
    parts = {"net": net, "optimizer": optimizer, "scheduler": scheduler, "sparsifier": sparsifier}
    return {name: part.state_dict() for name, part in parts.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for method in filter(usable, list_methods()):
        file = Path(sys.argv[1]) / f"{method.name}.pt"
        saved = torch.load(file, weights_only=True)
        run = start_run(method, init=False, seed=99)
        for part, name in zip(run, ("net", "optimizer", "scheduler", "sparsifier"), strict=True):
            part.load_state_dict(saved[name])
        torch.save(continue_run(*run, first=7, last=14), file.with_suffix(".done.pt"))
