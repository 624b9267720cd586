"""LayerCounts: how many weights a sparsifier keeps, in each layer or in all together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from s2sam.sparse.budget import Distribution, counts, descend, thin_on


class LayerCounts:
    """Turns a sparsity into numbers of weights, by `distribution` or from the masks that init="adopt" has found."""

    method: ClassVar[str]
    weights: dict[str, Tensor]
    distribution: Distribution
    power_scale: float
    adopted: dict[str, int]  #: active weights per layer that init="adopt" has found

    def budget(self, sparsity: float, distribution: Distribution, power_scale: float = 1.0) -> int | dict[str, int]:
        """How many weights to keep: in all together for "global", else in each layer."""
        self._check_there(sparsity)
        if distribution == "global":
            return sum(counts(self.shapes, sparsity, "uniform").values())
        if self.adopted:
            return self._thinned([sparsity])[0]
        return counts(self.shapes, sparsity, distribution, power_scale=power_scale)

    def budgets(self, sparsities: Sequence[float]) -> list[int | dict[str, int]]:
        """How many weights to keep at rising sparsities, the last of which is the target: no layer ever gains one."""
        self._check_there(min(sparsities))
        if self.distribution == "global":
            return [self.budget(s, "global") for s in sparsities]
        if self.adopted:
            return list(self._thinned(sparsities))
        return list(descend(self.shapes, sparsities, self.distribution, power_scale=self.power_scale))

    def _check_there(self, sparsity: float) -> None:
        if self.adopted and sparsity < self.there - 1e-9:
            raise ValueError(
                f"method {self.method!r} plans for a sparsity of {sparsity:.4g} on its way, and the model to adopt has "
                f"{self.there:.4g} already; change the method's options, or begin with init='anew'"
            )

    def _thinned(self, sparsities: Sequence[float]) -> list[dict[str, int]]:
        """The adopted shares of the layers, made smaller by one factor."""
        kept = {
            name: self.adopted[name] * math.prod(s) // self.weights[name].numel() for name, s in self.shapes.items()
        }
        return thin_on(kept, [(1 - s) / (1 - self.there) for s in sparsities])

    @property
    def there(self) -> float:
        """The sparsity that init="adopt" has found; 0 otherwise."""
        total = sum(w.numel() for w in self.weights.values())
        return 1 - sum(self.adopted.values()) / total if self.adopted else 0.0

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """What budgets are made from: the shape of each prunable weight."""
        return {name: tuple(w.shape) for name, w in self.weights.items()}

    @property
    def min_per_layer(self) -> int:
        """How many weights a "global" choice leaves each layer at least."""
        return 1
