"""Hooks on the model: they open the window at a training forward and keep displaced weights out of what is saved.

Every hook is a :class:`~s2sam.hooks.WeakHook`: it fires only for the module it was put on, and turns into nothing when
the model is copied or pickled.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from s2sam.hooks import WeakHook
from s2sam.private_torch import is_in_functional_call
from s2sam.sam.sharded import address, is_sharded, weights_move


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


class Places:
    """Where the parameters of an optimizer stand in its models, so that a forward can tell whether it runs on them."""

    def __init__(self, models: Sequence[nn.Module], parameters: Iterable[Tensor]) -> None:
        self._models = [weakref.ref(m) for m in models]
        self._parameters: list[tuple[dict[str, Any], str, Tensor]] = []  #: where, key, what
        self._modules: list[tuple[dict[str, Any], str, nn.Module]] = []  #: the same of modules
        self._find({id(p) for p in parameters})

    def _find(self, wanted: set[int]) -> None:
        """Remember the first place of each parameter with one of these ids, and all places of modules."""
        found: dict[int, tuple[dict[str, Any], str, Tensor]] = {}
        modules: list[tuple[dict[str, Any], str, nn.Module]] = []
        for module in [part for ref in self._models if (model := ref()) is not None for part in model.modules()]:
            modules += [(module._modules, key, part) for key, part in module._modules.items() if part is not None]
            for key, p in module._parameters.items():
                if p is not None and id(p) in wanted:
                    found.setdefault(id(p), (module._parameters, key, p))
        self._parameters, self._modules = list(found.values()), modules

    def hold(self) -> bool:
        """True if the models hold the parameters; False inside a functional_call that puts other tensors there.

        Cost: an identity check per parameter and module.

        Raises:
            RuntimeError: some have left the models for good.
        """
        places = (*self._parameters, *self._modules)
        if all(slots.get(key) is thing for slots, key, thing in places):
            return True
        if is_in_functional_call():
            return False
        gathered = [p for _, _, p in self._parameters if is_sharded(p)]
        if gathered:  # FSDP2 leaves the gathered weights of its root in the places of the sharded ones
            weights_move(gathered, for_a_look=True)
        before = list(self._parameters)
        self._find({id(p) for _, _, p in before})
        missing = len(before) - len(self._parameters)
        if not missing:  # moved within the models, by torch.nn.utils.parametrize for instance
            return True
        self._parameters = before
        raise RuntimeError(
            f"S2SAM: {missing} of {len(before)} parameters that its optimizer trains are no longer in the model; "
            "something has put others in their place (fully_shard, model.to() with "
            "torch.__future__.set_overwrite_module_params_on_conversion, load_state_dict(assign=True), a new layer). "
            "Call sam.remove(), build the optimizer from model.parameters() as they are now, and attach again"
        )

    def heirs(self) -> dict[int, Tensor]:
        """What stands in the places of parameters that are no longer there, by the id of the old one."""
        there = ((p, slots.get(key)) for slots, key, p in self._parameters if not is_sharded(p))
        return {id(p): q for p, q in there if q is not None and q is not p}


class CompiledCall:
    """The call of a module that was compiled in place, with the window around it instead of inside its graph."""

    def __init__(self, owner: WindowOwner, module: nn.Module, compiled: Callable[..., Any]) -> None:
        self._owner, self._module, self.compiled = weakref.ref(owner), weakref.ref(module), compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the compiled module."""
        owner, module = self._owner(), self._module()
        if owner is None or module is None:
            return self.compiled(*args, **kwargs)
        _before_forward(owner, module, args)
        try:
            return self.compiled(*args, **kwargs)
        finally:
            owner._leave_forward()

    def remove(self) -> None:
        """Put the compiled call back where it was."""
        module = self._module()
        if module is not None and module._compiled_call_impl is self:
            module._compiled_call_impl = self.compiled


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

    The forward hooks sit on each model itself (around the compiled call, if it was compiled in place), the state-dict
    hooks on every sub-module, so that `model.encoder.state_dict()` is clean as well.
    """
    handles: list[Any] = []
    for model in models:
        compiled = getattr(model, "_compiled_call_impl", None)
        if compiled is not None:
            model._compiled_call_impl = CompiledCall(owner, model, compiled)
            handles.append(model._compiled_call_impl)
        else:
            handles.append(model.register_forward_pre_hook(WeakHook(_before_forward, owner, model), prepend=True))
            handles.append(model.register_forward_hook(WeakHook(_after_forward, owner, model), always_call=True))
        for part in model.modules():
            save, load = WeakHook(_save_clean, owner, part), WeakHook(_before_load, owner, part)
            handles.append(part.register_state_dict_post_hook(save))  # type: ignore[no-untyped-call]
            handles.append(part.register_load_state_dict_pre_hook(load))  # type: ignore[no-untyped-call]
    return handles
