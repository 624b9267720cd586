"""How long e is, by the name of the scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from s2sam.sam.displacement import pieces
from s2sam.sam.norms import FLOOR, constant, global_norm, real, root_of_count, total_norm, widen
from s2sam.sam.sharded import has_shards
from s2sam.tensors import alike


@dataclass(frozen=True)
class Scale:
    r"""e = c shaped(d, w), with one number c for all parameters of one radius.

    ========  =======================  =====================  ==========================
    name      shaped(d, w)             c                      what holds
    ========  =======================  =====================  ==========================
    norm      d                        rho / ||d||            ||e|| = rho
    relative  d                        rho ||w|| / ||d||      ||e|| = rho ||w||
    asam      w^2 d                    rho / || |w| d ||      || e / |w| || = rho
    step      d                        rho lr                 ||e|| = rho lr ||d||
    filter    ||w_f|| d_f / ||d_f||    rho                    ||e_f|| = rho ||w_f||
    rms       d                        rho sqrt(p) / ||d||    ||e|| = rho sqrt(p)
    ========  =======================  =====================  ==========================

    A filter is a slice along dim 0 of a tensor with at least 2 dims; one with d_f = 0 or w_f = 0 gets e_f = 0. Pruned
    weights get e = 0: their d is 0, which masked gradients ensure, and asam multiplies by w as well. p is the number of
    weights that are not 0, so that rho of "rms" is the root mean square of the displacement of an active weight.
    """

    power: int = 0  #: of |w| in shaped(d, w)
    relative: bool = False  #: rho counts in units of ||w||
    by_lr: bool = False  #: the radius is rho times the learning rate of the group, and d is not normalised
    filters: bool = False  #: each filter by itself; tensors with fewer than 2 dims take no part
    rms: bool = False  #: rho counts in units of sqrt(p)

    @property
    def plain(self) -> bool:
        """True if shaped(d, w) = d."""
        return self.power == 0 and not self.filters

    @property
    def common(self) -> bool:
        """True if c needs the norm over all parameters."""
        return not (self.by_lr or self.filters)

    def shaped(self, d: list[Tensor], w: list[Tensor]) -> list[Tensor]:
        """The vector that c multiplies, as new tensors unless `plain`."""
        if self.filters:
            return filterwise(d, w)
        if self.power == 0:
            return d
        conjugate = [t.conj() for t in w] if w[0].is_complex() else w
        return list(torch._foreach_mul(torch._foreach_mul(d, w), conjugate))

    def unit(self, w: list[Tensor]) -> Tensor | None:
        """What rho counts in, of all weights that are displaced together; None if it is a length itself."""
        if self.relative:
            return total_norm(w)
        return root_of_count(w) if self.rms else None

    def coefficient(self, rho: float, d_norm: Tensor, unit: Tensor | None) -> Tensor:
        """The number c, if it needs the common norm of all directions."""
        size = constant(rho, d_norm.device, d_norm.dtype)
        return (size if unit is None else size * unit) / d_norm

    def direction_norm(self, d: list[Tensor], w: list[Tensor]) -> Tensor:
        """|| |w|^(power / 2) d ||_2 over all ranks, never 0."""
        if self.power == 0:
            return total_norm(d, floor=True)
        if has_shards(d):
            return global_norm(self.direction_norm, d, d, w, floor=True)
        parts = [total_norm(list(torch._foreach_mul(dd, ww))) for dd, ww in pieces(d, w)]
        return total_norm(parts, floor=True)


SCALES = {
    "norm": Scale(),
    "step": Scale(by_lr=True),
    "relative": Scale(relative=True),
    "filter": Scale(filters=True),
    "asam": Scale(power=2),
    "rms": Scale(rms=True),
}


def fixed(radius: float, p: Tensor) -> Tensor:
    """The number c of a scale without a common norm, for parameters like `p`."""
    return constant(radius, p.device, real(p))


def filterwise(d: Sequence[Tensor], w: Sequence[Tensor]) -> list[Tensor]:
    """||w_f|| d_f / ||d_f|| for every slice f of dim 0, 0 where d_f is 0; all 0 if there are fewer than 2 dims.

    Tensors of one shape are stacked, as no kernel for lists takes norms of slices. Norms below 1e-19 count as that.

    Cost: 8 calls for each shape, dtype and device (in half precision 11), and 24 bytes per entry (8 less for a shape
    that occurs once); at once, twice the largest stack.

    Example:
        >>> filterwise([torch.tensor([[3.0, 4.0], [0.0, 0.0]])], [torch.tensor([[0.0, 10.0], [1.0, 1.0]])])
        [tensor([[6., 8.],
                [0., 0.]])]
    """
    out: dict[int, Tensor] = {}
    for chosen in alike(d):
        here, shape = [d[i] for i in chosen], d[chosen[0]].shape
        if len(shape) < 2:
            out.update((i, torch.zeros_like(d[i])) for i in chosen)
            continue
        rest, wide = tuple(range(2, len(shape) + 1)), widen(_stack(here))
        size = torch.linalg.vector_norm(widen(_stack([w[i] for i in chosen])), dim=rest, keepdim=True)
        length = torch.linalg.vector_norm(wide, dim=rest, keepdim=True)
        e = (wide * (size / length.clamp_min_(FLOOR))).to(here[0].dtype)
        out.update(zip(chosen, e.unbind(), strict=True))
    return [out[i] for i in range(len(d))]


def _stack(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors) if len(tensors) > 1 else tensors[0].unsqueeze(0)
