"""Top-KAST: the largest weights are the network, some more are trained beside it (Jayakumar et al. 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from s2sam.hooks import check_number
from s2sam.sparse import sync
from s2sam.sparse.masks import pack_bits, unpack_bits
from s2sam.sparse.options import check_whole
from s2sam.sparse.part import Part
from s2sam.sparse.reserve import Reserve
from s2sam.sparse.topk import topk_mask


@dataclass(frozen=True)
class TopKASTOptions:
    """What differs between runs of Top-KAST.

    `backward_sparsity`: of B; None leaves B twice as many weights as A. `delta_t`: steps between choices of A and B.
    `momentum`: of the weights of B that are not in A. `min_per_filter`: how many of its largest weights a filter has in
    A, while there are enough; 0: as published.
    """

    backward_sparsity: float | None = None
    delta_t: int = 1
    momentum: float = 0.9
    min_per_filter: int = 1

    def __post_init__(self) -> None:
        if self.backward_sparsity is not None:
            check_number("backward_sparsity", self.backward_sparsity, 0.0, 1.0)
        check_whole("delta_t", self.delta_t)
        check_number("momentum", self.momentum, 0.0, 1.0)
        check_whole("min_per_filter", self.min_per_filter, 0)


class TopKAST(Reserve):
    """Forward with the largest |theta| of each layer, A; gradients for a larger set of the largest, B; no other moves.

    w = theta where A, else 0;   theta <- theta - lr v,  v <- mu v + dL/dw + (lambda / D) theta,  in B but not in A

    Every `delta_t` steps, after the optimizer's, A and B are chosen anew. The optimizer moves A, and its weight decay
    lambda acts there; what is outside A lives in a buffer of the method and is moved by the method, with the learning
    rate and weight decay of the weight's group, the latter divided by the density D of A (the exploration loss). So the
    network, its state and S2SAM see A alone. A weight that enters A comes with its value and no momentum.

    arXiv:2106.03517; neuralmagic/sparseml:.../pruning/modifier_pruning_topkast.py, where one optimizer moves both sets.
    That is the same for SGD with momentum mu, but for what happens to the momentum of weights that enter or leave A,
    which is lost here; for Adam and the like B's other weights are still moved by SGD.

    Defaults are for CIFAR and ImageNet alike: B twice A, which is 80 % for a network of 90 %. Cost: two dense buffers,
    and a dense weight gradient in every step, of which B's part is used; a choice ranks each layer twice.

    Raises:
        ValueError: B is sparser than A.
    """

    method = "top-kast"
    cannot_adopt = "it chooses among weights outside the network, too, and of these a sparse model holds none"
    Options = TopKASTOptions
    options: TopKASTOptions

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for part in self.parts if self._ready else ():
            self._choose(part)

    def check_options(self) -> None:
        """B holds A. Nothing is kept outside the network so far."""
        density, backward = 1 - self.final_sparsity, self.options.backward_sparsity
        if backward is not None and backward > self.final_sparsity:
            raise ValueError(f"backward_sparsity {backward} is above the sparsity {self.final_sparsity}; lower it")
        self.ratio = 2.0 if backward is None else (1 - backward) / density
        self.backward: dict[str, Tensor] = {}  #: B

    def trained(self, part: Part, name: str) -> Tensor:
        """B outside A."""
        mask = part.layers.masks[name]
        return self.backward[name].to(mask.device) & ~mask

    def decay(self, group: Mapping[str, Any]) -> float:
        """lambda / D."""
        return super().decay(group) / (1 - self.final_sparsity)

    def momentum(self, group: Mapping[str, Any]) -> float:
        """As the option says."""
        return self.options.momentum

    def due(self, part: Part, t: int) -> bool:
        """Every `delta_t` steps, but not in the last one."""
        return self.on_grid(t)

    def next_masks(self, part: Part, t: int) -> dict[str, Tensor]:
        """The largest |theta|, as many as before; a layer without a gradient stays as it is."""
        kept, rest = part.kept, part.resting()
        return {n: self._largest(self.theta(part, n), kept[n]) for n in kept if n not in rest}

    def change_topology(self, part: Part) -> None:
        """And choose B."""
        super().change_topology(part)
        self._choose(part)

    def extra_state(self) -> dict[str, Any]:
        """And B."""
        return super().extra_state() | {"backward": {name: pack_bits(mask) for name, mask in self.backward.items()}}

    def load_extra_state(self, extra: Mapping[str, Any]) -> None:
        """And B."""
        super().load_extra_state(extra)
        for name, w in self.weights.items():
            self.backward[name] = unpack_bits(extra["backward"][name], w.shape).to(w.device)

    def _largest(self, theta: Tensor, n: int) -> Tensor:
        """The first `n`, of which the first fewer are a subset."""
        return topk_mask(theta.abs(), n, check=False, min_per_filter=self.min_per_filter)

    def _choose(self, part: Part) -> None:
        for name, kept in part.kept.items():
            theta = self.theta(part, name)
            n = min(theta.numel(), round(self.ratio * kept))
            self.backward[name] = self._largest(theta, n)
        sync.broadcast_masks({name: self.backward[name] for name in part.kept})  # as A: rank 0's
