"""HTML from plain values: whatever comes from outside is escaped here."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from s2sam.report.arms import Arm
from s2sam.report.svg import PALETTE


def text(value: str) -> str:
    """Escaped, with the percent sign kept at its number.

    >>> text("<b> 90 %")
    '&lt;b&gt; 90&nbsp;%'
    """
    return escape(value, quote=True).replace(" %", "&nbsp;%")


def items(sentences: Iterable[str]) -> str:
    """The entries of a list.

    >>> items(["a", "b"])
    '<li>a</li><li>b</li>'
    """
    return "".join(f"<li>{text(sentence)}</li>" for sentence in sentences)


def pairs(mapping: Mapping[str, Any]) -> str:
    """A table of names and values."""
    rows = "".join(f'<tr><th scope="row">{text(str(k))}</th><td>{text(str(v))}</td></tr>' for k, v in mapping.items())
    return f"<table><tbody>{rows}</tbody></table>"


def grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts below their heads."""
    columns = "".join(f'<th scope="col">{text(h)}</th>' for h in head)
    body = "".join("<tr>" + "".join(f"<td>{text(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table>"


def arm_table(
    heads: Sequence[str], rows: Iterable[tuple[Arm, Sequence[str]]], names: Sequence[str], words: Collection[str] = ()
) -> str:
    """A table with a line for each arm below the name of its network, in the colour of its optimizer.

    Args:
        heads: of the columns; the first is that of the arms.
        rows: arms and their further cells, which are HTML.
        names: the optimizers of the report, in the order of their colours.
        words: heads of columns that hold words, which are set at the left.
    """

    def left(head: str) -> str:
        return ' class="text"' if head in words else ""

    columns = "".join(f'<th scope="col"{left(head)}>{text(head)}</th>' for head in heads)
    body, base = [], None
    for arm, cells in rows:
        if arm.base != base:
            base = arm.base
            body.append(
                f'<tr class="base"><th scope="rowgroup">{text(base)}</th><td colspan="{len(heads) - 1}"></td></tr>'
            )
        dot = f'<span class="dot" style="background:var(--s{names.index(arm.treatment) % len(PALETTE)})"></span>'
        rest = "".join(f"<td{left(head)}>{cell}</td>" for head, cell in zip(heads[1:], cells, strict=True))
        body.append(f'<tr><th scope="row">{dot}{text(arm.treatment)}</th>{rest}</tr>')
    return f"<table><thead><tr>{columns}</tr></thead><tbody>{''.join(body)}</tbody></table>"
