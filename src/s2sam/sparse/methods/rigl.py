"""RigL: SET that grows where the dense gradient is largest (Evci et al. 2020, arXiv:1911.11134)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from s2sam.sparse import scores
from s2sam.sparse.drop_grow import check_annealed
from s2sam.sparse.methods.set import SET, SETOptions
from s2sam.sparse.part import Part
from s2sam.sparse.schedules import CosineDrop


@dataclass(frozen=True)
class RigLOptions(SETOptions):
    """As SET's, with a cosine that starts at `drop_fraction` and ends at `t_end` of the training."""

    t_end: float | None = 0.75
    regrow_dropped: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_annealed(self.t_end)


class RigL(SET):
    """Grow the largest |dL/dw| among all weights not kept; f_t = f/2 (1 + cos(pi t / T_end)); no gradient step then.

    Differs from google-research/rigl:rigl/sparse_optimizers_base.py in that ties are settled by index, not by noise.
    The gradient is that of the step's own batch (all its micro-batches), at w + e under S2SAM. Needs `total_steps`.
    Cost: a change ranks each layer twice; a step in between costs what a static mask does.
    """

    method = "rigl"
    placement: ClassVar[Literal["after", "replace"]] = "replace"
    Options = RigLOptions
    options: RigLOptions

    def drop_fraction(self, t: int) -> float:
        """The cosine; 0 at its end, so that no change is due there."""
        return CosineDrop(self.options.drop_fraction, self.last_step)(t)

    def grow_scores(self, part: Part, name: str) -> Tensor | None:
        """|dL/dw|; a layer without a gradient stays as it is."""
        weight = part.layers.weights[name]
        return None if weight.grad is None else scores.gradient_magnitude(weight)
