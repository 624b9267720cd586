"""Count what an optimizer step asks of the device: calls, bytes, host syncs, kept memory, forward and backward passes.

Counting rule. A *call* is one aten operator that reaches the dispatcher below autograd, views and allocations
included; a foreach or fused operator is one call. The *bytes* of a call are the bytes of every tensor it reads plus
the bytes of every tensor it writes: an argument written in place counts as read and written, except where the operator
overwrites it without reading it (copy_, fill_, zero_); a fresh result counts as written. Views, allocations without a
fill and the gradients that a fused optimizer step only writes when it unscales them move nothing, and a fused kernel
whose `found_inf` is 1 reads that flag and nothing else. 0-dim tensors count with their own few bytes. A *host sync* is
`aten._local_scalar_dense`, the operator behind `.item()` and `bool(tensor)`.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

OVERWRITERS = ("copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_", "_foreach_fill_")
ALLOCATORS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
SYNC = "_local_scalar_dense"


class OpCounter(TorchDispatchMode):
    """Count calls, bytes and host syncs of the code inside the `with` block.

    >>> a = torch.ones(10)
    >>> with OpCounter() as counter:
    ...     _ = a.add_(1)                       # reads and writes 40 bytes
    >>> counter.calls, counter.bytes, counter.syncs
    (1, 80, 0)
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()
        self.bytes = 0

    @property
    def calls(self) -> int:
        """All calls so far."""
        return sum(self.by_name.values())

    @property
    def syncs(self) -> int:
        """Calls that made the host wait for a number."""
        return self.by_name[SYNC]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count it."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        self.by_name[name] += 1
        self.bytes += _moved(func._schema, name, args, kwargs, out)
        return out


def _moved(schema: Any, name: str, args: Any, kwargs: Any, out: Any) -> int:
    aliases = [r.alias_info for r in schema.returns]
    if name in ALLOCATORS or any(a is not None and not a.is_write for a in aliases):
        return 0
    found_inf = kwargs.get("found_inf")
    if name.startswith("_fused_") and found_inf is not None and bool(found_inf):
        return nbytes(found_inf)
    total = 0
    for position, argument in enumerate(schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        size = sum(map(nbytes, _tensors(value)))
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written and name.startswith("_fused_") and argument.name == "grads" and kwargs.get("grad_scale") is None:
            written = False
        total += size * (written + (not (written and name in OVERWRITERS)))
    if all(a is None for a in aliases):
        total += sum(map(nbytes, _tensors(out)))
    return total


def nbytes(t: Tensor) -> int:
    """Bytes of the entries of `t`."""
    return t.numel() * t.element_size()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def live_bytes() -> int:
    """Bytes of all storages that Python objects keep alive, each counted once."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), Tensor)]
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors if t.layout == torch.strided)}
    return sum(storages.values())


def count_passes(model: nn.Module, step: Callable[[], object]) -> tuple[int, int]:
    """Forwards of `model` and backwards through its output (one tensor) during `step()`."""
    seen: Counter[str] = Counter()

    def forward(_module: nn.Module, _args: Any, out: Tensor) -> None:
        seen["forward"] += 1
        if out.requires_grad:
            out.register_hook(lambda _: seen.update(["backward"]))

    handle = model.register_forward_hook(forward)
    try:
        step()
    finally:
        handle.remove()
    return seen["forward"], seen["backward"]
