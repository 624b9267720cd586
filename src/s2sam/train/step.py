"""One optimizer step on one batch: micro-batches, precision, masks, clipping, sharpness, in this order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from s2sam.sam.single_step import S2SAM
from s2sam.sam.two_step import SAM
from s2sam.train.precision import autocast

if TYPE_CHECKING:
    from s2sam.train.state import TrainState


def train_step(state: TrainState, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """One optimizer step on one batch; returns (logits, loss) of its first forward. Afterwards the weights are clean.

    S2SAM acts through hooks, so the plain loop is all there is; SAM calls the closure twice. The batch may be cut into
    micro-batches (`optim.accumulate`), whose gradients add up to that of the mean loss; S2SAM's displacement is the
    same for all of them. Pruned weights are masked before the gradient is clipped. If an fp16 gradient overflows, the
    step does not happen: weights, state, direction and topology stay.

    Args:
        state: the run.
        x: images as the model takes them.
        y: labels (N,), or probabilities (N, classes).
    """
    first: list[tuple[Tensor, Tensor]] = []
    if state.config.channels_last and x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)

    def closure() -> Tensor:
        logits, loss = gradients(state, x, y)
        clip(state)
        if not first:
            first.append((logits, loss))
        return loss

    if isinstance(state.sharpness, SAM):
        state.optimizer.step(closure)  # type: ignore[arg-type]
    else:
        closure()
        state.scaler.step(state.optimizer)
        state.scaler.update()
    if isinstance(state.sharpness, S2SAM):
        state.sharpness.restore()  # a step that the scaler skipped has left the window open
    state.optimizer.zero_grad()
    return first[0]


def gradients(state: TrainState, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Add the gradient of the mean loss to `p.grad`, micro-batch by micro-batch; returns (logits, mean loss)."""
    smoothing, found = state.config.data_options.label_smoothing, []
    loss = x.new_zeros((), dtype=torch.float32)
    for x_part, y_part in micro_batches(x, y, state.config.batch_size, state.config.optim.accumulate):
        with autocast(state.device, state.config.precision):
            logits = state.model(x_part)
        logits = logits.to(torch.float32, copy=True)  # the memory of a CUDA graph is the next forward's
        part = F.cross_entropy(logits, y_part, label_smoothing=smoothing)
        if len(x_part) < len(x):
            part = part * (len(x_part) / len(x))
        state.scaler.scale(part).backward()
        loss = loss + part.detach()
        found.append(logits.detach())
    return torch.cat(found), loss


def micro_batches(x: Tensor, y: Tensor, batch_size: int, accumulate: int) -> list[tuple[Tensor, Tensor]]:
    """A batch in parts of about batch_size / accumulate images and at least two (BatchNorm cannot train on one).

    >>> [len(part) for part, _ in micro_batches(torch.zeros(65), torch.zeros(65), 128, 4)]
    [22, 22, 21]
    """
    count = -(-len(x) // -(-batch_size // accumulate))
    if len(x) // count < 2:
        count = max(1, len(x) // 2)
    return list(zip(x.tensor_split(count), y.tensor_split(count), strict=True))


def clip(state: TrainState) -> None:
    """Undo the loss scale; then limit the gradient's norm over the active weights.

    SAM's first gradient is clipped like its second: only its direction matters.
    """
    state.scaler.unscale_(state.optimizer)
    limit = state.config.optim.clip_norm
    if limit > 0:
        if state.sparsifier is not None:
            state.sparsifier.mask_gradients()
        torch.nn.utils.clip_grad_norm_(state.model.parameters(), limit)
