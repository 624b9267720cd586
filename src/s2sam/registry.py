"""What there is, as data: sparse training methods, models, data sets and recipes. Listing them loads no torch.

A row names its code as "module:attribute"; `.load()` imports it. A new method is one file in `s2sam/sparse/methods`
and one row in `s2sam.method_rows`; rows of models and data sets stand in `s2sam.models.MODELS` and `s2sam.data.DATA`; a
recipe is a YAML file in `s2sam/recipes` whose first comment line describes it.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from s2sam.sparse.names import unknown


class Row(Protocol):
    """Every row has a name."""

    @property
    def name(self) -> str:
        """What a user types."""


R = TypeVar("R", bound=Row)


def load(path: str) -> Any:
    """The object that "module:attribute" names."""
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)


@dataclass(frozen=True)
class MethodInfo:
    """A sparse training method.

    `kind` is "static" (one mask for the whole training), "dynamic" (the mask moves), "structured" (whole channels do)
    or "iterative" (one mask for each of several trainings); `defaults` are its options; `dense_state` says that the
    optimizer state of pruned weights may be non-zero. `flops` says how its training is counted
    (:func:`s2sam.analysis.flops.training_flops`), by the gradients that it looks at:

        sparse            active weights only, at the density of the step; what is done before training is not counted
        rigl              all weights in one step of `delta_t` + 1
        dense_gradient    all weights in every step
    """

    name: str
    cls: str
    paper: str
    kind: str
    defaults: Mapping[str, Any] = field(default_factory=dict, hash=False)
    dense_state: bool = False
    flops: str = "sparse"

    def load(self) -> Any:
        """The class, a subclass of `s2sam.sparse.base.Sparsifier`."""
        return load(self.cls)


@dataclass(frozen=True)
class ModelInfo:
    """A model; `factory(num_classes=..., in_channels=..., image_size=..., generator=..., **options)` makes it."""

    name: str
    factory: str
    paper: str
    description: str

    def load(self) -> Any:
        """The factory."""
        return load(self.factory)


@dataclass(frozen=True)
class DataInfo:
    """A data set, with the name of the function that loads it."""

    name: str
    loader: str
    description: str
    source: str

    def load(self) -> Any:
        """The function that loads the data."""
        return load(self.loader)


@dataclass(frozen=True)
class RecipeInfo:
    """A whole-run configuration: a YAML file that comes with the package."""

    name: str
    path: str
    description: str


def list_methods() -> tuple[MethodInfo, ...]:
    """All sparse training methods.

    >>> [row.name for row in list_methods()][:2]
    ['static', 'magnitude']
    """
    return tuple(load("s2sam.method_rows:METHODS"))


def list_models() -> tuple[ModelInfo, ...]:
    """All models."""
    return tuple(load("s2sam.models:MODELS"))


def list_data() -> tuple[DataInfo, ...]:
    """All data sets that have a name; a folder of parquet files is a data set as well."""
    return tuple(load("s2sam.data:DATA"))


def list_recipes() -> tuple[RecipeInfo, ...]:
    """All recipes that come with the package, by name."""
    folder = Path(__file__).parent / "recipes"
    return tuple(RecipeInfo(p.stem, str(p), _description(p)) for p in sorted(folder.glob("*.yaml")))


def _description(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ").strip() if first.startswith("#") else ""


def find(rows: Sequence[R], name: str, what: str) -> R:
    """The row called `name`.

    >>> find(list_methods(), "rigl", "method").kind
    'dynamic'
    >>> find(list_methods(), "rigel", "method")
    Traceback (most recent call last):
    ValueError: unknown method 'rigel'; did you mean 'rigl'? (one of: static, magnitude, set, rigl, ...)

    Raises:
        ValueError: there is none; the message names the nearest and lists all.
    """
    for row in rows:
        if row.name == name:
            return row
    raise unknown(what, name, [row.name for row in rows])
