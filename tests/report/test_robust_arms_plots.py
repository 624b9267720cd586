"""Robustness over seeds, and its heat maps."""

from __future__ import annotations

import re

import numpy as np
import pytest

from s2sam.analysis.robustness_file import assemble
from s2sam.report.robust_arms import compare, group, sentence
from s2sam.report.robust_plots import accuracies, draw_differences, draw_heatmaps, write

NAMES = ("gaussian_noise", "glass_blur", "fog")


def result(run, arm, seed, clean, corrupted, **change):
    facts = {
        "run": run, "source": "generated", "constants": "cifar", "corruptions": list(NAMES), "severities": [1, 3, 5],
        "images": 400, "classes": 10, "arm": arm, "run_seed": seed, **change,
    }  # fmt: skip
    cells = {
        name: {s: {"top1": corrupted + 0.01 * (s - 3) + 0.1 * (k - 1), "nll": 1.0, "ece": 0.2} for s in (1, 3, 5)}
        for k, name in enumerate(NAMES)
    }
    return assemble(facts, {"top1": clean, "nll": 1.0, "ece": 0.1}, cells)


SGD = [result(f"sgd-seed{s}", "a", s, 0.90 + 0.01 * s, 0.50 + 0.02 * s) for s in range(3)]
SAM = [result(f"sam-seed{s}", "b", s, 0.90 + 0.011 * s, 0.55 + 0.021 * s) for s in range(3)]


def test_arms_hold_their_seeds():
    arms = group([SGD[0], SAM[0], *SGD[1:], *SAM[1:]])
    assert [(arm.name, len(arm.results)) for arm in arms] == [("sgd", 3), ("sam", 3)]
    assert arms[0].values("mean_corruption_error") == pytest.approx([0.50, 0.48, 0.46])
    assert arms[0].text("mean_corruption_error", 100.0) == "48.00\n+-2.00"
    assert arms[0].text("mce_alexnet") == "-"
    assert group(SGD[:1])[0].text("clean_error", 100.0, 1) == "10.0"
    twins = group([result("one", "a", 0, 0.9, 0.5), result("other", "b", 0, 0.9, 0.5)])
    assert [arm.name for arm in twins] == ["one", "other"]


def test_arms_are_compared_seed_by_seed_and_at_equal_clean_accuracy():
    (found,) = compare(group([*SGD, *SAM]))
    assert found.paired is not None and found.paired.n == 3
    assert found.paired.mean == pytest.approx(0.051) and found.paired.shows == 1
    assert found.tolerance == pytest.approx(np.sqrt(0.91 * 0.09 / 400), rel=0.02)
    assert len(found.matched.pairs) == 3 and found.matched.corrupted == pytest.approx(0.051)
    text = sentence(found)
    assert text.startswith("sam minus sgd: +5.10 points of corrupted accuracy (n = 3, 95 % interval +")
    assert "this shows a difference" in text and "+5.10 among 3 pair(s)" in text


def test_what_cannot_be_said_is_not_said():
    better = [result(f"sam-seed{s}", "b", s, 0.99, 0.6) for s in range(2)]
    (found,) = compare(group([*SGD, *better]))
    assert found.paired is None and found.matched.corrupted is None
    text = sentence(found)
    assert "have other seeds" in text and "no two runs have the same clean accuracy" in text
    (single,) = compare(group([SGD[0], SAM[0]]))
    assert "n = 1, no interval" in sentence(single)


def test_results_that_do_not_belong_together():
    with pytest.raises(ValueError, match="these never stand in one table"):
        group([SGD[0], {**SAM[0], "source": "official"}])
    with pytest.raises(ValueError, match="are the same arm and seed"):
        group([SGD[0], SGD[0]])


def shown(figure):
    """The texts in the cells of each panel."""
    panels = [axes for axes in figure.axes if axes.texts]
    return [np.array([t.get_text() for t in axes.texts]).reshape(3, 3) for axes in panels]


def test_heat_maps_show_every_cell(tmp_path):
    figure = draw_heatmaps([SGD[0], SAM[0]])
    first, second = shown(figure)
    assert first.tolist() == [["38", "40", "42"], ["48", "50", "52"], ["58", "60", "62"]]
    assert second[1].tolist() == ["53", "55", "57"]
    np.testing.assert_allclose(accuracies(SGD[0])[2], [58, 60, 62])
    image = figure.axes[0].images[0]
    assert image.get_clim() == (0.0, 100.0) and image.get_array().shape == (3, 3)
    assert "50.00 %" in figure.axes[0].get_title(loc="left")
    text = figure._suptitle.get_text()
    assert "400 test images" in text and "generated" in text
    paths = write(figure, tmp_path / "map")
    assert paths[0].read_bytes().startswith(b"\x89PNG") and "glass blur" in paths[1].read_text()
    assert not re.findall(r"(?:href|src)=\"http", paths[1].read_text())


def test_differences_are_symmetric_about_zero():
    figure = draw_differences([SAM[0], SGD[1]], SGD[0])
    first, second = shown(figure)
    assert set(first.flatten()) == {"+5.0"} and set(second.flatten()) == {"+2.0"}
    assert figure.axes[0].images[0].get_clim() == pytest.approx((-5.0, 5.0))
    with pytest.raises(ValueError, match="never stand in one table"):
        draw_differences([SAM[0]], {**SGD[0], "source": "official"})
    with pytest.raises(ValueError, match="no run to subtract"):
        draw_differences([], SGD[0])
