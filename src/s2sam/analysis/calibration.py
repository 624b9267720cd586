"""Calibration: whether a network that says 80 % is right in 80 of 100 cases. Pure functions, and a running count."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BINS = 15  #: of the expected calibration error, everywhere in this package


def calibration_bins(confidence: Tensor, correct: Tensor, bins: int = BINS) -> Tensor:
    """Images, summed confidence and correct ones in equal bins (0, 1/bins], (1/bins, 2/bins], ...: float64 (3, bins).

    Args:
        confidence: the largest probability of each image, in [0, 1], (N,).
        correct: whether the class of that probability is the right one, (N,).
        bins: their number.

    >>> calibration_bins(torch.tensor([0.5, 0.9]), torch.tensor([True, False]), bins=2).tolist()
    [[1.0, 1.0], [0.5, 0.8999999761581421], [1.0, 0.0]]
    """
    place = (confidence * bins).ceil().long().sub(1).clamp(0, bins - 1)
    rows = torch.stack([torch.ones_like(confidence), confidence, correct.to(confidence)]).double()
    return torch.zeros(3, bins, dtype=torch.float64, device=rows.device).index_add_(1, place, rows)


def expected_calibration_error(bins: Tensor) -> float:
    """ECE = sum_b n_b / N |accuracy of b - mean confidence of b|, of :func:`calibration_bins`; NaN of no image.

    Source: Guo et al., On Calibration of Modern Neural Networks, 2017, equation 3.

    >>> expected_calibration_error(calibration_bins(torch.tensor([0.75, 0.75]), torch.tensor([True, False])))
    0.25
    """
    images, confidence, correct = bins
    return float((correct - confidence).abs().sum() / images.sum())


class Scores:
    """Accuracy, negative log-likelihood and ECE of one set of images, batch by batch, kept on the device until read."""

    def __init__(self, device: torch.device) -> None:
        self.bins = torch.zeros(3, BINS, dtype=torch.float64, device=device)
        self.nll = torch.zeros((), dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, logits: Tensor, y: Tensor) -> None:
        """Add a batch: logits (N, classes), labels (N,)."""
        logits = logits.float()
        self.nll += F.cross_entropy(logits, y, reduction="sum").double()
        confidence, guess = logits.softmax(dim=1).max(dim=1)
        self.bins += calibration_bins(confidence, guess == y)

    def read(self) -> dict[str, float]:
        """`top1`, `nll` (nats, the mean) and `ece`.

        Raises:
            ValueError: there were no images, or the network gave a value that is not finite.
        """
        images, _, correct = self.bins.sum(dim=1).tolist()
        if images == 0 or not bool(torch.isfinite(self.nll)):
            raise ValueError("the network gives values that are not finite; look at its training with `s2sam report`")
        return {"top1": correct / images, "nll": float(self.nll) / images, "ece": expected_calibration_error(self.bins)}
