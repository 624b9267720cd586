"""Looks at the clean weights inside an open window: evaluation forwards, and `with sam.clean():`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from s2sam.private_torch import computing
from s2sam.sam.sharded import storage
from s2sam.sam.slot import Slot


class Looks:
    """The forwards under way. While one of them is a clean one, the weights are w; afterwards they are x again.

    A graph built during a look outlives it: what it saves of the weights is copied, so that its backward still sees w.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._slots = slots
        self._under_way: list[tuple[nn.Module | None, bool]] = []
        self._saving: Any = None

    @property
    def clean(self) -> bool:
        """True while somebody looks."""
        return any(clean for _, clean in self._under_way)

    def enter(self, module: nn.Module | None, clean: bool) -> None:
        """A forward begins, or (module None) a `with clean():`."""
        if not clean and module is not None and any(m is module for m, is_clean in self._under_way if is_clean):
            self.end()  # that look was interrupted, by Ctrl-C for instance, and never left
        first = clean and not self.clean
        self._under_way.append((module, clean))
        if first:
            self._swap()
            if any(slot.blocks for slot in self._slots):
                self._saving = torch.autograd.graph.saved_tensors_hooks(self._save, lambda t: t)
                self._saving.__enter__()

    def leave(self) -> None:
        """It ends."""
        if self._under_way and self._under_way.pop()[1] and not self.clean:
            self._end_look()

    def end(self) -> None:
        """End all of them."""
        if self.clean:
            self._end_look()
        self._under_way.clear()

    def _end_look(self) -> None:
        if self._saving is not None:
            self._saving.__exit__(None, None, None)
            self._saving = None
        self._swap()

    def _swap(self) -> None:
        with computing():
            for slot in self._slots:
                slot.peek()

    def _save(self, saved: Tensor) -> Tensor:
        """Copy what shares its storage with a displaced parameter."""
        address = storage(saved)
        ours = (t for slot in self._slots for t in slot.shown())
        return saved.clone() if any(storage(t) == address for t in ours) else saved
