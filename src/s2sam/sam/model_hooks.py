"""Hooks on the model: they open the window at a training forward and keep displaced weights out of what is saved.

Every hook is a :class:`~s2sam.hooks.WeakHook`: it fires only for the module it was put on, and turns into nothing when
the model is copied or pickled.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from s2sam.hooks import WeakHook
from s2sam.sam.sharded import address


class WindowOwner(Protocol):
    """What the hooks need from S2SAM."""

    def restore(self) -> None:
        """End the window."""

    def _enter_forward(self, module: nn.Module | None, clean: bool) -> None: ...
    def _leave_forward(self) -> None: ...
    def _displaced(self) -> dict[int, tuple[Tensor, Tensor]]: ...
    def _weights_replaced(self, load: object) -> None: ...


def _before_forward(owner: WindowOwner, module: nn.Module, args: Any) -> None:
    owner._enter_forward(module, clean=not (module.training and torch.is_grad_enabled()))


def _after_forward(owner: WindowOwner, module: nn.Module, args: Any, output: Any) -> None:
    owner._leave_forward()


def _save_clean(owner: WindowOwner, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    displaced = owner._displaced()
    if displaced:
        for key, value in state.items():
            if not torch.is_tensor(value):
                continue
            p, w = displaced.get(address(value), (None, None))
            # keep_vars=True asks for the parameter itself
            if p is not None and w is not None and value is not p and key.startswith(prefix) and value.shape == p.shape:
                state[key] = w.detach().clone()


def _before_load(owner: WindowOwner, module: nn.Module, *args: Any) -> None:
    owner.restore()
    owner._weights_replaced(args[-1])  # the list of errors: one per load_state_dict call


def check_models(model: nn.Module | Sequence[nn.Module] | None) -> list[nn.Module]:
    """A Module, a sequence of them, or None, as a list. Raises TypeError for anything else."""
    several = isinstance(model, Sequence) and not isinstance(model, nn.Module | str)
    models: list[Any] = [] if model is None else list(model) if several else [model]  # type: ignore[arg-type]
    for m in models:
        if not isinstance(m, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module or a list of them, got {type(m).__name__}")
    return models


def hook_models(owner: WindowOwner, models: Iterable[nn.Module]) -> list[Any]:
    """Register all hooks for `owner` on `models`; returns the handles.

    The forward hooks sit on each model itself, the state-dict hooks on every sub-module, so that
    `model.encoder.state_dict()` is clean as well.
    """
    handles: list[Any] = []
    for model in models:
        handles.append(model.register_forward_pre_hook(WeakHook(_before_forward, owner, model), prepend=True))
        handles.append(model.register_forward_hook(WeakHook(_after_forward, owner, model), always_call=True))
        for part in model.modules():
            save, load = WeakHook(_save_clean, owner, part), WeakHook(_before_load, owner, part)
            handles.append(part.register_state_dict_post_hook(save))  # type: ignore[no-untyped-call]
            handles.append(part.register_load_state_dict_pre_hook(load))  # type: ignore[no-untyped-call]
    return handles
