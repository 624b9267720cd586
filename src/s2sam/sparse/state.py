"""A sparsifier's state as plain tensors, numbers and strings, and back, with a sentence for whatever does not fit."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from s2sam.sparse.masks import pack_bits, unpack_bits

if TYPE_CHECKING:
    from s2sam.sparse.base import Sparsifier

FORMAT, VERSION = "s2sam.sparsifier", 1
_KEYS = ("method", "steps", "updates", "frozen", "shapes", "masks", "initial", "explored", "generator", "extra")


def save(sparsifier: Sparsifier) -> dict[str, Any]:
    """All that a resumed run needs: masks as bits, counters, generator, and the masks at the start and their union.

    A snapshot: later steps do not change it. Cost: a copy of what the method keeps besides.
    """
    sparsifier.require_masks()
    return {
        "format": FORMAT,
        "version": VERSION,
        "method": sparsifier.method,
        "steps": [part.step for part in sparsifier.parts],
        "sparsity": sparsifier.final_sparsity,
        "min_per_filter": sparsifier.min_per_filter,
        "updates": sparsifier.updates,
        "frozen": sparsifier.frozen,
        "shapes": {name: list(mask.shape) for name, mask in sparsifier.masks.items()},
        "masks": _pack(sparsifier.masks),
        "initial": _pack(sparsifier._initial),
        "explored": _pack(sparsifier._explored),
        "stayed": _pack(sparsifier._stayed),
        "adopted": dict(sparsifier.adopted),
        "blank": sorted(sparsifier._blank),
        "generator": sparsifier.generator.get_state(),
        "extra": copy.deepcopy(sparsifier.extra_state()),
    }


def load(sparsifier: Sparsifier, saved: Mapping[str, Any]) -> None:
    """Put a saved state into `sparsifier`; nothing changes if it does not fit."""
    if not isinstance(saved, Mapping) or saved.get("format") != FORMAT:
        raise ValueError("this is no sparsifier state; pass what sparsifier.state_dict() returned")
    if saved.get("version") != VERSION:
        raise ValueError(
            f"the sparsifier state has version {saved.get('version')!r}; this s2sam reads version {VERSION}"
        )
    missing = [key for key in _KEYS if key not in saved]
    if missing:
        raise ValueError(f"the sparsifier state is damaged: it has no {missing[0]!r}")
    if saved["method"] != sparsifier.method:
        raise ValueError(
            f"this state was saved by method {saved['method']!r}, the sparsifier's is {sparsifier.method!r}; "
            f"resume with method={saved['method']!r}"
        )
    if saved.get("sparsity", sparsifier.final_sparsity) != sparsifier.final_sparsity:  # not in older states
        raise ValueError(
            f"this state was saved at a target sparsity of {saved['sparsity']}, the sparsifier's is "
            f"{sparsifier.final_sparsity}; a run keeps its sparsity: resume with sparsity={saved['sparsity']}"
        )
    _check_shapes(sparsifier, saved["shapes"])
    if len(saved["steps"]) != len(sparsifier.parts):
        raise ValueError(
            f"this state was saved with {len(saved['steps'])} optimizers, there are {len(sparsifier.parts)}; "
            "give the same list of optimizers"
        )
    if (before := saved.get("min_per_filter", 0)) != sparsifier.min_per_filter:  # not in older states: 0
        warnings.warn(
            f"this state was saved with min_per_filter={before}, the sparsifier has {sparsifier.min_per_filter}: the "
            f"masks will move in another way than before; give min_per_filter={before} to go on as it was",
            stacklevel=3,
        )
    masks = _unpack(sparsifier, saved["masks"])
    initial = _unpack(sparsifier, saved["initial"]) if saved["initial"] else {}
    explored = _unpack(sparsifier, saved["explored"]) if saved["explored"] else {}
    both = {name: initial[name] & mask for name, mask in masks.items()} if initial else {}  # older states have no more
    stayed = _unpack(sparsifier, saved["stayed"]) if saved.get("stayed") else both
    if (adopted := dict(saved.get("adopted", {}))) != sparsifier.adopted:  # plans are made from these counts
        sparsifier.adopted = adopted
        sparsifier.check_options()
    sparsifier.load_extra_state(saved["extra"])
    sparsifier.generator.set_state(saved["generator"])
    for part, step in zip(sparsifier.parts, saved["steps"], strict=True):
        part.step = step
        part.layers.follow_device()
    for name, mask in sparsifier.masks.items():
        mask.copy_(masks[name])
    sparsifier.count_kept()
    sparsifier.frozen, sparsifier.updates, sparsifier.last_update = saved["frozen"], saved["updates"], None
    sparsifier._initial, sparsifier._explored, sparsifier._stayed = initial, explored, stayed
    sparsifier._blank = set(saved["blank"]) if "blank" in saved else sparsifier.all_zero()


def _check_shapes(sparsifier: Sparsifier, shapes: Mapping[str, Any]) -> None:
    here = {name: list(mask.shape) for name, mask in sparsifier.masks.items()}
    if shapes == here:
        return
    different = [name for name in {**here, **shapes} if here.get(name) != shapes.get(name)]
    name = different[0]
    raise ValueError(
        f"this state belongs to another set of weights: {len(different)} differ, for instance {name!r} has shape "
        f"{shapes.get(name, 'none')} in the state and {here.get(name, 'none')} here; use the same include and exclude"
    )


def _pack(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: pack_bits(mask) for name, mask in masks.items()}


def _unpack(sparsifier: Sparsifier, packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    masks = sparsifier.masks
    if packed.keys() != masks.keys():
        raise ValueError("the sparsifier state is damaged: it has not one mask for each of its layers")
    with torch.no_grad():
        return {name: unpack_bits(packed[name], mask.shape).to(mask.device) for name, mask in masks.items()}
