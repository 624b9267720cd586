"""Sentences of the premise and of the theorem: which checkpoint, which epochs and which masks they speak of."""

from __future__ import annotations

from types import SimpleNamespace

from s2sam.report import bound_section, premise_section

ARM = SimpleNamespace(name="RigL")


def point(step, lr, rises, *, over=False):
    return {
        "step": step, "lr": lr, "over": over, "looks": 4, "previous_rises": rises, "random_rises": 0.5,
        "cosine": {"mean": 0.1},
    }  # fmt: skip


def result(tested, **changes):
    part = {"start": 20.0, "noise": 1.0, "radius": 0.0, "generalisation": 4.0, "total": 25.0}
    return {
        "classes": 10, "step_condition": 0.5, "terms": dict.fromkeys(bound_section.TITLES, part),
        "measured": {"test_loss": 0.5, "train_loss": 0.25, "epochs": 10, "tested_epochs": tested}, **changes,
    }  # fmt: skip


def test_the_premise_is_said_where_steps_are_taken():
    during, end = point(80, 0.05, 0.75), point(120, 0.0, 0.0, over=True)
    runs = [{"points": [point(40, 0.1, 0.5), during, end]}, {"points": [during, end]}]
    said = premise_section.words(ARM, runs)
    assert said.startswith("RigL: from step 80 on, at learning rate 0.05, the loss") and "in 75 % of 8 looks" in said
    said = premise_section.words(ARM, [{"points": [end]}])
    assert said.startswith("RigL: after the end of training, at learning rate 0, the loss") and "in 0 % of" in said
    blind = [{"points": [{**during, "random_rises": None}]}]
    assert premise_section.words(ARM, blind).endswith(
        "nothing could be looked at from step 80 on, at learning rate 0.05."
    )
    assert "may lie after its end" in premise_section._after(SimpleNamespace(results=runs))
    assert premise_section._after(SimpleNamespace(results=blind)) == ""


def test_the_mean_test_loss_says_of_how_many_epochs_it_is():
    lines = bound_section._words([result(2), result(2)])
    assert all("where the mean test loss was 0.5 (2 of 10 epochs); vacuous" in line for line in lines[:2])
    assert "where the mean train loss was 0.25; vacuous" in lines[2]
    assert "(2 to 10 of 10 epochs)" in bound_section._words([result(2), result(10)])[0]
    assert "epochs" not in bound_section._words([result(10)])[0]


def test_results_from_before_masks_were_told_apart_are_named():
    old, new = {"method": "rigl", "probes": [{"at": "start"}]}, {"method": "rigl", "probes": [{"mask": "0f"}]}
    lines = bound_section._words([result(10, **old), result(10, **new), result(10, method="dense", probes=[{}])])
    assert lines[3].startswith("In 1 of 3 runs mu was taken over all masks together") and "`s2sam bound`" in lines[3]
    assert len(bound_section._words([result(10, **new)])) == 3


def test_runs_whose_gradients_are_biased_are_counted():
    runs = [{"sharpness": "echo"}, {"sharpness": "sam", "squared_radius": 0.01}, {"sharpness": "s2sam"}, {}]
    lines = bound_section._words([result(10, **run) for run in runs])
    assert lines[3].startswith("In 2 of 4 runs (two-step SAM, echo) a batch's gradient is taken at a place")
    assert len(bound_section._words([result(10, sharpness="sam", squared_radius=0.0)])) == 3
