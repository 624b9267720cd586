"""S2SAM: sharpness-aware minimization at one gradient a step, as hooks on any torch optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from s2sam.hooks import (
    Closure,
    Phase,
    StepContext,
    StepHooks,
    check_number,
    check_optimizers,
    claim_sharpness,
    release_sharpness,
    step_hooks,
)
from s2sam.sam.displacement import SCALES
from s2sam.sam.looks import Looks
from s2sam.sam.model_hooks import check_models, hook_models
from s2sam.sam.norms import all_finite, largest, total_norm
from s2sam.sam.slot import KEY, STEP, TWINS, Block, Flag, Slot
from s2sam.sam.stats import Stats

DIRECTIONS = ("gradient", "momentum")
CLEAN_GRADIENT = (
    "S2SAM: the gradients were taken at the clean weights, not at the displaced ones, so this step would be plain "
    "{name}. Pass model=... and call that model itself in training mode with gradients enabled, or call sam.displace() "
    "before the forward. (Not counted: sub-modules called directly, functional_call with other tensors, model.eval(), "
    "torch.no_grad(). Stale gradients do count: use zero_grad(set_to_none=True). Missed: a step that mixes displaced "
    "and clean forwards. To accept it: on_clean_grad='ignore'.)"
)


class S2SAM:
    r"""Displace every training forward by the previous step's direction; the base optimizer steps from clean weights.

    .. math::
        e_t = \rho\, d_{t-1} / \|d_{t-1}\|_2, \qquad g_t = \nabla L_t(w_t + e_t), \qquad
        w_{t+1} = w_t - \eta\,\mathrm{base}(g_t, w_t)

    with :math:`d = g` ("gradient", the paper) or the base optimizer's momentum buffer ("momentum"). The norm is one
    number over all parameters of all optimizers given; pruned coordinates are 0 in d and so in e. Weight decay,
    momentum and masks act at w. The first step is plain (there is no direction yet), and so is every step with rho = 0,
    bit for bit.

    The window: with `model`, a training forward (module.training, gradients enabled) of exactly that module moves p
    from w to x = w + e; `optimizer.step()` moves it back before anything else. A no-grad or eval forward inside a
    window sees w. A window that never reaches step() (a GradScaler skip, a dropped batch) stays open at the same x;
    `restore()` ends it. `state_dict()` of model and optimizer holds w and what opens the window at the same x again.

    Args:
        optimizer: any first-order torch optimizer, or a list of them that share one norm. It stays what it is.
        model: Module or list of Modules whose training forwards open the window. Without it use `displaced()`,
            `displace()`, or `optimizer.step(closure)`, which displaces around the closure.
        rho: radius, >= 0, put into every param_group that has no "rho" of its own (one from a checkpoint counts); or a
            function of the number of finished steps, which multiplies the groups' "rho" (1 where there is none).
        direction: "gradient" or "momentum". SGD's momentum contains coupled weight decay; `stats` logs its share.
        sign: +1 (the paper) or -1 (the lookahead side).
        scale: "norm" (\|e\| = rho), "relative" (\|e\| = rho \|w\|) or "asam" (e = rho w^2 d / \| \|w\| d \|).
        nonfinite: "auto" and "skip" leave weights, state, direction and masks bit-unchanged if a gradient is not
            finite; "ignore" does not look. Fused optimizers skip on the device, without a host sync; others read one
            number.
        on_clean_grad: "raise", "warn" or "ignore" when step() meets gradients taken at the clean weights.
        stats_every: measure `stats` every so many steps; 0 = never.

    Raises:
        ValueError: an argument is out of range, the optimizer already has a sharpness method, its hooks never fire, it
            calls closures repeatedly, or it shares no parameter with the model.
        RuntimeError: see on_clean_grad; or the window would open while a backward runs (reentrant checkpointing).

    Cost: one gradient a step, one buffer per parameter, 52 bytes of traffic per fp32 parameter and step (fused: 60).

    Source: Ji et al., NeurIPS 2024 (S2-SAM). Their code (jjsrf/SSAM-NEURIPS2024:sam.py) never perturbs on torch >= 2.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> sam = S2SAM(optimizer, model=model, rho=0.05, stats_every=1)
        >>> for _ in range(2):
        ...     model(torch.ones(3, 4)).square().mean().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> round(sam.stats["displacement"], 4)
        0.05
    """

    def __init__(
        self,
        optimizer: Optimizer | Iterable[Optimizer],
        *,
        model: nn.Module | Sequence[nn.Module] | None = None,
        rho: float | Callable[[int], float] = 0.05,
        direction: str = "gradient",
        sign: int = 1,
        scale: str = "norm",
        nonfinite: str = "auto",
        on_clean_grad: str = "raise",
        stats_every: int = 0,
    ) -> None:
        self.optimizers = check_optimizers(optimizer)
        models = check_models(model)
        for name, value, allowed in (
            ("direction", direction, DIRECTIONS),
            ("sign", sign, (1, -1)),
            ("scale", scale, tuple(SCALES)),
            ("nonfinite", nonfinite, ("auto", "skip", "ignore")),
            ("on_clean_grad", on_clean_grad, ("raise", "warn", "ignore")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
        self.direction, self.sign, self.scale = direction, sign, SCALES[scale]
        self.nonfinite, self.on_clean_grad = nonfinite, on_clean_grad
        factor = rho if callable(rho) else None
        radius = 1.0 if callable(rho) else check_number("rho", rho)
        for o in self.optimizers:
            _check_members(o, models, direction)
        self._slots = [Slot(o, momentum=direction == "momentum", factor=factor) for o in self.optimizers]
        self._stats = Stats(int(check_number("stats_every", stats_every)))
        self._looks = Looks(self._slots)
        hooks = claim_sharpness(self.optimizers, self, radius)
        self._handles: list[Any] = hook_models(self, models)
        for slot, h in zip(self._slots, hooks, strict=True):
            self._attach(slot, h)

    def _attach(self, slot: Slot, hooks: StepHooks) -> None:
        hooks.run_closure = self._run_closure
        o = slot.optimizer
        self._handles += [
            hooks.register(Phase.CHECK, partial(self._check, slot)),
            hooks.register(Phase.RESTORE, partial(self._restore, slot)),
            hooks.register(Phase.DIRECTION, partial(self._store, slot)),
            o.register_state_dict_post_hook(lambda _, state: slot.save(state, peeking=self._looks.clean)),
            o.register_load_state_dict_pre_hook(lambda *_: self._before_load(slot)),
            o.register_load_state_dict_post_hook(lambda _: self._after_load(slot)),
        ]
        slot.load()  # the optimizer may have loaded a checkpoint before

    # The window

    def displace(self) -> None:
        """Move all parameters from w to x = w + e, unless they are there already. Counts as a displaced forward."""
        if self._looks.clean:
            return
        for slot in self._slots:
            slot.fresh = True
        closed = [(slot, slot.displaceable()) for slot in self._slots if not slot.open]
        if not any(blocks for _, blocks in closed):
            for slot, _ in closed:
                slot.open = True
            return
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "S2SAM: a displacement was requested while a backward runs, so the forward it belongs to used the "
                "clean weights; use torch.utils.checkpoint with use_reentrant=False"
            )
        self._open(closed)

    @torch.no_grad()
    def _open(self, closed: list[tuple[Slot, list[Block]]]) -> None:
        measure = self._stats.due(self._slots[0].step)
        if measure:
            self._stats.before_displace(closed, self.scale)
        everything = [block for _, blocks in closed for block in blocks]
        if any(block.twin is False for block in everything):  # one norm for all: twins take part with their directions
            for block in everything:
                if block.twin is True and block.c is not None:
                    block.untwin(self.scale)
        coefficients = self._coefficients(everything)
        for slot, blocks in closed:
            slot.displace(blocks, coefficients, self.scale)
        if measure:
            self._stats.after_displace(self.sign)

    def _coefficients(self, blocks: list[Block]) -> dict[int, Tensor]:
        """The c of e = c |w|^power d by id(block), from one norm over all blocks but the certain twins."""
        new = [block for block in blocks if block.twin is not True]
        out: dict[int, Tensor] = {}
        if new:
            norms = [self.scale.direction_norm(block.d, block.p) for block in new]
            if len(new) > 1:
                norms = [
                    n * block.twin.clear if isinstance(block.twin, Flag) else n
                    for n, block in zip(norms, new, strict=True)
                ]
            d_norm = norms[0] if len(new) == 1 else total_norm(norms, floor=True)
            w_norm = total_norm([p for block in new for p in block.p]) if self.scale.relative else None
            for block in new:
                c = self.scale.coefficient(self.sign * block.rho, d_norm, w_norm)
                out[id(block)] = c.to(block.p[0].device)
        return out

    def restore(self) -> None:
        """Move all parameters back to w and close the window; the next one opens at the same x. Harmless if closed."""
        self._looks.end()
        for slot in self._slots:
            if slot.open:
                slot.restore(keep=True)

    @contextmanager
    def displaced(self) -> Iterator[None]:
        """Forward and backward inside run at x; on leaving, also by an exception, the weights are w again."""
        self.displace()
        try:
            yield
        finally:
            self.restore()

    @contextmanager
    def clean(self) -> Iterator[None]:
        """Inside, the weights are w, whatever the window; afterwards x again."""
        self._looks.enter(None, clean=True)
        try:
            yield
        finally:
            self._looks.leave()

    @property
    def is_displaced(self) -> bool:
        """True while some parameter is at x instead of w."""
        return any(slot.blocks for slot in self._slots) and not self._looks.clean

    @property
    def stats(self) -> dict[str, float]:
        """What was measured last (see `stats_every`), as floats; reading it waits for the device.

        step, displacement ||x - w||, projection (of x - w on the intended direction), gradient_norm (unscaled, of
        active weights), alignment (cosine of g_t and the direction used), skipped (steps so far), decay_share.
        """
        return self._stats.read(self._slots[0].step)

    def remove(self) -> None:
        """Restore the weights and take everything off model and optimizers again."""
        self.restore()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for slot in self._slots:
            release_sharpness(step_hooks(slot.optimizer))
            for state in slot.optimizer.state.values():
                state.pop(KEY, None)
            for key in (STEP, TWINS):
                slot.optimizer.param_groups[0].pop(key, None)

    # What the model hooks and the closure call

    def _enter_forward(self, module: nn.Module | None, clean: bool) -> None:
        self._looks.enter(module, clean)
        if not clean:
            self.displace()

    def _leave_forward(self) -> None:
        self._looks.leave()

    def _displaced(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Displaced parameters and where their w is now, by the address of their storage."""
        clean = self._looks.clean
        blocks = [block for slot in self._slots for block in slot.blocks]
        return {p.data_ptr(): (p, p if clean else b) for k in blocks for p, b in zip(k.p, k.b, strict=True)}

    def _weights_replaced(self, load: object) -> None:
        for slot in self._slots:
            slot.weights_replaced(load)

    def _run_closure(self, closure: Closure) -> Any:
        self.displace()
        try:
            return closure()
        except BaseException:
            self.restore()
            raise

    # The phases of a step

    def _check(self, slot: Slot, context: StepContext) -> None:
        gradients = context.gradients()
        if any(g.layout != torch.strided for g in gradients):
            raise ValueError("S2SAM: sparse gradients are not supported; build the embedding with sparse=False")
        if not slot.fresh and self.on_clean_grad != "ignore" and _at_clean_weights(slot):
            message = CLEAN_GRADIENT.format(name=type(slot.optimizer).__name__)
            if self.on_clean_grad == "raise":
                raise RuntimeError(message)
            warnings.warn(message, stacklevel=6)
        if self.nonfinite == "ignore" or not gradients:
            return
        new = any(p.grad is not None and slot.buffer(p) is None for p in slot.parameters())
        if getattr(slot.optimizer, "_step_supports_amp_scaling", False) and not new:
            zero = largest(gradients) * 0  # or NaN
            found = zero.nan_to_num(1.0).float()
            slot.poison = zero if context.found_inf is None else None
            context.found_inf = found if context.found_inf is None else torch.maximum(context.found_inf, found)
            self._stats.count_skips(context.found_inf)
        elif not all_finite(gradients):
            context.skip = True
            self._stats.count_skips(1)

    def _restore(self, slot: Slot, context: StepContext) -> None:
        self._looks.end()
        if self._stats.due(slot.step):
            self._stats.at_step(slot, context, self.sign)
        slot.flag = None if context.skip or context.found_inf is None else Flag(context.found_inf, slot.poison)
        slot.poison = None
        for other in self._slots:
            if other.open and other is slot:
                slot.restore(keep=context.skip or slot.flag is not None, flag=slot.flag)
            elif other.open:
                other.restore(keep=True)

    def _store(self, slot: Slot, context: StepContext) -> None:
        if not context.skip:
            slot.store(flag=slot.flag, may_create=not context.replace)
        slot.end_step()

    def _before_load(self, slot: Slot) -> None:
        self.restore()
        self._rhos = [group["rho"] for group in slot.optimizer.param_groups]

    def _after_load(self, slot: Slot) -> None:
        for group, rho in zip(slot.optimizer.param_groups, self._rhos, strict=True):
            group.setdefault("rho", rho)
        slot.load()


def _at_clean_weights(slot: Slot) -> bool:
    for group in slot.optimizer.param_groups:
        with_direction = any(p.grad is not None and slot.buffer(p) is not None for p in group["params"])
        if with_direction and slot.rho(group) > 0:
            return True
    return False


def _check_members(optimizer: Optimizer, models: list[nn.Module], direction: str) -> None:
    name = type(optimizer).__name__
    if models:
        owned = {id(p) for m in models for p in m.parameters()}
        if not any(id(p) in owned for group in optimizer.param_groups for p in group["params"]):
            raise ValueError(f"{name} shares no parameter with the model; pass the model that it trains")
    if direction == "momentum":
        for group in optimizer.param_groups:
            if not (group.get("momentum", 0) > 0 or any(group.get("betas", (0,)))):
                raise ValueError(f"direction='momentum' needs an optimizer with momentum, and this {name} has none")
