"""What a window is made of: blocks of parameters that move together, and the twins that a window leaves behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from s2sam.sam.norms import total_norm
from s2sam.sam.scales import Scale, fixed
from s2sam.sam.sharded import shard, weights_move


class Flag:
    """A skipped step (1) or not (0), as a 0-dim float on the device; its opposite; and not finite (or 0)."""

    def __init__(self, found_inf: Tensor, poison: Tensor | None = None) -> None:
        self.set, self.clear = found_inf, 1 - found_inf
        self._poison = poison

    @property
    def poison(self) -> Tensor:
        """A number that makes what it is added to not finite if the step was skipped, and changes nothing else."""
        return self.set / self.clear if self._poison is None else self._poison


@dataclass
class Twin:
    """The buffer of a parameter holds x, made with this radius and coefficient c (None: only the device knows it)."""

    rho: float
    c: Tensor | None
    version: int | None  #: of the weights it belongs to; None = loaded, and the weights may be loaded after it
    flag: Flag | None = None  #: it does so if this says so; None = it does


@dataclass
class Block:
    """Parameters of one radius, device and dtype, with their buffers b and directions d (`d is b` if it lives there).

    `twin` says whether b holds x, `ratio` is this radius over the one that x was made with. p, b and d may be DTensors;
    what moves weights takes :meth:`lists`.
    """

    rho: float
    twin: bool | Flag = False
    ratio: float = 1.0
    c: Tensor | None = None
    p: list[Tensor] = field(default_factory=list)
    b: list[Tensor] = field(default_factory=list)
    d: list[Tensor] = field(default_factory=list)
    sharded: bool = False  #: some of p are DTensors

    @property
    def own(self) -> bool:
        """True if the direction lives in the buffer itself, so that a window uses it up."""
        return self.d is self.b

    def lists(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """p, b and d, or of DTensors this rank's shards, to change in place."""
        if not self.sharded:
            return self.p, self.b, self.d
        p, b, d = ([shard(t) for t in tensors] for tensors in (self.p, self.b, self.d))
        return p, b, d

    def moves(self, *, for_a_look: bool = False) -> None:
        """To be called when the weights move: others who hold something made of DTensors learn of it."""
        if self.sharded:
            weights_move(self.p, for_a_look=for_a_look)

    @torch.no_grad()
    def untwin(self, scale: Scale) -> None:
        """b: x -> d = (x - w) / (c |w|^power), to within rounding, so that a new common norm can apply to it."""
        assert self.c is not None
        w, b, _ = self.lists()
        d = list(torch._foreach_div(torch._foreach_sub(b, w), self.c))
        if scale.power:
            squares = scale.shaped([torch.ones_like(t) for t in w], w)
            d = [t.nan_to_num_(0.0, 0.0, 0.0) for t in torch._foreach_div(d, squares)]  # at w = 0 nothing moves
        torch._foreach_copy_(b, d)
        self.twin, self.ratio = False, 1.0


def coefficients(blocks: Sequence[Block], scale: Scale, sign: int) -> dict[int, Tensor]:
    """The c of e = c shaped(d, w) by id(block), from one norm (or none) over all blocks but the certain twins."""
    new = [block for block in blocks if block.twin is not True]
    if not new or not scale.common:
        return {id(block): fixed(sign * block.rho, block.p[0]) for block in new}
    norms = [scale.direction_norm(block.d, block.p) for block in new]
    if len(new) > 1:
        norms = [
            n * block.twin.clear if isinstance(block.twin, Flag) else n for n, block in zip(norms, new, strict=True)
        ]
    d_norm = norms[0] if len(new) == 1 else total_norm(norms, floor=True)
    unit = scale.unit([p for block in new for p in block.p])
    return {id(k): scale.coefficient(sign * k.rho, d_norm, unit).to(k.p[0].device) for k in new}
