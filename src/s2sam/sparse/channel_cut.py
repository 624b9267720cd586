"""Take rows out of the tensors of a model, and tell its layers their new sizes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

Rows = Mapping[str, Mapping[int, Tensor]]


def cut_tensor(tensor: Tensor, dims: Mapping[int, Tensor]) -> Tensor:
    """The rows that stay, of each dimension named; a dimension of another length than its rows is left alone.

    So a state tensor that keeps one number for each row (Adafactor's) is cut with its weight.

    >>> cut_tensor(torch.arange(6).view(2, 3), {1: torch.tensor([True, False, True])}).tolist()
    [[0, 2], [3, 5]]
    """
    for dim, alive in dims.items():
        if tensor.shape[dim] == len(alive):
            tensor = tensor.index_select(dim, alive.nonzero().flatten().to(tensor.device))
    return tensor.clone()


@torch.no_grad()
def cut(model: nn.Module, rows: Rows) -> None:
    """Replace the tensors called in `rows` by those of their rows that stay, in place, and set the layers' sizes.

    Layers: Conv1d/2d/3d (grouped and depthwise too), Linear, BatchNorm, PReLU. Parameters are new objects.

    >>> layer = nn.Linear(3, 2)
    >>> cut(layer, {"weight": {0: torch.tensor([True, False])}, "bias": {0: torch.tensor([True, False])}})
    >>> layer
    Linear(in_features=3, out_features=1, bias=True)
    """
    for prefix, module in model.named_modules():
        changed = False
        for tensors in (module._parameters, module._buffers):
            for key, old in list(tensors.items()):
                dims = rows.get(f"{prefix}.{key}" if prefix else key)
                if dims and old is not None:
                    new = cut_tensor(old.detach(), dims)
                    if isinstance(old, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=old.requires_grad)
                    tensors[key] = new  # type: ignore[assignment]
                    changed = True
        if changed:
            _resize(module)


def _resize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        if module.groups == module.in_channels == module.out_channels:
            module.groups = len(module.weight)  # depthwise
        module.out_channels, each = module.weight.shape[:2]
        module.in_channels = each * module.groups
    elif isinstance(module, nn.modules.batchnorm._BatchNorm):
        held = module.weight if module.weight is not None else module.running_mean
        module.num_features = module.num_features if held is None else len(held)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)
