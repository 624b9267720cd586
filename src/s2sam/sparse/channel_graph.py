"""The channel groups of any model, from the dependency graph of torch-pruning (extra `structured`).

VainF/Torch-Pruning traces one forward pass and says which channels of which layers go together: through residual sums,
BatchNorm, depthwise convolutions, concatenation and flattening. Nothing else is asked of it, and nothing of it is seen
outside this file. Two things it does not say are added: in a grouped convolution the same channel of every convolution
group goes at once; and *proof*. Where tracing may be wrong (channels shifted by padding, sizes written into the code,
layers called as functions), removal would silently compute something else. So half the channels of every group are
really cut out of a copy with random weights, in float64, and a group whose cut changes the output stays dense.

Fang et al. 2023, DepGraph, arXiv:2301.12900. Cost: one traced pass; a copy and a pass, or one for each group if some
group cannot be cut.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from s2sam.sparse.channel_proof import proved, randomise
from s2sam.sparse.channels import (
    IN,
    OUT,
    SCALE,
    SHIFT,
    SLOPE,
    STATISTIC,
    ChannelGroup,
    Channels,
    Member,
)
from s2sam.sparse.saliency import Batch, scoring_copy

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.modules.batchnorm._BatchNorm,)
_KNOWN = (*_CONVS, nn.Linear, *_NORMS, nn.PReLU)
_OUTPUT = "it is part of the output"
Atom = tuple[str, str, int]  # layer, OUT or IN, channel


def channel_groups(model: nn.Module, batch: Any) -> Channels:
    """The groups of channels of `model` that can be pruned, found by running it on an (input, target) pair.

    >>> import pytest
    >>> _ = pytest.importorskip("torch_pruning")
    >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> found = channel_groups(net, (torch.zeros(2, 4), None))
    >>> [(g.name, g.size) for g in found.groups], dict(found.dense)
    ([('0', 6)], {'2': 'it is part of the output'})

    Raises:
        ValueError: the extra is missing, the model cannot be copied, or it fails on the input.
    """
    library = _library()
    with scoring_copy(model, (), dtype=torch.float64) as (twin, _):
        for p in twin.parameters():
            p.requires_grad_(True)
        randomise(twin)
        example = Batch.read(batch, next(iter(twin.parameters()), torch.zeros(())))
        classes, bad = _classes(twin, *_trace(library, twin, example))
        groups, dense = _groups(twin, classes, bad)
        return proved(twin, example, groups, dense | _others(twin))


def _library() -> Any:
    try:
        return importlib.import_module("torch_pruning")
    except ImportError as error:
        raise ValueError(
            "channels are found with the torch-pruning library, which is not installed; "
            "run: pip install 's2sam[structured]'"
        ) from error


def _trace(library: Any, twin: nn.Module, example: Batch) -> tuple[list[tuple[Atom, Atom]], dict[Atom, str]]:
    """Pairs of channels that go together, and channels that must stay with the reason."""
    names = {id(module): name for name, module in twin.named_modules()}
    calls: dict[str, int] = {}
    counters = [
        m.register_forward_hook(lambda m, *_: calls.update({names[id(m)]: calls.get(names[id(m)], 0) + 1}))
        for m in twin.modules()
        if isinstance(m, _KNOWN)
    ]
    graph = library.DependencyGraph()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph.build_dependency(
                twin,
                (),
                forward_fn=lambda m, _: m(*example.args, **example.kwargs),
                output_transform=lambda out: [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad],
                verbose=False,
            )
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the model fails on the example input ({reason}); give inputs as in training") from error
    finally:
        for counter in counters:
            counter.remove()
    pairs: list[tuple[Atom, Atom]] = []
    bad: dict[Atom, str] = {}
    for module in list(graph.module2node):
        if id(module) not in names or not isinstance(module, (*_CONVS, nn.Linear)):
            continue
        root, pruner = names[id(module)], graph.get_pruner_of_module(module)
        n = pruner.get_out_channels(module)
        try:
            items = list(graph.get_pruning_group(module, pruner.prune_out_channels, list(range(n))))
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AssertionError):
            items = []  # a layer behind it whose columns the library cannot map, such as an LSTM
            bad.update({(root, OUT, i): "its channels cannot be followed through the model" for i in range(n)})
            pairs += [((root, OUT, i), (root, OUT, i)) for i in range(n)]
        for item in items:
            target, out = item.dep.target.module, graph.is_out_channel_pruning_fn(item.dep.handler)
            if type(target).__name__ == "_OutputOp":
                bad.update({(root, OUT, i): _OUTPUT for i in item.root_idxs})
            elif isinstance(target, nn.Parameter):
                bad.update({(root, OUT, i): "it meets a parameter of no layer" for i in item.root_idxs})
            elif id(target) in names:
                name = names[id(target)]
                reason = _reason(target, calls.get(name, 0))
                for i, k in zip(item.root_idxs, item.idxs, strict=True):
                    pairs.append(((root, OUT, i), (name, OUT if out or _passes(target) else IN, k)))
                    if reason:
                        bad[root, OUT, i] = f"{name!r} {reason}"
    return pairs, bad


def _others(twin: nn.Module) -> dict[str, str]:
    """The layers with weights that are of no known kind."""
    return {
        name: f"it is a {type(module).__name__}, whose channels cannot be cut"
        for name, module in twin.named_modules()
        if not isinstance(module, _KNOWN) and any(p.dim() > 1 for p in module.parameters(recurse=False))
    }


def _passes(module: nn.Module) -> bool:
    """Whether input and output channels are the same."""
    return not isinstance(module, (*_CONVS, nn.Linear)) or _depthwise(module)


def _depthwise(module: nn.Module) -> bool:
    return isinstance(module, _CONVS) and module.groups == module.in_channels == module.out_channels > 1


def _reason(module: nn.Module, calls: int) -> str:
    if not isinstance(module, _KNOWN):
        return f"is a {type(module).__name__}, whose channels cannot be cut"
    if calls != 1:
        return f"is called {calls} times in one pass"
    if any(not isinstance(p, nn.Parameter) for p in (getattr(module, "weight", None),) if p is not None):
        return "has a weight that is computed from others"
    return ""


def _classes(
    twin: nn.Module, pairs: Sequence[tuple[Atom, Atom]], bad: Mapping[Atom, str]
) -> tuple[list[list[Atom]], dict[Atom, str]]:
    """The channels that go together, transitively; `bad` by the first channel of each class."""
    parent: dict[Atom, Atom] = {}

    def root(a: Atom) -> Atom:
        parent.setdefault(a, a)
        while parent[a] != a:
            parent[a] = parent[parent[a]]
            a = parent[a]
        return a

    for a, b in pairs:
        parent[root(b)] = root(a)
    for name, module in twin.named_modules():
        for pair in _grouped(name, module):
            if pair[0] in parent and pair[1] in parent:
                parent[root(pair[1])] = root(pair[0])
    classes: dict[Atom, list[Atom]] = {}
    for a in list(parent):
        classes.setdefault(root(a), []).append(a)
    return list(classes.values()), {members[0]: bad[a] for members in classes.values() for a in members if a in bad}


def _grouped(name: str, module: nn.Module) -> Iterator[tuple[Atom, Atom]]:
    """In a grouped convolution: channel j of the first convolution group goes with channel j of every other."""
    if isinstance(module, _CONVS) and module.groups > 1 and not _depthwise(module):
        for role, n in ((OUT, module.out_channels), (IN, module.in_channels)):
            each = n // module.groups
            yield from (((name, role, i % each), (name, role, i)) for i in range(each, n))


def _groups(
    twin: nn.Module, classes: Sequence[Sequence[Atom]], bad: Mapping[Atom, str]
) -> tuple[list[ChannelGroup], dict[str, str]]:
    """Classes that are made by the same layers form a group."""
    order = {name: i for i, name in enumerate(dict(twin.named_modules()))}
    modules = dict(twin.named_modules())
    together: dict[tuple[str, ...], list[Sequence[Atom]]] = {}
    dense: dict[str, str] = {}
    for atoms in classes:
        makers = {a[0] for a in atoms if a[1] == OUT and isinstance(modules[a[0]], (*_CONVS, nn.Linear))}
        reason = bad.get(atoms[0], "") or ("" if any(a[1] == IN for a in atoms) else _OUTPUT)
        if reason:
            dense.update(dict.fromkeys(sorted(makers, key=order.__getitem__), reason))
        else:
            together.setdefault(tuple(sorted(makers, key=order.__getitem__)), []).append(atoms)
    shared = _shared(twin)
    found: dict[str, ChannelGroup] = {}
    for makers_, members in sorted(together.items(), key=lambda item: order[item[0][0]]):
        name = makers_[0] if makers_[0] not in found else "+".join(makers_)
        group = ChannelGroup(name, len(members), tuple(_members(modules, sorted(members, key=min))))
        if any(m.name in shared for m in group.members):
            dense[name] = "it shares a parameter"
        elif len(members) > 1:
            found[name] = group
        else:
            dense[name] = "its channels can only go all together"
    return list(found.values()), {name: reason for name, reason in dense.items() if name not in found}


def _shared(twin: nn.Module) -> set[str]:
    names: dict[int, list[str]] = {}
    for name, p in twin.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return {name for several in names.values() if len(several) > 1 for name in several}


def _members(modules: Mapping[str, nn.Module], channels: Sequence[Sequence[Atom]]) -> Iterator[Member]:
    owners: dict[tuple[str, int, str], Tensor] = {}
    for channel, atoms in enumerate(channels):
        for layer, side, i in atoms:
            for key, dim, role, length in _tensors(modules[layer], side):
                name = f"{layer}.{key}" if layer else key
                owner = owners.setdefault((name, dim, role), torch.full((length,), -1))
                owner[i % length] = channel  # of a grouped convolution's input: the column
    return (Member(name, dim, owner, role) for (name, dim, role), owner in owners.items())


def _tensors(module: nn.Module, side: str) -> Iterator[tuple[str, int, str, int]]:
    """Name, dimension, role and length of the tensors of a module that a channel on this side of it is in."""
    if side == IN:
        yield "weight", 1, IN, module.weight.shape[1]  # type: ignore[index, misc]
        return
    weight = SCALE if isinstance(module, _NORMS) else SLOPE if isinstance(module, nn.PReLU) else OUT
    found = [("weight", weight), ("bias", SHIFT)]
    found += [("running_mean", STATISTIC), ("running_var", STATISTIC)] if isinstance(module, _NORMS) else []
    for key, role in found:
        tensor = getattr(module, key, None)
        if isinstance(tensor, Tensor) and not (isinstance(module, nn.PReLU) and tensor.numel() == 1):
            yield key, 0, role, len(tensor)
