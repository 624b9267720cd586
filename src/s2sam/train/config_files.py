"""Configurations from YAML files, recipes and flags, and back to YAML: one strict reader for all of them.

jsonargparse turns the fields of :class:`~s2sam.train.config.TrainConfig` into flags and reads the files; what is added
here is that a wrong key is answered with the nearest right one, in one sentence.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from s2sam import registry
from s2sam.outside import parse_yaml, reading
from s2sam.train.config import TrainConfig

_KINDS = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text",
    "dict": "a mapping, as in --{key}.NAME VALUE", "list": "a list, as in '[0.5, 0.75]'",
}  # fmt: skip
SWITCHES = ("resume", "overwrite", "print_config")  #: flags that are no setting of the run
_NESTED = {
    "model_options",
    "sparse.options",
    "sparse.distribution",
    "data_options.options",
}  #: their values may be mappings with free keys


def load_config(source: str | Path, **changes: Any) -> TrainConfig:
    """The configuration in a YAML file, or of a recipe by name, with top-level fields changed.

    >>> load_config("digits", seed=3).seed
    3

    Raises:
        ValueError: no such file or recipe, not YAML, an unknown key or an impossible value; one sentence says which.
    """
    return dataclasses.replace(parse(["--config", str(source)]), **changes)


def parse(argv: Sequence[str], *, prog: str = "s2sam train") -> TrainConfig:
    """The configuration that command-line flags describe; `--config` may occur several times, flags win over files.

    Dashes and underscores are the same: `--optim.weight-decay` is `optim.weight_decay`. `--help` prints help and exits.

    Raises:
        ValueError: as :func:`load_config`.
    """
    return parse_flags(argv, prog=prog)[0]


def parse_flags(argv: Sequence[str], *, prog: str = "s2sam train") -> tuple[TrainConfig, dict[str, Any]]:
    """As :func:`parse`, with the flags that are no setting of the run: resume, overwrite, print_config."""
    from jsonargparse import ArgumentError, Namespace

    files, flags = _split(argv)
    parser = make_parser(prog)
    try:
        chosen: Namespace = parser.parse_args([token for f in files for token in ("--config", f)] + flags)
    except ArgumentError as error:
        raise ValueError(_sentence(str(error))) from None
    except (OverflowError, RecursionError, AttributeError, KeyError) as error:  # of values that no setting takes
        raise ValueError(
            f"{' and '.join(files) or 'a flag'} holds a value that no setting takes ({error}); see `{prog} --help`"
        ) from error
    values = parser.instantiate(chosen)
    config = TrainConfig(**{f.name: values[f.name] for f in dataclasses.fields(TrainConfig)})
    return config, {switch: values[switch] for switch in SWITCHES}


def unused_options(argv: Sequence[str], config: TrainConfig) -> list[str]:
    """The options in the flags `--sparse.options...` that the method does not have; those of files are left aside.

    >>> unused_options(["--sparse.options.rate", "0.3"], TrainConfig(method="static"))
    ['rate']
    """
    import yaml

    given: list[str] = []
    for token, value in zip(argv, [*argv[1:], ""], strict=True):
        key, equals, _ = token.replace("-", "_").partition("=")
        if key.startswith("__sparse.options."):
            given.append(key.rpartition(".")[2])
        elif key == "__sparse.options":
            content = yaml.safe_load(token.partition("=")[2] if equals else value)
            given += content if isinstance(content, Mapping) else []
    return [option for option in given if option not in config.method_options]


def make_parser(prog: str) -> Any:
    """The jsonargparse parser whose flags are the fields of TrainConfig."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog=prog, usage=f"{prog} [--config RECIPE] [--KEY VALUE ...]",
        exit_on_error=False, allow_abbrev=False, print_config=None,
        description="Train one network into a run folder. Dashes and underscores in names are the same.",
    )  # fmt: skip
    parser.add_argument(
        "--config", action="config", help="a recipe (`s2sam list recipes`) or a YAML file; flags win over it"
    )
    parser.add_argument(
        "--resume", default="auto", metavar="auto|never|PATH",
        help="auto: go on with the unfinished run in the folder, if there is one; or a checkpoint to go on from",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace a finished run in the same folder")
    parser.add_argument("--print_config", action="store_true", help="print the whole configuration as YAML and stop")
    parser.add_class_arguments(TrainConfig)
    return parser


def dump(config: TrainConfig) -> str:
    """The whole configuration as YAML.

    >>> print(dump(TrainConfig()).partition("method")[0].strip())
    data: digits
    model: mlp
    """
    import yaml

    text: str = yaml.safe_dump(config.as_dict(), sort_keys=False, allow_unicode=True)
    return text


def recipe_path(name: str) -> Path:
    """The file of a recipe, or `name` itself if it is the path of a YAML file.

    Raises:
        ValueError: there is neither.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        if not path.is_file():
            raise ValueError(
                f"there is no configuration file at {path}; give a YAML file or a recipe (`s2sam list recipes`)"
            )
        return path
    return Path(registry.find(registry.list_recipes(), name, "recipe").path)


def known_keys(cls: Any = TrainConfig, prefix: str = "") -> Iterator[str]:
    """All dotted keys of a configuration, groups included."""
    for f in dataclasses.fields(cls):
        key = prefix + f.name
        yield key
        default = f.default_factory() if callable(f.default_factory) else f.default
        if dataclasses.is_dataclass(default):
            yield from known_keys(type(default), key + ".")


def check_key(key: str, where: str, more: Sequence[str] = ()) -> None:
    """Raise ValueError, naming the nearest key, unless `key` (dotted, with underscores) is one of a configuration.

    `more` are others that could be meant.
    """
    known = [*known_keys(), *more]
    if key in known or any(key.startswith(group + ".") for group in _NESTED):
        return
    leaf = {k.rpartition(".")[2]: k for k in known}
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6) or [
        leaf[n] for n in difflib.get_close_matches(key.rpartition(".")[2], list(leaf), n=1, cutoff=0.6)
    ]
    hint = f"did you mean {near[0]!r}?" if near else "`s2sam train --help` lists all"
    raise ValueError(f"unknown key {key!r} {where}; {hint}")


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The configuration files, checked, and the flags with underscores, checked."""
    files: list[str] = []
    flags: list[str] = []
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        if not token.startswith("--") or token == "--":
            flags.append(token)
            continue
        name, equals, value = token[2:].partition("=")
        key = name.replace("-", "_")
        if key == "config":
            if not equals and not tokens:
                raise ValueError("--config needs the name of a recipe or a YAML file")
            path = recipe_path(value if equals else tokens.pop(0))
            _check_file(path)
            files.append(str(path))
        elif key in ("help", *SWITCHES):
            flags.append("--" + key + equals + value)
        else:
            check_key(key, "among the flags", ("config", "help", *SWITCHES))
            if _inner(key):
                raise ValueError(f"--{key} is a group of settings, as in --{key}.{_inner(key)[0]} VALUE")
            flags.append("--" + key + equals + value)
    return files, flags


def _check_file(path: Path) -> None:
    import yaml

    with reading(path, "not valid YAML", "write one `key: value` a line"):
        text = path.read_text(encoding="utf-8")
        content = parse_yaml(text)
        twice = _twice(yaml.compose(text, Loader=yaml.SafeLoader))
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds no configuration; write one `key: value` a line")
    if twice:
        raise ValueError(f"{path} gives {twice}; keep one of them")
    for key, value in _flat(content):
        check_key(key, f"in {path}")
        if _inner(key) and not isinstance(value, Mapping):
            raise ValueError(f"{key} in {path} is a group of settings, as in {key}: {{{_inner(key)[0]}: VALUE}}")


def _twice(node: Any, prefix: str = "") -> str:
    """The first key of a YAML node that stands twice in one mapping, with both lines; "" if there is none."""
    seen: dict[str, int] = {}
    for key, value in getattr(node, "value", ()) if getattr(node, "id", "") == "mapping" else ():
        name, line = f"{prefix}{key.value}", key.start_mark.line + 1
        if name in seen:
            return f"{name!r} twice (lines {seen[name]} and {line})"
        seen[name] = line
        inner = _twice(value, f"{name}.")
        if inner:
            return inner
    return ""


def _inner(key: str) -> list[str]:
    """The settings in the group `key`; none if it is no group."""
    return [k.removeprefix(key + ".") for k in known_keys() if k.startswith(key + ".")]


def _flat(content: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        name = f"{prefix}{key}"
        yield name, value
        if isinstance(value, Mapping) and name not in _NESTED:
            yield from _flat(value, name + ".")


def _sentence(message: str) -> str:
    """jsonargparse's message as one line."""
    wrong = re.match(r'Parser key "([^"]+)":\s+Expected a <class \'(\w+)\'>\. Got value: (.*)', message, re.DOTALL)
    if wrong:
        key, kind, value = wrong.groups()
        return f"{key} must be {_KINDS.get(kind, kind).format(key=key)}, got {value.strip()}"
    union = re.match(r'Parser key "([^"]+)":\s+Does not validate .*Given value: (.*)', message, re.DOTALL)
    if union:
        return f"{union.group(1)} does not take the value {union.group(2).strip()}; `s2sam train --help` names its type"
    return " ".join(message.split())
