"""Where the direction d comes from: a difference of a few lines each."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from s2sam.sam.blocks import Flag
from s2sam.sam.displacement import copy_unless_, pieces
from s2sam.tensors import by_kind

KEY = "s2sam_buffer"  #: name of the buffer b in optimizer.state[p]
EMA, SEED = "s2sam_ema", "s2sam_seed"  #: what "ema" keeps in optimizer.state[p], and "random" in param_groups[0]
MOMENTUM_KEYS = ("momentum_buffer", "exp_avg")


@dataclass
class Row:
    """A parameter in scope, its place among those of the optimizer, its buffers; its gradient is `p.grad`."""

    index: int
    p: Tensor
    b: Tensor
    state: dict[str, Any]

    @property
    def g(self) -> Tensor:
        """The gradient."""
        assert self.p.grad is not None
        return self.p.grad


@dataclass
class News:
    """What a step has left to make the next direction of.

    If `flag` is set, which only the device knows, the step was skipped: then the gradients of `plain` hold x, which
    their buffers must take, and the buffers of `conditional` must stay what they are.
    """

    group: dict[str, Any]  #: param_groups[0]
    step: int
    flag: Flag | None
    plain: list[Row] = field(default_factory=list)
    conditional: list[Row] = field(default_factory=list)
    gone: list[Row] = field(default_factory=list)  #: parameters that got no gradient


class Gradient:
    """d = g_{t-1}, in b itself; 0 where there was no gradient. No further buffer, 8 bytes per parameter."""

    own = True  #: d lives in b, so that a window uses it up

    def check(self, optimizer: Optimizer) -> None:
        """Raise ValueError if this optimizer has no such direction."""

    def set_up(self, group: dict[str, Any]) -> None:
        """Put what must be in param_groups[0] there, unless a checkpoint has."""

    def of(self, p: Tensor, b: Tensor, state: dict[str, Any]) -> Tensor | None:
        """d of a parameter."""
        return b

    def store(self, news: News) -> None:
        """After the base step: the direction of the next window."""
        flag = news.flag
        if news.plain:
            self._write(news)
        gone = [row.b for row in news.gone]
        if gone and flag is None:
            torch._foreach_zero_(gone)
        if flag is not None:
            for b in gone:
                b.mul_(flag.set.to(b.device))
            if news.conditional:
                copy_unless_([row.b for row in news.conditional], self._fresh(news), flag.set)
            # what passed through the gradients was x if the step was skipped: let nobody take it for one
            for part in by_kind(row.g for row in news.plain):
                torch.ops.aten._foreach_add_.Tensor(part, flag.poison.to(part[0].device))  # no host read

    def _write(self, news: News) -> None:
        """b <- direction, or x if skipped, for the plain ones."""
        torch._foreach_copy_([row.b for row in news.plain], [row.g for row in news.plain])

    def _fresh(self, news: News) -> list[Tensor]:
        """The directions of the conditional ones."""
        return [row.g for row in news.conditional]


class Random(Gradient):
    r"""d ~ N(0, 1) on active coordinates, new in every step, in b itself: the control of equal norm.

    A coordinate is active if its gradient or its weight is not 0: pruned ones have neither, just-regrown ones have a
    gradient. The draw for a parameter is a function of (seed, step, place of the parameter), so nothing but the seed
    needs saving, and whatever happens to the other parameters does not move it. The seed is drawn from the generator,
    is rank 0's on all ranks, and is kept in `param_groups[0]["s2sam_seed"]`.

    Cost: no further buffer; a draw per parameter and about 40 bytes. In a fused step that closes no window (rho = 0)
    one copy of the parameters for a moment.
    """

    def __init__(self, generator: torch.Generator | None) -> None:
        if generator is None:
            generator = torch.Generator().manual_seed(torch.initial_seed())
        seed = [_draw(generator)]
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.broadcast_object_list(seed, src=0)
        self._seeds = torch.Generator().manual_seed(seed[0])
        self._generators: dict[torch.device, torch.Generator] = {}

    def set_up(self, group: dict[str, Any]) -> None:
        """Draw the seed of an optimizer."""
        if SEED not in group:
            group[SEED] = _draw(self._seeds)

    def _write(self, news: News) -> None:
        self._draw(news, news.plain, [row.b for row in news.plain])
        if news.flag is not None:
            copy_unless_([row.b for row in news.plain], [row.g for row in news.plain], news.flag.clear)

    def _fresh(self, news: News) -> list[Tensor]:
        out = [torch.empty_like(row.b) for row in news.conditional]
        self._draw(news, news.conditional, out)
        return out

    def _draw(self, news: News, rows: list[Row], out: list[Tensor]) -> None:
        for row, noise in zip(rows, out, strict=True):
            if noise.device not in self._generators:
                self._generators[noise.device] = torch.Generator(noise.device)
            generator = self._generators[noise.device].manual_seed(noise_seed(news.group[SEED], news.step, row.index))
            noise.normal_(generator=generator)
        for noise_part, g, w in pieces(out, [row.g for row in rows], [row.p for row in rows]):
            active = torch._foreach_abs(g)
            torch._foreach_add_(active, torch._foreach_abs(w))
            torch._foreach_sign_(active)
            torch._foreach_mul_(noise_part, active)


class Momentum(Gradient):
    """d = the base optimizer's momentum buffer (SGD's contains coupled weight decay); b only holds w in a window."""

    own = False

    def check(self, optimizer: Optimizer) -> None:
        """Raise ValueError if a group has no momentum."""
        for group in optimizer.param_groups:
            if not (group.get("momentum", 0) > 0 or any(group.get("betas", (0,)))):
                name = type(optimizer).__name__
                raise ValueError(f"direction='momentum' needs an optimizer with momentum, and this {name} has none")

    def of(self, p: Tensor, b: Tensor, state: dict[str, Any]) -> Tensor:
        """The buffer. Raises ValueError if the optimizer keeps none."""
        for key in MOMENTUM_KEYS:
            momentum: Tensor | None = state.get(key)
            if momentum is not None:
                return momentum
        raise ValueError("direction='momentum' needs momentum in every param_group, and one has none")

    def store(self, news: News) -> None:
        """The base step has done it."""


class Ema(Gradient):
    r"""d_t = beta d_{t-1} + (1 - beta) g_t, from d = 0, without weight decay; b only holds w in a window.

    There is no bias correction: it would multiply d by a number, which the scales cancel, all but "step", under which
    the first windows are shorter by 1 - beta^t. A missing gradient counts as 0, a skipped step does not count.

    Cost: a second buffer per parameter, `optimizer.state[p]["s2sam_ema"]`, and 12 bytes (fused: 20).
    """

    own = False

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def of(self, p: Tensor, b: Tensor, state: dict[str, Any]) -> Tensor | None:
        """The mean, or None before its first gradient."""
        return where_it_is(p, state, EMA)

    def store(self, news: News) -> None:
        """One more gradient."""
        rows, beta, flag = news.plain + news.conditional, self.beta, news.flag
        means, gone = ([self._mean(row) for row in part] for part in (rows, news.gone))
        if rows and flag is None:
            torch._foreach_lerp_(means, [row.g for row in rows], 1 - beta)
        elif rows and flag is not None:
            copy_unless_(means, [row.g for row in rows], flag.set, keep=beta)
        for mean in gone:
            mean.mul_(beta if flag is None else (1 - (1 - beta) * flag.clear).to(mean.device))

    def _mean(self, row: Row) -> Tensor:
        if row.state.get(EMA) is None:
            row.state[EMA] = torch.zeros_like(row.p, requires_grad=False)
        mean = where_it_is(row.p, row.state, EMA)
        assert mean is not None
        return mean


DIRECTIONS = ("gradient", "momentum", "ema", "random")


def make_direction(name: str, *, ema_beta: float, generator: torch.Generator | None) -> Gradient:
    """The direction called `name`; the options of the others are without effect."""
    if name == "ema":
        return Ema(ema_beta)
    if name == "random":
        return Random(generator)
    return Momentum() if name == "momentum" else Gradient()


def where_it_is(p: Tensor, state: dict[str, Any] | None, key: str) -> Tensor | None:
    """A tensor of a parameter's state, moved to where the parameter is now; None if there is none."""
    t: Tensor | None = state.get(key) if state else None
    if t is not None and state is not None and (t.device != p.device or t.dtype != p.dtype):
        t = state[key] = t.to(p.device, p.dtype)
    return t


def noise_seed(seed: int, step: int, index: int) -> int:
    """The seed of one draw: that of parameter `index` of an optimizer after its step `step` (counted from 0)."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{index}".encode()).digest()[:8], "little") >> 1


def _draw(generator: torch.Generator) -> int:
    return int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
