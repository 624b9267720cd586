"""What a weight is worth: scores, larger is kept longer. Pure functions that return new tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def magnitude(weight: Tensor) -> Tensor:
    """|w|.

    >>> magnitude(torch.tensor([-2.0, 1.0])).tolist()
    [2.0, 1.0]
    """
    return weight.detach().abs()


def gradient_magnitude(weight: Tensor) -> Tensor:
    """|dL/dw| from `weight.grad`; of micro-batches it is the sum, which ranks as the mean does.

    Raises:
        RuntimeError: the weight has no gradient.
    """
    if weight.grad is None:
        raise RuntimeError("a score by gradient needs weight.grad; run backward() first")
    return weight.grad.detach().abs()


def random(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform on [0, 1), drawn on the CPU so that every device sees the same numbers.

    >>> one = random(torch.zeros(2, 2), torch.Generator().manual_seed(0))
    >>> bool((one == random(torch.ones(2, 2), torch.Generator().manual_seed(0))).all())
    True
    """
    return torch.rand(weight.shape, generator=generator).to(weight.device)
