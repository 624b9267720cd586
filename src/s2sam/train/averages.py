"""Averages of what training leaves: an exponential moving average of the weights, BatchNorm statistics at the end."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from s2sam.tensors import kinds

BN_BATCHES = 100  #: as many training batches at most re-estimate the statistics


class Ema:
    r"""torch's AveragedModel, kept as sparse as the model it follows.

    .. math:: a_{t+1} = \beta\, a_t + (1 - \beta)\, w_{t+1}

    Buffers (BatchNorm statistics) are averaged like weights. When the masks change, the loop calls the sparsifier's
    `apply_to` on the average; otherwise that of a sparse network would be denser than the network.

    Cost: one copy of the model, one pass over it a step.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._mean = get_ema_multi_avg_fn(decay)
        self.averaged = AveragedModel(model, multi_avg_fn=self._mean, use_buffers=True)

    @property
    def module(self) -> nn.Module:
        """The averaged network."""
        module: nn.Module = self.averaged.module
        return module

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the clean weights after a step.

        What `AveragedModel.update_parameters` does, but for its copy of the count of steps to the device, which waits
        for the device.
        """
        if self.averaged.n_averaged == 0:
            self.averaged.update_parameters(model)
            return
        mean, now = ([*network.parameters(), *network.buffers()] for network in (self.module, model))
        for chosen in kinds(mean):
            self._mean([mean[i] for i in chosen], [now[i] for i in chosen], self.averaged.n_averaged)
        self.averaged.n_averaged += 1


def recalibrated(
    model: nn.Module,
    x: Tensor,
    batch_size: int,
    prepare: Callable[[Tensor, torch.Generator], Tensor],
    generator: torch.Generator,
) -> nn.Module | None:
    """A copy of `model` whose BatchNorm statistics are those of its own weights over up to 100 training batches.

    During training they are collected along the way, with S2SAM at displaced weights. None if there is no BatchNorm.

    Args:
        model: at its clean weights; it is not touched.
        x: training images as stored.
        batch_size: images a batch; a last smaller one is left out.
        prepare: turns stored images into what the model was trained on, augmentation included. Statistics of images
            that are not augmented do not fit: on digits and on 16x16 CIFAR images they cost 3 to 10 points.
        generator: draws the order of the images and their augmentation.
    """
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        return None
    twin = copy.deepcopy(model)

    order = torch.randperm(len(x), generator=generator).to(x.device)

    def batches() -> Iterator[Tensor]:
        for start in range(0, max(1, len(x) - batch_size + 1), batch_size)[:BN_BATCHES]:
            yield prepare(x[order[start : start + batch_size]], generator)

    update_bn(batches(), twin)
    return twin
