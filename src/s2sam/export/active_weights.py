"""A sparse network on disk: one safetensors file with the active weights and a bit for each place they may stand in.

A masked tensor becomes two: NAME:values, its active weights in the order of their places, and NAME:mask, its mask
packed to bits; other tensors stay as they are. Any reader of safetensors can open the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from s2sam.outside import COUNT, fit, parse_json, reading
from s2sam.sparse.masks import pack_bits, unpack_bits
from s2sam.train.atomic import atomic

FORMAT = "s2sam.active_weights 1"
VALUES, MASK = ":values", ":mask"


def save_active(path: str | Path, tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> int:
    """Write `tensors` without the weights that `masks` prune; returns the size of the file in bytes.

        bytes = sum over masked tensors (b * active + ceil(n / 8)) + sum over the others (b * n) + header

    with n elements of b bytes. A dense file of fp32 has 4 n, so at sparsity s the factor is about 1 / (1 - s + 1/32).

    Args:
        path: the file, which appears whole or not at all.
        tensors: as of `model.state_dict()`.
        masks: of some of them, bool, True = active, as of `sparsifier.masks`; {} writes all tensors whole.

    Raises:
        ValueError: a pruned weight is not exactly 0, so that leaving it out would lose it; or a mask that fits no
            tensor.
        OSError: the disk is full or not writable.

    Cost: a copy of the tensors in main memory.

    >>> import tempfile
    >>> weight, mask = torch.tensor([0.0, 1.5, 0.0, 2.5]), torch.tensor([False, True, False, True])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     size = save_active(f"{folder}/net.safetensors", {"weight": weight}, {"weight": mask})
    ...     tensors, masks = load_active(f"{folder}/net.safetensors")
    >>> tensors["weight"].tolist(), masks["weight"].tolist()
    ([0.0, 1.5, 0.0, 2.5], [False, True, False, True])
    """
    from safetensors.torch import save_file

    _check(tensors, masks)
    parts: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        kept = tensor.detach().cpu()
        if name in masks:
            parts[name + VALUES], parts[name + MASK] = kept[masks[name].cpu()], pack_bits(masks[name])
        else:
            parts[name] = kept.clone().contiguous()
    meta = {
        "format": FORMAT, "shapes": json.dumps({name: list(tensors[name].shape) for name in masks}),
        "order": json.dumps(list(tensors)),
    }  # fmt: skip
    with atomic(Path(path)) as temporary:
        save_file(parts, temporary, meta)
    return Path(path).stat().st_size


def load_active(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(tensors, masks) that :func:`save_active` wrote, bit for bit, on the CPU; pruned weights are 0.

    Raises:
        ValueError: the file is damaged or none of these; the sentence names it.
        FileNotFoundError: it is not there.
    """
    from safetensors import safe_open

    Path(path).stat()  # safetensors would not name a file that is not there
    with reading(path, "damaged or no file of active weights", "write it again"):
        with safe_open(path, "pt") as file:
            meta = file.metadata() or {}
            parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 it is no mapping
        if meta.get("format") != FORMAT:
            raise ValueError(f"its format is {meta.get('format')!r}")
        shapes, order = parse_json(meta["shapes"]), parse_json(meta["order"])
        fit({"shapes": shapes, "order": order}, {"shapes": {...: [COUNT]}, "order": [str]})
        masks = {name: unpack_bits(parts.pop(name + MASK), shape) for name, shape in shapes.items()}
        for name, mask in masks.items():
            values = parts.pop(name + VALUES)
            if values.shape != (int(mask.sum()),):
                raise ValueError(f"it has {values.numel()} values of {name!r} where the mask has {int(mask.sum())}")
            parts[name] = torch.zeros(mask.shape, dtype=values.dtype)
            parts[name][mask] = values
        if sorted(order) != sorted(parts):
            raise ValueError("its tensors are not those that it names")
    return {name: parts[name] for name in order}, masks


def _check(tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    for name in tensors:
        if name.endswith((VALUES, MASK)):
            raise ValueError(f"the name {name!r} ends like a part of another tensor in the file; give it another one")
    for name, mask in masks.items():
        if name not in tensors:
            raise ValueError(f"there is a mask of {name!r}, and no such tensor; give the tensors of the same network")
        if mask.dtype != torch.bool:
            raise ValueError(f"the mask of {name!r} is of {mask.dtype}, not bool; give masks as of sparsifier.masks")
        if mask.shape != tensors[name].shape:
            raise ValueError(
                f"the mask of {name!r} has shape {tuple(mask.shape)}, the tensor {tuple(tensors[name].shape)}; give "
                "those of one network"
            )
        wrong = int((tensors[name].detach()[~mask.to(tensors[name].device)] != 0).sum())
        if wrong:
            raise ValueError(
                f"{name!r} is not 0 in {wrong} places that its mask prunes, and they would be lost; call "
                "sparsifier.apply() first, outside of S2SAM's windows"
            )
