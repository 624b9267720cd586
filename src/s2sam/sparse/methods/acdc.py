"""AC/DC: the network is dense and compressed by turns, and compressed at the end (Peste et al. 2021)."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from s2sam.hooks import check_number
from s2sam.sparse import scores
from s2sam.sparse.budget import Distribution
from s2sam.sparse.options import check_flag, check_whole
from s2sam.sparse.part import Part
from s2sam.sparse.scheduled import Budget, Scheduled, over

MOMENTUM = ("momentum_buffer", "exp_avg")  #: what torch's optimizers call it


@dataclass(frozen=True)
class ACDCOptions:
    """What differs between runs of AC/DC.

    `delta_t`, `dense_t`: steps of a compressed and of a dense phase; None is a twentieth of the training, and as long
    as the other. `t_start`, `t_end`: the shares of `total_steps` at which the first and the last compressed phase
    begin. `reset_momentum`: start each dense phase without momentum. `min_per_filter`: how many of its largest weights
    a filter keeps in a compression, while there are enough; 0: as published.
    """

    delta_t: int | None = None
    dense_t: int | None = None
    t_start: float = 0.1
    t_end: float = 0.85
    reset_momentum: bool = True
    min_per_filter: int = 1

    def __post_init__(self) -> None:
        for name in ("delta_t", "dense_t"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name))
        check_number("t_start", self.t_start, 0.0, 1.0)
        check_number("t_end", self.t_end, 0.0, 1.0)
        check_flag("reset_momentum", self.reset_momentum)
        check_whole("min_per_filter", self.min_per_filter, 0)


class ACDC(Scheduled):
    """Compress to the largest |w| of all layers, train those; decompress, train all; by turns, compressed at the end.

    dense up to t0;  compressed from t0 + k (c + d), dense again c steps later, k = 0, 1, ...;  compressed from t1 on

    c = delta_t, d = dense_t, t0 = t_start T, t1 = t_end T, T = total_steps. A compressed phase that would leave no
    whole dense phase before t1 is left out, so the last dense phase is the longest: for T = 100 epochs and the defaults
    this is the authors' table, compressed at 10, 20, ..., 70 and 85, dense again at 15, 25, ..., 75. The mask stays for
    a phase and is hard; weights come back from 0, and all prunable weights without momentum.

    arXiv:2106.12379; IST-DASLab/ACDC:policies, configs/neurips/iht_imagenet_resnet50_insta_cosinelr_s90_ep100.yaml.
    Differs from there in exact counts where weights tie, in that each layer keeps a weight, and in that second moments
    (Adam's) and what is not prunable keep their state.

    Defaults are for ImageNet (100 epochs). CIFAR-100 (200 epochs): compressed for 20 epochs and dense for 13, from
    t_start=0.05 on. Cost: the masks alone; a compression ranks all layers together. Dense phases compute densely.

    >>> layer = nn.Linear(10, 10)
    >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    >>> from s2sam import sparsify
    >>> acdc = sparsify(layer, optimizer, method="ac-dc", sparsity=0.8, total_steps=100)
    >>> acdc.changes
    [10, 15, 20, 25, 30, 35, 40, 45, 50, 55, 60, 65, 70, 75, 85]
    >>> [acdc.target_sparsity(t) for t in (9, 10, 15, 84, 85, 100)]
    [0.0, 0.8, 0.0, 0.0, 0.8, 0.8]

    Raises:
        ValueError: no total_steps; the last phase begins before the first.
    """

    method = "ac-dc"
    cannot_adopt = "it begins dense and chooses its masks later"
    Options = ACDCOptions
    options: ACDCOptions
    default_distribution = "global"

    def check_options(self) -> None:
        """Make the plan: the steps after which the network is compressed, decompressed, compressed, ..."""
        super().check_options()
        o = self.options
        start, end = self.step_at(o.t_start), self.step_at(o.t_end)
        if not 1 <= start <= end:
            raise ValueError(
                f"the first compression, at t_start={o.t_start} of {self.total_steps} steps, must be after step 0 and "
                f"not after the last, at t_end={o.t_end}"
            )
        compressed = o.delta_t or max(1, self.step_at(0.05))
        self.changes = phases(start, end, compressed, o.dense_t or compressed)
        self.full = {name: w.numel() for name, w in self.weights.items()}
        self.sparse = self.budget(self.final_sparsity, self.distribution, self.power_scale)

    def target_sparsity(self, t: int) -> float:
        """The final one in a compressed phase, 0 in a dense one."""
        return self.final_sparsity if self.compressed(t) else 0.0

    def compressed(self, t: int) -> bool:
        """Whether step `t` leaves the network compressed."""
        return bisect_right(self.changes, t) % 2 == 1

    def allowed(self, t: int) -> Budget:
        """The budget, or everything."""
        return self.sparse if self.compressed(t) else self.full

    def initial_masks(
        self, model: nn.Module, sparsity: float, distribution: Distribution, power_scale: float
    ) -> dict[str, Tensor]:
        """Everything."""
        return {name: torch.ones_like(w, dtype=torch.bool) for name, w in self.weights.items()}

    def due(self, part: Part, t: int) -> bool:
        """Where a phase begins, and in it for as long as that was missed."""
        if self.compressed(t):
            return over(part.kept, self.allowed(t))
        return any(n < self.full[name] for name, n in part.kept.items())

    def next_masks(self, part: Part, t: int) -> dict[str, Tensor]:
        """The largest |w|, or all."""
        if self.compressed(t):
            return self.pick({n: scores.magnitude(w) for n, w in part.layers.weights.items()}, self.allowed(t))
        return {name: torch.ones_like(mask) for name, mask in part.layers.masks.items()}

    def change_topology(self, part: Part) -> None:
        """And forget the momentum where a dense phase begins."""
        super().change_topology(part)
        if self.options.reset_momentum and not self.compressed(part.step):
            for weight in part.layers.weights.values():
                state = part.optimizer.state.get(weight, {})
                for value in (state.get(key) for key in MOMENTUM):
                    if isinstance(value, Tensor):
                        value.zero_()


def phases(start: int, end: int, compressed: int, dense: int) -> list[int]:
    """The steps after which the network is compressed, decompressed, ..., compressed: an odd number of them.

    >>> phases(10, 85, 5, 5)[-3:], phases(10, 75, 20, 13), phases(5, 5, 5, 5)
    ([70, 75, 85], [10, 30, 75], [5])
    """
    found = []
    while start + compressed + dense <= end:
        found += [start, start + compressed]
        start += compressed + dense
    return [*found, end]
