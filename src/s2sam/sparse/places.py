"""Where the masked weights stand in the model, and who masks them: one sparsifier, and weights that the model holds."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from s2sam.hooks import WeakHook
from s2sam.private_torch import in_ddp_join
from s2sam.sparse import sync
from s2sam.sparse.prunable import unwrap

if TYPE_CHECKING:
    from s2sam.sparse.base import Sparsifier

_attached: weakref.WeakSet[Sparsifier] = weakref.WeakSet()


class Places:
    """The places of `weights` in `model`: the parameters of its modules, wherever a parametrization moves them.

    Cost: a dictionary look-up for each weight and each module above one; a walk over the model if one does not fit.
    """

    def __init__(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        self.model, self.weights = unwrap(model), weights
        self._shapes = {name: w.shape for name, w in weights.items()}
        self._links: list[tuple[dict[str, Any], str, Any]] = []  # what a module holds under which name
        self._walk()

    def missing(self) -> list[str]:
        """The names of the weights that the model no longer holds, anywhere, or that have another shape (FSDP1)."""
        cut = [name for name, w in self.weights.items() if w.shape != self._shapes[name]]
        if cut:
            return cut
        if all(table.get(key) is held for table, key, held in self._links):
            return []
        return self._walk()

    def _walk(self) -> list[str]:
        wanted = {id(w): name for name, w in self.weights.items()}
        above: dict[int, tuple[nn.Module, str, nn.Module]] = {}
        links: dict[tuple[int, str], tuple[dict[str, Any], str, Any]] = {}
        for module in self.model.modules():
            for key, child in module._modules.items():
                if child is not None:
                    above.setdefault(id(child), (module, key, child))
            for key, parameter in module._parameters.items():
                if parameter is None or wanted.pop(id(parameter), None) is None:
                    continue
                links[id(module), key] = (module._parameters, key, parameter)
                inner = module
                while inner is not self.model:
                    parent, name, inner = above[id(inner)]
                    links[-id(parent), name] = (parent._modules, name, inner)
                    inner = parent
        if not wanted:
            self._links = list(links.values())
        return list(wanted.values())


def check_free(weights: Mapping[str, Tensor], optimizers: Sequence[Optimizer]) -> None:
    """Raise ValueError if another sparsifier masks one of the weights, or two of the optimizers hold it."""
    held = [{id(p) for group in one.param_groups for p in group["params"]} for one in optimizers]
    for name, w in weights.items():
        if sum(id(w) in ids for ids in held) > 1:
            raise ValueError(
                f"{name!r} is in two of the optimizers, and each would give it masks of its own; put every weight "
                "into one optimizer"
            )
    if _taken(weights):
        gc.collect()  # one whose optimizer is gone lives on in a circle of references
        if _taken(weights):
            raise ValueError("these weights are sparse already; call .remove() on their sparsifier before sparsify()")


@torch.no_grad()
def mask_copy(model: nn.Module, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Zero the parameters of `model`, a copy of the network that holds `weights`, where `masks` are False.

    Raises:
        ValueError: it has no such parameters, of other shapes, sharded ones, or these very weights; nothing is changed.
    """
    found = _matching(model, masks)
    live = {w.untyped_storage().data_ptr() for w in weights.values() if w.device.type != "meta"}
    for name, mask in masks.items():
        p = found[name]
        if hasattr(p, "placements"):
            raise ValueError(f"{name!r} of this model is sharded (DTensor), which sparse training does not support yet")
        if p.shape != mask.shape:
            raise ValueError(
                f"{name!r} has shape {tuple(p.shape)} in this model and {tuple(mask.shape)} in the one that is "
                "trained; give a copy of that one"
            )
        if p.untyped_storage().data_ptr() in live:
            raise ValueError(
                f"{name!r} of this model is the weight that is trained, not a copy; call sparsifier.apply() for it"
            )
    for name, mask in masks.items():
        found[name].mul_(mask.to(found[name].device))


def _matching(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """The parameters of `model` by these names, as they are once wrappers around it are off."""
    wanted, inner = {_bare(name): name for name in names}, model
    while True:
        inner = unwrap(inner)
        here = {_bare(name): p for name, p in inner.named_parameters(remove_duplicate=False)}
        if wanted.keys() <= here.keys():
            return {name: here[bare] for bare, name in wanted.items()}
        below = inner._modules.get("module")  # AveragedModel, and averages of other libraries
        if below is None:
            lacking = next(name for bare, name in wanted.items() if bare not in here)
            raise ValueError(
                f"this {type(model).__name__} has no parameter {lacking!r}; give a copy of the model that is trained, "
                "or a wrapper that holds one as .module"
            )
        inner = below


def _bare(name: str) -> str:
    """Without what torch.compile of a part of the model puts into it."""
    return name.replace("_orig_mod.", "")


def claim(owner: Sparsifier) -> None:
    """Note that `owner` masks its weights from now on."""
    _attached.add(owner)


def release(owner: Sparsifier) -> None:
    """Note that `owner` masks nothing any longer."""
    _attached.discard(owner)


def watch(owner: Sparsifier, model: nn.Module, *, changes: bool) -> list[Any]:
    """Handles of hooks on the modules: weights that are loaded are checked, and DDP's join() is refused.

    Args:
        owner: whom the hooks tell.
        model: on whose modules they are.
        changes: whether its masks change in training, for which all ranks must take part.
    """
    handles: list[Any] = []
    for module in model.modules():
        load = WeakHook(_weights_loaded, owner, module)
        handles.append(module.register_load_state_dict_pre_hook(load))  # type: ignore[no-untyped-call]
    if changes and sync.world_size() > 1:
        inner = unwrap(model)
        handles.append(inner.register_forward_pre_hook(WeakHook(_refuse_join, owner, inner)))
    return handles


def _weights_loaded(owner: Sparsifier, module: nn.Module, *args: Any) -> None:
    owner._unchecked = True  # the next step looks whether they fit the masks


def _refuse_join(owner: Sparsifier, module: nn.Module, *args: Any) -> None:
    if not owner.frozen and in_ddp_join():
        raise RuntimeError(
            f"method {owner.method!r} changes its masks on all ranks at once, and inside DDP's join() a rank whose "
            "inputs have run out would take no part, so that the others wait for ever; give every rank as many "
            "batches (drop_last), call sparsifier.freeze(), or use a fixed mask (method='static')"
        )


def _taken(weights: Mapping[str, Tensor]) -> bool:
    ids = {id(w) for w in weights.values()}
    return any(id(w) in ids for other in list(_attached) for w in other.weights.values())
