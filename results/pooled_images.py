"""Small proxies of CIFAR-10: some classes, pooled 2x2 to 16x16 pixels, as one .npz file that `--data` takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np


def pooled(source: Path, out: Path, classes: Sequence[str] | None, train: int, test: int) -> None:
    """Write `train` and `test` images of each class (None: all of them), always the same ones."""
    import torch

    from s2sam.data import load_data

    data, rng = load_data(source, val_fraction=0.0), np.random.default_rng(0)
    names = list(classes or data.classes)
    wanted = [data.classes.index(name) for name in names]
    arrays = {}
    for split, each in (("train", train), ("test", test)):
        x, y = data.split(split)
        small = torch.nn.functional.avg_pool2d(x.float(), 2).round().to(torch.uint8).numpy()
        order = rng.permutation(len(y))
        rows = np.concatenate([order[y.numpy()[order] == label][:each] for label in wanted])
        arrays |= {f"{split}_x": small[rows], f"{split}_y": np.repeat(np.arange(len(wanted)), each)}
    np.savez_compressed(out, classes=np.array(names), **arrays)
