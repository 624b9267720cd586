"""Draws flow.svg: where SGD, SAM, S2-SAM and echo take their gradients, and what they do with them.

python docs/pictures/flow.py    # writes flow.svg beside this file
"""

from __future__ import annotations

from math import hypot
from pathlib import Path

BATCHES = ("#0072b2", "#d55e00", "#009e73", "#8a5fbf")
INK, PALE = "#1b2430", "#5b6675"
LEFT, COLUMN, ROW, TOP, LIFT, RADIUS = 190, 118, 104, 66, 34, 15
#: Row by row: batch (from 0), displaced or not, whether a step follows, and which gradient (or None) displaced it.
Gradient = tuple[int, bool, bool, int | None]
PLAIN, ASCENT = (False, True), (False, False)  #: at w, with a step; at w, only to displace the next one
METHODS: tuple[tuple[str, str, tuple[Gradient, ...]], ...] = (
    ("SGD", "4 batches, 4 steps", tuple((i, *PLAIN, None) for i in range(4))),
    ("SAM", "2 batches, 2 steps", ((0, *ASCENT, None), (0, True, True, 0), (1, *ASCENT, None), (1, True, True, 2))),
    ("S2-SAM", "4 batches, 4 steps", ((0, *PLAIN, None), *((i, True, True, i - 1) for i in (1, 2, 3)))),
    ("echo", "2 batches, 4 steps", ((0, *PLAIN, None), (0, True, True, 0), (1, *PLAIN, None), (1, True, True, 2))),
)
WORDS = (
    "B: the batch, also by colour. Filled: a step follows; hollow: the gradient only displaces.",
    "Arrow: this gradient displaces that one. SAM and echo: of the same batch. S2-SAM: of another.",
)


def draw() -> str:
    """The picture as SVG."""
    width, height = LEFT + 4 * COLUMN + 10, TOP + len(METHODS) * ROW + 62
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'role="img" font-family="system-ui, sans-serif">',
        "<title>Four gradients of SGD, SAM, S2-SAM and echo</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" fill="{INK}"/></marker></defs>',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        text(LEFT, 24, "The same cost: four gradients", 15, bold=True),
        *(text(LEFT + COLUMN * i + COLUMN / 2 - 16, 46, f"gradient {i + 1}", 12, PALE, "middle") for i in range(4)),
    ]
    for row, (name, note, gradients) in enumerate(METHODS):
        base = TOP + ROW * row + 66
        if row:
            out.append(line(16, base - 80, width - 16, base - 80, "#e3e7ec"))
        out += [text(16, base - 20, name, 17, bold=True), text(16, base, note, 12, PALE)]
        out.append(line(LEFT, base, width - 20, base, "#c4cad3", 'stroke-dasharray="3 4"'))
        for i, (batch, moved, steps, source) in enumerate(gradients):
            x, y = place(i, moved, base)
            if source is not None:
                sx, sy = place(source, gradients[source][1], base)
                out.append(arrow(sx, sy, x, y))
            color = BATCHES[batch]
            fill = color if steps else "#ffffff"
            out.append(f'<circle cx="{x}" cy="{y}" r="{RADIUS}" fill="{fill}" stroke="{color}" stroke-width="2.5"/>')
            out.append(text(x, y + 4.5, f"B{batch + 1}", 12, "#ffffff" if steps else color, "middle", bold=True))
            out.append(text(x + RADIUS + 5, y + 4.5, "w + e" if moved else "w", 12, INK))
    y = TOP + len(METHODS) * ROW + 22
    out += [text(16, y + 20 * i, words, 12, PALE) for i, words in enumerate(WORDS)]
    out.append("</svg>")
    return "\n".join(out) + "\n"


def place(column: int, moved: bool, base: float) -> tuple[float, float]:
    """The centre of a gradient's circle: displaced ones are lifted."""
    return LEFT + COLUMN * column + COLUMN / 2 - 16, base - LIFT * moved


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    """From the rim of one circle to that of another, past the words beside the first."""
    y1, x1 = y1 - RADIUS * 0.8, x1 + RADIUS * 0.7
    length = hypot(x2 - x1, y2 - y1)
    x2, y2 = x2 - (x2 - x1) / length * (RADIUS + 3), y2 - (y2 - y1) / length * (RADIUS + 3)
    bend = f"{(x1 + x2) / 2:.1f} {min(y1, y2) - 12:.1f}"
    path = f"M{x1:.1f} {y1:.1f}Q{bend} {x2:.1f} {y2:.1f}"
    return f'<path d="{path}" fill="none" stroke="{INK}" stroke-width="1.6" marker-end="url(#tip)"/>'


def line(x1: float, y1: float, x2: float, y2: float, color: str, more: str = "") -> str:
    """A straight line."""
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{color}" {more}/>'


def text(x: float, y: float, words: str, size: int, color: str = INK, anchor: str = "start", bold: bool = False) -> str:
    """Words at a place."""
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{color}" text-anchor="{anchor}"{weight}>{words}</text>'


if __name__ == "__main__":
    Path(__file__).with_name("flow.svg").write_text(draw(), encoding="utf-8")
