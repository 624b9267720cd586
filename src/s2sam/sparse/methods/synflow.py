"""SynFlow: keep the flow through the network, without data, in many rounds (Tanaka et al. 2020, arXiv:2006.05467)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from s2sam.sparse.budget import Distribution
from s2sam.sparse.options import check_list, check_whole
from s2sam.sparse.saliency import Batch, Saliency, SaliencyOptions, checked, gradients, scoring_copy


@dataclass(frozen=True)
class SynFlowOptions(SaliencyOptions):
    """`rounds`: of scoring and pruning; `input_shape`: of one sample, such as (3, 32, 32), None = that of `batches`."""

    rounds: int = 100
    input_shape: Sequence[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("rounds", self.rounds)
        if self.input_shape is not None:
            check_list("input_shape", self.input_shape, "(3, 32, 32)")
            for side in self.input_shape:
                check_whole("each number of input_shape", side)


class SynFlow(Saliency):
    """Prune by |w| times the weights before and after it on all paths from input to output, a little in each round.

    R = 1' f(1; |theta|),  S_q = |w_q| dR/d|w_q|,  kept after round k of n: the largest S, N (1-s)^(k/n) of them

    f is the model in eval mode with the absolute value of every parameter and buffer. For a network of ReLU layers
    without biases the sum of S over a layer is R in every layer, so that no layer runs empty before the others; one
    round alone would take most from the widest. Against ganguli-lab/Synaptic-Flow: float64, as products over dozens of
    layers leave the range of float32; a round keeps an exact number, not what a threshold leaves; weights once pruned
    stay pruned. No data, no loss, no random numbers: every rank finds the same masks.

    Cost: n forwards and backwards of one sample in float64, each with a top-k over all weights, once; during it a
    float64 copy of the model and two more of its prunable weights.

    Raises:
        ValueError: the shape of a sample is not known, all scores are zero, or they overflow.
    """

    method = "synflow"
    Options = SynFlowOptions
    options: SynFlowOptions

    def initial_scores(self, model: nn.Module) -> dict[str, Tensor]:
        """S of the whole network, as the first round sees it."""
        with scoring_copy(model, self.weights, dtype=torch.float64) as (twin, weights):
            take_abs(twin)
            return self.flow(twin, weights, self.sample_shape())

    def initial_masks(
        self, model: nn.Module, sparsity: float, distribution: Distribution, power_scale: float
    ) -> dict[str, Tensor]:
        """The masks after all rounds."""
        budget = self.budget(sparsity, distribution, power_scale)
        sizes = {name: w.numel() for name, w in self.weights.items()}
        masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in self.weights.items()}
        with scoring_copy(model, self.weights, dtype=torch.float64) as (twin, weights):
            take_abs(twin)
            shape = self.sample_shape()
            for k in range(1, self.options.rounds + 1):
                flow = self.flow(twin, weights, shape)
                left = step_budget(budget, sizes, k / self.options.rounds)
                masks = self.pick(
                    {name: s.masked_fill(~masks[name], -torch.inf) for name, s in flow.items()},
                    left,
                    at_least=self.min_per_layer,
                )
                with torch.no_grad():
                    for name, w in weights.items():
                        w.mul_(masks[name])
        return masks

    def flow(self, twin: nn.Module, weights: Mapping[str, Tensor], shape: Sequence[int]) -> dict[str, Tensor]:
        """S at the weights that `twin` has now."""
        some = next(iter(weights.values()))
        ones = torch.ones(1, *shape, dtype=some.dtype, device=some.device)
        output = self.called("the model", twin, ones)
        if not isinstance(output, Tensor):
            raise ValueError(f"method 'synflow' sums the model's output, which is a {type(output).__name__}, no tensor")
        slope = gradients(output.sum(), weights)
        found = {name: (w.detach() * slope[name]).abs() for name, w in weights.items()}
        return checked(found, self.method, "; or ask for less sparsity, as no path through the network is left")

    def sample_shape(self) -> tuple[int, ...]:
        """The shape of one sample: the option, or that of the first batch.

        Raises:
            ValueError: neither is given.
        """
        if self.options.input_shape is not None:
            return tuple(self.options.input_shape)
        first = next(iter(self.batches or ()), None)
        if first is not None:
            batch = Batch.read(first, next(iter(self.weights.values())))
            if len(batch.args) == 1 and not batch.args[0].is_floating_point():
                raise ValueError(
                    "method 'synflow' sends ones through the model, and this one takes whole numbers (tokens); choose "
                    "another method, such as snip or grasp"
                )
            if len(batch.args) == 1:
                return tuple(batch.args[0].shape[1:])
        raise ValueError(
            "method 'synflow' needs the shape of one sample: give input_shape=, such as (3, 32, 32), or batches= of "
            "(input, target) pairs whose input is one tensor"
        )


@torch.no_grad()
def take_abs(model: nn.Module) -> None:
    """The absolute value of every parameter and buffer that the model would save, in place."""
    for value in model.state_dict().values():
        if isinstance(value, Tensor) and value.is_floating_point():
            value.abs_()


def step_budget(budget: int | Mapping[str, int], sizes: Mapping[str, int], progress: float) -> int | dict[str, int]:
    """How many weights are left after a share `progress` of the rounds: N (B/N)^progress of N, down to the budget B.

    >>> [step_budget(10, {"a": 600, "b": 400}, share) for share in (0.0, 0.5, 1.0)]
    [1000, 100, 10]
    """
    if isinstance(budget, int):
        n = sum(sizes.values())
        return max(budget, round(n * math.pow(budget / n, progress)))
    return {name: max(b, round(sizes[name] * math.pow(b / sizes[name], progress))) for name, b in budget.items()}
