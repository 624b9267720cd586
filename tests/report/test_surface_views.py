"""Grids to look at: every cell tells its own loss, contours lie where the loss is, one pair and one side at a time."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from s2sam.analysis.surface import SurfaceSettings
from s2sam.analysis.surface_file import Surface
from s2sam.report import surface_views
from s2sam.report.arms import Arm
from s2sam.report.panels import Section
from s2sam.report.surface_section import surface_section
from s2sam.report.surface_views import CELLS, PAIRS, SIDES, contours, rules, views
from s2sam.report.write import make_table, write_report


def surface(points=5, pairs=2, change=lambda loss: loss, **facts):
    """A tilted plane, higher for the second pair; the first index counts ten times the second."""
    settings = SurfaceSettings(points=points, pairs=pairs)
    made = Surface.empty("run", settings, {"classes": 10, "weights": "final"} | facts)
    i, j = np.indices((points, points))
    made.loss = change(np.stack([0.1 * i + 0.01 * j + pair for pair in range(pairs)]))
    made.done[:] = True
    return made


def arm(name="SGD"):
    return Arm("Dense", name, (("method", "dense"),), (("sharpness", "none" if name == "SGD" else "s2sam"),), {})


def told(html):
    """The losses of the cells of each grid, from top left to bottom right."""
    return [re.findall(r'data-v="([^"]*)"', part) for part in html.split('<div class="cells"')[1:]]


def test_cells_tell_the_losses_of_their_points():
    one = arm()
    html = views([one], {one: surface()}).svg
    first, second = told(html)
    expected = [f"{0.1 * i + 0.01 * j:.3g}" for j in range(4, -1, -1) for i in range(5)]
    assert first == expected and first[0] == "0.04" and first[4] == "0.44" and first[-1] == "0.4"
    assert second == [f"{float(value) + 1:.3g}" for value in expected]


def test_colours_are_those_of_the_cells():
    one = arm()
    html = views([one], {one: surface(pairs=1)}).svg
    data = re.search(r"data:image/png;base64,([^\"]+)", html).group(1)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).astype(int)
    assert pixels.shape == (5, 5, 3)
    assert pixels[0, 4].tolist() == [253, 231, 37] and pixels[4, 0].tolist() == [68, 1, 84]  # viridis' ends
    assert (np.diff(pixels[2, :, 1]) > 0).all() and (pixels[0, :, 1] >= pixels[4, :, 1]).all()  # green rises


def test_contours_lie_where_the_loss_is():
    x = np.arange(7.0)
    path = contours(np.broadcast_to(x[:, None], (7, 7)), (0.0, 5.0))  # levels 0.5, 1, ... 4.5 along the first index
    lines = [[tuple(map(float, point.split())) for point in line.split("L")] for line in path.split("M")[1:]]
    assert [line[0][0] for line in lines] == [0.5 + 0.5 * k for k in range(1, 10)]
    assert all(x == line[0][0] for line in lines for x, _ in line)
    assert all({y for _, y in line} >= {0.5, 6.5} for line in lines)
    fine = contours(np.broadcast_to(np.arange(61.0)[:, None], (61, 61)), (0.0, 50.0))
    assert fine.count("M") == 9 and fine.count("L") == 9 * 30  # every other point


def test_losses_that_are_not_finite_are_shown_as_such_and_said():
    def spoil(loss):
        loss[0, 0, 0], loss[1, 2, 2], loss[1, 0, 1] = np.nan, np.inf, 1e6
        return loss

    one, other = arm(), arm("S2-SAM")
    found = {one: surface(change=spoil), other: surface()}
    section = surface_section(found, [one, other])
    first, second = told(section.figures[0].svg)[0], told(section.figures[0].svg)[2]
    assert first[20] == "nan" and "inf" in second and "1e+06" in second
    assert "NaN or infinite (Dense, SGD 2) count as the largest finite loss: of" in section.caption
    assert "1 points lie above the end of the scale, 23" in section.caption
    assert "NaN" not in surface_section({other: surface()}, [other]).caption


def test_the_caption_says_what_was_measured():
    one = arm()
    facts = {"images": 1000, "all_images": 4500, "split": "train", "data_digest": "abcdef" * 10}
    caption = surface_section({one: surface(7, 3, **facts)}, [one]).caption
    for part in (
        "around the final weights", "7 x 7 points from -1 to 1 along 3 pairs of directions (seed 0)",
        "filter-normalised", "over 1,000 of 4,500 train images (digest abcdefabcdef), not augmented", "BatchNorm eval",
    ):  # fmt: skip
        assert part in caption
    assert (
        "the averaged weights, not those of the table" in surface_section({one: surface(weights="ema")}, [one]).caption
    )
    many = surface_section({one: surface(5, PAIRS + 1)}, [one])
    assert f"the first {PAIRS} pairs are drawn" in many.caption and len(told(many.figures[0].svg)) == PAIRS


def test_pages_stay_small(monkeypatch):
    arms = [arm(f"kind {k}") for k in range(8)]
    monkeypatch.setattr(surface_views, "_picture", lambda *settings: b"x" * 1000)
    html = views(arms, {one: surface(51, 5) for one in arms}).svg
    grids = told(html)
    assert len(grids) == 40 and len({len(cells) for cells in grids}) == 1
    assert 0.8 * CELLS < sum(map(len, grids)) <= CELLS and len(html) < 700_000
    middle = len(grids[0]) // 2
    assert grids[0][middle] == f"{0.1 * 25 + 0.01 * 25:.3g}"  # still the weights themselves


def test_pictures_from_the_sides_keep_to_their_bytes(monkeypatch):
    one = arm()
    full = views([one], {one: surface(pairs=1)}).svg
    monkeypatch.setattr(surface_views, "PICTURES", 6_000)
    small = views([one], {one: surface(pairs=1)}).svg
    sizes = [sum(map(len, re.findall(r"image/webp;base64,([^\"]+)", html))) for html in (full, small)]
    assert sizes[1] < 6_000 * 1.8 < sizes[0]
    pictures = re.findall(r"image/webp;base64,([^\"]+)", full)
    assert len(set(pictures)) == len(SIDES) - 1
    assert Image.open(io.BytesIO(base64.b64decode(pictures[0]))).size[0] == surface_views.LARGEST


@pytest.mark.parametrize("dark", [False, True])
def test_pair_side_and_value_are_chosen_without_any_script(browser, run_writer, tmp_path, dark):
    table = make_table([run_writer(tmp_path / "runs", "dense", kind, 0) for kind in ("none", "s2sam")])
    arms = [row.arm for row in table.rows]
    section: Section = surface_section({one: surface() for one in arms}, arms)
    write_report(table, tmp_path / "page.html", sections=[section])
    errors, requests, evaluate = browser.open((tmp_path / "page.html").as_uri(), width=390, dark=dark)
    assert errors == [] and requests == []
    assert evaluate("document.documentElement.scrollWidth") <= 390
    shown = (  # of each map, which of its views can be seen
        "[...document.querySelectorAll('.map')].map(m => [...m.querySelectorAll('.view')]"
        ".flatMap((v, i) => v.checkVisibility() && v.clientWidth > 100 ? [i] : []))"
    )
    assert evaluate(shown) == [[0], [0], [], []]
    evaluate("document.getElementById('surface-pair-1').click()")
    assert evaluate(shown) == [[], [], [0], [0]]
    value = (
        "(c => getComputedStyle(c, '::after').content)([...document.querySelectorAll('.cells b')]"
        ".find(c => c.matches(':hover')) || document.body)"
    )
    assert evaluate(value) == "none"
    x, y = evaluate(
        "(b => { b.scrollIntoView({block: 'center'}); const r = b.getBoundingClientRect();"
        " return [r.x + r.width / 2, r.y + r.height / 2] })(document.querySelectorAll('.pair-1 .cells b')[4])"
    )
    browser.point(x, y)
    assert evaluate(value) == '"1.44 nats"'
    evaluate("document.getElementById('surface-view-3').click()")
    assert evaluate(shown) == [[], [], [3], [3]]


def test_there_is_a_rule_for_every_choice():
    assert rules().count("display: block") == len(SIDES) + PAIRS


def test_from_the_sides_the_height_is_the_loss():
    """One corner is high: it stands to the right of the middle from one side, to the left from the opposite one."""
    z = np.zeros((9, 9))
    z[8, 8] = 1.0

    def top_of(azimuth, limits=(0.0, 1.0)):
        picture = Image.open(io.BytesIO(surface_views._picture(z, limits, azimuth, 300))).convert("RGBA")
        red, green, blue, alpha = np.asarray(picture).astype(int).transpose(2, 0, 1)
        rows, columns = np.nonzero((alpha > 200) & (green > 130) & (blue < green - 20))  # the bright end of viridis
        return (columns.mean() / picture.size[0], rows.min() / picture.size[1]) if len(rows) else None

    assert top_of(-45.0)[0] > 0.8 and top_of(135.0)[0] < 0.2
    assert top_of(225.0)[1] < top_of(45.0)[1] < 0.75  # far behind it is higher on the picture than near
    assert top_of(45.0, limits=(0.0, 10.0)) is None  # flat on that scale


@pytest.mark.parametrize("first", SIDES)
def test_one_side_and_one_pair_are_shown_first(first):
    one = arm()
    html = views([one], {one: surface(pairs=2)}, first).svg
    chosen = re.findall(r'id="surface-(\w+)-(\d)" checked', html)
    assert chosen == [("view", str(list(SIDES).index(first))), ("pair", "0")]
