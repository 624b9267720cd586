r"""The training loss on fixed batches as a function of a network's weights, and what batches tell of it.

.. math::
    F(w) = \frac1m \sum_b f_b(w)

f_b is the mean loss over the images of batch b, with that batch's statistics in BatchNorm. The batches are cut once, so
F is one function, whatever the running statistics, and a sum of m parts, as the theorem has it. Weight decay is left
out; :mod:`s2sam.analysis.bound_probe` adds it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Losses = Callable[[Tensor, Tensor], Tensor]  #: (outputs, targets) of a batch -> the loss of each example


def cross_entropy(smoothing: float = 0.0) -> Losses:
    """That of each image, in nats.

    >>> cross_entropy()(torch.zeros(1, 2), torch.tensor([1]))
    tensor([0.6931])
    """
    return partial(F.cross_entropy, reduction="none", label_smoothing=smoothing)


@dataclass(frozen=True, eq=False)
class Look:
    """F at one point."""

    loss: float  #: F
    gradient: Tensor  #: of F on the active weights, 0 elsewhere; flat
    variance: float  #: E||grad f_b - grad F||^2 over batches, estimated without bias from those there are
    largest: float  #: max ||grad f_b||
    losses: Tensor  #: of each image, (m, b)

    @property
    def norm(self) -> float:
        """||grad F||."""
        return length(self.gradient)


class Objective:
    """F for a network; the network itself is never touched.

    Args:
        model: whose copy is looked at; copies carry no hooks.
        batches: at least two, of equal size: inputs as the model takes them, and targets.
        losses: of each example of a batch.

    Raises:
        ValueError: fewer than two batches, or of different sizes.

    Cost: a copy of the model; a look is forward and backward of all batches and two vectors of the size of the model.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> batches = [(torch.tensor([[1.0]]), torch.zeros(1, 1)), (torch.tensor([[3.0]]), torch.zeros(1, 1))]
        >>> half_square = lambda out, y: 0.5 * ((out - y) ** 2).sum(1)
        >>> look = Objective(model, batches, half_square).look(torch.tensor([2.0]), torch.tensor([True]))
        >>> look.loss, look.gradient.tolist(), look.variance, look.largest     # f_b = w^2/2 and 9 w^2/2
        (10.0, [10.0], 128.0, 18.0)
    """

    def __init__(
        self, model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], losses: Losses | None = None
    ) -> None:
        if len(batches) < 2 or len({len(x) for x, _ in batches}) > 1:
            raise ValueError("the variance of a batch needs at least two batches, all of one size")
        self.twin = copy.deepcopy(model).eval()
        for module in self.twin.modules():
            if isinstance(module, _BatchNorm):
                module.train()
        self.batches, self.losses = batches, losses or cross_entropy()
        self.parameters = [p for p in self.twin.parameters() if p.requires_grad]

    @property
    def images(self) -> int:
        """In all batches."""
        return sum(len(x) for x, _ in self.batches)

    def look(self, w: Tensor, active: Tensor) -> Look:
        """F at `w`, flat as :func:`flat` gives it; `active` is True where a weight is."""
        self._move(w)
        total, mask = torch.zeros_like(w), active.to(w.dtype)
        squares: list[float] = []
        found: list[Tensor] = []
        for x, y in self.batches:
            losses = self.losses(self.twin(x), y)
            gradient = self._gradient(losses.mean(), mask)
            total += gradient
            squares.append(length(gradient) ** 2)
            found.append(losses.detach())
        count = len(self.batches)
        gradient = total / count
        spread = sum(squares) - count * length(gradient) ** 2
        losses = torch.stack(found)
        loss = float(losses.double().mean())
        return Look(loss, gradient, max(0.0, spread / (count - 1)), max(squares) ** 0.5, losses)

    def largest_example(self, w: Tensor, active: Tensor, losses: Tensor, count: int) -> float:
        """max ||grad f_i|| over the `count` images with the largest `losses`, each within its batch.

        Cost: a forward of each batch they are in and a backward for each of them.
        """
        self._move(w)
        size, largest, mask = losses.shape[1], 0.0, active.to(w.dtype)
        worst = losses.flatten().argsort(descending=True, stable=True)[:count].tolist()
        for b in sorted({i // size for i in worst}):
            x, y = self.batches[b]
            here = self.losses(self.twin(x), y)
            for i in (i % size for i in worst if i // size == b):
                largest = max(largest, length(self._gradient(here[i], mask, again=True)))
        return largest

    @torch.no_grad()
    def _move(self, w: Tensor) -> None:
        torch.nn.utils.vector_to_parameters(w, self.parameters)

    def _gradient(self, loss: Tensor, mask: Tensor, *, again: bool = False) -> Tensor:
        found = torch.autograd.grad(
            loss, self.parameters, allow_unused=True, materialize_grads=True, retain_graph=again or None
        )
        return flat(found).mul_(mask)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All entries in one vector, without history.

    >>> flat([torch.zeros(2, 1), torch.ones(1)])
    tensor([0., 0., 1.])
    """
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def length(v: Tensor) -> float:
    """||v||, summed in float64."""
    return float(torch.linalg.vector_norm(v, dtype=torch.float64))
