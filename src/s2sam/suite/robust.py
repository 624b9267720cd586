"""Tables of robustness: the finished runs of a plan on corrupted test images, each measured once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2sam.analysis.robustness_file import check_comparable, path_of, save
from s2sam.analysis.robustness_run import RobustSettings, measure, stored
from s2sam.report.read import Run
from s2sam.suite.plan import Plan, Planned
from s2sam.suite.provenance import digest_of

if TYPE_CHECKING:
    from rich.console import Console


def measure_robustness(
    plan: Plan, runs: Mapping[Planned, Run], console: Console, *, read_only: bool = False
) -> dict[Planned, dict[str, Any]]:
    """The results of `s2sam robust` for all runs: from their folders where they are, else measured and kept there.

    All corruptions and severities, all test images: the official ones in `plan.corrupted`, else generated ones.

    Raises:
        ValueError: official files that are missing, damaged or of other images; with `read_only` a run that is not
            measured; runs of one block that saw different corrupted images.
    """
    settings = RobustSettings(official=plan.corrupted or None, device=plan.device)
    found = {planned: stored(planned.config.folder, settings) for planned in runs}
    todo: dict[str, list[Planned]] = {}
    for planned, run in runs.items():
        if found[planned] is None:
            todo.setdefault(digest_of(run), []).append(planned)
    count = sum(map(len, todo.values()))
    if count and read_only:
        first = next(iter(todo.values()))[0]
        raise ValueError(f"the robustness of {count} runs is not measured, such as {first.name}; leave out --read-only")
    if count:
        console.print(f"measuring {count} runs on corrupted images", markup=False)
    for group in todo.values():
        folders: list[Path] = [planned.config.folder for planned in group]
        results = measure(folders, [planned.name for planned in group], settings)
        for planned, result in zip(group, results, strict=True):
            save(result, path_of(planned.config.folder, settings.kind))
            found[planned] = result
    measured = {planned: result for planned, result in found.items() if result is not None}
    for block in plan.suite.blocks:
        check_comparable([result for planned, result in measured.items() if planned.cell.block == block])
    return measured
