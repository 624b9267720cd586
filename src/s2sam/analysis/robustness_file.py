"""robustness-SOURCE.json in a run folder: every cell, the measures over them, and all that they depend on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from s2sam.analysis.calibration import BINS
from s2sam.analysis.plain_json import to_json
from s2sam.analysis.robustness import ALEXNET, Grid, mce_alexnet, mean_of, relative_mce_alexnet, retained_accuracy
from s2sam.data.corruptions import SEVERITIES, group_of
from s2sam.outside import COUNT, NUMBER, OPTIONAL, SHARE, Number, Row, fit, parse_json, reading
from s2sam.train.atomic import write_text

FORMAT = 1
Result = dict[str, Any]
#: what must agree between results in one table; the digest says that the corrupted pixels are the same
SHARED = (
    "format", "source", "constants", "layout", "corruption_seed", "data_digest", "split", "images", "image_seed",
    "corruptions", "severities", "ece_bins", "corrupted_digest", "weights",
)  # fmt: skip
#: what every result holds besides; those of official and of generated images differ in the rest
NEEDED = (
    "arm", "run_seed", "source", "weights", "weights_sha256", "data_digest", "corrupted_digest", "images", "all_images",
    "clean", "clean_error", "mean_corruption_accuracy", "mean_corruption_error", "relative_mean_corruption_error",
    "retained_accuracy", "mce_alexnet", "relative_mce_alexnet", "mean_corruption_nll", "mean_corruption_ece",
)  # fmt: skip
_CELL = {"top1": SHARE, "nll": NUMBER, "ece": NUMBER}
_SHAPE: dict[str, Any] = {
    **dict.fromkeys(NEEDED, OPTIONAL), "format": Number(FORMAT, FORMAT, whole=True), "clean": _CELL,
    **dict.fromkeys(("clean_error", "mean_corruption_accuracy", "mean_corruption_error"), SHARE),
    **dict.fromkeys(("arm", "source", "weights", "weights_sha256", "data_digest"), str),
    "corrupted_digest": (str, None),
    "run_seed": COUNT, "images": Number(1, whole=True), "all_images": COUNT, "ece_bins": COUNT,
    "corruptions": Row(str), "severities": Row(Number(1, len(SEVERITIES), whole=True)), "cells": {...: {...: _CELL}},
    **dict.fromkeys(("layout?", "constants?"), (str, None)), "corruption_seed?": (COUNT, None),
}  # fmt: skip


def path_of(folder: Path, source: str) -> Path:
    """The file of results on "generated" or "official" images: two files, as the two are never mixed."""
    return folder / f"robustness-{source}.json"


def assemble(facts: Mapping[str, Any], clean: Mapping[str, float], cells: Mapping[str, Mapping[int, Any]]) -> Result:
    """The result of a run.

    Args:
        facts: what the numbers depend on; `source`, `layout` and `classes` decide whether mCE is defined.
        clean: top1, nll and ece on the clean images.
        cells: the same of each corruption and severity.
    """
    errors = grid_of(cells, "top1", flip=True)
    error, mean_error = 1 - clean["top1"], mean_of(errors)
    imagenet_c = facts.get("layout") == "imagenet-c" and facts["classes"] == 1000
    whole = set(errors) == set(ALEXNET) and all(set(row) == set(SEVERITIES) for row in errors.values())
    return {
        "format": FORMAT, **facts, "ece_bins": BINS,
        "clean": dict(clean),
        "cells": {name: {str(severity): dict(cell) for severity, cell in row.items()} for name, row in cells.items()},
        "clean_error": error,
        "mean_corruption_accuracy": 1 - mean_error,
        "mean_corruption_error": mean_error,
        "relative_mean_corruption_error": mean_error - error,
        "retained_accuracy": retained_accuracy(errors, error),
        "mce_alexnet": mce_alexnet(errors) if imagenet_c and whole else None,
        "relative_mce_alexnet": relative_mce_alexnet(errors, error) if imagenet_c and whole else None,
        "mean_corruption_nll": mean_of(grid_of(cells, "nll")),
        "mean_corruption_ece": mean_of(grid_of(cells, "ece")),
    }  # fmt: skip


def grid_of(cells: Mapping[str, Mapping[Any, Any]], name: str, *, flip: bool = False) -> Grid:
    """One number of every cell; with `flip` 1 minus it, so that `top1` becomes the error."""
    return {
        corruption: {int(severity): 1 - cell[name] if flip else cell[name] for severity, cell in row.items()}
        for corruption, row in cells.items()
    }


def save(result: Result, path: Path) -> None:
    """Write the file whole or not at all; a measure that is not finite (nothing retained of nothing) is null."""
    write_text(path, to_json(result, indent=1) + "\n")


def read(path: Path) -> Result:
    """A result.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not there; measure the run with `s2sam robust {path.parent}`")
    with reading(path, "damaged or no result of `s2sam robust`", "delete it and measure the run again"):
        result: Result = parse_json(path.read_bytes())
        fit(result, _SHAPE)
        for name in result["corruptions"]:
            group_of(name)
            if set(result["cells"][name]) != set(map(str, result["severities"])):
                raise ValueError(f"not every severity of {name} is there")
    return result


def check_distinct(results: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError if two of them are the same arm and seed: they would be counted as two draws of one arm."""
    seen: dict[tuple[Any, Any], Any] = {}
    for result in results:
        key = result["arm"], result["run_seed"]
        if key in seen:
            raise ValueError(f"{seen[key]} and {result['run']} are the same arm and seed; name one of them")
        seen[key] = result["run"]


def check_comparable(results: Sequence[Result]) -> None:
    """Raise ValueError unless these results may stand in one table: same corrupted pixels of the same test images."""
    for other in results[1:]:
        first = results[0]
        if other["source"] != first["source"]:
            raise ValueError(
                f"{first['run']} was measured on {first['source']} images and {other['run']} on {other['source']} "
                "ones; these never stand in one table, measure both on the same"
            )
        for name in SHARED:
            if first.get(name) != other.get(name):
                raise ValueError(
                    f"{first['run']} and {other['run']} cannot be compared: {name} is {_short(first.get(name))} for "
                    f"the first and {_short(other.get(name))} for the second; measure both in one command"
                )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
