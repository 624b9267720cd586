"""SNIP: keep the connections that the loss feels most, before training (Lee et al. 2019, arXiv:1810.02340)."""

from __future__ import annotations

from torch import Tensor, nn

from s2sam.sparse import sync
from s2sam.sparse.saliency import BatchOptions, Saliency, add_, checked, gradients, scoring_copy


class SNIP(Saliency):
    """Score a weight by how much the loss changes with its gate: |dL/dc| at c = 1, where the weight is c w.

    s_q = |w_q dL/dw_q|,  L = the loss summed over all samples given

    The gradient is summed over all samples (batches weighted by their size, ranks added up) before the absolute value.
    Normalising the scores, as the paper does, would not change their order and is left out. Against
    namhoonlee/snip-public: weights only, no biases; the weights that are there, no draw of its own; BatchNorm in train
    mode by default (`bn_mode`). Against mil-ad/snip: the model itself is scored, not a copy with new weights. `loss_fn`
    returns the mean over a batch; without one it is cross-entropy.

    Cost: one forward and backward per batch, once; during it a float32 copy of the model and of its gradients.

    >>> import torch
    >>> from s2sam import sparsify
    >>> layer = nn.Linear(2, 2, bias=False)
    >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    >>> x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([0])           # the loss does not feel the second input
    >>> sparsify(layer, optimizer, method="snip", sparsity=0.5, batches=[(x, y)]).masks["weight"].tolist()
    [[True, False], [True, False]]
    """

    method = "snip"
    Options = BatchOptions
    options: BatchOptions

    def initial_scores(self, model: nn.Module) -> dict[str, Tensor]:
        """|w sum_i dL_i/dw|."""
        total: dict[str, Tensor] = {}
        copied = scoring_copy(model, self.weights, bn_mode=self.options.bn_mode)
        with copied as (twin, weights), sync.together():
            for batch in self.read_batches(next(iter(weights.values()))):
                loss = self.loss(self.called("the model", twin, *batch.args, **batch.kwargs), batch.target)
                add_(total, gradients(loss, weights), batch.size)
        sync.sum_over_ranks(total.values())
        return checked({name: (weights[name].detach() * g).abs() for name, g in total.items()}, self.method)
