"""Where the direction d comes from: a difference of a few lines each."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from s2sam.sam.blocks import Flag
from s2sam.sam.displacement import SCRATCH_BYTES, copy_unless_, pieces
from s2sam.sam.sharded import is_sharded, local, shard_like
from s2sam.tensors import alike, by_kind

KEY = "s2sam_buffer"  #: name of the buffer b in optimizer.state[p]
EMA, SEED = "s2sam_ema", "s2sam_seed"  #: what "ema" keeps in optimizer.state[p], and "random" in param_groups[0]
DRAW_BYTES = SCRATCH_BYTES // 2  #: of noise drawn at once
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
    members: dict[int, Tensor] = field(default_factory=dict)  #: all parameters in scope, by their places
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
        gone = local([row.b for row in news.gone])
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
        torch._foreach_copy_(local([row.b for row in news.plain]), local([row.g for row in news.plain]))

    def _fresh(self, news: News) -> list[Tensor]:
        """The directions of the conditional ones."""
        return [row.g for row in news.conditional]


class Random(Gradient):
    r"""d ~ N(0, 1) on active coordinates, new in every step, in b itself: the control of equal norm.

    A coordinate is active if its gradient or its weight is not 0: pruned ones have neither, just-regrown ones have a
    gradient. Parameters are drawn in the batches of :func:`draw_batches`, each a function of (seed, step, place of its
    first parameter), so nothing but the seed needs saving, and who has a gradient does not move a draw. The seed is
    drawn from the generator, is rank 0's on all ranks, and is kept in `param_groups[0]["s2sam_seed"]`.

    Of a sharded parameter every rank draws all the noise, the same as one process would, and keeps that of its shard.

    Cost: no further buffer; a draw per batch, two views for each shape in it, and about 64 bytes. In a fused step that
    closes no window (rho = 0) one copy of the parameters for a moment. Sharded: the noise of a whole parameter for a
    moment.
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
        wanted = {row.index: (row, b) for row, b in zip(rows, out, strict=True)}
        for batch in draw_batches(news.members):
            chosen = [wanted[i] for shape in batch for i in shape if i in wanted]
            if not chosen:
                continue
            noise = self._noise(news, batch, chosen[0][1])
            rows_here = [row for row, _ in chosen]
            drawn_here = [shard_like(noise[row.index], row.p) for row in rows_here]
            lists = local([row.g for row in rows_here]), local([row.p for row in rows_here])
            for drawn, g, w, b in pieces(drawn_here, *lists, local([b for _, b in chosen])):
                active = torch._foreach_abs(g)
                torch._foreach_add_(active, torch._foreach_abs(w))
                torch._foreach_sign_(active)
                torch._foreach_mul_(active, drawn)
                torch._foreach_copy_(b, list(active))

    def _noise(self, news: News, batch: list[list[int]], alone: Tensor) -> dict[int, Tensor]:
        """The noise of each parameter of a batch, as parts of one draw; if there is but one, `alone` takes it."""
        groups = [[news.members[i] for i in shape] for shape in batch]
        first, sizes = groups[0][0], [len(group) * group[0].numel() for group in groups]
        if first.device not in self._generators:
            self._generators[first.device] = torch.Generator(first.device)
        generator = self._generators[first.device].manual_seed(noise_seed(news.group[SEED], news.step, batch[0][0]))
        if len(batch) == len(batch[0]) == 1 and not is_sharded(alone):
            return {batch[0][0]: alone.normal_(generator=generator)}
        flat = torch.empty(sum(sizes), dtype=first.dtype, device=first.device).normal_(generator=generator)
        found: dict[int, Tensor] = {}
        for shape, group, part in zip(batch, groups, torch.split(flat, sizes), strict=True):
            found.update(zip(shape, part.view(len(group), *group[0].shape).unbind(), strict=True))
        return found


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
            torch._foreach_lerp_(local(means), local([row.g for row in rows]), 1 - beta)
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


def draw_batches(members: Mapping[int, Tensor]) -> list[list[list[int]]]:
    """Which parameters, by their places, are drawn together: batches of one device and dtype, shape by shape.

    A batch has at most DRAW_BYTES, or one parameter.

    >>> draw_batches({0: torch.zeros(2), 1: torch.zeros(3), 3: torch.zeros(2), 4: torch.zeros(2).half()})
    [[[0, 3], [1]], [[4]]]
    """
    places, tensors = list(members), list(members.values())
    open_batches: dict[tuple[torch.device, torch.dtype], tuple[list[list[int]], int]] = {}
    batches: list[list[list[int]]] = []
    for chosen in alike(tensors):
        first = tensors[chosen[0]]
        kind, size = (first.device, first.dtype), first.numel() * first.element_size()
        new_shape = True
        for i in chosen:
            batch, used = open_batches.get(kind, ([], 0))
            if not batch or used + size > DRAW_BYTES:
                batch, used, new_shape = [], 0, True
                batches.append(batch)
            if new_shape:
                batch.append([])
            batch[-1].append(places[i])
            open_batches[kind], new_shape = (batch, used + size), False
    return batches


def noise_seed(seed: int, step: int, index: int) -> int:
    """The seed of one draw: that of the batch which parameter `index` begins, after step `step` (counted from 0)."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{index}".encode()).digest()[:8], "little") >> 1


def _draw(generator: torch.Generator) -> int:
    return int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
