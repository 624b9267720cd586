"""Hooks on the model: they open the window at a training forward and keep displaced weights out of what is saved.

Every hook is a :class:`WeakHook`: it holds its owner and its module weakly, fires only for the module it was put on, and
turns into nothing when the model is copied or pickled.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class WindowOwner(Protocol):
    """What the hooks need from S2SAM."""

    def displace(self) -> None: ...
    def restore(self) -> None: ...
    def _enter_forward(self, clean: bool) -> None: ...
    def _leave_forward(self) -> None: ...
    def _clean_weights(self, p: Tensor) -> Tensor | None: ...
    def _weights_replaced(self) -> None: ...


def inert(*args: Any, **kwargs: Any) -> None:
    """What a hook becomes in a copy or a pickle: nothing."""


class WeakHook:
    """Calls `function(owner, module, ...)` while both still live and the caller is the module it was registered on."""

    def __init__(self, function: Callable[..., None], owner: WindowOwner, module: nn.Module) -> None:
        self._function, self._owner, self._module = function, weakref.ref(owner), weakref.ref(module)

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        owner = self._owner()
        if owner is not None and self._module() is module:
            self._function(owner, module, *args, **kwargs)

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return _make_inert, ()


# What torch.compiler.disable would set; calling that would import torch._dynamo, which doubles the import time. Compiled
# models run the hooks outside the graph (one graph break); traced into it they would be constant-folded or wrong.
WeakHook.__call__._torchdynamo_disable = True  # type: ignore[attr-defined]


def _make_inert() -> Callable[..., None]:
    return inert


def _before_forward(owner: WindowOwner, module: nn.Module, args: Any) -> None:
    owner._enter_forward(clean=not (module.training and torch.is_grad_enabled()))


def _after_forward(owner: WindowOwner, module: nn.Module, args: Any, output: Any) -> None:
    owner._leave_forward()


def _copy_clean(owner: WindowOwner, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name, p in module._parameters.items():
        if p is None or prefix + name not in state or state[prefix + name] is p:  # the last: keep_vars=True
            continue
        clean = owner._clean_weights(p)
        if clean is not None:
            state[prefix + name] = clean.detach().clone()


def _before_load(owner: WindowOwner, module: nn.Module, *args: Any) -> None:
    owner.restore()
    owner._weights_replaced()


def hook_models(owner: WindowOwner, models: Iterable[nn.Module]) -> list[Any]:
    """Register all hooks for `owner` on `models`; returns the handles.

    The forward hooks sit on each model itself, the state-dict hooks on every sub-module with parameters of its own, so
    that `model.encoder.state_dict()` is clean as well.
    """
    handles: list[Any] = []
    for model in models:
        handles.append(model.register_forward_pre_hook(WeakHook(_before_forward, owner, model), prepend=True))
        handles.append(model.register_forward_hook(WeakHook(_after_forward, owner, model), always_call=True))
        for part in model.modules():
            if any(p is not None for p in part._parameters.values()):
                handles.append(part.register_state_dict_post_hook(WeakHook(_copy_clean, owner, part)))  # type: ignore[no-untyped-call]
                load = part.register_load_state_dict_pre_hook(WeakHook(_before_load, owner, part))  # type: ignore[no-untyped-call]
                handles.append(load)
    return handles
