"""Whole models and their states: from dense layers to compact ones and back."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from s2sam.compact.layers import SparseConv2d, SparseLinear, StoredLayer, obstacle
from s2sam.compact.pattern import SparsePattern


def from_dense(model: nn.Module, masks: Mapping[str, Tensor], block: int = 1) -> nn.Module:
    """A copy of `model` in which each layer whose weight has a mask stores the weights that the mask keeps.

    `masks` are bool tensors by parameter name, True = weight, as in `sparsifier.masks`; the others stay dense. The
    copy has parameters of its own: build its optimizer from `copy.parameters()`. Call it inside `sam.clean()` where a
    window of S2SAM is open.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> small = from_dense(net, {"0.weight": net[0].weight > 0.2})
    >>> type(small[0]).__name__, type(small[2]).__name__
    ('SparseLinear', 'Linear')

    Raises:
        ValueError: a name is no weight of a layer that can be converted, or a mask or the block does not fit it.
            Nothing is converted then.
    """
    model = unwrapped(model)
    reasons = obstacles(model)
    modules = dict(model.named_modules())
    made: dict[str, StoredLayer] = {}
    for name, mask in masks.items():
        prefix, _, last = name.rpartition(".")
        if prefix not in modules or last != "weight":
            known = ", ".join(f"{layer}.weight".lstrip(".") for layer, reason in reasons.items() if not reason)
            raise ValueError(f"{name!r} is no weight of a layer that can be converted; these are: {known or 'none'}")
        if prefix not in reasons or reasons[prefix]:
            raise ValueError(f"{name!r} cannot be converted: {reasons.get(prefix, 'it has no matrix of weights')}")
        try:
            made[prefix] = compact_layer(modules[prefix], mask, block)
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}") from error
    return replaced(copy.deepcopy(model), made)


def to_dense(model: nn.Module) -> nn.Module:
    """A copy of `model` with a dense layer in the place of each compact one: for export, or to differentiate twice.

    >>> to_dense(nn.Sequential(SparseLinear.from_dense(nn.Linear(4, 2))))
    Sequential(
      (0): Linear(in_features=4, out_features=2, bias=True)
    )
    """
    small = copy.deepcopy(unwrapped(model))
    compact = (SparseLinear, SparseConv2d)
    return replaced(small, {name: m.to_dense() for name, m in small.named_modules() if isinstance(m, compact)})


def dense_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """The `state_dict()` of a model with compact layers as one that loads into the same model with dense layers.

    For every compact layer `values`, `crow`, `col` and `dense_shape` become `weight`; all else stays as it is. The
    other way needs no function: a compact layer also loads the state of a dense one that is 0 outside of its pattern.

    >>> layer = SparseLinear.from_dense(nn.Linear(3, 2), nn.Linear(3, 2).weight > 0)
    >>> nn.Linear(3, 2).load_state_dict(dense_state(layer.state_dict()))
    <All keys matched successfully>

    Raises:
        ValueError: the pattern of a layer is damaged; the sentence names it.
    """
    dense: dict[str, Any] = {}
    parts = ("crow", "col", "dense_shape")
    for key, value in state.items():
        prefix = key[: key.rfind(".") + 1]
        name = key[len(prefix) :]
        whole = all(prefix + part in state for part in ("values", *parts))
        if whole and name == "values":
            shape = state[prefix + "dense_shape"].tolist()
            block = value.shape[1] if value.dim() == 3 else 1
            try:
                size = (shape[0] // block, math.prod(shape[1:]) // block)
                pattern = SparsePattern.from_csr(state[prefix + "crow"], state[prefix + "col"], size)
                layer = StoredLayer(pattern, value, None, shape)
            except ValueError as error:
                raise ValueError(f"{key} of this state cannot be read: {error}") from error
            dense[prefix + "weight"] = layer.dense_weight().detach()
        elif not (whole and name in parts):
            dense[key] = value
    return dense


def obstacles(model: nn.Module) -> dict[str, str]:
    """Every layer that owns a matrix of weights, by name, and why it cannot become compact ("" if it can)."""
    owners: dict[int, list[str]] = {}
    layers: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        matrices = [p for p in module.parameters(recurse=False) if p.dim() > 1 or isinstance(module, StoredLayer)]
        if matrices:
            layers[name] = module
        for p in module.parameters(recurse=False):
            owners.setdefault(id(p), []).append(name)
    found = {}
    for name, module in layers.items():
        others = [o for p in module.parameters(recurse=False) for o in owners[id(p)] if o != name]
        if isinstance(module, StoredLayer):
            found[name] = "it is compact already"
        elif reason := obstacle(module):
            found[name] = reason
        elif others:
            found[name] = f"it shares a parameter with {others[0]!r}"
        elif any(
            (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        ):
            found[name] = "it has hooks, which a new layer would not have"
        else:
            found[name] = ""
    return found


def compact_layer(layer: nn.Module, mask: Tensor | None = None, block: int = 1) -> StoredLayer:
    """The compact layer of a Linear or Conv2d."""
    if isinstance(layer, nn.Conv2d):
        return SparseConv2d.from_dense(layer, mask, block)
    return SparseLinear.from_dense(layer, mask, block)  # type: ignore[arg-type]


def replaced(model: nn.Module, layers: Mapping[str, nn.Module]) -> nn.Module:
    """`model` with `layers` in the place of the modules of these names, and of the same modules under other names."""
    old = dict(model.named_modules())
    new = {id(old[name]): layer.train(old[name].training) for name, layer in layers.items()}
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if id(child) in new:
                parent._modules[key] = new[id(child)]
    return new.get(id(model), model)


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module inside `torch.compile`, DataParallel or DistributedDataParallel."""
    while True:
        inner = model._modules.get("_orig_mod")
        if inner is None and isinstance(model, (nn.DataParallel, DistributedDataParallel)):
            inner = model.module
        if inner is None:
            return model
        model = inner
