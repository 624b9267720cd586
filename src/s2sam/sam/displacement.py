"""The displacement e and the two exact moves w -> x = w + e and x -> w, on lists of tensors.

A parameter has one extra buffer b. Between windows p = w and b holds the direction d; inside a window p = x and b = w:
the weights are copied back, never recomputed as (w + e) - e, so they return bit for bit in any dtype. If a window ends
without a new direction (a skipped step, `restore()`), p and b are swapped: b then holds the *twin* x, and the next
window opens by swapping again, at exactly the same x.

Cost per opened and closed window, in bytes per fp32 parameter: displace 28 + restore 8 (swap 24).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from s2sam.tensors import kinds

if TYPE_CHECKING:
    from s2sam.sam.scales import Scale

SCRATCH_BYTES = 24 << 20  #: moves work through at most this much scratch memory (twice that where two are alive)


def pieces(*lists: list[Tensor]) -> Iterator[tuple[list[Tensor], ...]]:
    """Cut parallel lists into runs whose first list has at most SCRATCH_BYTES, splitting large tensors by rows."""
    run: list[tuple[Tensor, ...]] = []
    room = SCRATCH_BYTES
    for tensors in zip(*lists, strict=True):
        size = tensors[0].numel() * tensors[0].element_size()
        if size > SCRATCH_BYTES and tensors[0].dim() > 0 and tensors[0].shape[0] > 1:
            rows = max(1, tensors[0].shape[0] * SCRATCH_BYTES // size)
            for part in zip(*(t.split(rows) for t in tensors), strict=True):
                yield tuple([t] for t in part)
            continue
        if run and size > room:
            yield tuple(map(list, zip(*run, strict=True)))
            run, room = [], SCRATCH_BYTES
        run.append(tensors)
        room -= size
    if run:
        yield tuple(map(list, zip(*run, strict=True)))


def displace_(p: list[Tensor], b: list[Tensor], d: list[Tensor], c: Tensor, scale: Scale) -> None:
    """p: w -> w + c shaped(d, w); b: -> w. `d` may be `b` itself."""
    for w, keep, direction in pieces(p, b, d):
        e = torch._foreach_mul(scale.shaped(direction, w), c)
        torch._foreach_copy_(keep, w)
        torch._foreach_add_(w, e)


def choose_(
    p: list[Tensor],
    b: list[Tensor],
    d: list[Tensor],
    c: Tensor,
    scale: Scale,
    twin: Tensor,
    fresh: Tensor,
    ratio: float = 1.0,
) -> None:
    """:func:`displace_` where `twin` is 0; where it is 1, p: w -> w + ratio (x - w) and b: x -> w.

    `fresh` is 1 - twin. It does not ask the host which; with ratio = 1 the second case is :func:`swap_`. Cost: as
    displace_, if twin is 0.
    """
    kept = twin if ratio == 1 else twin.to(c.dtype) * ratio
    for w, keep, direction in pieces(p, b, d):
        if scale.plain:
            e = torch._foreach_mul(direction, torch.addcmul(kept, c, fresh))
        else:
            e = torch._foreach_mul(scale.shaped(direction, w), c * fresh)
            torch._foreach_add_(e, torch._foreach_mul(keep, kept))
        torch._foreach_copy_(keep, w)
        torch._foreach_add_(w, e)
        if ratio != 1:
            e = torch._foreach_add(e, torch._foreach_mul(keep, 1 - ratio))
        copy_unless_(w, list(e), fresh)


def restore_(p: list[Tensor], b: list[Tensor]) -> None:
    """p: x -> w, exactly."""
    torch._foreach_copy_(p, b)


def swap_(p: list[Tensor], b: list[Tensor]) -> None:
    """Exchange the contents of p and b, exactly; the storages stay where they are."""
    for one, other in pieces(p, b):
        scratch = torch._foreach_mul(one, 1)  # the cheapest exact copy of a list: one call
        torch._foreach_copy_(one, other)
        torch._foreach_copy_(other, scratch)


def reopen_(p: list[Tensor], b: list[Tensor], ratio: float) -> None:
    """p: w -> w + ratio (x - w); b: x -> w."""
    for w, keep in pieces(p, b):
        e = torch._foreach_mul(torch._foreach_sub(keep, w), ratio)
        torch._foreach_copy_(keep, w)
        torch._foreach_add_(w, e)


def copy_unless_(b: list[Tensor], g: list[Tensor], flag: Tensor, *, keep: float = 0.0) -> None:
    """b <- keep b + (1 - keep) g where `flag` is 0, nothing where it is 1, without asking the host.

    torch's fused SGD kernel does nothing at all, and reads nothing but the flag, if `found_inf` is 1; its momentum
    buffer is this mean, or in its first step the gradient. The parameters it moves are g, by lr = 0.
    Cost: 16 bytes (20 with `keep`), or none.
    """
    for chosen in kinds(g):  # the kernel takes one device and dtype
        part = [g[i] for i in chosen]
        torch._fused_sgd_(
            part,
            part,
            [b[i] for i in chosen],
            weight_decay=0.0,
            momentum=keep or 1.0,
            lr=0.0,
            dampening=keep,
            nesterov=False,
            maximize=False,
            is_first_step=keep == 0,
            grad_scale=None,
            found_inf=flag.to(part[0].device),
        )
