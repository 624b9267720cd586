"""Ranked step hooks: the one place where this library hooks into a torch optimizer.

Sharpness (`s2sam.sam`) and sparsity (`s2sam.sparse`) act on the same `optimizer.step()` and must do so in one order,
whichever was attached first. Each optimizer therefore gets one :class:`StepHooks` with one torch pre-hook and one torch
post-hook; both run the phases registered with them in rank order::

    pre    CHECK      the raw gradients: sparse? finite? taken at the displaced point?
           MASK       gradients of pruned weights become 0; a due topology update is announced
           RESTORE    x -> w
           (hide)     a skipped or replaced step hides all gradients, so that the base optimizer moves nothing
    base optimizer step
           (unhide)
    post   REMASK     weights and optimizer state of pruned positions become 0
           TOPOLOGY   masks change, state at changed positions is cleared
           DIRECTION  the next displacement is prepared from the new masks

With a closure the pre-phases run inside it, after the user's own closure has returned. Cost: no tensor work of its own.
"""

from __future__ import annotations

import gc
import inspect
import math
import numbers
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

Closure = Callable[[], Any]
_ATTRIBUTE = "_s2sam_step_hooks"


class Phase(IntEnum):
    """Rank of a phase; those below 100 run before the base step."""

    CHECK = 0
    MASK = 10
    RESTORE = 20
    REMASK = 100
    TOPOLOGY = 110
    DIRECTION = 120


@dataclass(eq=False)
class StepContext:
    """What the phases of one `optimizer.step()` tell each other."""

    optimizer: Optimizer
    has_closure: bool = False
    skip: bool = False  #: a gradient is not finite (known on the host): nothing at all may change
    replace: bool = False  #: a topology update takes the place of the gradient step
    found_inf: Tensor | None = (
        None  #: 0-dim float on the device, 1 = skip; read by fused base steps, unknown to the host
    )
    hidden: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    pre_done: bool = False
    given: dict[str, Tensor] = field(default_factory=dict)  #: the `found_inf` a GradScaler had put on the optimizer

    def parameters(self) -> Iterator[Tensor]:
        """All parameters of the optimizer, in group order."""
        for group in self.optimizer.param_groups:
            yield from group["params"]

    def gradients(self) -> list[Tensor]:
        """The gradients that are there, in group order."""
        return [p.grad for p in self.parameters() if p.grad is not None]

    def nothing_moved(self) -> bool:
        """True if the base step was skipped; reads `found_inf` from the device: ask only where a sync is affordable."""
        return self.skip or (self.found_inf is not None and bool(self.found_inf))


PhaseFunction = Callable[[StepContext], None]


class Handle:
    """Removes one registered phase again."""

    def __init__(self, hooks: StepHooks, entry: tuple[Phase, PhaseFunction]) -> None:
        self._hooks, self._entry = hooks, entry

    def remove(self) -> None:
        """Unregister the phase; calling it twice is harmless."""
        self._hooks._remove(self._entry)


class StepHooks:
    """One pre- and one post-hook on an optimizer, running ranked phases. Get it with :func:`step_hooks`."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.gradient_masks: list[Callable[[], None]] = []  #: each zeroes the gradients of its pruned weights, in place
        self.sharpness: object | None = None  #: the S2SAM or SAM attached here: there can be one
        self.run_closure: Callable[[Closure], Any] | None = (
            None  #: set by the sharpness method: how it calls the closure
        )
        self.preview = False  #: the gradients at hand are SAM's first, which only say where to displace the weights
        self.visits = 1  #: steps in a row that are taken on the same batch; 2 with echo
        self.looked_after: list[Callable[[], Iterable[Tensor]]] = []  #: weights that no other optimizer may move
        self._phases: list[tuple[Phase, PhaseFunction]] = []
        self._context: StepContext | None = None
        self._torch_handles = (
            optimizer.register_step_pre_hook(self._pre),
            optimizer.register_step_post_hook(self._post),
        )

    def register(self, phase: Phase, function: PhaseFunction) -> Handle:
        """Run `function(context)` in `phase` of every step; equal ranks run in the order of registration."""
        entry = (phase, function)
        self._phases.append(entry)
        self._phases.sort(key=lambda e: e[0])
        return Handle(self, entry)

    def mask_gradients(self) -> None:
        """Zero the gradients of all pruned weights now (SAM needs this before its first norm)."""
        for mask in self.gradient_masks:
            mask()

    def _remove(self, entry: tuple[Phase, PhaseFunction]) -> None:
        if entry in self._phases:
            self._phases.remove(entry)
        self.retire()

    def retire(self) -> None:
        """Come off the optimizer if nothing uses this any longer."""
        if not (self._phases or self.sharpness or self.gradient_masks or self.looked_after):
            for handle in self._torch_handles:
                handle.remove()
            vars(self.optimizer).pop(_ATTRIBUTE, None)
            _Bystanders.forget(self)

    def look_after(self, weights: Callable[[], Iterable[Tensor]]) -> None:
        """No other optimizer may move these weights from now on."""
        self.looked_after.append(weights)
        _Bystanders.watch(self)

    def weights(self) -> set[int]:
        """The ids of the weights that only this optimizer may move: those of S2SAM or SAM, and those with a mask."""
        found = {id(p) for weights in self.looked_after for p in weights()}
        if self.sharpness is not None:
            found |= {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        return found

    def _pre(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _nested(optimizer):
            return None
        self._put_back()  # a base step that raised last time has left gradients hidden
        closure = kwargs["closure"] if "closure" in kwargs else (args[1] if len(args) > 1 else None)
        self._context = context = StepContext(optimizer, has_closure=closure is not None)
        if closure is None:
            self._run_pre(context)
            return None

        def once() -> Any:
            if context.pre_done:
                raise RuntimeError(
                    f"{type(optimizer).__name__} calls its closure more than once a step, which sharpness-aware and "
                    "sparse training do not support; use an optimizer that calls it once"
                )
            with torch.enable_grad():
                loss = closure() if self.run_closure is None else self.run_closure(closure)
            with torch.no_grad():
                self._run_pre(context)
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": once}
        return (args[0], once, *args[2:]), kwargs

    @torch.no_grad()
    def _run_pre(self, context: StepContext) -> None:
        context.given = {k: v for k, v in vars(context.optimizer).items() if k == "found_inf"}
        context.found_inf = context.given.get("found_inf")
        for phase, function in list(self._phases):
            if phase < Phase.REMASK:
                function(context)
        context.pre_done = True
        if context.found_inf is not None:
            context.optimizer.found_inf = context.found_inf  # type: ignore[attr-defined]
        if context.skip or context.replace:
            for p in context.parameters():
                if p.grad is not None:
                    context.hidden.append((p, p.grad))
                    p.grad = None

    @torch.no_grad()
    def _post(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _nested(optimizer):
            return
        context = self._context
        if context is None or not context.pre_done:
            raise RuntimeError(f"{type(optimizer).__name__} never called its closure; call step() without one")
        self._put_back()
        for group in optimizer.param_groups:
            group.pop(_RHO_KEY, None)  # add_param_group gives a new group all that the defaults hold
        for phase, function in list(self._phases):
            if phase >= Phase.REMASK:
                function(context)

    def _put_back(self) -> None:
        """Undo what was done to the optimizer for the base step: hidden gradients and `found_inf`."""
        context, self._context = self._context, None
        if context is not None:
            for p, grad in context.hidden:
                p.grad = grad
            if context.found_inf is not None:
                vars(context.optimizer).pop("found_inf", None)
                vars(context.optimizer).update(context.given)


def step_hooks(optimizer: Optimizer) -> StepHooks:
    """The :class:`StepHooks` of `optimizer`, made at the first call. Copies and pickles of the optimizer have none.

    Raises:
        TypeError: `optimizer` is not a torch optimizer.
        ValueError: its step hooks never fire (wrappers that skip `Optimizer.__init__`) or it calls closures repeatedly.
    """
    check_optimizers(optimizer)
    hooks: StepHooks | None = getattr(optimizer, _ATTRIBUTE, None)
    if hooks is None:
        hooks = StepHooks(optimizer)
        setattr(optimizer, _ATTRIBUTE, hooks)
    return hooks


def _nested(optimizer: Optimizer) -> bool:
    """True inside a step that this optimizer's own step called: `super().step()` fires torch's hooks a second time."""
    code = type(optimizer).step.__code__  # torch's wrapper: one code object for the steps of all classes
    depth, frame = 0, sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code is code and frame.f_locals["args"][0] is optimizer:
            depth += 1
    return depth > 1


def check_optimizers(optimizers: Optimizer | Iterable[Optimizer]) -> list[Optimizer]:
    """One optimizer or several, as a list of distinct ones that can be hooked. Raises as :func:`step_hooks`."""
    several = isinstance(optimizers, Iterable) and not isinstance(optimizers, Optimizer)
    found: list[Optimizer] = list(optimizers) if several else [optimizers]  # type: ignore[arg-type, list-item]
    if not found or len({id(o) for o in found}) != len(found):
        raise ValueError("give one optimizer, or a non-empty list of different ones")
    for optimizer in found:
        name = type(optimizer).__name__
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"expected a torch.optim.Optimizer, got {name}")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError(
                "LBFGS calls its closure many times a step; use SGD, AdamW or another first-order optimizer"
            )
        if not hasattr(optimizer, "_optimizer_step_pre_hooks") or not getattr(type(optimizer).step, "hooked", False):
            raise ValueError(
                f"the step hooks of {name} never fire (it does not call torch.optim.Optimizer.__init__, as Lookahead "
                "and other wrappers do not); attach to the optimizer it wraps"
            )
    return found


class _Bystanders:
    """Other optimizers: one that steps on weights which S2SAM or a sparsifier looks after is told so beforehand.

    It would move displaced weights, and bring pruned ones back to life. Torch calls :meth:`check` before the step of
    any optimizer; that one is harmless is remembered until somebody attaches or its parameters change.
    """

    watched: ClassVar[weakref.WeakSet[StepHooks]] = weakref.WeakSet()
    changes: ClassVar[int] = 0  #: how often the set above has changed
    harmless: ClassVar[weakref.WeakKeyDictionary[Optimizer, tuple[int, int]]] = weakref.WeakKeyDictionary()

    @classmethod
    def watch(cls, hooks: StepHooks) -> None:
        """Look after the weights of `hooks`, as many as they are now; whoever was harmless is looked at again."""
        if cls.changes == 0:
            register_optimizer_step_pre_hook(cls.check)
        cls.watched.add(hooks)
        cls.changes += 1

    @classmethod
    def forget(cls, hooks: StepHooks) -> None:
        """Look after them no longer."""
        cls.watched.discard(hooks)
        cls.changes += 1

    @classmethod
    def check(cls, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise RuntimeError if `optimizer` is about to step on weights that are looked after through another one."""
        now = cls.changes, sum(len(group["params"]) for group in optimizer.param_groups)
        if cls.harmless.get(optimizer) == now:
            return
        if cls._owner(optimizer) is not None:
            gc.collect()  # an optimizer that nobody holds any longer lives on in a circle with its hooks
        owner = cls._owner(optimizer)
        if owner is not None:
            by = type(owner.sharpness).__name__ if owner.sharpness is not None else "a sparsifier"
            old, new = type(owner.optimizer).__name__, type(optimizer).__name__
            raise RuntimeError(
                f"{new}.step() would move weights that {by} looks after through another optimizer ({old}): displaced "
                "weights would be moved, or pruned ones come back to life; call .remove() on what is attached to the "
                "old optimizer and attach to the new one, or attach to a list of both"
            )
        cls.harmless[optimizer] = now

    @classmethod
    def _owner(cls, optimizer: Optimizer) -> StepHooks | None:
        """Who looks after a weight of `optimizer` through another one that is not wrapped by it."""
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for hooks in list(cls.watched):
            other = hooks.optimizer
            if other is not optimizer and not mine.isdisjoint(hooks.weights()) and not _wraps(optimizer, other):
                return hooks
        return None


def _wraps(outer: Optimizer, inner: Optimizer) -> bool:
    """Whether `outer` holds `inner` to call its step, as Lookahead, ZeroRedundancyOptimizer and the like do."""
    held = list(vars(outer).values())
    return any(value is inner or (isinstance(value, (list, tuple)) and inner in value) for value in held)


def inert(*args: Any, **kwargs: Any) -> None:
    """What a hook becomes in a copy or a pickle: nothing."""


def _make_inert() -> Callable[..., None]:
    return inert


ONE_GRAPH = (
    "s2sam moves weights around this forward, which a single graph cannot hold. Compile first and attach to what was "
    "compiled: compiled = torch.compile(model, fullgraph=True); S2SAM(optimizer, model=compiled); or "
    "model.compile(...) and then S2SAM(optimizer, model=model). For torch.export with strict=True export "
    "copy.deepcopy(model)"
)


class WeakHook:
    """Calls `function(owner, module, ...)` while both still live and the caller is the module it was registered on.

    A compiled model runs it outside its graphs (one graph break if the model itself is hooked, none if the compiled
    wrapper is): traced into a graph it would be constant-folded. Where torch wants one graph and meets the hook all the
    same, its error holds :data:`ONE_GRAPH`.
    """

    def __init__(self, function: Callable[..., None], owner: object, module: nn.Module) -> None:
        self._function: Callable[..., None] = torch.compiler.disable(function, reason=ONE_GRAPH)  # type: ignore[no-untyped-call]
        self._owner, self._module = weakref.ref(owner), weakref.ref(module)

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Run the hook."""
        owner = self._owner()
        if owner is not None and self._module() is module:
            self._function(owner, module, *args, **kwargs)

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return _make_inert, ()

    @property
    def __name__(self) -> str:
        """What torch.jit.script asks a hook for, and nobody else needs."""
        raise AttributeError(
            "torch.jit.script cannot compile a hook of s2sam; call .remove() on S2SAM and the sparsifier first, or use "
            "torch.export.export"
        )


WeakHook.__call__._torchdynamo_disable = True  # type: ignore[attr-defined]  # do not trace the lines above either
WeakHook.__call__._torchdynamo_disable_msg = ONE_GRAPH  # type: ignore[attr-defined]


def check_number(name: str, value: float, low: float = 0.0, high: float = math.inf) -> float:
    """`value` as a float within [low, high], or a ValueError that names the argument."""
    scalar = isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
    number = float(value) if scalar or isinstance(value, numbers.Real) else math.nan
    if not low <= number <= high or math.isinf(number):
        bounds = f">= {low:g}" if math.isinf(high) else f"between {low:g} and {high:g}"
        raise ValueError(f"{name} must be a finite number {bounds}, got {value!r}")
    return number


RHO, OWN_RHO = "rho", "sam_rho"
_RHO_KEY = "s2sam_rho_key"  #: where `defaults` of a claimed optimizer says which of the two it is


def rho_key(optimizer: Optimizer) -> str:
    """The key of the radius in this optimizer's param_groups: "rho", or "sam_rho" if it has a rho itself (Adadelta).

    >>> w = torch.nn.Parameter(torch.ones(1))
    >>> rho_key(torch.optim.SGD([w], lr=0.1)), rho_key(torch.optim.Adadelta([w]))
    ('rho', 'sam_rho')
    """
    known: str | None = optimizer.defaults.get(_RHO_KEY)  # claimed before, or a copy of one that was
    own = RHO in optimizer.defaults or RHO in inspect.signature(type(optimizer).__init__).parameters
    return known or (OWN_RHO if own else RHO)


def claim_sharpness(optimizers: Iterable[Optimizer], owner: object, rho: float) -> list[StepHooks]:
    """Make `owner` the one sharpness method of these optimizers; `rho` goes into groups that have none of their own.

    Raises:
        ValueError: one has a sharpness method already, or a group's rho is no finite number >= 0; nothing is changed.
    """
    optimizers, radii = list(optimizers), []
    for optimizer in optimizers:
        hooks = getattr(optimizer, _ATTRIBUTE, None)
        if hooks is not None and hooks.sharpness is not None:
            raise ValueError(
                f"this optimizer already has a {type(hooks.sharpness).__name__}; call its .remove() before attaching "
                f"a {type(owner).__name__}"
            )
        key = rho_key(optimizer)
        old = optimizer.defaults.get(key)  # left by a copy: no group's own choice
        groups = optimizer.param_groups
        radii.append([rho if g.get(key, old) == old else check_number(key, g[key]) for g in groups])
    claimed = [step_hooks(optimizer) for optimizer in optimizers]
    for hooks, per_group in zip(claimed, radii, strict=True):
        key = rho_key(hooks.optimizer)
        hooks.sharpness = owner
        _Bystanders.watch(hooks)
        hooks.optimizer.defaults |= {key: rho, _RHO_KEY: key}
        for group, radius in zip(hooks.optimizer.param_groups, per_group, strict=True):
            group[key] = radius
    return claimed


def release_sharpness(hooks: StepHooks) -> None:
    """Undo :func:`claim_sharpness`; a rho that differs from the common one was a group's own and stays."""
    hooks.sharpness = hooks.run_closure = None
    key = rho_key(hooks.optimizer)
    rho = hooks.optimizer.defaults.pop(key, None)
    hooks.optimizer.defaults.pop(_RHO_KEY, None)
    for group in hooks.optimizer.param_groups:
        group.pop(_RHO_KEY, None)
        if group.get(key) == rho:
            group.pop(key, None)
    hooks.retire()
