"""One optimizer's share of S2SAM: its buffers, its window, and what goes into its state_dict.

An open autocast context keeps the low-precision copies of weights that it has made, and takes no notice of weights that
move in place: wherever they do here, those copies are cleared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from s2sam.hooks import check_number, rho_key
from s2sam.sam.blocks import Block, Flag, Twin
from s2sam.sam.directions import EMA, KEY, SEED, Gradient, News, Row, where_it_is
from s2sam.sam.displacement import choose_, copy_unless_, displace_, reopen_, restore_, swap_
from s2sam.sam.guard import GradientWatch
from s2sam.sam.norms import constant, real
from s2sam.sam.scales import Scale
from s2sam.sam.scope import Scope
from s2sam.sam.sharded import (
    address,
    check_placements,
    gathered_copies,
    has_shards,
    is_sharded,
    local,
    placed_like,
    refuse_inside_forward,
)

STEP, TWINS = "s2sam_step", "s2sam_twins"  #: what param_groups[0] holds


class Slot:
    """Buffers and window of one optimizer."""

    def __init__(
        self,
        optimizer: Optimizer,
        direction: Gradient,
        scale: Scale,
        scope: Scope,
        factor: Callable[[int], float] | None,
    ) -> None:
        self.optimizer, self.direction, self.scale, self.scope = optimizer, direction, scale, scope
        self.factor = factor
        self.rho_key = rho_key(optimizer)  #: of the radius in the groups
        self.watch = GradientWatch()
        self._versions: list[tuple[int, int]] = []  #: version and address of the displaced parameters
        self._looking = self._tainted = False  #: w is shown for a moment; x was written to
        self._seen: set[int] = set()  #: parameters out of scope that have had a gradient
        self.open = False  #: between displace and restore
        self.fresh = False  #: a displaced forward or displace() happened since the last step
        self.blocks: list[Block] = []  #: what is displaced while open
        self.twins: dict[int, Twin] = {}  #: by id of the parameter
        self.spent: list[Tensor] = []  #: buffers whose direction was used up by a step that has not ended
        self._carried: list[Tensor] = []  #: parameters whose x may be in their gradient just now
        self.flag: Flag | None = None  #: of the step under way
        self.poison: Tensor | None = None  #: for that flag, if it is known already
        self._companion: object = None  #: the loading of weights that belongs to twins from a checkpoint

    @property
    def step(self) -> int:
        """Finished steps."""
        return int(self.optimizer.param_groups[0].get(STEP, 0))

    def parameters(self) -> list[Tensor]:
        """All parameters of the optimizer."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def rho(self, group: dict[str, Any]) -> float:
        """rho of a group for the coming step: the group's own times the schedule's factor; ValueError if unusable."""
        rho = check_number(self.rho_key, group[self.rho_key])
        return rho if self.factor is None else rho * check_number(f"rho({self.step})", self.factor(self.step))

    def radius(self, group: dict[str, Any]) -> float:
        """What the coefficient of a group is proportional to: rho, or rho times the learning rate."""
        rho = self.rho(group)
        return rho * check_number("lr", group["lr"]) if self.scale.by_lr else rho

    def buffer(self, p: Tensor) -> Tensor | None:
        """The buffer of `p` if it has one, moved to where `p` is now."""
        return where_it_is(p, self.optimizer.state.get(p), KEY) if p in self.scope else None

    def is_new(self, p: Tensor) -> bool:
        """True if `p` is about to get its first gradient."""
        return p.grad is not None and (self.buffer(p) is None if p in self.scope else id(p) not in self._seen)

    def with_direction(self) -> list[Tensor]:
        """The parameters with a buffer whose group has a radius above 0 now: those that a window displaces."""
        groups = [group for group in self.optimizer.param_groups if self.rho(group) > 0]
        return [p for group in groups for p in group["params"] if self.buffer(p) is not None]

    # The window

    def displaceable(self) -> list[Block]:
        """The parameters with a direction and rho > 0, in blocks."""
        self.forget_spent()
        blocks: dict[Any, Block] = {}
        for group in self.optimizer.param_groups:
            rho = self.radius(group)
            for p in group["params"] if rho > 0 else ():
                b = self.buffer(p)
                d = None if b is None else self.direction.of(p, b, self.optimizer.state[p])
                if b is None or d is None:
                    self.twins.pop(id(p), None)  # somebody cleared the state
                    continue
                twin = self.twins.get(id(p))
                if twin is not None and twin.version not in (None, p._version):
                    self._drop(p)  # somebody wrote to these weights
                    twin = None
                key = (rho, p.device, p.dtype, twin and (twin.rho, id(twin.c), id(twin.flag)))
                if key not in blocks:
                    blocks[key] = block = Block(rho)
                    if twin is not None:
                        block.twin = True if twin.flag is None else twin.flag
                        block.ratio, block.c = rho / twin.rho, twin.c
                    if self.direction.own:
                        block.d = block.b
                block = blocks[key]
                block.p.append(p)
                block.b.append(b)
                if not self.direction.own:
                    block.d.append(d)
        for block in blocks.values():
            block.sharded = has_shards(block.p)
        self._check_shards([block for block in blocks.values() if block.sharded])
        return list(blocks.values())

    def _check_shards(self, blocks: list[Block]) -> None:
        """Make buffers and directions of sharded parameters lie as these do, or raise, before a weight has moved."""
        parameters = [p for block in blocks for p in block.p]
        if not parameters:
            return
        check_placements(filter(is_sharded, parameters), filters=self.scale.filters)
        refuse_inside_forward(parameters)
        for block in blocks:
            for i, p in enumerate(block.p):
                block.b[i] = self.optimizer.state[p][KEY] = placed_like(block.b[i], p)
                if not block.own:
                    block.d[i] = placed_like(block.d[i], p)

    @torch.no_grad()
    def displace(self, blocks: list[Block], coefficients: dict[int, Tensor], scale: Scale) -> None:
        """Open the window: w -> x, with e = c shaped(d, w) and c by id(block), except for twins."""
        for block in blocks:
            block.moves()
            w, b, d = block.lists()
            if block.twin is False:
                block.c = coefficients[id(block)]
                displace_(w, b, d, block.c, scale)
            elif block.twin is True and block.ratio == 1:
                swap_(w, b)
            elif block.twin is True and block.p[0].is_complex():
                reopen_(w, b, block.ratio)
                block.c = None if block.c is None else block.c * block.ratio
            elif block.twin is True:  # the same arithmetic as where only the device knows, so that resuming is exact
                c, one, zero = (constant(v, block.p[0].device, torch.float32) for v in (0.0, 1.0, 0.0))
                choose_(w, b, d, c.to(real(block.p[0])), scale, one, zero, block.ratio)
                block.c = None if block.c is None else block.c * block.ratio
            else:
                c, flag = coefficients[id(block)], block.twin
                choose_(w, b, d, c, scale, flag.set, flag.clear, block.ratio)
                block.c = None
            for p in block.p:
                self.twins.pop(id(p), None)
        self.blocks, self.open, self._looking, self._tainted = blocks, True, False, False
        self._versions = self._versions_now()
        torch.clear_autocast_cache()

    def _versions_now(self) -> list[tuple[int, int]]:
        return [(p._version, address(p)) for block in self.blocks for p in block.p]

    def written(self) -> bool:
        """True if somebody has written to displaced parameters; new memory (`.to()`, a flattened RNN) is no write."""
        if not (self._looking or self._tainted):
            now = self._versions_now()
            pairs = zip(self._versions, now, strict=True) if now != self._versions else ()
            self._tainted = any(new[0] != old[0] and new[1] == old[1] for old, new in pairs)
        return self._tainted

    @torch.no_grad()
    def restore(self, *, keep: bool, flag: Flag | None = None) -> None:
        """Close the window: x -> w.

        With `keep`, buffers keep x, so that the next window opens at the same x; not if somebody has written to x. With
        `flag` as well, only the device knows whether that is needed: x goes into the gradients, worthless if it is, and
        comes back in :meth:`store`.
        """
        keep = keep and not self.written()
        for block in self.blocks:
            block.moves()
            if keep and block.own:
                pairs = list(zip(block.p, block.b, strict=True))
                carried = [] if flag is None else [(p, b, p.grad) for p, b in pairs if p.grad is not None]
                swapped = pairs if flag is None else [(p, b) for p, b in pairs if p.grad is None]
                if flag is not None and carried:
                    ps, bs = [p for p, _, _ in carried], [b for _, b, _ in carried]
                    copy_unless_([g for _, _, g in carried], ps, flag.clear)
                    restore_(ps, bs)
                    self._carried += ps
                    self.spent += bs
                if swapped:
                    swap_(local([p for p, _ in swapped]), local([b for _, b in swapped]))
                self.twins.update((id(p), Twin(block.rho, block.c, p._version)) for p in block.p)
            else:
                restore_(*block.lists()[:2])
                self.spent += block.b if block.own else ()
        self.blocks, self.open = [], False
        self._versions, self._looking, self._tainted = [], False, False
        torch.clear_autocast_cache()

    def shown(self) -> Iterator[Tensor]:
        """All tensors that hold displaced weights, or copies of them that FSDP2 has gathered."""
        for block in self.blocks:
            yield from block.p
            if block.sharded:
                yield from gathered_copies(block.p)

    @torch.no_grad()
    def peek(self) -> None:
        """Show w for a moment, and x again at the second call; but if somebody has written to w meanwhile, no x.

        Works on `.data`, so a graph that waits for its backward meanwhile does not take this for a change of weights.
        """
        self.written()
        if self._looking and self._versions != self._versions_now():  # another w now, to which x does not belong
            self.spent += [b for block in self.blocks if block.own for b in block.b]
            self.blocks = []
        for block in self.blocks:
            block.moves(for_a_look=True)
            w, b, _ = block.lists()
            swap_([p.data for p in w], b)
        self._looking = not self._looking
        self._versions = self._versions_now()
        torch.clear_autocast_cache()

    @torch.no_grad()
    def store(self, *, flag: Flag | None, may_create: bool) -> None:
        """After the base step: the direction of the next window, or none if `flag` is set."""
        carried = {id(p) for p in self._carried}
        news = News(self.optimizer.param_groups[0], self.step, flag)
        for index, p in enumerate(self.parameters()):
            if p not in self.scope:
                self._seen.update((id(p),) if p.grad is not None else ())
                continue
            news.members[index] = p
            b = self.buffer(p)
            if p.grad is None:
                if b is not None:
                    news.gone.append(Row(index, p, b, self.optimizer.state[p]))
                continue
            if b is None:
                if not may_create and not self.optimizer.state.get(p):
                    continue  # the base optimizer sets up its state when this is still empty
                b = self.optimizer.state[p][KEY] = torch.zeros_like(p, requires_grad=False)
            row = Row(index, p, b, self.optimizer.state[p])
            (news.plain if flag is None or id(p) in carried else news.conditional).append(row)
        self.spent, self._carried = [], []
        if flag is None:
            self.twins.clear()
        self.direction.store(news)
        if flag is not None:
            joined: dict[int, Flag] = {}
            for twin in self.twins.values():
                old = twin.flag
                if id(old) not in joined:
                    joined[id(old)] = flag if old is None else Flag(old.set * flag.set)
                twin.flag = joined[id(old)]

    def count(self) -> None:
        """A step is over; the gradients of the next one have yet to be taken."""
        self.optimizer.param_groups[0][STEP] = self.step + 1
        self.fresh = False

    def end_step(self) -> None:
        """Count the step; what twins there are belong to the weights as they are now."""
        self.count()
        self.watch.after_step(self.parameters())
        for p in self.parameters() if self.twins else ():
            if id(p) in self.twins:
                self.twins[id(p)].version = p._version

    @torch.no_grad()
    def forget_spent(self) -> None:
        """A step that raised has left w, not a direction, in these buffers: there is no direction."""
        if self.spent:
            torch._foreach_zero_(local(self.spent))
            for p in self._carried:
                self.twins.pop(id(p), None)
            self.spent, self._carried = [], []

    @torch.no_grad()
    def _drop(self, p: Tensor) -> None:
        twin, b = self.twins.pop(id(p)), self.buffer(p)
        if b is not None:
            b.mul_(0 if twin.flag is None else twin.flag.clear)

    # Checkpoints

    def weights_replaced(self, load: object) -> None:
        """Weights are being loaded, by the load_state_dict call that `load` stands for.

        Twins from a checkpoint expect their weights to be loaded once, before or after them; a second loading makes
        them stale.
        """
        again = self._companion is not None and self._companion is not load
        for p in self.parameters():
            twin = self.twins.get(id(p))
            if again and twin is not None and twin.version is None:
                self._drop(p)
        self._companion = load

    def save(self, state_dict: dict[str, Any], *, peeking: bool) -> None:
        """Put what opens the window again at the same x, as copies, into a state_dict just made."""
        self.forget_spent()
        twins = {i: t for i, t in self.twins.items() if t.flag is None or bool(t.flag.set)}
        x = {id(p): b if peeking else p for k in self.blocks if k.own for p, b in zip(k.p, k.b, strict=True)}
        twins |= {id(p): Twin(block.rho, block.c, 0) for block in self.blocks if block.own for p in block.p}
        saved = []
        for index, p in enumerate(self.parameters()):
            if id(p) in twins:
                twin = twins[id(p)]
                saved.append([index, twin.rho, None if twin.c is None else float(twin.c)])
            if id(p) in x:
                entry = state_dict["state"][index]
                state_dict["state"][index] = {**entry, KEY: x[id(p)].detach().clone()}
        state_dict["param_groups"][0][TWINS] = saved

    def load(self) -> None:
        """Take back what :meth:`save` wrote, after the optimizer has loaded a state_dict (ours or a plain one)."""
        first = self.optimizer.param_groups[0]
        first.setdefault(STEP, 0)
        parameters = self.parameters()
        self.twins = {}
        for index, rho, c in first.get(TWINS, []):
            p = parameters[int(index)]
            known = None if c is None else constant(float(c), p.device, real(p))
            self.twins[id(p)] = Twin(float(rho), known, None)
        first[TWINS] = []  # stays there, empty: tools that flatten a state_dict read back only keys they see
        self.direction.set_up(first)
        for p in parameters:
            if p not in self.scope:
                self._forget(p)
        self.fresh, self.spent, self._companion = False, [], None
        self._seen.clear()

    def clear(self) -> None:
        """Leave nothing of S2SAM in the optimizer."""
        for p in self.parameters():
            self._forget(p)
        for key in (STEP, TWINS, SEED):
            self.optimizer.param_groups[0].pop(key, None)

    def _forget(self, p: Tensor) -> None:
        state = self.optimizer.state.get(p, {})
        for key in (KEY, EMA):
            state.pop(key, None)
