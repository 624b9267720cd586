"""Measures of robustness and calibration on numbers made by hand, and the file that keeps them."""

from __future__ import annotations

import json
import math
from statistics import fmean

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s2sam.analysis.calibration import BINS, Scores, calibration_bins, expected_calibration_error
from s2sam.analysis.robustness import (
    ALEXNET,
    ALEXNET_CLEAN,
    at_matched_clean,
    mce_alexnet,
    mean_of,
    relative_mce_alexnet,
    retained_accuracy,
)
from s2sam.analysis.robustness_file import assemble, check_comparable, check_distinct, path_of, read, save
from s2sam.data.corruptions import CORRUPTIONS

FACTS = {
    "run": "a", "source": "official", "layout": "imagenet-c", "classes": 1000, "corruptions": list(CORRUPTIONS),
    "severities": [1, 2, 3, 4, 5], "arm": "x", "run_seed": 0, "weights": "final", "weights_sha256": "00",
    "data_digest": "11", "corrupted_digest": None, "images": 10, "all_images": 10,
}  # fmt: skip


def cells(top1, names=CORRUPTIONS, severities=(1, 2, 3, 4, 5)):
    return {name: {s: {"top1": top1(name, s), "nll": 2.0, "ece": 0.1 * s} for s in severities} for name in names}


def test_ece_by_hand():
    confidence = torch.tensor([0.95, 0.95, 0.95, 0.95, 0.55, 0.55])
    correct = torch.tensor([1, 1, 1, 0, 0, 1])
    # two bins are used: |3/4 - .95| on 4 of 6 images, |1/2 - .55| on 2 of 6
    expected = 4 / 6 * 0.2 + 2 / 6 * 0.05
    assert expected_calibration_error(calibration_bins(confidence, correct)) == pytest.approx(expected, abs=1e-6)
    assert expected_calibration_error(calibration_bins(confidence, correct, bins=1)) == pytest.approx(
        abs(4 / 6 - (4 * 0.95 + 2 * 0.55) / 6), abs=1e-6
    )


def test_bins_are_closed_on_the_right():
    bins = calibration_bins(torch.tensor([0.2, 0.2001, 0.4, 1.0, 0.0]), torch.ones(5), bins=5)
    assert bins[0].tolist() == [2, 2, 0, 0, 1]
    assert BINS == 15


@given(st.lists(st.tuples(st.floats(0.01, 1.0), st.booleans()), min_size=1, max_size=40))
def test_ece_is_at_most_the_worst_image_and_at_least_the_mean_gap(images):
    confidence = torch.tensor([c for c, _ in images], dtype=torch.float64)
    correct = torch.tensor([c for _, c in images])
    found = expected_calibration_error(calibration_bins(confidence, correct))
    assert found <= float((confidence - correct.double()).abs().max()) + 1e-9
    assert found >= abs(float((confidence - correct.double()).mean())) - 1e-9


def test_scores_over_batches_are_those_of_all_images():
    logits = 3 * torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    y = torch.randint(7, (50,), generator=torch.Generator().manual_seed(1))
    scores = Scores(torch.device("cpu"))
    for part in (slice(0, 13), slice(13, 50)):
        scores.add(logits[part], y[part])
    found = scores.read()
    assert found["top1"] == float((logits.argmax(1) == y).double().mean())
    assert found["nll"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, y)), rel=1e-6)
    confidence, guess = logits.softmax(1).max(1)
    assert found["ece"] == pytest.approx(expected_calibration_error(calibration_bins(confidence, guess == y)), abs=1e-6)


@pytest.mark.parametrize("logits", [torch.full((2, 3), math.nan), torch.zeros(0, 3)])
def test_scores_of_nothing_or_nan_are_refused(logits):
    scores = Scores(torch.device("cpu"))
    scores.add(logits, torch.zeros(len(logits), dtype=torch.int64))
    with pytest.raises(ValueError, match="not finite"):
        scores.read()


def test_mce_by_hand():
    errors = {name: dict.fromkeys(range(1, 6), 0.5) for name in ALEXNET}
    assert mce_alexnet(errors) == pytest.approx(fmean(2.5 / sum(row) for row in ALEXNET.values()))
    assert relative_mce_alexnet(errors, 0.2) == pytest.approx(
        fmean(1.5 / (sum(row) - 5 * ALEXNET_CLEAN) for row in ALEXNET.values())
    )
    alexnet = {name: dict(enumerate(row, 1)) for name, row in ALEXNET.items()}
    assert mce_alexnet(alexnet) == relative_mce_alexnet(alexnet, ALEXNET_CLEAN) == 1.0
    halved = {name: {s: e / 2 for s, e in row.items()} for name, row in alexnet.items()}
    assert mce_alexnet(halved) == pytest.approx(0.5)


def test_the_constants_have_the_published_means():
    # the mean over severities of each corruption, as used by PyTorch ports of the benchmark
    published = {
        "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640, "defocus_blur": 0.819880,
        "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572,
        "fog": 0.819324,
    }  # fmt: skip
    for name, mean in published.items():
        assert fmean(ALEXNET[name]) == pytest.approx(mean, abs=1e-9)
    assert set(ALEXNET) == set(CORRUPTIONS)


def test_mce_needs_every_cell():
    errors = {name: dict.fromkeys(range(1, 6), 0.5) for name in ALEXNET}
    with pytest.raises(ValueError, match="mCE is defined for all 15 corruptions"):
        mce_alexnet({name: row for name, row in errors.items() if name != "fog"})
    with pytest.raises(ValueError, match="mCE is defined for all 15 corruptions"):
        relative_mce_alexnet({**errors, "fog": {1: 0.5}}, 0.1)


def test_plain_measures_by_hand():
    errors = {"fog": {1: 0.2, 5: 0.6}, "snow": {1: 0.4, 5: 0.8}}
    assert mean_of(errors) == pytest.approx(0.5)
    assert retained_accuracy(errors, 0.2) == pytest.approx(0.5 / 0.8)
    assert math.isnan(retained_accuracy(errors, 1.0))


def test_matched_pairs_are_the_nearest_and_used_once():
    reference = [(0.90, 0.50), (0.92, 0.60), (0.70, 0.10)]
    treated = [(0.921, 0.64), (0.905, 0.55), (0.95, 0.99)]
    found = at_matched_clean(reference, treated, 0.01)
    assert found.pairs == ((0, 1), (1, 0))
    assert found.clean == pytest.approx(0.003) and found.corrupted == pytest.approx(0.045)
    assert at_matched_clean(reference, treated, 0.0001).pairs == ()
    assert at_matched_clean([], treated, 1.0).corrupted is None
    assert len(at_matched_clean(reference[:1], treated, 1.0).pairs) == 1


def test_a_result_names_every_measure():
    result = assemble(FACTS, {"top1": 0.8, "nll": 1.0, "ece": 0.05}, cells(lambda name, s: 0.7 - 0.1 * s))
    assert result["clean_error"] == pytest.approx(0.2)
    assert result["mean_corruption_error"] == pytest.approx(0.6) == 1 - result["mean_corruption_accuracy"]
    assert result["relative_mean_corruption_error"] == pytest.approx(0.4)
    assert result["retained_accuracy"] == pytest.approx(0.5)
    assert result["mean_corruption_ece"] == pytest.approx(0.3) and result["mean_corruption_nll"] == 2.0
    expected = fmean(3.0 / sum(row) for row in ALEXNET.values())
    assert result["mce_alexnet"] == pytest.approx(expected)
    assert result["relative_mce_alexnet"] == pytest.approx(
        fmean(2.0 / (sum(row) - 5 * ALEXNET_CLEAN) for row in ALEXNET.values())
    )


@pytest.mark.parametrize("change", [{"layout": "cifar-c"}, {"classes": 200}, {"source": "generated", "layout": None}])
def test_mce_is_for_imagenet_c_alone(change):
    clean = {"top1": 0.8, "nll": 1.0, "ece": 0.05}
    assert assemble({**FACTS, **change}, clean, cells(lambda name, s: 0.5))["mce_alexnet"] is None
    partial = assemble(FACTS, clean, cells(lambda name, s: 0.5, severities=(1, 2)))
    assert partial["mce_alexnet"] is None and partial["mean_corruption_error"] == 0.5


def test_files_come_back_and_damaged_ones_are_named(tmp_path):
    result = assemble(FACTS, {"top1": 0.8, "nll": 1.0, "ece": 0.05}, cells(lambda name, s: 0.7 - 0.1 * s))
    path = path_of(tmp_path, "official")
    with pytest.raises(ValueError, match="is not there; measure the run with `s2sam robust"):
        read(path)
    save(result, path)
    assert path.name == "robustness-official.json" and path_of(tmp_path, "generated") != path
    assert read(path) == json.loads(json.dumps(result))
    text = path.read_text()
    lacking = (text.replace('"fog"', '"frog"', 1), text.replace('"arm"', '"ram"'), text.replace('"images"', '"image"'))
    for damage in ("", "[]", text[:-100], *lacking):
        path.write_text(damage)
        with pytest.raises(ValueError, match=r"official.json is damaged or no result"):
            read(path)


def test_what_may_stand_in_one_table():
    one = assemble(FACTS, {"top1": 0.8, "nll": 1.0, "ece": 0.05}, cells(lambda name, s: 0.5))
    check_comparable([one, {**one, "run": "b"}])
    with pytest.raises(ValueError, match="a was measured on official images and b on generated ones; these never"):
        check_comparable([one, {**one, "run": "b", "source": "generated"}])
    with pytest.raises(ValueError, match="a and b cannot be compared: corrupted_digest is None for the first and 12"):
        check_comparable([one, {**one, "run": "b", "corrupted_digest": "12"}])
    with pytest.raises(ValueError, match="a and b are the same arm and seed"):
        check_distinct([one, {**one, "run": "b"}])
    check_distinct([one, {**one, "run": "b", "run_seed": 1}])
