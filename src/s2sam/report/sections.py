"""Everything that the run folders of a report hold beyond training: a section for each kind of measurement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from s2sam.report.arms import Arm
from s2sam.report.bound_section import bound_sections, find_bounds
from s2sam.report.held import Held
from s2sam.report.panels import Section
from s2sam.report.premise_section import find_premise, premise_sections
from s2sam.report.robust_section import SOURCES, find_robustness, robust_sections
from s2sam.report.sharpness_section import find_sharpness, sharpness_sections
from s2sam.report.svg import style

Kind = tuple[Callable[[Sequence[Arm]], Held], Callable[[Held, Sequence[Arm]], list[Section]]]
KINDS: tuple[Kind, ...] = (
    (find_sharpness, sharpness_sections),
    (find_premise, premise_sections),
    *((partial(find_robustness, source=source), robust_sections) for source in SOURCES),
    (find_bounds, bound_sections),
)


def measured_sections(arms: Sequence[Arm]) -> list[Section]:
    """The sections for which there is something: none if nothing was measured beyond training.

    Results that were made at other weights than a run holds now are left out, and the section says so.

    Raises:
        ValueError: a file is damaged, or results were not measured in the same way; names it.
    """
    with style():
        kinds = [(find(arms), draw) for find, draw in KINDS]
        sections = [section for held, draw in kinds if held.by_arm for section in draw(held, arms)]
    lost = [note for held, _ in kinds if not held.by_arm for note in held.notes]
    if lost:
        sections.append(
            Section("Measurements left out", "These say nothing about the runs as they are.", (), tuple(lost))
        )
    return sections
