"""The grids of loss surfaces to look at: one pair of directions from one side at a time, chosen by radio buttons.

The page holds no script. From above each point is a cell, and style sheets show the loss of the cell under the pointer;
from the sides the grids are drawn in 3-D.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING

import matplotlib
import numpy as np

from s2sam.analysis.roughness import clipped
from s2sam.analysis.surface_file import Surface
from s2sam.report.arms import Arm
from s2sam.report.markup import text
from s2sam.report.panels import Figure
from s2sam.report.surface_plots import ceiling
from s2sam.report.svg import shorten

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Loss = NDArray[np.float64]
    Grids = Mapping[Arm, Surface]

SIDES = {"from above": None, "3-D": -52.0, "turned 90°": 38.0, "turned 180°": 128.0, "turned 270°": 218.0}
PAIRS = 5  #: of directions on a page, at most
CELLS = 10_600  #: that tell their loss, on a page, about
PICTURES = 180_000  #: bytes of all 3-D pictures of a page, about
LARGEST = 300  #: width of one in pixels
HEIGHT, ELEVATION = 1.4, math.radians(32.0)  #: of the box, whose sides are 2, and of the eye
LEVELS = 9  #: contours


def views(arms: Sequence[Arm], found: Grids, first: str = "from above") -> Figure:
    """All grids of these arms: from above with their losses, and from four sides.

    Args:
        arms: that have a surface, in order.
        found: their surfaces, of two dims, measured in the same way.
        first: the side, of :data:`SIDES`, that is shown until another one is chosen.
    """
    pairs = range(min(found[arms[0]].settings.pairs, PAIRS))
    top = ceiling([found[arm] for arm in arms])
    low = min(float(clipped(found[arm].loss[list(pairs)], top)[0].min()) for arm in arms)
    limits = (low, top if top > low else low + 1.0)
    grids = len(arms) * len(pairs)
    side, width = _side(found[arms[0]].settings.points, grids), _width(found[arms[0]], limits, grids)
    body = []
    for pair in pairs:
        maps = "".join(_map(arm.name, found[arm], pair, limits, side, width) for arm in arms)
        body.append(f'<div class="pair pair-{pair}"><div class="maps">{maps}</div></div>')
    choices = _buttons("view", list(SIDES), first)
    if len(pairs) > 1:
        choices += _buttons("pair", [f"directions {pair + 1}" for pair in pairs], "directions 1")
    else:
        choices += '<input type="radio" id="surface-pair-0" checked hidden>'
    html = f'<div class="views">{choices}{"".join(body)}{_scale(*limits)}</div>'
    words = "; ".join(f"{arm.name} {found[arm].centre[0]:.3g} at the weights" for arm in arms)
    return Figure(html, f"Loss surfaces of {len(arms)} runs: {words}", wide=True)


def rules() -> str:
    """The style rules that show what is chosen."""
    return "\n".join(
        f".views:has(#surface-{group}-{i}:checked) .{group}-{i} {{ display: block; }}"
        for group, count in (("view", len(SIDES)), ("pair", PAIRS))
        for i in range(count)
    )


def contours(z: Loss, limits: tuple[float, float]) -> str:
    """Lines of equal loss as an SVG path; a cell is 1 x 1, the first index goes right, the second one up.

    >>> contours(np.array([[0.0, 2.0], [0.0, 2.0]]), (0.0, 2.0))[:15]
    'M0.5 1.4L1.5 1.'
    """
    from contourpy import contour_generator

    n = len(z)
    step = next((k for k in range(1, n) if (n - 1) % k == 0 and (n - 1) // k <= 30), 1)  # fine grids need not so many
    at = np.arange(0, n, step)
    generator = contour_generator(at + 0.5, n - 0.5 - at, z[::step, ::step].T)
    parts = []
    for level in np.linspace(*limits, LEVELS + 2)[1:-1]:
        for line in generator.lines(float(level)):
            points = [f"{x:.1f} {y:.1f}".replace(".0", "") for x, y in np.asarray(line)]
            parts.append(f"M{'L'.join(points)}")
    return "".join(parts)


def _map(name: str, surface: Surface, pair: int, limits: tuple[float, float], side: int, width: int) -> str:
    """One grid from all sides; from above `side` x `side` cells tell their loss."""
    loss, n = surface.loss[pair], surface.settings.points
    z = clipped(loss, limits[1])[0]
    centres = ((np.arange(side) + 0.5) / side * n).astype(int)
    cells = "".join(f'<b data-v="{loss[i, j]:.3g}"></b>' for j in centres[::-1] for i in centres)
    cross = f"M{n / 2 - 0.6} {n / 2}h1.2M{n / 2} {n / 2 - 0.6}v1.2"
    span, alt = f"{surface.settings.span:g}", f"{escape(name, quote=True)}, directions {pair + 1}"
    sides = "".join(
        f'<img class="view view-{view}" alt="{alt}, {escape(words)}" '
        f'src="data:image/webp;base64,{base64.b64encode(_picture(z, limits, azimuth, width)).decode()}">'
        for view, (words, azimuth) in enumerate(SIDES.items())
        if azimuth is not None
    )
    return (
        f'<div class="map"><p>{text(shorten(name, 40))}</p><div class="view view-0"><div class="field">'
        f'<img alt="{alt}" src="data:image/png;base64,{_colours(z, limits)}">'
        f'<svg viewBox="0 0 {n} {n}" aria-hidden="true"><path d="{contours(z, limits)}"/>'
        f'<path class="here" d="{cross}"/></svg>'
        f'<div class="cells" style="grid-template-columns:repeat({side},1fr)">{cells}</div></div>'
        f"<small>-{span} to {span} filter norms</small></div>{sides}</div>"
    )


def _side(points: int, grids: int) -> int:
    """Cells along a side that so many grids can have: odd, so that the weights are one.

    >>> _side(21, 24), _side(51, 40)
    (21, 15)
    """
    room = math.isqrt(CELLS // grids)
    return min(points, max(5, room - 1 + room % 2))


def _colours(z: Loss, limits: tuple[float, float]) -> str:
    """A picture with a pixel for each point, as base64."""
    from PIL import Image

    low, high = limits
    shades = np.clip(np.round(255 * (z.T[::-1] - low) / (high - low)), 0, 255).astype(np.uint8)
    table = matplotlib.colormaps["viridis"](np.arange(256))[:, :3]
    picture = Image.fromarray(shades)
    picture.putpalette(np.round(255 * table).astype(np.uint8).tobytes())
    buffer = io.BytesIO()
    picture.save(buffer, format="png", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _width(surface: Surface, limits: tuple[float, float], grids: int) -> int:
    """Pixels of the 3-D pictures of so many grids: the more there are, the smaller they become."""
    one = len(_picture(clipped(surface.loss[0], limits[1])[0], limits, 38.0, LARGEST))
    return round(LARGEST * min(1.0, PICTURES / (one * grids * (len(SIDES) - 1))))


def _picture(z: Loss, limits: tuple[float, float], azimuth: float, width: int) -> bytes:
    """A grid from one side, as WebP: cells from far to near in a box whose height is the common scale.

    With azimuth a, elevation E, a point (x, y) of the sides -1 to 1 and a height h lies at -x sin a + y cos a to the
    right, h cos E - (x cos a + y sin a) sin E up.
    """
    from PIL import Image, ImageDraw

    at = np.unique(np.linspace(0, len(z) - 1, min(len(z), 31)).round().astype(int))
    share = (z[np.ix_(at, at)] - limits[0]) / (limits[1] - limits[0])
    t = 2.0 * at / (len(z) - 1) - 1.0
    sin, cos = math.sin(math.radians(azimuth)), math.cos(math.radians(azimuth))
    scale = 2 * width / 2.9  # twice the size, to be halved at the end

    def place(x: Loss, y: Loss, height: Loss) -> tuple[Loss, Loss]:
        """Pixels (..., 2), and how near."""
        near, up = x * cos + y * sin, HEIGHT * (height - 0.5)
        right, above = y * cos - x * sin, up * math.cos(ELEVATION) - near * math.sin(ELEVATION)
        return np.stack([scale * (1.45 + right), scale * (1.4 - above)], axis=-1), near

    picture = Image.new("RGBA", (2 * width, round(2.8 * scale)), (127, 138, 153, 0))
    draw = ImageDraw.Draw(picture)
    x, y = np.array([-1.0, 1.0, 1.0, -1.0]), np.array([-1.0, -1.0, 1.0, 1.0])
    floor, near = place(x, y, np.zeros(4))
    ceiling_, _ = place(x, y, np.ones(4))
    back = [int(np.argmax(near) + k) % 4 for k in (1, 2, 3)]  # the three corners away from the reader
    edges = [*zip(floor, np.roll(floor, 1, axis=0), strict=True), *((floor[k], ceiling_[k]) for k in back)]
    edges += [(ceiling_[a], ceiling_[b]) for a, b in pairwise(back)]
    for start, end in edges:
        draw.line([tuple(start), tuple(end)], fill=(127, 138, 153, 200), width=2)
    points, near = place(*np.meshgrid(t, t, indexing="ij"), share)
    corners = np.stack([points[:-1, :-1], points[1:, :-1], points[1:, 1:], points[:-1, 1:]], axis=2).reshape(-1, 4, 2)
    order = np.argsort((near[:-1, :-1] + near[1:, 1:]).ravel())
    colours = matplotlib.colormaps["viridis"]((share[:-1, :-1] + share[1:, 1:]).ravel() / 2, bytes=True)
    for cell in order:
        colour = tuple(int(part) for part in colours[cell, :3])
        draw.polygon([tuple(p) for p in corners[cell]], colour, tuple(part * 5 // 6 for part in colour))
    buffer = io.BytesIO()
    picture.reduce(2).save(buffer, format="webp", quality=50)
    return buffer.getvalue()


def _buttons(group: str, names: Sequence[str], chosen: str) -> str:
    """Radio buttons, one of them chosen."""
    on = {chosen: " checked"}
    labels = "".join(
        f'<label><input type="radio" name="surface-{group}" id="surface-{group}-{i}"{on.get(name, "")}>'
        f"{escape(name)}</label>"
        for i, name in enumerate(names)
    )
    return f'<div class="buttons">{labels}</div>'


def _scale(low: float, high: float) -> str:
    """The colours from the lowest to the highest loss."""
    stops = [matplotlib.colors.to_hex(matplotlib.colormaps["viridis"](i / 8)) for i in range(9)]
    bar = f'<i style="background:linear-gradient(90deg,{",".join(stops)})"></i>'
    return f'<div class="scale"><span>{low:.3g}</span>{bar}<span>{high:.3g} nats</span></div>'
