"""Measurements that the run folders of a report hold: JSON files that the verbs of analysis leave beside the weights.

A file counts only if it was made at the weights that the run holds now, which their digest tells.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2sam.outside import Number, fit, parse_json, reading
from s2sam.report.arms import Arm
from s2sam.train.finished import WEIGHTS, weights_digest

Result = dict[str, Any]


@dataclass(frozen=True)
class Held:
    """Results of one kind."""

    by_arm: dict[Arm, dict[int, Result]]  #: arm -> seed -> result, in the report's order; arms without any left out
    notes: tuple[str, ...] = ()  #: what is left out, and why

    @property
    def results(self) -> list[Result]:
        """All of them."""
        return [result for seeds in self.by_arm.values() for result in seeds.values()]

    @property
    def first(self) -> Result:
        """Any, for what all of them share."""
        return self.results[0]


def find(
    arms: Sequence[Arm],
    file: str,
    verb: str,
    *,
    shared: Sequence[str],
    shape: Mapping[str, Any] | None = None,
    check: Callable[[Result], None] = lambda result: None,
    read: Callable[[Path], Result] | None = None,
) -> Held:
    """The results of one kind in the folders of these runs, each named by its arm and seed.

    Args:
        arms: of the report.
        file: its name in a run folder.
        verb: the command that writes it, such as "s2sam bound".
        shared: keys whose values must be the same in all of them.
        shape: what else the report relies on in a file, see :func:`s2sam.outside.misfit`.
        check: raises ValueError for what a shape cannot say.
        read: reads one file and raises ValueError if it is damaged; None = it is a JSON object of this shape.

    Raises:
        ValueError: a file is damaged, or two were not measured in the same way; names them.
    """
    found: dict[Arm, dict[int, Result]] = {}
    stale: list[Path] = []
    for arm in arms:
        for seed, run in arm.runs.items():
            path = run.folder / file
            if not path.is_file():
                continue
            result = read_object(path, verb, shared, shape or {}, check) if read is None else read(path)
            digest = digest_of(run.folder, str(result.get("weights", "final")))
            if digest is None or result.get("weights_sha256") != digest:
                stale.append(path)
                continue
            found.setdefault(arm, {})[seed] = {**result, "run": f"{arm.name}, seed {seed}"}
    held = Held(found, (*_stale(stale, verb), *_missing(arms, found)))
    check_alike(held.results, shared, verb)
    return held


def read_object(
    path: Path, verb: str, keys: Sequence[str], shape: Mapping[str, Any], check: Callable[[Result], None]
) -> Result:
    """The JSON object in a file, with these keys, of this shape and of format 1; ValueError if it is damaged."""
    with reading(path, f"damaged or no result of `{verb}`", "delete it, or run that command again"):
        result: Result = parse_json(path.read_bytes())
        fit(result, {"format": Number(1, 1, whole=True), "weights?": str, **dict.fromkeys(keys, object), **shape})
        check(result)
    return result


def digest_of(folder: Path, weights: str = "final") -> str | None:
    """The SHA-256 of the weights in a run folder, "final" or "ema"; None if there are none."""
    there = weights in WEIGHTS and (folder / WEIGHTS[weights]).is_file()
    return weights_digest(folder, weights) if there else None


def check_alike(results: Sequence[Mapping[str, Any]], keys: Sequence[str], verb: str) -> None:
    """Raise ValueError if one of these values is not the same in all results."""
    for other in results[1:]:
        for key in keys:
            a, b = results[0].get(key), other.get(key)
            if a != b:
                raise ValueError(
                    f"what `{verb}` left in the run folders cannot stand in one report: {differs(key, a, b)} for "
                    f"{results[0]['run']} and {other['run']}; measure all runs in one command"
                )


def differs(key: str, a: Any, b: Any) -> str:
    """What differs, in words: of settings only the first that does.

    >>> differs("settings", {"rho": 0.1, "k": 1}, {"rho": 0.2, "k": 1}), differs("images", 100, 200)
    ('rho is 0.1 and 0.2', 'images is 100 and 200')
    """
    if isinstance(a, dict) and isinstance(b, dict):
        name = next(name for name in {**a, **b} if a.get(name) != b.get(name))
        return differs(name, a.get(name), b.get(name))
    short = [text if len(text) <= 40 else f"{text[:37]}..." for text in (str(a), str(b))]
    return f"{key} is {short[0]} and {short[1]}"


def _stale(paths: Sequence[Path], verb: str) -> list[str]:
    if not paths:
        return []
    listed = ", ".join(map(str, paths))
    return [f"Left out, as it was measured at other weights than the run holds now: {listed}; run `{verb}` again."]


def _missing(arms: Sequence[Arm], found: Mapping[Arm, Mapping[int, Result]]) -> list[str]:
    """Which arms are not whole; nothing if none was measured at all."""
    counts = [(arm.name, len(found.get(arm, {})), len(arm.runs)) for arm in arms]
    if not found or all(n == total for _, n, total in counts):
        return []
    if len({(n, total) for _, n, total in counts}) == 1:
        return ["Not every run was measured: {1} of {2} of each arm.".format(*counts[0])]
    return ["Not every run was measured: " + "; ".join(f"{name} {n} of {total}" for name, n, total in counts) + "."]
