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

from s2sam.detached import DetachedCopy
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
from s2sam.private_torch import computing, is_in_backward, is_tracing, is_transforming
from s2sam.sam.blocks import Block, Flag, coefficients
from s2sam.sam.directions import make_direction
from s2sam.sam.guard import CLEAN_GRADIENT, MIXED_GRADIENTS, WRITTEN, complain
from s2sam.sam.looks import Looks
from s2sam.sam.model_hooks import Places, check_models, hook_models
from s2sam.sam.norms import all_finite, largest
from s2sam.sam.options import Options, paper_options
from s2sam.sam.rho import every_second
from s2sam.sam.scales import SCALES
from s2sam.sam.scope import Scope
from s2sam.sam.sharded import address, any_rank, check_sharding, has_shards, place_gradients
from s2sam.sam.slot import Slot
from s2sam.sam.stats import Stats

ECHO_SCALE, ECHO_RHO = "filter", 0.04  #: see S2SAM.echo


class S2SAM:
    r"""Displace every training forward by the previous step's direction; the base optimizer steps from clean weights.

    .. math::
        e_t = s \rho\, d_{t-1} / \|d_{t-1}\|_2, \qquad g_t = \nabla L_t(w_t + e_t), \qquad
        w_{t+1} = w_t - \eta\,\mathrm{base}(g_t, w_t)

    The published method is direction g_{t-1}, s = +1 and this length (:meth:`paper`); `direction`, `sign`, `scale` and
    `scope` change one thing each. The norm is one number over all parameters in scope of all optimizers given; pruned
    coordinates are 0 in d and so in e. Weight decay, momentum and masks act at w. The first step is plain (there is no
    direction yet), and so is every step with rho = 0, bit for bit.

    The window: with `model`, a training forward (module.training, gradients enabled) of exactly that module moves p
    from w to x = w + e; `optimizer.step()` moves it back before anything else. A no-grad or eval forward inside a
    window sees w. A window that never reaches step() (a GradScaler skip, a dropped batch) stays open at the same x;
    `restore()` ends it. `state_dict()` of model and optimizer holds w and what opens the window at the same x again.

    Args:
        optimizer: any first-order torch optimizer, or a list of them that share one norm. It stays what it is.
        model: Module or list of Modules whose training forwards open the window. Without it use `displaced()`,
            `displace()`, or `optimizer.step(closure)`, which displaces around the closure.
        rho: radius, >= 0, put into every param_group that has no "rho" of its own (one from a checkpoint counts), or
            "sam_rho" where the optimizer has a "rho" itself; or a function of the number of finished steps, which
            multiplies the groups' (1 where there is none), such as those of :mod:`s2sam.sam.rho`.
        direction: "gradient", g_{t-1}; "momentum", the base optimizer's buffer (SGD's contains coupled weight decay;
            `stats` logs its share); "ema", a mean of the gradients; "random", N(0, 1) on active coordinates, a control.
        sign: s, +1 (the paper) or -1 (the lookahead side).
        scale: "norm" (\|e\| = rho), "relative" (\|e\| = rho \|w\|), "asam" (e = rho w^2 d / \| \|w\| d \|), "step"
            (e = rho lr d with the group's learning rate when the window opens: for SGD, sign -1, direction "momentum"
            and rho = momentum this is Nesterov's point; for adaptive optimizers d is not their update), or "filter"
            (\|e_f\| = rho \|w_f\| for each slice f along dim 0; tensors with fewer than 2 dims stay where they are).
            "rms": \|e\| = rho sqrt(p) for the p weights that are not 0, so that rho is a size per active weight. Norms
            of d below 1e-18 in fp32 count as that, so that e is then shorter.
        scope: "all", "weights" (tensors with at least 2 dims) or "norm" (what normalisation layers of `model` own).
            Parameters out of scope have no buffer and are in no norm and not in the guard.
        ema_beta: d_t = beta d_{t-1} + (1 - beta) g_t, for direction "ema".
        generator: seeds the draws of direction "random"; None = one seeded from rank 0's `torch.initial_seed()`. The
            seed is in the optimizer's state_dict.
        nonfinite: "auto" and "skip" leave weights, state, direction and masks bit-unchanged if a gradient is not
            finite; "ignore" does not look. Fused optimizers skip on the device, without a host sync; others read one
            number.
        on_clean_grad: "raise", "warn" or "ignore" when step() meets gradients taken at the clean weights.
        stats_every: measure `stats` every so many steps; 0 = never.

    Raises:
        ValueError: an argument is out of range or without effect beside another, nothing is in scope, a function for
            rho returns no finite number >= 0, the optimizer already has a sharpness method, its hooks never fire, it
            calls closures repeatedly, it shares no parameter with the model, or they are sharded by FSDP1.
        RuntimeError: see on_clean_grad; the window would open, or step() is called, while a backward runs (reentrant
            checkpointing, an optimizer inside the backward), or inside a forward for which FSDP2 has gathered the
            weights already; somebody has written to displaced weights; the model no longer holds the parameters.
            docs/guarantees.md has every case.

    Cost: one gradient a step, one buffer per parameter in scope ("ema": two), 52 bytes of traffic per fp32 parameter
    and step (fused: 60), of which 4 look for gradients that are not finite, in scope or not. Sharded parameters
    (DTensors of FSDP2 or tensor parallelism): buffers and traffic of the shards, two all_reduces of one number for each
    dim of the mesh, and fused optimizers read one number on the host as well.

    Worth: in this project's study (results/direction-study, a small proxy) no variant beat tuned Nesterov, and the
    default was below it (suggestive, not shown). Compare with `nesterov=True` before you rely on a gain.

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
        scope: str = "all",
        ema_beta: float = 0.9,
        generator: torch.Generator | None = None,
        nonfinite: str = "auto",
        on_clean_grad: str = "raise",
        stats_every: int = 0,
    ) -> None:
        self.optimizers, models = check_optimizers(optimizer), check_models(model)
        options = Options(direction, sign, scale, scope, ema_beta, generator, nonfinite, on_clean_grad)
        options.check()
        check_sharding(self.optimizers, models, filters=SCALES[scale].filters)
        options.check_members(self.optimizers, models)
        self.direction, self.sign, self.scale = direction, sign, SCALES[scale]
        self.nonfinite, self.on_clean_grad = nonfinite, on_clean_grad
        factor = rho if callable(rho) else None
        radius = 1.0 if callable(rho) else check_number("rho", rho)
        parameters = [p for o in self.optimizers for group in o.param_groups for p in group["params"]]
        within = Scope(scope, models, parameters, least_dims=2 * self.scale.filters)
        source = make_direction(direction, ema_beta=ema_beta, generator=generator)
        for o in self.optimizers:
            source.check(o)
        self._slots = [Slot(o, source, self.scale, within, factor) for o in self.optimizers]
        self._stats = Stats(int(check_number("stats_every", stats_every)))
        self._looks = Looks(self._slots)
        hooks = claim_sharpness(self.optimizers, self, radius)
        self._places = Places(models, parameters)
        self._handles: list[Any] = hook_models(self, models)
        for slot, h in zip(self._slots, hooks, strict=True):
            self._attach(slot, h)

    @classmethod
    def paper(
        cls,
        optimizer: Optimizer | Iterable[Optimizer],
        *,
        model: nn.Module | Sequence[nn.Module] | None = None,
        rho: float = 0.05,
        **options: Any,
    ) -> S2SAM:
        """The published variant by name: +g_{t-1}, ||e|| = rho, constant, over all parameters.

        Args:
            optimizer: as in the class.
            model: as in the class.
            rho: a number.
            options: nonfinite, on_clean_grad and stats_every; or what is fixed here, with the same value.

        Raises:
            ValueError: an option says something else; or as the class.

        Example:
            >>> sam = S2SAM.paper(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1))
            >>> sam.direction, sam.sign
            ('gradient', 1)
        """
        return cls(optimizer, model=model, rho=rho, **paper_options(rho, options))

    @classmethod
    def echo(
        cls,
        optimizer: Optimizer | Iterable[Optimizer],
        *,
        model: nn.Module | Sequence[nn.Module] | None = None,
        rho: float = ECHO_RHO,
        scale: str = ECHO_SCALE,
        period: int | None = None,
        **options: Any,
    ) -> S2SAM:
        r"""Single-step SAM with SAM's own mechanism: each batch twice, the second visit displaced by the first one.

        .. math::
            g_{2k} = \nabla L_k(w_{2k}), \qquad
            g_{2k+1} = \nabla L_k(w_{2k+1} + \rho\, g_{2k} / \|g_{2k}\|)

        SAM's force needs the gradient of the *same* batch; that of the batch before, which the paper uses, acts as a
        momentum filter. Here the direction of every displaced step is the same batch's. Give every batch twice in a
        row: `for x, y in s2sam.data.echo(loader)`. One gradient a step, no further buffer, half as many distinct
        batches for the same number of steps. Updates of masks fall on first visits: growth sees the gradient at w.

        Args:
            optimizer: as in the class.
            model: as in the class.
            rho: radius of the second visits, in units of the scale.
            scale: as in the class.
            period: steps after which the visits begin anew with a first one, for trainings of an odd number of steps
                that follow one another.
            options: what else the class takes, but direction, sign and a function for rho.

        Raises:
            ValueError: an option that would make it something else; or as the class.

        Caveats: with 40 % wrong labels it gained what two-step SAM gains, 19 to 27 points over SGD at a weight decay
        that nobody tuned and 1 to 3 (dense) over tuned baselines; it lost where a network underfits
        (docs/when-it-helps.md). Too large a radius ends in chance accuracy. A step that a GradScaler skips must be
        counted by :meth:`missed_step`, or first and second visits change places.

        Example:
            >>> w = nn.Parameter(torch.tensor([3.0]))
            >>> optimizer = torch.optim.SGD([w], lr=0.1)
            >>> sam = S2SAM.echo(optimizer, rho=0.5, scale="norm")
            >>> for _ in range(2):                             # both visits of one batch
            ...     with sam.displaced():
            ...         (w ** 2).sum().div(2).backward()
            ...     optimizer.step()
            ...     optimizer.zero_grad()
            >>> w.data                                         # 2.7 - 0.1 * (2.7 + 0.5)
            tensor([2.3800])
        """
        fixed = {"direction": "gradient", "sign": 1}
        for name, value in options.items():
            if name in fixed and value != fixed[name]:
                raise ValueError(f"S2SAM.echo means {name}={fixed[name]!r}; for {name}={value!r} call S2SAM itself")
        if callable(rho):
            raise ValueError("S2SAM.echo has a schedule of its own; give rho as a number")
        made = cls(optimizer, model=model, rho=every_second(rho, period), scale=scale, **options)
        made._stats.in_second_visits()
        for o in made.optimizers:
            step_hooks(o).visits = 2
        return made

    @classmethod
    def momentum(
        cls,
        optimizer: Optimizer | Iterable[Optimizer],
        *,
        model: nn.Module | Sequence[nn.Module] | None = None,
        rho: float = 0.02,
        **options: Any,
    ) -> S2SAM:
        """MSAM: e = -rho ||w|| m / ||m|| along the optimizer's own momentum (arXiv:2401.12033), no further buffer of d.

        Caveats: like every displacement that is linear in past gradients it is another momentum filter; with
        rho ||w|| = lr mu ||m|| it is Nesterov's method. Compare with `nesterov=True`.

        Args:
            optimizer: as in the class; it needs momentum.
            model: as in the class.
            rho: ||e|| over ||w||; start from 0.02.
            options: what else the class takes.

        Example:
            >>> sam = S2SAM.momentum(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9))
            >>> sam.direction, sam.sign
            ('momentum', -1)
        """
        preset: dict[str, Any] = {"direction": "momentum", "sign": -1, "scale": "relative"}
        return cls(optimizer, model=model, rho=rho, **preset | options)

    @classmethod
    def noise(
        cls,
        optimizer: Optimizer | Iterable[Optimizer],
        *,
        model: nn.Module | Sequence[nn.Module] | None = None,
        rho: float = 0.01,
        **options: Any,
    ) -> S2SAM:
        """Isotropic noise, e = rho z with z ~ N(0, 1) on active weights (Anti-PGD, arXiv:2202.02831): a control.

        It penalises the trace of the Hessian by rho^2 / 2 for any batch size, so rho is a size per weight.

        Caveats: what it gains a sharpness method must beat to have gained by its direction.

        Args:
            optimizer: as in the class.
            model: as in the class.
            rho: root mean square of the noise of one weight; start from 0.01.
            options: what else the class takes, such as `generator`.

        Example:
            >>> sam = S2SAM.noise(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1))
            >>> sam.direction
            'random'
        """
        return cls(optimizer, model=model, rho=rho, **{"direction": "random", "scale": "rms"} | options)

    def __reduce__(self) -> tuple[type[DetachedCopy], tuple[str, str]]:
        return DetachedCopy, (
            "an S2SAM",
            "call S2SAM(optimizer, model=model) on the copied model and optimizer, whose state_dict holds its state",
        )

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
        self._refuse_writes()
        closed = [(slot, slot.displaceable()) for slot in self._slots if not slot.open]
        if not any(blocks for _, blocks in closed):
            for slot in self._slots:
                slot.fresh = True
            for slot, _ in closed:
                slot.open = True
            if closed and self._stats.due(self._slots[0].step):
                self._stats.no_displacement()
            return
        if is_in_backward():
            raise RuntimeError(
                "S2SAM: a displacement was requested while a backward runs, so the forward it belongs to used the "
                "clean weights; use torch.utils.checkpoint with use_reentrant=False"
            )
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():  # type: ignore[no-untyped-call]
            raise RuntimeError(
                "S2SAM: a CUDA graph that captures the whole step would replay this step's rho and window for ever; "
                "capture forward and backward only (torch.compile with mode='reduce-overhead' does)"
            )
        self._check_mixed(closed)
        for slot in self._slots:
            slot.fresh = True
        with computing():
            self._open(closed)

    def _refuse_writes(self) -> None:
        """Nobody may have written to displaced weights: put w back and raise."""
        if any(slot.written() for slot in self._slots):
            self.restore(warn=False)
            raise RuntimeError(WRITTEN)

    def _check_mixed(self, closed: list[tuple[Slot, list[Block]]]) -> None:
        """No gradient that was taken at w since the last step may be there when the first window of a step opens."""
        if self.on_clean_grad == "ignore":
            return
        for slot, blocks in closed:
            if not slot.fresh and slot.watch.added([p for block in blocks for p in block.p]):
                complain(self.on_clean_grad, MIXED_GRADIENTS)

    @torch.no_grad()
    def _open(self, closed: list[tuple[Slot, list[Block]]]) -> None:
        measure = self._stats.due(self._slots[0].step)
        if measure:
            self._stats.before_displace(closed, self.scale)
        everything = [block for _, blocks in closed for block in blocks]
        if self.scale.common and any(block.twin is False for block in everything):  # one norm: twins take part in it
            for block in everything:
                if block.twin is True and block.c is not None:
                    block.untwin(self.scale)
        found = coefficients(everything, self.scale, self.sign)
        for slot, blocks in closed:
            slot.displace(blocks, found, self.scale)
        if measure:
            self._stats.after_displace(self.sign)

    def restore(self, *, warn: bool = True) -> None:
        """Move all parameters back to w and close the window; the next one opens at the same x. Harmless if closed.

        Args:
            warn: say so if somebody has written to weights while they were displaced, which this undoes.
        """
        if warn and any(slot.written() for slot in self._slots):
            warnings.warn(WRITTEN, stacklevel=2)
        self._looks.end()
        self._clean_heirs()
        for slot in self._slots:
            if slot.open:
                slot.restore(keep=True)

    @torch.no_grad()
    def _clean_heirs(self) -> None:
        """Parameters that were copied from displaced ones and took their places (a conversion) get w, too."""
        heirs = self._places.heirs() if any(slot.blocks for slot in self._slots) else {}
        for p, b in (pair for slot in self._slots if heirs for k in slot.blocks for pair in zip(k.p, k.b, strict=True)):
            q = heirs.get(id(p))
            if type(q) is nn.Parameter and q.shape == p.shape and torch.equal(q.to(p.device), p.to(q.dtype)):
                q.copy_(b)

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

        step, displacement ||x - w||, relative (that over ||w||), projection (of x - w on the intended direction),
        gradient_norm (unscaled, of active weights), alignment (cosine of g_t and the direction used), skipped (steps so
        far), decay_share.
        """
        return self._stats.read(self.step)

    def measures(self, step: int) -> bool:
        """Whether the step after `step` finished ones is measured: every `stats_every`-th, with echo a second visit."""
        return self._stats.due(step)

    @property
    def step(self) -> int:
        """Steps of the (first) optimizer, taken or skipped: what a schedule of rho is asked with."""
        return self._slots[0].step

    def missed_step(self, optimizer: Optimizer | None = None) -> None:
        """Count a step that never reached `optimizer.step()` (of that one; None = of all), so that schedules go on.

        A GradScaler that meets an overflow does not call an optimizer that is not fused, so no hook hears of the step.
        After `scaler.step(optimizer); scaler.update()` say `if sam.step == before: sam.missed_step()`. Weights,
        direction and an open window stay as they are; `stats` counts the step as skipped.

        Raises:
            ValueError: `optimizer` is none of those given to S2SAM.

        Example:
            >>> sam = S2SAM(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1))
            >>> sam.missed_step()
            >>> sam.step, sam.stats["skipped"]
            (1, 1.0)
        """
        if optimizer is not None and optimizer not in self.optimizers:
            raise ValueError("missed_step() takes one of the optimizers that S2SAM was given, or none for all")
        for slot in self._slots:
            if optimizer is None or slot.optimizer is optimizer:
                slot.count()
                self._stats.count_skips(1)

    def remove(self) -> None:
        """Restore the weights and take everything off model and optimizers again."""
        self.restore()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for slot in self._slots:
            step_hooks(slot.optimizer).visits = 1
            release_sharpness(step_hooks(slot.optimizer))
            slot.clear()

    # What the model hooks and the closure call

    def _enter_forward(self, module: nn.Module | None, clean: bool) -> None:
        if is_tracing() or (clean and is_transforming()):
            # What is recorded is no training step, and is to hold w. A look at w inside a torch.func transform could
            # not tell torch to keep w for the graph that it builds, so the window is closed there as well.
            with computing():
                self.restore()
            self._looks.enter(module, clean=False)
            return
        try:
            opens = not clean and self._places.hold()
        except RuntimeError:
            self.restore()
            raise
        self._looks.enter(module, clean)
        if opens:
            self.displace()

    def _leave_forward(self) -> None:
        self._looks.leave()

    def _displaced(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Displaced parameters and where their w is now, by the address of their storage."""
        clean = self._looks.clean
        blocks = [block for slot in self._slots for block in slot.blocks]
        return {address(p): (p, p if clean else b) for k in blocks for p, b in zip(k.p, k.b, strict=True)}

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
        if is_in_backward():
            raise RuntimeError(
                "S2SAM: optimizer.step() was called while the backward is still running (an optimizer in the backward, "
                "register_post_accumulate_grad_hook), and would take the displaced weights away from the rest of it; "
                "call optimizer.step() after loss.backward()"
            )
        sharded = has_shards(context.gradients())
        if sharded:
            place_gradients(context.parameters())
        gradients = context.gradients()
        if any(g.layout != torch.strided for g in gradients):
            raise ValueError("S2SAM: sparse gradients are not supported; build the embedding with sparse=False")
        self._refuse_writes()
        if not slot.fresh and self.on_clean_grad != "ignore" and any(p.grad is not None for p in slot.with_direction()):
            complain(self.on_clean_grad, CLEAN_GRADIENT.format(name=type(slot.optimizer).__name__))
        if sharded and context.found_inf is not None:  # a GradScaler's, which has seen the shards of this rank
            context.skip, context.found_inf = any_rank(bool(context.found_inf), gradients), None
            self._stats.count_skips(int(context.skip))
            if context.skip:
                return
        if self.nonfinite == "ignore" or not gradients:
            return
        new = any(slot.is_new(p) for p in slot.parameters())
        if getattr(slot.optimizer, "_step_supports_amp_scaling", False) and not (new or sharded):
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
        self._rhos = [group[slot.rho_key] for group in slot.optimizer.param_groups]

    def _after_load(self, slot: Slot) -> None:
        for group, rho in zip(slot.optimizer.param_groups, self._rhos, strict=True):
            group.setdefault(slot.rho_key, rho)
        slot.load()
