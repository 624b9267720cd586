"""SRigL: RigL with as many inputs for every neuron, and fewer neurons (Lasby et al. 2024, arXiv:2305.02299)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from s2sam.hooks import check_number
from s2sam.sparse import scores
from s2sam.sparse.budget import Distribution, counts
from s2sam.sparse.drop_grow import check_annealed
from s2sam.sparse.masks import counts as count_true
from s2sam.sparse.methods.rigl import RigL
from s2sam.sparse.names import select, unknown
from s2sam.sparse.options import check_list, check_whole
from s2sam.sparse.part import Part
from s2sam.sparse.topk import comparable, per_row, topk_mask


@dataclass(frozen=True)
class SRigLOptions:
    """As RigL's, and what decides which neurons go.

    `gamma_sal`: a neuron with fewer salient weights than this share of the fan-in goes; 0 keeps all. `no_ablation`:
    layers that keep all their neurons, as names or patterns; None is the last one.
    """

    drop_fraction: float = 0.3
    delta_t: int = 100
    t_end: float | None = 0.75
    gamma_sal: float = 0.3
    no_ablation: Sequence[str] | None = None

    def __post_init__(self) -> None:
        check_number("drop_fraction", self.drop_fraction, 0.0, 1.0)
        check_whole("delta_t", self.delta_t)
        check_number("t_end", self.t_end or 0.0, 0.0, 1.0)
        check_annealed(self.t_end)
        check_number("gamma_sal", self.gamma_sal, 0.0, 1.0)
        if self.no_ablation is not None:
            check_list("no_ablation", self.no_ablation, '["head"]')


class SRigL(RigL):
    """Drop |w| over the layer, grow |dL/dw| in each neuron up to the fan-in k, the same for all; weak neurons go.

    n_drop = floor(f_t nnz);   salient: the nnz - n_drop largest |w| of the layer, and its n_drop largest |dL/dw|
    ablate neurons with fewer than max(1, floor(gamma_sal k)) salient weights;   k' = nnz / neurons left
    of the largest |w| each neuron keeps up to k', and grows the largest |dL/dw| of its others until it has k'

    In place of the gradient step, as RigL. A neuron is a row of a Linear weight or a filter of a convolution. One that
    has gone is 0 and never comes back; ceil(budget / dense fan-in) of a layer stay. If a layer's budget is smaller than
    its number of neurons, it starts with as many neurons as weights. The mask at the start is random.

    A layer has a multiple of its neurons as weights, so sparsity is not met exactly: k is rounded in the layers with
    many neurons first, and what that leaves over goes to those with fewer (:func:`fan_ins`). :meth:`target_sparsity` is
    therefore what the neurons that are left can have.

    calgaryml/condensed-sparsity:src/rigl_torch/rigl_constant_fan.py with use_sparse_const_fan_in_for_ablation=True, as
    its configs/config.yaml has it (the other choice takes gamma_sal of the dense fan-in). Differs from there in that
    a neuron that has gone stays away whatever its gradient, in exact counts where scores tie, and in the rounding.

    Defaults are for CIFAR. ImageNet: delta_t=800 with batches of 512; vision transformers: gamma_sal=0.95. Cost: as
    RigL, with a top-k per neuron on top.

    Raises:
        ValueError: no total_steps, a transposed convolution, or a layer in no_ablation that does not exist.
    """

    method = "srigl"
    Options = SRigLOptions  # type: ignore[assignment]  # what is dropped can always come back
    options: SRigLOptions  # type: ignore[assignment]

    def check_options(self) -> None:
        """The layers that keep their neurons, and what each layer may keep."""
        super().check_options()
        for entry in self.entries:
            if entry.prunable and entry.layer.startswith("ConvTranspose"):
                raise ValueError(
                    f"method 'srigl' needs the neurons of a layer in its first dimension, which {entry.name!r} (a "
                    f"{entry.layer}) has not; leave it dense with exclude={entry.name!r}"
                )
        names = list(self.weights)
        named = self.options.no_ablation
        self.lasting = {names[-1]} if named is None else {n for pattern in named for n in _found(pattern, names)}
        self.fan = {name: w.numel() // len(w) for name, w in self.weights.items()}
        spread = "uniform" if self.distribution == "global" else self.distribution
        shapes = {name: tuple(w.shape) for name, w in self.weights.items()}
        drawn = {} if self.adopted else counts(shapes, self.final_sparsity, spread, power_scale=self.power_scale)
        self.aim = dict(self.adopted) or drawn

    def target_sparsity(self, t: int) -> float:
        """That of neurons with equal fan-ins; `t` makes no difference."""
        kept = sum(sum(part.kept.values()) for part in self.parts)
        return 1 - kept / sum(w.numel() for w in self.weights.values())

    def neurons(self) -> dict[str, int]:
        """How many neurons of each layer have inputs."""
        return count_true({name: mask.flatten(1).any(1) for name, mask in self.masks.items()})

    def drop_count(self, part: Part, name: str, t: int) -> int:
        """floor(f_t nnz)."""
        return math.floor(self.drop_fraction(t) * part.kept[name] + 1e-9)

    def initial_masks(
        self, model: nn.Module, sparsity: float, distribution: Distribution, power_scale: float
    ) -> dict[str, Tensor]:
        """Random inputs for every neuron, or for as many as there are weights."""
        masks = {}
        for part in self.parts:
            names = list(part.layers.masks)
            rows = {name: len(self.weights[name]) for name in names}
            rows |= {name: min(n, self.aim[name]) for name, n in rows.items() if name not in self.lasting}
            inputs = fan_ins({name: self.aim[name] for name in names}, rows, self.fan)
            for name in names:
                draw = scores.random(self.weights[name], self.generator)
                chosen = topk_mask(draw.flatten(1).amax(1), rows[name], check=False)
                masks[name] = per_row(draw, inputs[name]) & _wide(chosen, draw)
        return masks

    def adopt(self, model: nn.Module, present: dict[str, Tensor]) -> dict[str, Tensor]:
        """Where weights are not 0, if the neurons of a layer that have any have equally many."""
        for name, there in present.items():
            inputs = there.flatten(1).sum(1)
            if not bool((inputs[inputs > 0] == inputs.max()).all()):
                raise ValueError(
                    f"the neurons of {name!r} have different numbers of inputs, so method 'srigl' cannot adopt it; "
                    "adopt it with another method, such as 'rigl', or prune with init='anew'"
                )
        return present

    def next_masks(self, part: Part, t: int) -> dict[str, Tensor]:
        """What is left of each layer's neurons, and their inputs."""
        layers = {name: mask for name, mask in part.layers.masks.items() if part.layers.weights[name].grad is not None}
        alive = {name: mask.flatten(1).any(1) for name, mask in layers.items()}
        rows = count_true(alive)
        size, slope, drop = {}, {}, {}
        for name, mask in layers.items():
            weight = part.layers.weights[name]
            size[name] = comparable(scores.magnitude(weight)).masked_fill(~mask, -torch.inf)
            gone = ~_wide(alive[name], mask)
            slope[name] = comparable(scores.gradient_magnitude(weight)).masked_fill(gone, -torch.inf)
            drop[name] = self.drop_count(part, name, t)
            if name not in self.lasting and self.options.gamma_sal:
                fan_in = part.kept[name] // rows[name]
                salient = topk_mask(size[name], part.kept[name] - drop[name], check=False) & (size[name] > 0)
                salient |= topk_mask(slope[name], drop[name], check=False)
                alive[name] = self._strong(name, salient.flatten(1).sum(1).masked_fill(~alive[name], -1), fan_in)
        rows = count_true(alive)
        stay = {name: n for name, n in part.kept.items() if name not in layers}
        inputs = fan_ins(self.aim, rows, self.fan, carry=sum(self.aim[name] - n for name, n in stay.items()))
        return {
            name: constant(size[name], slope[name], alive[name], inputs[name], part.kept[name] - drop[name])
            for name in layers
        }

    def _strong(self, name: str, salient: Tensor, fan_in: int) -> Tensor:
        """The neurons with enough salient weights (-1: gone), and in any case as many as the budget needs."""
        enough = salient >= max(1, math.floor(self.options.gamma_sal * fan_in + 1e-9))
        return enough | topk_mask(salient.float(), math.ceil(self.aim[name] / self.fan[name]), check=False)


def fan_ins(
    aim: Mapping[str, int], neurons: Mapping[str, int], fan: Mapping[str, int], *, carry: int = 0
) -> dict[str, int]:
    """The fan-in k_l of each layer's n_l neurons, 1 <= k_l <= fan_l, so that sum k_l n_l is near the sum of the aims.

    k_l = round((aim_l + carry) / n_l), layers with many neurons first;  carry: what those before left over

    A dense layer stays dense.

    >>> fan_ins({"a": 100, "b": 25, "c": 50}, {"a": 64, "b": 10, "c": 12}, {"a": 9, "b": 64, "c": 64})
    {'a': 2, 'b': 2, 'c': 2}
    """
    found = dict.fromkeys(neurons, 1)
    for name in sorted(neurons, key=lambda n: -neurons[n]):
        n = neurons[name]
        dense = aim[name] == fan[name] * n
        found[name] = fan[name] if dense else min(fan[name], max(1, round((aim[name] + carry) / n)))
        carry += aim[name] - found[name] * n
    return found


def constant(size: Tensor, slope: Tensor, alive: Tensor, fan_in: int, n_keep: int) -> Tensor:
    """A mask with `fan_in` True in each row that is `alive` and none in the others.

    Of the `n_keep` largest `size` (-inf where not active) in these rows each row keeps up to `fan_in`; its largest
    `slope` fill it up.

    >>> size = torch.tensor([[5.0, 4.0, 3.0, -torch.inf], [1.0, -torch.inf, -torch.inf, -torch.inf]])
    >>> slope = torch.tensor([[0.0, 0.0, 9.0, 8.0], [0.0, 1.0, 3.0, 2.0]])
    >>> constant(size, slope, torch.tensor([True, True]), 2, 3).int().tolist()
    [[1, 1, 0, 0], [0, 0, 1, 1]]
    """
    rows = _wide(alive, size)
    strong = size.masked_fill(~rows, -torch.inf)
    kept = topk_mask(strong, n_keep, check=False) & (strong > -torch.inf)
    kept &= per_row(strong.masked_fill(~kept, -torch.inf), fan_in)
    return per_row(slope.masked_fill(kept, torch.inf), fan_in) & rows


def _wide(rows: Tensor, like: Tensor) -> Tensor:
    """One bool per row, shaped to go with a weight."""
    return rows.view(-1, *[1] * (like.dim() - 1))


def _found(pattern: str, names: list[str]) -> list[str]:
    found = select(pattern, names)
    if not found:
        raise unknown("layer", pattern, names)
    return found
