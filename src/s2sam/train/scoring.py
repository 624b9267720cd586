"""The images by which SNIP and GraSP score the weights of a run before it starts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from s2sam.data.augment import Augment
from s2sam.data.images import ImageData
from s2sam.registry import find, list_methods
from s2sam.train.config import TrainConfig
from s2sam.train.seeding import generator

SAMPLES_PER_CLASS = 10  #: as GraSP and SynFlow's authors do
LARGEST_BATCH = 128


def scoring_options(config: TrainConfig, data: ImageData, augment: Augment, device: torch.device) -> dict[str, Any]:
    """The arguments of `sparsify` by which its method sees data: none for methods that need none.

    The images are as many of each class, drawn from the training split by the seed and for this purpose alone,
    normalised but not augmented, in batches of equal size. The loss is cross-entropy, whatever the training adds to it.
    """
    if config.method == "dense" or not find(list_methods(), config.method, "method").load().needs_batches:
        return {}
    rows = balanced(data.train_y, SAMPLES_PER_CLASS, generator(config.seed, "scoring"))
    parts = rows.tensor_split(-(-len(rows) // LARGEST_BATCH))
    batches = [(augment(data.train_x[part].to(device)), data.train_y[part].to(device)) for part in parts]
    return {"batches": batches, "loss_fn": F.cross_entropy}


def balanced(labels: Tensor, per_class: int, generator: torch.Generator) -> Tensor:
    """Rows of `per_class` samples of each class (all of a smaller one), in random order.

    >>> rows = balanced(torch.tensor([0, 0, 0, 1, 1, 1, 1]), 2, torch.Generator().manual_seed(0))
    >>> sorted(torch.tensor([0, 0, 0, 1, 1, 1, 1])[rows].tolist())
    [0, 0, 1, 1]
    """
    labels = labels.cpu()
    order = torch.randperm(len(labels), generator=generator)
    chosen = [order[labels[order] == label][:per_class] for label in labels.unique()]
    rows = torch.cat(chosen)
    return rows[torch.randperm(len(rows), generator=generator)]
