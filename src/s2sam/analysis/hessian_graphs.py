"""Gradients with their graphs, kept from one product with the Hessian to the next."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

import torch
from torch import Tensor

Gradient = tuple[Tensor, ...]  #: one tensor for each parameter, with its graph
GIB = 1 << 30


class Graphs:
    """The gradient of each batch at one point, with its graph, as far as memory allows.

    A product with the Hessian goes backward through that graph. Where it is kept, a product needs no forward and no
    first backward pass. A point at which only one product is taken keeps nothing.

    Args:
        device: where the graphs are.
        keep: bytes they may take; None = 1 GiB, on CUDA at least a quarter of the free memory.
    """

    def __init__(self, device: torch.device, keep: int | None = None) -> None:
        self.device, self.keep = device, keep
        self.kept: dict[Hashable, Gradient] = {}
        self._point, self._rounds, self._each = -1, 0, 0

    def begin(self, point: int) -> None:
        """A product at this point begins; what was kept at another is let go."""
        if point != self._point:
            self.kept, self._point, self._rounds = {}, point, 0
        self._rounds += 1

    def get(self, key: Hashable, build: Callable[[], Gradient], known: Iterable[Tensor] = ()) -> tuple[Gradient, bool]:
        """The gradient of batch `key`, made by `build` if it is not there, and whether it is kept.

        Args:
            key: of the batch; batches are about equally large.
            build: makes it.
            known: tensors that are in memory anyway.
        """
        if key in self.kept:
            return self.kept[key], True
        if self._rounds < 2 or self.keep == 0:
            return build(), False
        if not self._each:
            self._each = max(1, saved_bytes(build, known))
            self.keep = self._limit() if self.keep is None else self.keep
        fits = (len(self.kept) + 1) * self._each <= (self.keep or 0)
        made = build()
        if fits:
            self.kept[key] = made
        return made, fits

    def _limit(self) -> int:
        free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 0
        return max(GIB, free // 4)


def saved_bytes(build: Callable[[], object], known: Iterable[Tensor] = ()) -> int:
    """How many bytes autograd holds for what `build` makes, but for those of the tensors `known`.

    >>> w = torch.ones(100, requires_grad=True)
    >>> saved_bytes(lambda: (w.exp() * 2).exp()), saved_bytes(lambda: w * w, [w])
    (800, 0)
    """
    seen = {t.untyped_storage().data_ptr() for t in known}
    sizes: list[int] = []

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            sizes.append(storage.nbytes())
        return t.detach()  # the tensor itself could hold the graph that holds it

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        made = build()
    del made  # until here nothing that was counted could be freed, and its place taken by something else
    return sum(sizes)
