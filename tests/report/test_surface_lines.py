"""Lines of surfaces: means are of the losses as they were measured, only the picture ends at the top of the axis."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest

from s2sam.analysis.surface import SurfaceSettings
from s2sam.analysis.surface_file import Surface
from s2sam.report import surface_plots, surface_section
from s2sam.report.arms import Arm

TOP = 10 * math.log(10)  # of ten classes


def lines(*ends, middle=1.0):
    """A line for each of these losses at both ends."""
    made = Surface.empty("run", SurfaceSettings(points=5, pairs=len(ends), dims=1), {"classes": 10})
    made.loss[:], made.done[:] = [[end, 5.0, middle, 5.0, end] for end in ends], True
    return made


def arm(name):
    return Arm("Dense", name, (("method", "dense"),), (("sharpness", "none" if name == "SGD" else "s2sam"),), {})


def drawn(monkeypatch, tmp_path, found):
    """The axes of the lines on the page and of those in the file, and the panel of the page."""
    kept = []
    for module, name in ((surface_section, "to_svg"), (surface_plots, "save_figure")):
        finish = getattr(module, name)
        monkeypatch.setattr(module, name, lambda figure, *rest, f=finish: (kept.append(figure), f(figure, *rest))[1])
    panel = surface_section.surface_section(found, list(found)).figures[0]
    surface_plots.draw_profiles(list(found.values()), tmp_path / "lines")
    return SimpleNamespace(page=kept[0].axes[0], file=kept[1].axes[0], panel=panel)


def names(svg):
    return [re.sub(r"<[^>]*>", "", part) for part in re.findall(r"<text[^>]*>(.*?)</text>", svg, flags=re.DOTALL)]


def test_means_above_the_top_are_said_to_be_above_it(monkeypatch, tmp_path):
    sgd, sam, low = arm("SGD"), arm("S2-SAM"), arm("SAM")
    seen = drawn(monkeypatch, tmp_path, {sgd: lines(1000.0), sam: lines(30.0), low: lines(20.0)})
    ends = ("SGD above 23", "S2-SAM above 23", "SAM 20")
    words = "Loss along random directions, Dense: " + ", ".join(f"{end} at the end" for end in ends)
    assert seen.panel.label == words and f'aria-label="{words}"' in seen.panel.svg
    assert {"SGD, above 23", "S2-SAM, above 23", "SAM"} <= set(names(seen.panel.svg))
    assert all(0 <= label.xy[1] < 1.3 for label in seen.page.texts)  # no name stands where the loss would be


def test_a_mean_is_that_of_the_losses_and_not_of_what_is_left_of_them(monkeypatch, tmp_path):
    sgd, sam = arm("SGD"), arm("S2-SAM")
    seen = drawn(monkeypatch, tmp_path, {sgd: lines(30.0, 10.0), sam: lines(200.0, 0.0)})
    assert "SGD 20 at the end, S2-SAM above 23 at the end" in seen.panel.label  # not 16.5 and 11.5
    for axes in (seen.page, seen.file):
        means = [line.get_ydata()[[0, 2, 4]].tolist() for line in axes.lines]
        assert means == [[20.0, 1.0, 20.0], [100.0, 1.0, 100.0]]
        assert [band.get_paths()[0].vertices[:, 1].max() for band in axes.collections] == [30.0, 200.0]
        assert axes.get_ylim() == (0.0, pytest.approx(1.02 * TOP))


def test_only_losses_that_are_not_finite_are_replaced(monkeypatch, tmp_path):
    found = {arm("SGD"): lines(np.inf, 40.0), arm("S2-SAM"): lines(np.nan, 4.0)}
    seen = drawn(monkeypatch, tmp_path, found)
    for axes in (seen.page, seen.file):
        assert [float(line.get_ydata()[-1]) for line in axes.lines] == [40.0, 4.5]
    caption = surface_section.surface_section(found, list(found)).caption
    assert "NaN or infinite (Dense, SGD 2, Dense, S2-SAM 2) count as the largest finite loss: of" in caption
    assert "2 points lie above the end of the scale, 23, and are cut off in the pictures; means and Ra" in caption


def test_losses_without_measure_leave_the_lines_in_the_picture(monkeypatch, tmp_path):
    seen = drawn(monkeypatch, tmp_path, {arm("SGD"): lines(1e30), arm("S2-SAM"): lines(3.0)})
    assert seen.page.get_ylim() == seen.file.get_ylim() == (0.0, pytest.approx(1.02 * TOP))
    assert "SGD above 23 at the end, S2-SAM 3 at the end" in seen.panel.label


def test_a_mean_of_equal_losses_is_not_above_them(monkeypatch, tmp_path):
    ends = (5.9, 5.9, 5.9)
    assert np.mean(ends) > max(ends)  # by rounding
    assert "SGD 5.9 at the end" in drawn(monkeypatch, tmp_path, {arm("SGD"): lines(*ends)}).panel.label


def test_long_names_leave_room_for_what_is_above(monkeypatch, tmp_path):
    seen = drawn(monkeypatch, tmp_path, {arm("S2-SAM (rho 0.05, sign -1, direction momentum)"): lines(1000.0)})
    assert "S2-SAM (rho 0.0..., above 23" in names(seen.panel.svg)
