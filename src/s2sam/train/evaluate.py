"""Loss and top-1 accuracy: accumulated during training, or measured on a whole split."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2sam.data.images import ImageData

BATCH = 1024


class Meter:
    """Mean loss and accuracy over images, kept on the device until read; a batch with a non-finite loss is left out.

    Args:
        device: where the batches are.
        limit: losses above it, and those that are not finite, are counted as absurd.
    """

    def __init__(self, device: torch.device, limit: float = math.inf) -> None:
        self.limit = limit
        #: loss, correct, images, batches whose loss is not finite, batches whose loss is absurd
        self.totals = torch.zeros(5, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, logits: Tensor, y: Tensor, loss: Tensor) -> None:
        """Add one batch: logits (N, classes), labels (N,) or probabilities (N, classes), its mean loss."""
        loss = loss.detach()
        finite = torch.isfinite(loss)
        labels = y.argmax(dim=1) if y.is_floating_point() else y
        correct = (logits.argmax(dim=1) == labels).sum()
        n = len(y)
        absurd = ~(loss <= self.limit) | ~finite
        batch = torch.stack([(loss * n).masked_fill(~finite, 0.0), correct, finite * n, ~finite, absurd]).double()
        batch[1] *= finite
        self.totals += batch

    def load_state_dict(self, totals: Tensor) -> None:
        """Go on from saved `totals`; ValueError if there are others than these five."""
        if totals.shape != self.totals.shape:
            raise ValueError(f"the meter holds {len(self.totals)} numbers, the saved one {totals.numel()}")
        self.totals.copy_(totals)

    def read(self) -> tuple[float, float, int, int]:
        """(mean loss, top-1, number of non-finite batches, of absurd ones); NaN where no batch was finite."""
        loss, correct, images, bad, absurd = self.totals.tolist()
        means = (loss / images, correct / images) if images else (math.nan, math.nan)
        return *means, int(bad), int(absurd)


@torch.no_grad()
def evaluate(
    model: nn.Module, x: Tensor, y: Tensor, prepare: Callable[[Tensor], Tensor]
) -> tuple[float | None, float | None]:
    """(mean cross entropy, top-1) of `model` in eval mode on all images; (None, None) if there are none.

    Args:
        model: left in the mode it was in.
        x: images (N, C, H, W) as stored.
        y: labels (N,).
        prepare: turns stored images into what the model takes.
    """
    if len(x) == 0:
        return None, None
    training = model.training
    model.eval()
    try:
        loss = torch.zeros((), dtype=torch.float64, device=x.device)
        correct = torch.zeros((), dtype=torch.int64, device=x.device)
        for rows in torch.arange(len(x), device=x.device).split(BATCH):
            logits = model(prepare(x[rows])).float()
            loss += F.cross_entropy(logits, y[rows], reduction="sum")
            correct += (logits.argmax(dim=1) == y[rows]).sum()
    finally:
        model.train(training)
    return float(loss) / len(x), int(correct) / len(x)


def evaluate_split(
    model: nn.Module, data: ImageData, split: str, prepare: Callable[[Tensor], Tensor]
) -> tuple[float | None, float | None]:
    """:func:`evaluate` on "train", "val" or "test" of `data`, on the device of the model."""
    device = next(model.parameters()).device
    x, y = data.split(split)
    return evaluate(model, x.to(device), y.to(device), prepare)
