"""What a report's page is made of: sections of figures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from s2sam.report.arms import Arm


@dataclass(frozen=True)
class Figure:
    """A drawn panel."""

    svg: str  #: or other HTML
    label: str  #: what it shows, in words
    wide: bool = False  #: takes the whole width


@dataclass(frozen=True)
class Section:
    """Panels under one heading and caption."""

    title: str
    caption: str
    figures: tuple[Figure, ...]
    says: tuple[str, ...] = ()  #: what the numbers support, in sentences that stand first


def treatments(arms: Iterable[Arm]) -> list[str]:
    """The optimizers of a report in the order of their colours, the plain one first."""
    return list(dict.fromkeys(arm.treatment for arm in sorted(arms, key=lambda arm: not arm.plain)))
