"""GraSP: keep the weights that gradient flow needs, before training (Wang et al. 2020, arXiv:2002.07376)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from s2sam.hooks import check_number
from s2sam.sparse import sync
from s2sam.sparse.saliency import Batch, BatchOptions, Saliency, add_, checked, gradients, scoring_copy


@dataclass(frozen=True)
class GraSPOptions(BatchOptions):
    """`temperature`: T > 0, by which the model's output is divided before the loss."""

    temperature: float = 200.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not check_number("temperature", self.temperature):
            raise ValueError("temperature must be above 0, got 0")


class GraSP(Saliency):
    """Remove the weights whose removal lowers the gradient norm least, or raises it most.

    g = dL/dw,  S_q = -w_q (H g)_q,  g'g after removing w_q = g'g + 2 S_q + ...      the highest S are removed

    L is the loss of output / T summed over all samples given, g and H those of the prunable weights, and H g comes from
    a second backward through g. Removing w_q is the step -w_q e_q, which changes g'g by -2 w_q (H g)_q to first order:
    that settles the sign, which authors and ports write either way round. Against alecwangcq/GraSP:pruner/GraSP.py:
    batches are whole, not halves of one class-sorted batch; the weights that are there, no new draw for Linear layers;
    scores are not divided by their sum, which has no effect on the order. `loss_fn` gets output / T and returns the
    mean over a batch; without one it is cross-entropy. The batches are held in memory, as they are needed twice.

    Cost: two forwards and about four backwards per batch, once; during it a float32 copy of the model, of its gradients
    and of H g, and the graph of a backward.
    """

    method = "grasp"
    Options = GraSPOptions
    options: GraSPOptions

    def initial_scores(self, model: nn.Module) -> dict[str, Tensor]:
        """-S = w (H g): the largest stay."""
        g: dict[str, Tensor] = {}
        hg: dict[str, Tensor] = {}
        with scoring_copy(model, self.weights, bn_mode=self.options.bn_mode) as (twin, weights):
            with sync.together():
                batches = list(self.read_batches(next(iter(weights.values()))))
                for batch in batches:
                    loss = self.loss(self._cooled(twin, batch), batch.target)
                    add_(g, gradients(loss, weights), batch.size)
            sync.sum_over_ranks(g.values())
            for batch in batches:
                loss = self.loss(self._cooled(twin, batch), batch.target)
                slope = gradients(loss, weights, create_graph=True)
                flow = sum((slope[name] * g[name]).sum() for name in g)
                assert isinstance(flow, Tensor)
                add_(hg, gradients(flow, weights), batch.size)
        sync.sum_over_ranks(hg.values())
        return checked({name: weights[name].detach() * h for name, h in hg.items()}, self.method)

    def _cooled(self, twin: nn.Module, batch: Batch) -> Tensor:
        output = self.called("the model", twin, *batch.args, **batch.kwargs)
        if not isinstance(output, Tensor):
            raise ValueError(
                f"method 'grasp' divides the model's output by a temperature, so it must be a tensor, not a "
                f"{type(output).__name__}; wrap the model in one that returns its logits"
            )
        return output / self.options.temperature
