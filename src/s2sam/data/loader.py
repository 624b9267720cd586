"""Batches from tensors in memory, in an order that resumes exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from s2sam.tensors import upload

Transform = Callable[[Tensor, torch.Generator], Tensor]


class Batches:
    """One `for x, y in batches` is one epoch: a fresh permutation of all images, cut into batches on their device.

    Permutation and augmentation draw from `generator` alone. :meth:`state_dict` may be taken between any two batches;
    a loader that loads it goes on with the same epoch, bit by bit. An epoch that was left with `break` is not resumed:
    the next `for` starts a new one.

    Args:
        data_x: images (N, C, H, W), kept where they are; move them to the device first.
        data_y: labels (N,) on the same device.
        batch_size: images a batch; the last one is smaller unless `drop_last` (BatchNorm1d cannot train on one image).
        generator: source of all draws; its device may be the CPU or that of the data.
        augment: `augment(x, generator)` for each batch, e.g. :class:`s2sam.data.augment.Augment`; None = as stored.

    Raises:
        ValueError: lengths or devices differ, no batch comes out, or batch_size is no whole number >= 1.

    >>> batches = Batches(torch.arange(5.0), torch.arange(5), 2, torch.Generator().manual_seed(0))
    >>> len(batches), sorted(label for _, y in batches for label in y.tolist())
    (3, [0, 1, 2, 3, 4])
    """

    def __init__(
        self,
        data_x: Tensor,
        data_y: Tensor,
        batch_size: int,
        generator: torch.Generator,
        augment: Transform | None = None,
        drop_last: bool = False,
    ) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")
        if len(data_x) != len(data_y) or data_x.device != data_y.device:
            raise ValueError(
                f"images and labels must match: {len(data_x)} on {data_x.device} and {len(data_y)} on {data_y.device}"
            )
        self.data_x, self.data_y, self.batch_size = data_x, data_y, batch_size
        self.generator, self.augment, self.drop_last = generator, augment, drop_last
        if len(self) == 0:
            raise ValueError(f"{len(data_x)} images make no batch of {batch_size}; lower batch_size")
        self.position = 0  #: batches handed out in the epoch under way
        self._epoch_start: Tensor | None = None  #: generator state before its permutation; None = between epochs
        self._resuming = False

    def __len__(self) -> int:
        n, size = len(self.data_x), self.batch_size
        return n // size if self.drop_last else -(-n // size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = self._permutation()
        while self.position < len(self):
            rows = order[self.position * self.batch_size : (self.position + 1) * self.batch_size]
            x, y = self.data_x[rows], self.data_y[rows]
            if self.augment is not None:
                x = self.augment(x, self.generator)
            self.position += 1
            yield x, y
        self.position, self._epoch_start = 0, None

    def _permutation(self) -> Tensor:
        """The order of the epoch: a new one, or after :meth:`load_state_dict` that of the epoch under way."""
        now = self.generator.get_state()
        if self._resuming and self._epoch_start is not None:
            self.generator.set_state(self._epoch_start)
        else:
            self.position, self._epoch_start = 0, now
        order = torch.randperm(len(self.data_x), generator=self.generator, device=self.generator.device)
        if self._resuming:
            self.generator.set_state(now)
        self._resuming = False
        return upload(order, self.data_x.device)

    def state_dict(self) -> dict[str, Any]:
        """Position, generator states and the sizes they belong to: tensors and numbers only."""
        return {
            "position": self.position,
            "generator": self.generator.get_state(),
            "epoch_start": self._epoch_start,
            "images": len(self.data_x),
            "batch_size": self.batch_size,
            "drop_last": self.drop_last,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            ValueError: it belongs to another number of images or another batch size.
        """
        for key, have in (("images", len(self.data_x)), ("batch_size", self.batch_size), ("drop_last", self.drop_last)):
            if state[key] != have:
                raise ValueError(f"this state was saved with {key}={state[key]}, but the loader has {key}={have}")
        start = state["epoch_start"]
        self.position, self._epoch_start = int(state["position"]), None if start is None else start.cpu()
        self.generator.set_state(state["generator"].cpu())
        self._resuming = self._epoch_start is not None
