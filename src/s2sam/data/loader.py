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
        visits: how often each batch comes in a row, with the same draws; 2 for echo. An epoch has as many batches as
            with 1, so a permutation lasts for `visits` epochs.

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
        visits: int = 1,
    ) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")
        if len(data_x) != len(data_y) or data_x.device != data_y.device:
            raise ValueError(
                f"images and labels must match: {len(data_x)} on {data_x.device} and {len(data_y)} on {data_y.device}"
            )
        self.data_x, self.data_y, self.batch_size = data_x, data_y, batch_size
        self.generator, self.augment, self.drop_last, self.visits = generator, augment, drop_last, visits
        if len(self) == 0:
            raise ValueError(f"{len(data_x)} images make no batch of {batch_size}; lower batch_size")
        self.position = 0  #: batches handed out of the permutation under way, each visit counted
        self._epoch_start: Tensor | None = None  #: generator state before that permutation; None = between two
        self._before: Tensor | None = None  #: generator state before the last first visit
        self._resuming = False
        self._all_out = False  #: the last batch of an epoch has been handed out, and the epoch has not ended

    def __len__(self) -> int:
        n, size = len(self.data_x), self.batch_size
        return n // size if self.drop_last else -(-n // size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = self._permutation()
        ended = self._all_out  # the state that was loaded is that after the last batch of an epoch
        while not ended:
            batch, visit = divmod(self.position, self.visits)
            if self.visits > 1 and visit == 0:
                self._before = self.generator.get_state()
            elif visit > 0 and self._before is not None:
                self.generator.set_state(self._before)
            rows = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            x, y = self.data_x[rows], self.data_y[rows]
            if self.augment is not None:
                x = self.augment(x, self.generator)
            self.position += 1
            ended = self._all_out = self.position % len(self) == 0
            yield x, y
        self._all_out = False
        self._resuming = self.position < self.visits * len(self)  # the next epoch goes on with this permutation
        if not self._resuming:
            self.position, self._epoch_start, self._before = 0, None, None

    def restart(self, state: Tensor) -> None:
        """Begin anew, with the generator in this state."""
        self.generator.set_state(state)
        self.position, self._epoch_start, self._before = 0, None, None
        self._resuming = self._all_out = False

    def _permutation(self) -> Tensor:
        """The order of the epoch: a new one, or after :meth:`load_state_dict` that of the epoch under way."""
        now = self.generator.get_state()
        if self._resuming and self._epoch_start is not None:
            self.generator.set_state(self._epoch_start)
        else:
            self.position, self._epoch_start, self._all_out = 0, now, False
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
            "before": self._before,
            "all_out": self._all_out,
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
        before = state.get("before")  # not in older states, which had one visit
        self._before = None if before is None else before.cpu()
        self._all_out = bool(state.get("all_out", self.position == len(self)))
        self.generator.set_state(state["generator"].cpu())
        self._resuming = self._epoch_start is not None
