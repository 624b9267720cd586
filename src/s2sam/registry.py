"""What there is, as data: sparse training methods, models, data sets and recipes. Listing them loads no torch.

A row names its code as "module:attribute"; `.load()` imports it. A new method is one file in `s2sam/sparse/methods`
and one row here; rows of models and data sets stand in `s2sam.models.MODELS` and `s2sam.data.DATA`; a recipe is a YAML
file in `s2sam/recipes` whose first comment line describes it.
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

    `kind` is "static" (one mask for the whole training), "dynamic" (the mask moves) or "iterative" (one mask for each
    of several trainings); `defaults` are its options; `dense_state` says that the optimizer state of pruned weights may
    be non-zero. `flops` says how its training is counted (:func:`s2sam.analysis.flops.training_flops`), by the
    gradients that it looks at:

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


_METHODS = (
    MethodInfo(
        "static",
        "s2sam.sparse.methods.static:Static",
        "Mocanu et al. 2016, arXiv:1604.06060; Liu et al. 2022, arXiv:2202.02643",
        "static",
    ),
    MethodInfo(
        "magnitude",
        "s2sam.sparse.methods.magnitude:Magnitude",
        "Han et al. 2015, arXiv:1506.02626",
        "static",
    ),
    MethodInfo(
        "set",
        "s2sam.sparse.methods.set:SET",
        "Mocanu et al. 2018, arXiv:1707.04780",
        "dynamic",
        {"drop_fraction": 0.3, "delta_t": 100, "t_end": None, "regrow_dropped": False, "sign_split": False},
    ),
    MethodInfo(
        "rigl",
        "s2sam.sparse.methods.rigl:RigL",
        "Evci et al. 2020, arXiv:1911.11134",
        "dynamic",
        {"drop_fraction": 0.3, "delta_t": 100, "t_end": 0.75, "regrow_dropped": True, "sign_split": False},
        flops="rigl",
    ),
    MethodInfo(
        "set-itop",
        "s2sam.sparse.methods.itop:SETITOP",
        "Liu et al. 2021, arXiv:2102.02887",
        "dynamic",
        {
            "drop_fraction": 0.5,
            "delta_t": 1500,
            "t_end": 1.0,
            "regrow_dropped": False,
            "sign_split": False,
            "drop_end": 0.005,
        },
    ),
    MethodInfo(
        "rigl-itop",
        "s2sam.sparse.methods.itop:RigLITOP",
        "Liu et al. 2021, arXiv:2102.02887",
        "dynamic",
        {
            "drop_fraction": 0.5,
            "delta_t": 4000,
            "t_end": 1.0,
            "regrow_dropped": True,
            "sign_split": False,
            "drop_end": 0.005,
        },
        flops="rigl",
    ),
    MethodInfo(
        "deepr",
        "s2sam.sparse.methods.deepr:DeepR",
        "Bellec et al. 2018, arXiv:1711.05136",
        "dynamic",
        {"l1": 1e-5, "temperature": (1e-5, 1e-8, 1e-12, 1e-15), "delta_t": 1},
    ),
    MethodInfo(
        "dsr",
        "s2sam.sparse.methods.dsr:DSR",
        "Mostafa and Wang 2019, arXiv:1902.05967",
        "dynamic",
        {"drop_fraction": 0.15, "threshold": 1e-3, "delta_t": 100, "stretch": (0.25, 0.5, 0.75), "t_end": 0.95},
    ),
    MethodInfo(
        "snfs",
        "s2sam.sparse.methods.snfs:SNFS",
        "Dettmers and Zettlemoyer 2019, arXiv:1907.04840",
        "dynamic",
        {"drop_fraction": 0.5, "delta_t": 100, "t_end": 1.0, "regrow_dropped": True, "beta": 0.9},
        flops="dense_gradient",
    ),
    MethodInfo(
        "top-kast",
        "s2sam.sparse.methods.topkast:TopKAST",
        "Jayakumar et al. 2020, arXiv:2106.03517",
        "dynamic",
        {"backward_sparsity": None, "delta_t": 1, "momentum": 0.9},
        flops="dense_gradient",
    ),
    MethodInfo(
        "granet",
        "s2sam.sparse.methods.granet:GraNet",
        "Liu et al. 2021, arXiv:2106.10404",
        "dynamic",
        {
            "initial_sparsity": 0.5,
            "delta_t": 1000,
            "t_start": 0.0,
            "t_end": 0.6875,
            "drop_fraction": 0.5,
            "drop_end": 0.005,
        },
        flops="rigl",
    ),
    MethodInfo(
        "gmp",
        "s2sam.sparse.methods.gmp:GMP",
        "Zhu and Gupta 2017, arXiv:1710.01878",
        "dynamic",
        {"initial_sparsity": 0.0, "delta_t": 100, "t_start": 0.2, "t_end": 0.75},
    ),
    MethodInfo(
        "mest",
        "s2sam.sparse.methods.mest:MEST",
        "Yuan et al. 2021, arXiv:2110.14032",
        "dynamic",
        {
            "variant": "em",
            "delta_t": 100,
            "phases": (0.5625, 0.75),
            "lower": None,
            "upper": None,
            "grad_weight": 0.0,
            "regrow_dropped": False,
            "mest_compat": False,
        },
    ),
    MethodInfo(
        "lt",
        "s2sam.sparse.methods.lt:LT",
        "Frankle and Carbin 2019, arXiv:1803.03635; Frankle et al. 2019, arXiv:1903.01611",
        "iterative",
        {"rate": 0.2, "rewind_step": 0},
    ),
    MethodInfo(
        "snip",
        "s2sam.sparse.methods.snip:SNIP",
        "Lee et al. 2019, arXiv:1810.02340",
        "static",
        {"min_per_layer": 1, "bn_mode": "train", "num_batches": None},
    ),
    MethodInfo(
        "grasp",
        "s2sam.sparse.methods.grasp:GraSP",
        "Wang et al. 2020, arXiv:2002.07376",
        "static",
        {"min_per_layer": 1, "bn_mode": "train", "num_batches": None, "temperature": 200.0},
    ),
    MethodInfo(
        "synflow",
        "s2sam.sparse.methods.synflow:SynFlow",
        "Tanaka et al. 2020, arXiv:2006.05467",
        "static",
        {"min_per_layer": 1, "rounds": 100, "input_shape": None},
    ),
)


def list_methods() -> tuple[MethodInfo, ...]:
    """All sparse training methods.

    >>> [row.name for row in list_methods()][:2]
    ['static', 'magnitude']
    """
    return _METHODS


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
