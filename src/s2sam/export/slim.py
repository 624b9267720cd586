"""slim(): the dense network that is left when pruned channels are cut out, and an optimizer that goes on with it."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from s2sam.hooks import StepHooks, step_hooks
from s2sam.sparse.base import Sparsifier
from s2sam.sparse.channel_cut import Rows, cut, cut_tensor
from s2sam.sparse.channel_graph import channel_groups
from s2sam.sparse.channel_proof import same_output
from s2sam.sparse.channels import IN, OUT, SCALE, SHIFT, ChannelGroup, rows
from s2sam.sparse.prunable import unwrap
from s2sam.sparse.saliency import Batch
from s2sam.sparse.structured import Structured

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  #: of the largest output; 0.05 for narrower numbers


@dataclass(frozen=True, eq=False)
class Slim:
    """A slim network and what goes with it.

    `optimizer` is None if none was given; `masks` are those of the weights that are left, True = active;
    `removed` says how many channels each group lost, `parameters` how many parameters there were and are.
    """

    model: nn.Module
    optimizer: Optimizer | None
    masks: dict[str, Tensor]
    removed: dict[str, int]
    parameters: tuple[int, int]


def slim(
    model: nn.Module,
    source: Sparsifier | Mapping[str, Tensor] | None = None,
    example_input: Any = None,
    optimizer: Optimizer | None = None,
) -> Slim:
    """Cut out the channels of `model` that are pruned; model and optimizer stay as they are, the result is a copy.

    In eval mode the slim network computes what the masked one does, up to the rounding of shorter sums. Pruned are the
    channels that the structured sparsifier `source` has pruned. For any other sparsifier, masks of weights by parameter
    name, or None (the zeros that are there) it is every channel that cannot matter: no weight that reads it is left, or
    no weight, bias or BatchNorm scale that makes it. One that is a constant to those that read it stays: BatchNorm may
    move it off 0, and so may an activation (sigmoid(0) = 1/2).

    The optimizer is a new one of the same class and settings, whose state is that of the parameters that are left, rows
    cut out likewise; S2SAM's direction is part of it, and `S2SAM(result.optimizer, model=result.model, ...)` goes on
    from there. A learning-rate scheduler must be made anew. The slim network has no hooks; what is left of unstructured
    masks is in the result.

    Args:
        model: compiled and DDP-wrapped models count as the module inside.
        source: see above.
        example_input: as `model` takes it: a tensor, a list of arguments, or a dict of named ones; needed unless
            `source` is structured, and used to check the result if given.
        optimizer: that of the parameters.

    Raises:
        ValueError: no example input where one is needed, masks of other shapes, the extra `structured` is missing,
            several optimizers, or one that keeps more than numbers beside its state.
        RuntimeError: the slim network computes something else (a model that depends on the number of its channels).

    Cost: a copy of the model; with an example input a traced pass (unless structured) and two more.

    >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> _ = net[2].weight.data[:, :4].zero_()
    >>> import pytest
    >>> _ = pytest.importorskip("torch_pruning")
    >>> slim(net, example_input=torch.zeros(1, 4)).model
    Sequential(
      (0): Linear(in_features=4, out_features=2, bias=True)
      (1): ReLU()
      (2): Linear(in_features=2, out_features=2, bias=True)
    )
    """
    if not isinstance(optimizer, Optimizer | None):
        raise ValueError(f"slim() carries one optimizer, got {type(optimizer).__name__}; make new ones for the result")
    inner = unwrap(model)
    held = [optimizer] if optimizer is not None else source.optimizers if isinstance(source, Sparsifier) else []
    windows: list[Any] = [step_hooks(one).sharpness for one in held]
    masks = source.masks if isinstance(source, Sparsifier) else dict(source or {})
    if optimizer is not None and windows == [None]:
        step_hooks(optimizer).retire()
    with ExitStack() as clean:
        for sharpness in {id(one): one for one in windows if one is not None}.values():
            clean.enter_context(sharpness.clean())
        masked = copy.deepcopy(inner)
    masked.eval()
    for p in masked.parameters():
        p.grad = None
    _apply(masked, masks)
    example = None if example_input is None else Batch.read((example_input, None), next(masked.parameters()))
    if isinstance(source, Structured):
        groups, keep = source.channels.groups, source.keep
    else:
        if example_input is None:
            raise ValueError("slim() needs example_input=, what the model is called with, to find its channels")
        assert example is not None
        groups = channel_groups(masked, (example_input, None)).groups
        keep = {group.name: useful(group, masked, example) for group in groups}
    alive = rows(groups, keep)
    small = copy.deepcopy(masked)
    cut(small, alive)
    if example is not None:
        _check(masked, small, example)
    for module, was in zip(small.modules(), inner.modules(), strict=True):
        module.training = was.training
    return Slim(
        small,
        None if optimizer is None else _carry(optimizer, inner, small, alive),
        {name: cut_tensor(mask, alive.get(name, {})) for name, mask in masks.items()},
        {name: int((~k).sum()) for name, k in keep.items()},
        (sum(p.numel() for p in inner.parameters()), sum(p.numel() for p in small.parameters())),
    )


def useful(group: ChannelGroup, model: nn.Module, example: Batch) -> Tensor:
    """Which channels of the group can matter to what `model` computes; at least one counts as such.

    A channel that is read and that nothing makes is 0 where it begins, but not behind an activation with f(0) != 0: it
    matters if the layers that read it see something else than 0. Cost: a pass, if there is such a channel.
    """
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    read = _any(group, tensors, [IN])
    made = _any(group, tensors, [OUT]) | _any(group, tensors, [SCALE]) | _any(group, tensors, [SHIFT])
    if bool((read & ~made).any()):
        made |= arrives(group, model, example)
    keep = read & made
    if not bool(keep.any()):
        keep[0] = True
    return keep


@torch.no_grad()
def arrives(group: ChannelGroup, model: nn.Module, example: Batch) -> Tensor:
    """Which channels of the group reach a layer that reads them as anything but 0, on the example."""
    found = torch.zeros(group.size, dtype=torch.bool)

    def watch(layer: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], owner: Tensor) -> None:
        (x,) = (*args, *kwargs.values())
        columns = x.movedim(1 - layer.weight.dim(), 0).flatten(1)
        seen = (columns != 0).any(1).view(-1, len(owner)).any(0).cpu()  # of a grouped convolution: in any group
        found[owner[seen & (owner >= 0)]] = True

    handles = []
    for m in group.of(IN):
        layer, hook = model.get_submodule(m.name.rpartition(".")[0]), partial(watch, owner=m.owner.cpu())
        handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        model(*example.args, **example.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _any(group: ChannelGroup, tensors: Mapping[str, Tensor], roles: Iterable[str]) -> Tensor:
    if not group.of(*roles):
        return torch.zeros(group.size, dtype=torch.bool)
    return (group.matrix(tensors, *roles) != 0).any(1).cpu()


@torch.no_grad()
def _apply(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    held = dict(model.named_parameters())
    for name, mask in masks.items():
        if name not in held or held[name].shape != mask.shape:
            shape = tuple(held[name].shape) if name in held else "no such parameter"
            raise ValueError(f"the mask of {name!r} has shape {tuple(mask.shape)}, the model has {shape}")
        held[name].mul_(mask.to(held[name].device))


def _check(masked: nn.Module, small: nn.Module, example: Batch) -> None:
    tolerance = TOLERANCE.get(next(masked.parameters()).dtype, 0.05)
    try:
        same = same_output(masked, small, example, tolerance=tolerance)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise RuntimeError(f"the slim network cannot run on the example input ({error}); use the masked one") from error
    if not same:
        raise RuntimeError("the slim network computes something else than the masked one; use the masked one")


def _carry(optimizer: Optimizer, old: nn.Module, new: nn.Module, alive: Rows) -> Optimizer:
    """An optimizer as `optimizer`, over the parameters of `new`."""
    names = {id(p): name for name, p in old.named_parameters()}
    twins = dict(new.named_parameters())
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    saved = optimizer.state_dict()  # weights may be displaced: it holds what opens that window again
    for index, state in saved["state"].items():
        p = parameters[index]
        dims = alive.get(names.get(id(p), ""), {})
        saved["state"][index] = {key: _cut_state(value, p, dims) for key, value in state.items()}
    carried = copy.copy(optimizer)
    carried.defaults = copy.deepcopy({key: value for key, value in optimizer.defaults.items() if key != "rho"})
    carried.state = defaultdict(dict)
    carried.param_groups = [
        {**group, "params": [twins[names[id(p)]] if id(p) in names else p for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    carried.load_state_dict(saved)
    for key, value in vars(optimizer).items():  # copy.copy() leaves out what a subclass of Optimizer has of its own
        if (
            key in vars(carried) or isinstance(value, StepHooks) or key == "step"
        ):  # a scheduler puts its own step() there
            continue
        if not isinstance(value, int | float | str | None):
            raise ValueError(
                f"{type(optimizer).__name__} keeps {key!r} beside its state, which slim() cannot cut; leave out "
                "optimizer= and make a new one for the result"
            )
        setattr(carried, key, value)
    return carried


def _cut_state(value: Any, p: Tensor, dims: Mapping[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return cut_tensor(value, dims) if value.dim() == p.dim() else value.clone()
    return copy.deepcopy(value)
