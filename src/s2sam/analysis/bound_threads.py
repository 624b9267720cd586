"""One thread of torch where a batch is so little work that several would mostly wait for each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from s2sam.analysis.flops import count_macs

SMALL = 10**8  #: multiply-accumulates of a forward pass, a few milliseconds of one core


@contextmanager
def enough_threads(model: nn.Module, x: Tensor) -> Iterator[int]:
    """Within the block torch has one thread if a forward of the batch `x` takes fewer than SMALL multiply-accumulates.

    Else, and on a GPU, their number stays. Every operation waits for the slowest of its threads; where other processes
    keep the cores busy, that is a wait for the scheduler, at every one of some thousand operations of a batch.

    Args:
        model: left as it is.
        x: images as the model takes them, (N, C, H, W).

    Cost: a forward of one image.

    Example:
        >>> with enough_threads(nn.Linear(3, 2), torch.zeros(8, 3)) as threads:
        ...     threads == torch.get_num_threads()
        True
    """
    before = torch.get_num_threads()
    if x.device.type != "cpu" or before == 1 or len(x) * sum(count_macs(model, x[:1]).values()) >= SMALL:
        yield before
        return
    torch.set_num_threads(1)
    try:
        yield 1
    finally:
        torch.set_num_threads(before)
