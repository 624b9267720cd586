"""Cost ratios: paired within a round, with a distribution-free interval."""

from __future__ import annotations

import pytest

from s2sam.report.arms import group_runs
from s2sam.report.cost import cost_from_rounds, cost_from_runs, load_rounds, save_rounds
from s2sam.report.read import read_runs


@pytest.fixture(scope="module")
def arms(design):
    return group_runs(read_runs(design))


def rounds_of(arms, disturbance=lambda i: 1.0):
    factor = {"SGD": 1.0, "S2-SAM": 1.05, "SAM": 2.0}
    return {arm.name: [0.01 * factor[arm.treatment] * disturbance(i) for i in range(9)] for arm in arms}


def test_ratios_within_a_round_cancel_what_disturbs_the_machine(arms):
    costs = cost_from_rounds(rounds_of(arms, lambda i: 5.0 if i % 2 else 1.0), arms)
    cost = costs["RigL 90 %, S2-SAM"]
    assert cost.ratio == pytest.approx(1.05)
    assert (cost.interval.low, cost.interval.high) == pytest.approx((1.05, 1.05))
    assert costs["RigL 90 %, SAM"].ratio == pytest.approx(2.0)
    assert costs["Dense, SGD"].text == "1.00x"
    assert costs["RigL 90 %, SAM"].text == "2.00x (2.00 to 2.00)"
    assert "9 rounds" in cost.how


def test_cost_against_the_dense_network(arms):
    rounds = rounds_of(arms)
    rounds["Dense, SGD"] = [0.004] * 9
    costs = cost_from_rounds(rounds, arms)
    assert costs["Dense, SGD"].dense_text == "1.00x"
    assert costs["RigL 90 %, SGD"].text == "1.00x"
    assert costs["RigL 90 %, SGD"].dense_text == "2.50x (2.50 to 2.50)"
    assert costs["Static ERK 90 %, SAM"].dense == pytest.approx(5.0)
    without = [arm for arm in arms if not arm.dense]
    assert {cost.dense_text for cost in cost_from_rounds(rounds, without).values()} == {"-"}
    assert cost_from_runs(arms)["RigL 90 %, SAM"].dense == pytest.approx(2.0)
    assert cost_from_runs(without)["RigL 90 %, SAM"].dense is None


def test_interval_of_the_median_ratio(arms):
    rounds = rounds_of(arms)
    rounds["RigL 90 %, SAM"] = [0.01 * r for r in (1.1, 1.9, 1.8, 1.7, 1.6, 1.5, 1.4, 1.3, 1.2)]
    cost = cost_from_rounds(rounds, arms)["RigL 90 %, SAM"]
    assert cost.ratio == pytest.approx(1.5)
    assert (cost.interval.low, cost.interval.high) == pytest.approx((1.2, 1.8))  # ranks 2 and 8 of 9


def test_from_the_runs(arms):
    costs = cost_from_runs(arms)
    assert costs["Static ERK 90 %, S2-SAM"].ratio == pytest.approx(1.1)
    assert costs["Static ERK 90 %, S2-SAM"].interval is None
    assert costs["Dense, SGD"].step_seconds == 0.010
    assert "rough" in costs["Dense, SGD"].how


def test_rounds_that_do_not_fit_are_refused(arms):
    rounds = rounds_of(arms)
    with pytest.raises(ValueError, match="missing: Dense, SGD"):
        cost_from_rounds({k: v for k, v in rounds.items() if k != "Dense, SGD"}, arms)
    with pytest.raises(ValueError, match="missing: rounds"):
        cost_from_rounds(rounds | {"Dense, SGD": [0.1]}, arms)


def test_saved_rounds_come_back(arms, tmp_path):
    rounds = rounds_of(arms)
    save_rounds(tmp_path / "cost.json", rounds)
    assert load_rounds(tmp_path / "cost.json") == rounds


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"seconds_per_step": 3}', '{"seconds_per_step": {"a": ["x"]}}'])
def test_foreign_cost_files_are_refused(tmp_path, content):
    path = tmp_path / "cost.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"{path} is not a cost measurement"):
        load_rounds(path)
    with pytest.raises(ValueError, match="no cost measurement at"):
        load_rounds(tmp_path / "nothing.json")
