"""One optimizer's share of S2SAM: its buffers, its window, and what goes into its state_dict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from s2sam.hooks import check_number
from s2sam.sam.displacement import Scale, Twin, choose_, copy_unless_, displace_, restore_, swap_
from s2sam.sam.norms import constant

KEY = "s2sam_buffer"  #: name of the buffer b in optimizer.state[p]
STEP, TWINS = "s2sam_step", "s2sam_twins"  #: what param_groups[0] of a state_dict holds besides
MOMENTUM_KEYS = ("momentum_buffer", "exp_avg")


@dataclass
class Block:
    """Parameters of one rho, device and dtype, with their buffers b and directions d (`d is b` for gradients).

    `ratio` is this rho over the one that the twins were made with.
    """

    rho: float
    twin: Twin
    ratio: float
    p: list[Tensor] = field(default_factory=list)
    b: list[Tensor] = field(default_factory=list)
    d: list[Tensor] = field(default_factory=list)

    @property
    def own(self) -> bool:
        """True if the direction lives in the buffer itself, so that a window uses it up."""
        return self.d is self.b


class Slot:
    """Buffers and window of one optimizer. `step` counts finished steps."""

    def __init__(self, optimizer: Optimizer, *, momentum: bool, factor: Callable[[int], float] | None) -> None:
        self.optimizer, self.momentum, self.factor = optimizer, momentum, factor
        self.step = 0
        self.open = False  #: between displace and restore
        self.fresh = False  #: a displaced forward or displace() happened since the last step
        self.blocks: list[Block] = []  #: what is displaced while open
        self.twins: dict[int, float] = {}  #: ids of the parameters whose buffer holds x, and the rho it was made with ...
        self.flag: Tensor | None = None  #: ... if this is 1 (None: they do)
        self.loaded = False  #: the twins come from a checkpoint, whose weights may be loaded after them

    def rho(self, group: dict[str, Any]) -> float:
        """rho of a group for the coming step: group["rho"] times the schedule's factor; ValueError if unusable."""
        rho = check_number("rho", group["rho"])
        return rho if self.factor is None else rho * check_number(f"rho({self.step})", self.factor(self.step))

    def buffer(self, p: Tensor) -> Tensor | None:
        """The buffer of `p` if it has one, moved to where `p` is now."""
        state = self.optimizer.state.get(p)
        b: Tensor | None = state.get(KEY) if state else None
        if b is not None and (b.device != p.device or b.dtype != p.dtype):
            b = self.optimizer.state[p][KEY] = b.to(p.device, p.dtype)
        return b

    def displaceable(self) -> list[Block]:
        """The parameters with a direction and rho > 0, in blocks."""
        blocks: dict[Any, Block] = {}
        for group in self.optimizer.param_groups:
            rho = self.rho(group)
            for p in group["params"] if rho > 0 else ():
                b = self.buffer(p)
                if b is None:
                    continue
                twin: Twin = id(p) in self.twins
                ratio = rho / self.twins[id(p)] if twin else 1.0
                key = (rho, p.device, p.dtype, twin, ratio)
                if key not in blocks:
                    blocks[key] = Block(rho, self.flag if twin and self.flag is not None else twin, ratio)
                    if not self.momentum:
                        blocks[key].d = blocks[key].b
                block = blocks[key]
                block.p.append(p)
                block.b.append(b)
                if self.momentum:
                    block.d.append(self.momentum_of(p))
        return list(blocks.values())

    def momentum_of(self, p: Tensor) -> Tensor:
        """The base optimizer's momentum buffer of `p`."""
        state = self.optimizer.state[p]
        momentum: Tensor = next(state[key] for key in MOMENTUM_KEYS if state.get(key) is not None)
        return momentum

    @torch.no_grad()
    def displace(self, blocks: list[Block], coefficients: dict[int, Tensor], scale: Scale) -> None:
        """Open the window: w -> x, with e = c |w|^power d and c by id(block)."""
        for block in blocks:
            c = coefficients[id(block)]
            if block.twin is True and block.ratio == 1:
                swap_(block.p, block.b)
            elif block.twin is False:
                displace_(block.p, block.b, block.d, c, scale)
            else:
                twin = constant(1.0, c.device, c.dtype) if block.twin is True else block.twin
                choose_(block.p, block.b, block.d, c, scale, twin, block.ratio)
        self.blocks, self.open = blocks, True
        self.twins.clear()
        self.flag, self.loaded = None, False

    @torch.no_grad()
    def restore(self, *, keep: bool) -> None:
        """Close the window: x -> w. With `keep`, buffers keep x, so that the next window opens at the same x."""
        for block in self.blocks:
            if keep and block.own:
                swap_(block.p, block.b)
                self.twins.update((id(p), block.rho) for p in block.p)
            else:
                restore_(block.p, block.b)
        self.blocks, self.open = [], False

    @torch.no_grad()
    def peek(self) -> None:
        """Show w for a moment, and x again at the second call.

        Works on `.data`, so a graph that waits for its backward meanwhile does not take this for a change of weights.
        """
        for block in self.blocks:
            swap_([p.data for p in block.p], block.b)

    @torch.no_grad()
    def store(self, *, found_inf: Tensor | None, may_create: bool) -> None:
        """After the base step: b <- gradient (0 where there is none), or nothing where `found_inf` is 1."""
        buffers, gradients, gone = [], [], []
        for p in self.parameters():
            b = self.buffer(p)
            if p.grad is None:
                if b is not None:
                    gone.append(b)
                    self.twins.pop(id(p), None)
                continue
            if b is None:
                if not may_create and not self.optimizer.state.get(p):
                    continue  # the base optimizer sets up its state when this is still empty
                b = self.optimizer.state[p][KEY] = torch.zeros_like(p, requires_grad=False)
            buffers.append(b)
            gradients.append(p.grad)
        if not self.momentum:
            if gone:
                torch._foreach_zero_(gone)
            if buffers and found_inf is None:
                torch._foreach_copy_(buffers, gradients)
            elif buffers and found_inf is not None:
                copy_unless_(buffers, gradients, found_inf)
        if found_inf is None or not self.twins:
            self.twins.clear()
            self.flag = None
        else:
            self.flag = found_inf if self.flag is None else self.flag * found_inf

    def drop_twins(self) -> None:
        """Forget what belongs to weights that were replaced: these parameters are not displaced for one step."""
        for p in self.parameters():
            if id(p) in self.twins and (b := self.buffer(p)) is not None:
                b.zero_()
        self.twins.clear()
        self.flag = None

    def parameters(self) -> list[Tensor]:
        """All parameters of the optimizer."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def save(self, state_dict: dict[str, Any], *, peeking: bool) -> None:
        """Put the step count, and copies of the x that restores an open window, into a state_dict just made."""
        twins = dict(self.twins) if self.flag is None or bool(self.flag) else {}
        x = {id(p): block.rho for block in self.blocks if block.own for p in block.p}
        twins.update(x)
        saved = []
        for index, p in enumerate(self.parameters()):
            if id(p) in twins:
                saved.append([index, twins[id(p)]])
                if id(p) in x and not peeking:
                    entry = state_dict["state"][index]
                    state_dict["state"][index] = {**entry, KEY: p.detach().clone()}
        state_dict["param_groups"][0].update({STEP: self.step, TWINS: saved})

    def load(self) -> None:
        """Take back what :meth:`save` wrote, after the optimizer has loaded a state_dict (ours or a plain one)."""
        first = self.optimizer.param_groups[0]
        self.step = int(first.pop(STEP, 0))
        parameters = self.parameters()
        self.twins = {id(parameters[int(i)]): float(rho) for i, rho in first.pop(TWINS, [])}
        self.flag, self.loaded, self.fresh = None, bool(self.twins), False
