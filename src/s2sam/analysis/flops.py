"""Multiply-accumulates of one forward pass, dense and at given densities, and of one training step.

    MACs_sparse = sum over weights l of density_l * MACs_l + (MACs without a weight)

Each matrix product or convolution counts for the weight whose memory takes part in it, whatever module runs it; a
weight used twice counts twice. Products of activations (attention scores) have no weight and stay dense. Element-wise
work (BatchNorm, ReLU) is not counted, as in the tables of the sparse-training literature; 1 MAC = 2 FLOPs.

A backward pass counts as two forwards, one for the gradient of the activations and one for that of the weights. A
published "training FLOPs 0.25x" is :func:`method_flops` of the method over that of "dense".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from s2sam.registry import find, list_methods
from s2sam.sparse.names import unknown

NO_WEIGHT = ""
TRAINING_RULES = ("dense", "sparse", "dense_gradient", "rigl")
GRADIENTS = {"none": 1, "s2sam": 1, "sam": 2}  #: forward and backward passes a step


@dataclass(frozen=True)
class Flops:
    """Cost of one forward pass of one input, in multiply-accumulates."""

    macs: dict[str, int]  #: per weight, by parameter name; "" = products without a weight
    densities: dict[str, float]  #: share of nonzero weights; 1 where none is given

    @property
    def dense(self) -> int:
        """MACs with all weights."""
        return sum(self.macs.values())

    @property
    def sparse(self) -> float:
        """MACs with only the active weights, sum of density * MACs."""
        return sum(self.densities.get(name, 1.0) * macs for name, macs in self.macs.items())

    @property
    def fraction(self) -> float:
        """sparse / dense."""
        return self.sparse / self.dense if self.dense else 1.0


def count_macs(model: nn.Module, *inputs: Tensor) -> dict[str, int]:
    """Dense MACs of `model(*inputs)` per weight name, in the order of the parameters; "" (no weight) last.

    Runs one forward in eval mode without gradients; modes, buffers and the random state are as before afterwards.
    Source of the per-operation formulas: `torch.utils.flop_counter`.

    >>> count_macs(nn.Linear(3, 5), torch.zeros(1, 3))
    {'weight': 15}
    """
    owners = {_storage(p): name for name, p in model.named_parameters() if p.ndim >= 2}
    counter = FlopCounterMode(display=False)
    attribute = _Attribute(counter, owners)
    with _undisturbed(model), torch.no_grad(), counter, attribute:
        model(*inputs)
    order = [*owners.values(), NO_WEIGHT]
    return {name: attribute.flops[name] // 2 for name in order if attribute.flops.get(name)}


def inference_flops(
    model: nn.Module, image_shape: tuple[int, ...], densities: Mapping[str, float] | None = None
) -> Flops:
    """:class:`Flops` of one image, shape `image_shape` without the batch axis.

    Args:
        model: a network that takes (N, *image_shape).
        image_shape: (C, H, W).
        densities: share of active weights by parameter name; None = counted from the nonzero weights.

    Raises:
        ValueError: a density is outside [0, 1] or names a parameter that does not exist.

    >>> from s2sam.models import create_model
    >>> net = create_model("resnet32", num_classes=10, generator=torch.Generator(), width=2.0)
    >>> inference_flops(net, (3, 32, 32)).dense
    275612928
    """
    weights = {name: p for name, p in model.named_parameters() if p.ndim >= 2}
    if densities is None:
        densities = {name: float(torch.count_nonzero(p.detach())) / max(p.numel(), 1) for name, p in weights.items()}
    for name, density in densities.items():
        if name not in weights:
            raise ValueError(f"the model has no weight {name!r}; densities go by parameter name, as 'stem.weight'")
        if not 0.0 <= density <= 1.0:
            raise ValueError(f"the density of {name!r} must be between 0 and 1, got {density!r}")
    first = next(iter(weights.values()), torch.empty(0))
    image = torch.zeros((1, *image_shape), device=first.device, dtype=first.dtype)
    return Flops(count_macs(model, image), dict(densities))


def training_flops(
    sparse: float, dense: float, *, rule: str = "sparse", delta_t: int | None = None, sharpness: str = "none"
) -> float:
    """Cost of one training step an image, mean over the steps, in the unit of its arguments.

    With f_S = `sparse` and f_D = `dense`, the costs of a forward pass, DT = `delta_t`:

        rule              none, s2sam                              sam (two gradients a step)
        dense             3 f_D                                    6 f_D
        sparse            3 f_S                                    6 f_S
        dense_gradient    2 f_S + f_D                              5 f_S + f_D
        rigl              (3 f_S DT + 2 f_S + f_D) / (DT + 1)      (6 f_S DT + 5 f_S + f_D) / (DT + 1)

    "sparse" is every method that looks at active weights only: a static mask, SET, MEST; SNIP, GraSP and SynFlow after
    their mask is made. "rigl" has a dense weight gradient at one step in DT + 1, "dense_gradient" at every step (SNFS).
    Which rule a method has stands in its row of the registry; :func:`method_flops` takes it from there.
    All are linear in f_S: for a method whose density moves (GMP, GraNet), give the mean of f_S over the steps, see
    :func:`mean_sparse`. As in the papers, the first layer's activation gradient counts too, and what is done element by
    element counts nothing: masks, the optimizer, the displacements of S2-SAM and SAM. That RigL stops looking after
    T_end is not counted either.

    Source: Evci et al., Rigging the Lottery, 2020, appendix H. The column of SAM follows from it: its first pass has a
    sparse gradient, its second the one that the method wants.

    Raises:
        ValueError: an unknown rule or sharpness, a cost below 0, f_S above f_D, or a delta_t missing or useless.

    >>> training_flops(10, 100, rule="dense"), training_flops(10, 100), training_flops(10, 100, sharpness="sam")
    (300.0, 30.0, 60.0)
    >>> training_flops(10, 100, rule="rigl", delta_t=9)      # (30 * 9 + 20 + 100) / 10
    39.0
    """
    if rule not in TRAINING_RULES:
        raise unknown("training rule", rule, TRAINING_RULES)
    if sharpness not in GRADIENTS:
        raise unknown("sharpness", sharpness, GRADIENTS)
    if not 0 <= sparse <= dense < math.inf:
        raise ValueError(f"costs must be 0 <= sparse <= dense, got sparse={sparse!r} and dense={dense!r}")
    if (rule == "rigl") != (delta_t is not None):
        raise ValueError(f"rule 'rigl' needs delta_t and no other rule takes it, got {rule!r} with delta_t={delta_t!r}")
    if delta_t is not None and (isinstance(delta_t, bool) or not isinstance(delta_t, int) or delta_t < 1):
        raise ValueError(f"delta_t must be a whole number of at least 1, got {delta_t!r}")
    if rule == "dense":
        return float(GRADIENTS[sharpness] * 3 * dense)
    usual = GRADIENTS[sharpness] * 3 * sparse
    looking = usual - sparse + dense
    if delta_t is None:
        return float(usual if rule == "sparse" else looking)
    return (usual * delta_t + looking) / (delta_t + 1)


def method_flops(
    method: str,
    sparse: float,
    dense: float,
    *,
    options: Mapping[str, Any] | None = None,
    sharpness: str = "none",
) -> float:
    """:func:`training_flops` by the rule in the method's row of the registry; "dense" is a method too.

    Args:
        method: see `s2sam list methods`.
        sparse: f_S, for a density that moves its mean over the steps; for LT over all its trainings, each of which
            costs this much a step.
        dense: f_D.
        options: of the method; the defaults of its row where they are not given.
        sharpness: none, s2sam or sam.

    Raises:
        ValueError: no such method; and as :func:`training_flops`.

    >>> method_flops("set", 10, 100), method_flops("dense", 10, 100)
    (30.0, 300.0)
    >>> method_flops("rigl", 10, 100, options={"delta_t": 9})
    39.0
    """
    if method == "dense":
        return training_flops(sparse, dense, rule="dense", sharpness=sharpness)
    row = find(list_methods(), method, "method")
    delta_t = {**row.defaults, **(options or {})}["delta_t"] if row.flops == "rigl" else None
    return training_flops(sparse, dense, rule=row.flops, delta_t=delta_t, sharpness=sharpness)


def mean_sparse(
    macs: Mapping[str, int], topology: Sequence[tuple[int, Mapping[str, float]]], total_steps: int
) -> float:
    """f_S, mean over the steps of a run whose densities change: sum_t sum_l density_l(t) MACs_l / total_steps.

    Args:
        macs: of :func:`count_macs`.
        topology: (step, densities by parameter name) whenever they changed, ascending, the first at step 0; densities
            hold from their step to the next entry. A weight that is not named is dense.
        total_steps: of the run.

    Raises:
        ValueError: no entry for step 0, steps out of order, or no steps.

    >>> mean_sparse({"w": 100}, [(0, {"w": 1.0}), (30, {"w": 0.5})], total_steps=40)
    87.5
    """
    steps = [step for step, _ in topology]
    if not steps or steps[0] != 0 or steps != sorted(steps) or total_steps < max(steps[-1], 1):
        raise ValueError(f"topology must begin at step 0 and ascend to at most {total_steps} steps, got {steps[:5]}")
    ends = [*steps[1:], total_steps]
    costs = [Flops(dict(macs), dict(densities)).sparse for _, densities in topology]
    return sum((end - step) * cost for step, end, cost in zip(steps, ends, costs, strict=True)) / total_steps


class _Attribute(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds what `counter` counts for each operation to the weight whose storage is among its arguments."""

    def __init__(self, counter: FlopCounterMode, owners: dict[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counter, self.owners, self.flops = counter, owners, dict[str, int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.counter.get_total_flops()
        out = func(*args, **(kwargs or {}))
        if counted := self.counter.get_total_flops() - before:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            names = [self.owners.get(_storage(t)) for t in tensors]
            name = next((n for n in names if n is not None), NO_WEIGHT)
            self.flops[name] = self.flops.get(name, 0) + counted
        return out


def _storage(tensor: Tensor) -> int:
    """What identifies a tensor's memory; unlike its address it tells meta tensors apart."""
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, without fused attention and recurrence, which no formula counts.

    All is put back, exceptions included.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    cuda = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    fused = torch.backends.mha.get_fastpath_enabled()
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    libraries = [(one, one.set_flags(False)[0]) for one in (torch.backends.mkldnn, torch.backends.cudnn) if recurrent]
    with torch.random.fork_rng(devices=cuda):
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            model.eval()
            with sdpa_kernel(SDPBackend.MATH):
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
            for library, enabled in libraries:
                library.set_flags(enabled)
            for module, training in modes:
                module.training = training
            with torch.no_grad():
                for buffer, saved in buffers:
                    if not (buffer.is_meta or torch.equal(buffer, saved)):
                        buffer.copy_(saved)
