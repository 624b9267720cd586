"""Which parameters of a model may be pruned, and why the others may not.

By default: weights of Conv1d, Conv2d, Conv3d and Linear, the stem, the classifier and 1x1 shortcuts among them. Not:
depthwise convolutions (one input channel per filter: their few weights carry a channel each), embeddings and the Linear
layers tied to one (a pruned row is a lost token), normalisation weights, biases, and whatever else a module holds:
transposed convolutions, the in_proj_weight of MultiheadAttention (its out_proj is a Linear), recurrent cells. `include`
adds what is left out; every method but those that need neurons first in a weight can take it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer

from s2sam.private_torch import is_fsdp1_parameter
from s2sam.sparse.names import compiled, select, unknown

Patterns = str | Sequence[str] | None

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True, eq=False)
class Entry:
    """A parameter: its first name, the class of the module that owns it, and why it is not prunable ("" if it is)."""

    name: str
    layer: str
    parameter: Tensor
    reason: str = ""

    @property
    def prunable(self) -> bool:
        """Whether it takes part in sparse training."""
        return not self.reason


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside `torch.compile`, DataParallel or DistributedDataParallel: names stay the same."""
    while True:
        inner = model._modules.get("_orig_mod")
        if inner is None and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if inner is None:
            return model
        model = inner


def discover(model: nn.Module, include: Patterns = None, exclude: Patterns = None) -> list[Entry]:
    """Every parameter of `model` once, in module order; a tied one under its first name, though any name finds it.

    A pattern is a parameter name, a module name, a regular expression found in the parameter name, or a module class
    ("Linear", "Conv.*"). `include` adds parameters to the default set, `exclude` takes some away and has the last word.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    >>> [e.name for e in discover(model, exclude="2") if e.prunable]
    ['0.weight']

    Raises:
        ValueError: a pattern matches nothing (the nearest name is given), or a lazy module has no weights yet.
    """
    first: dict[int, tuple[str, nn.Module, Tensor]] = {}
    owners: dict[int, list[nn.Module]] = {}
    aliases: dict[str, str] = {}  # every name of every parameter -> its first name
    for prefix, module in unwrap(model).named_modules(remove_duplicate=False):
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = f"{prefix}.{key}" if prefix else key
            if isinstance(parameter, UninitializedParameter):
                raise ValueError(f"{name!r} has no weights yet; run the model once before making it sparse")
            first.setdefault(id(parameter), (name, module, parameter))
            owners.setdefault(id(parameter), []).append(module)
            aliases[name] = first[id(parameter)][0]
    reasons = {name: _reason(name, module, p, owners[id(p)]) for name, module, p in first.values()}
    classes = {name: {type(m).__name__ for m in owners[id(p)]} for name, _, p in first.values()}
    for name in _matched(include, aliases, classes, "include"):
        reasons[name] = ""
    for name in _matched(exclude, aliases, classes, "exclude"):
        reasons[name] = "excluded by name or class"
    return [Entry(name, type(module).__name__, p, reasons[name]) for name, module, p in first.values()]


def in_optimizers(entries: Sequence[Entry], optimizers: Sequence[Optimizer]) -> list[Entry]:
    """The entries, those that none of the optimizers trains marked as not prunable.

    Raises:
        ValueError: nothing prunable is left, or a weight is sharded or flattened.
    """
    held = {id(p) for one in optimizers for group in one.param_groups for p in group["params"]}
    if any(is_fsdp1_parameter(e.parameter) for e in entries):
        raise ValueError(
            "the model is wrapped in FullyShardedDataParallel, whose flat parameters have no layers to prune; wrap it "
            "in DistributedDataParallel instead"
        )
    if not entries:
        raise ValueError("the model has no parameters, so there is nothing to make sparse")
    if not any(e.prunable for e in entries):
        largest = sorted(entries, key=lambda e: -e.parameter.numel())[:3]
        reasons = "; ".join(f"{e.name}: {e.reason}" for e in largest)
        raise ValueError(f"the model has no prunable weight ({reasons}); name some with include=")
    if not any(id(e.parameter) in held for e in entries):
        raise ValueError("the optimizer shares no parameter with the model; build it from model.parameters()")
    found = []
    for e in entries:
        if e.prunable and hasattr(e.parameter, "placements"):
            raise ValueError(f"{e.name!r} is sharded (DTensor), which sparse training does not support yet")
        reason = e.reason or ("" if id(e.parameter) in held else "not in the optimizer")
        if not reason and not e.parameter.requires_grad:
            reason = "frozen (requires_grad is False)"
        found.append(replace(e, reason=reason))
    if not any(e.prunable for e in found):
        raise ValueError("the optimizer trains no prunable weight of the model; give it the Conv and Linear weights")
    return found


def _reason(name: str, module: nn.Module, parameter: Tensor, owners: list[nn.Module]) -> str:
    kind = type(module).__name__
    if any(isinstance(owner, _EMBEDDINGS) for owner in owners):
        return "embedding" if all(isinstance(owner, _EMBEDDINGS) for owner in owners) else "tied to an embedding"
    if name.rpartition(".")[2] == "bias" and parameter.dim() == 1:
        return "bias"
    if "Norm" in kind and not isinstance(module, _LAYERS):
        return f"normalisation ({kind})"
    if not isinstance(module, _LAYERS):
        return f"a parameter of {kind}, which is neither Conv1d/2d/3d nor Linear"
    if name.rpartition(".")[2] != "weight":
        return f"not the weight of its {kind}"
    if not isinstance(module, nn.Linear) and module.groups == module.in_channels > 1:
        return "depthwise convolution"
    return ""


def _matched(patterns: Patterns, aliases: Mapping[str, str], classes: Mapping[str, set[str]], what: str) -> list[str]:
    """The first names of the parameters that the patterns mean."""
    found: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else list(patterns or ()):
        by_name = [aliases[name] for name in select(pattern, list(aliases))]
        by_class = [name for name, kinds in classes.items() if any(compiled(pattern).fullmatch(k) for k in kinds)]
        if not by_name and not by_class:
            kinds = sorted(set().union(*classes.values()))
            raise unknown(f"name or module class in {what}:", pattern, [*aliases, *kinds])
        found += [*by_name, *by_class]
    return found
