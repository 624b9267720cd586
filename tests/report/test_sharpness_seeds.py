"""Single runs in the sharpness section: put in order at one seed, and at different seeds named without an order."""

from __future__ import annotations

from s2sam.report.arms import Arm
from s2sam.report.held import Held
from s2sam.report.sharpness_section import PANELS, sentences


def arm(kind, base="RigL 90 %"):
    return Arm(base, kind, (("base", base),), (("sharpness", "none" if kind == "SGD" else kind),), {})


def result(size, loss=0.1):
    return {name: {"value": size, "sd": 0.01} for name in PANELS} | {"train_loss": loss}


SGD, S2SAM, SAM = arm("SGD"), arm("S2-SAM"), arm("SAM")


def said(by_arm):
    return sentences(Held(by_arm), list(by_arm))


def test_runs_of_different_seeds_have_no_order():
    assert said({SGD: {0: result(2.0)}, S2SAM: {1: result(1.0)}}) == [
        "RigL 90 %: SGD, seed 0, and S2-SAM, seed 1, were measured at other seeds, so they are not compared."
    ]
    (three,) = said({SGD: {0: result(2.0)}, S2SAM: {1: result(1.0)}, SAM: {0: result(3.0)}})
    assert "SGD, seed 0, S2-SAM, seed 1, and SAM, seed 0, were measured at other seeds, so" in three


def test_runs_of_one_seed_keep_their_order():
    (line,) = said({SGD: {1: result(2.0)}, S2SAM: {1: result(1.0)}})
    assert "adaptive worst case: S2-SAM 1 < SGD 2" in line and line.endswith("agree that S2-SAM is the flattest.")
    assert "other seeds" not in line


def test_networks_are_judged_one_by_one():
    dense = [arm(kind, "Dense") for kind in ("SGD", "S2-SAM")]
    lines = said({SGD: {0: result(2.0)}, S2SAM: {1: result(1.0)}, **{one: {1: result(1.0)} for one in dense}})
    assert lines[0].endswith("were measured at other seeds, so they are not compared.")
    assert lines[1].startswith("Dense: train losses match") and len(lines) == 2


def test_train_losses_that_do_not_match_come_first_and_name_the_seeds():
    (line,) = said({SGD: {0: result(2.0, loss=0.2)}, S2SAM: {1: result(1.0)}})
    assert "train losses do not match: S2-SAM, seed 1's is 50 % below SGD, seed 0's" in line
    (line,) = said({SGD: {0: result(2.0, loss=0.2)}, S2SAM: {0: result(1.0)}})
    assert "train losses do not match: S2-SAM's is 50 % below SGD's" in line
