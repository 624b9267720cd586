"""One-shot magnitude pruning: the largest weights that are there now stay, the others go, once."""

from __future__ import annotations

from torch import Tensor, nn

from s2sam.sparse import scores
from s2sam.sparse.blocks import FixedOptions, InBlocks


class Magnitude(InBlocks):
    """Keep the largest |w| at the time of attaching, layer by layer, or over all layers with distribution="global".

    For trained weights, to prune and fine-tune (Han et al. 2015, arXiv:1506.02626); at initialisation it is close to a
    random choice. "global" keeps at least one weight in each layer. With `block` the blocks with the largest sums of
    |w| stay; `min_per_filter` keeps so many of each filter first. Cost: the masks alone.
    """

    method = "magnitude"
    Options = FixedOptions
    options: FixedOptions

    def initial_scores(self, model: nn.Module) -> dict[str, Tensor]:
        """|w|."""
        return {name: scores.magnitude(w) for name, w in self.weights.items()}
