"""N:M magnitude pruning: of every m weights that are there now the n largest stay (Mishra et al. 2021)."""

from __future__ import annotations

from torch import Tensor, nn

from s2sam.sparse import scores
from s2sam.sparse.nofm import NOfM, NOfMOptions


class NM(NOfM):
    """Keep the n largest |w| of every m along the inputs, once, at the time of attaching.

    For trained weights, to prune and fine-tune (arXiv:2104.08378, NVIDIA/apex:apex/contrib/sparsity, there 2:4); at
    initialisation it is close to a random choice. Against apex ties are settled by index, and no channels are permuted.
    Options, the same for CIFAR and ImageNet: n=None (from the sparsity), m=4. Cost: the masks alone.

    >>> import torch
    >>> from s2sam import sparsify
    >>> layer = torch.nn.Linear(8, 2, bias=False)
    >>> _ = layer.weight.data.copy_(torch.arange(16.0).view(2, 8) - 6)
    >>> nm = sparsify(layer, torch.optim.SGD(layer.parameters(), lr=0.1), method="nm", sparsity=0.5)
    >>> (layer.weight[0] != 0).int().tolist()      # of -6, -5, -4, -3, -2, -1, 0, 1
    [1, 1, 0, 0, 1, 1, 0, 0]

    Raises:
        ValueError: the sparsity is not 1 - n / m, or no layer divides into groups of m.
    """

    method = "nm"
    Options = NOfMOptions
    options: NOfMOptions

    def initial_scores(self, model: nn.Module) -> dict[str, Tensor]:
        """|w|."""
        return {name: scores.magnitude(w) for name, w in self.weights.items()}
