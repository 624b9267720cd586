"""Settings of runs as flat mappings from dotted keys to values: checked, merged in layers, made into a TrainConfig.

The keys are those of :class:`~s2sam.train.config.TrainConfig`. Later layers win; only `sparse.options` is merged option
by option, because a budget shortens intervals of methods that the rows have set.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from s2sam.train.config import SamConfig, TrainConfig
from s2sam.train.config_files import check_key, known_keys

Settings = dict[str, Any]
OWN = {
    "seed": "seeds",
    "sparsity": "sparsities",
    "out": "the command's --out",
    "device": "the command's --device",
}  #: keys that the table gives to its runs, and where they come from
MERGED = "sparse.options"


def settings(mapping: Any, where: str) -> Settings:
    """The settings in a (nested) mapping, with dotted keys.

    >>> settings({"lr": 0.1, "sam": {"sign": -1}, "optim.nesterov": True}, "in base")
    {'lr': 0.1, 'sam.sign': -1, 'optim.nesterov': True}
    >>> settings({"epoch": 3}, "in base")
    Traceback (most recent call last):
    ValueError: unknown key 'epoch' in base; did you mean 'epochs'?

    Raises:
        ValueError: an unknown key (the nearest one is named), one that the table itself decides, or no mapping.
    """
    flat: Settings = {}
    for key, value in _walk(_mapping(mapping, where), ""):
        check_key(key, where)
        if key in OWN:
            raise ValueError(f"{key} cannot stand {where}: it comes from {OWN[key]}")
        if _is_group(key):
            raise ValueError(f"{key} {where} is a group of settings; give it `name: value` pairs")
        whole = _free(key)
        if whole is None:
            flat[key] = value
        else:
            flat[whole] = flat.get(whole, {}) | {key.removeprefix(whole + "."): value}
    return flat


def merged(*layers: Settings) -> Settings:
    """One layer after the other.

    >>> merged({"lr": 1, "sparse.options": {"a": 1, "b": 2}}, {"lr": 2, "sparse.options": {"b": 3}})
    {'lr': 2, 'sparse.options': {'a': 1, 'b': 3}}
    """
    result: Settings = {}
    for layer in layers:
        options = {**result.get(MERGED, {}), **layer.get(MERGED, {})}
        result.update(layer)
        if MERGED in result:
            result[MERGED] = options
    return result


def make_config(flat: Settings, **fixed: Any) -> TrainConfig:
    """The whole configuration: the defaults, these settings, and `fixed` top-level fields.

    >>> make_config({"epochs": 3, "sam.sign": -1}, seed=7).sam.sign
    -1

    Raises:
        ValueError: an impossible value.
    """
    default, groups = TrainConfig(), dict[str, Settings]()
    top: Settings = {}
    for key, value in flat.items():
        group, dot, leaf = key.partition(".")
        if dot:
            groups.setdefault(group, {})[leaf] = value
        else:
            top[key] = value
    groups.setdefault("sam", {})
    start = {"sam": SamConfig()}  # in the defaults scale auto has become that of s2sam already; echo has another one
    inner = {group: replace(start.get(group, getattr(default, group)), **values) for group, values in groups.items()}
    return replace(default, **{**top, **inner, **fixed})


def default_of(key: str) -> Any:
    """The value that a key has where no layer sets it."""
    value: Any = _defaults()
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


@functools.cache
def _defaults() -> Settings:
    return TrainConfig().as_dict()


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"the settings {where} must be `key: value` pairs, not {value!r}")
    return value


def _walk(content: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and _is_group(name):
            yield from _walk(value, name + ".")
        else:
            yield name, value


def _is_group(key: str) -> bool:
    return any(known.startswith(key + ".") for known in _known())


def _free(key: str) -> str | None:
    """The setting with free inner keys that a dotted key points into."""
    known = _known()
    return None if key in known else next(k for k in known if key.startswith(k + ".") and not _is_group(k))


@functools.cache
def _known() -> tuple[str, ...]:
    return tuple(known_keys())
