"""Which parameters are displaced."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable, Sequence

from torch import Tensor, nn

SCOPES = ("all", "weights", "norm")
NORM_LAYERS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    *(nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
)
_NORM_NAME = re.compile(r"Norm([123]d)?$")


def is_norm_layer(module: nn.Module) -> bool:
    """True for BatchNorm, InstanceNorm, LayerNorm, GroupNorm, RMSNorm, and classes whose name ends in Norm or Norm2d.

    Example:
        >>> is_norm_layer(nn.BatchNorm2d(3)), is_norm_layer(nn.Linear(2, 2))
        (True, False)
    """
    return isinstance(module, NORM_LAYERS) or _NORM_NAME.search(type(module).__name__) is not None


class Scope:
    """`p in scope` says whether p takes part: a buffer, a displacement, the norm, the guard.

    "all"; "weights", the tensors with at least 2 dims; "norm", what normalisation layers of the models own themselves.
    The models are not kept alive; layers added to them later are found when their parameters are asked about.

    Raises:
        ValueError: unknown name, "norm" without a model, or none of `parameters` takes part.
    """

    def __init__(
        self, name: str, models: Sequence[nn.Module], parameters: Iterable[Tensor], *, least_dims: int = 0
    ) -> None:
        self._least = 2 if name == "weights" else least_dims
        self._models = [weakref.ref(m) for m in models] if name == "norm" else []
        self._norm: set[int] = set()
        self._known: set[int] = set()
        self.everything = name != "norm" and self._least == 0
        if name == "norm" and not models:
            raise ValueError("scope='norm' needs model=..., to know which parameters belong to normalisation layers")
        if not self.everything and not any(p in self for p in parameters):
            what = "normalisation layer with parameters" if name == "norm" else "parameter with at least 2 dims"
            raise ValueError(f"nothing would be displaced: the optimizer has no {what}; use scope='all'")

    def __contains__(self, p: Tensor) -> bool:
        if self.everything:
            return True
        if self._models and id(p) not in self._known:
            modules = [part for model in self._models if (m := model()) is not None for part in m.modules()]
            self._known = {id(q) for part in modules for q in part.parameters(recurse=False)} | {id(p)}
            layers = [part for part in modules if is_norm_layer(part)]
            self._norm = {id(q) for part in layers for q in part.parameters(recurse=False)}
        return p.dim() >= self._least and (not self._models or id(p) in self._norm)
