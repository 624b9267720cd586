"""The bound as arithmetic: golden values, what it must be monotone in, what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2sam.analysis.bound import (
    ASSUMPTIONS,
    Terms,
    corollary_terms,
    last_iterate_bound,
    matching_radius,
    theorem_terms,
)

GOOD = {"gap": 1.0, "smooth": 2.0, "pl": 0.5, "variance": 0.1, "lr": 0.5, "steps": 100, "rho": 0.05}
settings = st.fixed_dictionaries(
    {
        "gap": st.floats(0, 100),
        "smooth": st.floats(0.5, 10),
        "pl": st.floats(0.01, 0.5),
        "variance": st.floats(0, 10),
        "lr": st.floats(1e-4, 0.05),
        "steps": st.integers(1, 10_000),
        "rho": st.floats(0, 2),
        "decay": st.floats(0, 5),
    }
)


def test_golden_terms():
    assert corollary_terms(**GOOD) == Terms(1 / 25, 0.1, pytest.approx(0.01))
    assert corollary_terms(**GOOD | {"lr": 0.25, "decay": 2.0}) == Terms(2 / 25, 0.1, pytest.approx(0.01))
    assert corollary_terms(**GOOD | {"lr": 0.25, "decay": 2.0, "decay_at": "x"}) == Terms(
        2 / 25, 0.1, pytest.approx(0.04)
    )
    theorem = theorem_terms(loss=1.0, smooth=1.0, pl=2.0, variance=0.5, lr=0.25, steps=100, lipschitz=1.5, examples=50)
    assert theorem == Terms(0.02, 0.09375, 0.0, 0.2)
    assert theorem.total == pytest.approx(0.31375)


@given(settings, st.floats(0.01, 1))
def test_smallest_at_rho_0_where_it_is_sgds(setting, more):
    terms, without = corollary_terms(**setting), corollary_terms(**setting | {"rho": 0.0})
    further = corollary_terms(**setting | {"rho": setting["rho"] + more})
    assert without.radius == 0
    assert (terms.start, terms.noise) == (without.start, without.noise)
    assert without.total <= terms.total < further.total
    assert terms.radius == pytest.approx((setting["smooth"] * setting["rho"]) ** 2 / (2 * setting["pl"]))


@given(settings)
def test_each_term_has_its_rate(setting):
    terms = corollary_terms(**setting)
    assert corollary_terms(**setting | {"steps": 2 * setting["steps"]}).start == pytest.approx(terms.start / 2)
    assert corollary_terms(**setting | {"lr": setting["lr"] / 2}).noise == pytest.approx(terms.noise / 2)
    assert corollary_terms(**setting | {"rho": 3 * setting["rho"]}).radius == pytest.approx(9 * terms.radius)
    at_x = corollary_terms(**setting, decay_at="x")
    assert (at_x.start, at_x.noise) == (terms.start, terms.noise)
    assert at_x.radius >= terms.radius


@given(settings)
def test_the_theorem_shares_two_terms_with_the_corollary(setting):
    smooth, variance, pl, lr, steps = (setting[k] for k in ("smooth", "variance", "pl", "lr", "steps"))
    lr /= 3
    theorem = theorem_terms(
        loss=setting["gap"], smooth=smooth, pl=pl, variance=variance, lr=lr, steps=steps, lipschitz=1.0, examples=7
    )
    ours = corollary_terms(
        gap=setting["gap"], smooth=smooth, pl=pl, variance=variance, lr=lr, steps=steps, rho=0.0, decay=2 * smooth
    )
    assert (theorem.start, theorem.noise) == pytest.approx((ours.start, ours.noise))
    assert theorem.generalisation == pytest.approx(1.0)


@given(st.floats(0.1, 10), st.floats(0.01, 0.1), st.integers(1, 10**6))
def test_the_matching_radius_is_worth_one_over_n(smooth, pl, examples):
    rho = matching_radius(smooth=smooth, pl=pl, examples=examples)
    radius = corollary_terms(**GOOD | {"smooth": smooth, "pl": pl, "rho": rho, "lr": 0.1}).radius
    assert radius * examples == pytest.approx(1.0)


def test_the_last_iterate_forgets_its_start():
    terms = corollary_terms(**GOOD)
    ends = [last_iterate_bound(terms, gap=1.0, pl=0.5, lr=0.5, steps=t) for t in (0, 1, 1000)]
    assert ends == pytest.approx([1.11, 0.86, 0.11])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"lr": 0.51}, r"needs 0 < lr <= 1/\(L \+ lambda\) = 0.5"),
        ({"lr": 0.0}, "needs 0 < lr"),
        ({"decay": 1.0}, r"= 0.333333, got lr = 0.5"),
        ({"pl": 0.0}, r"pl \(mu\) must be above 0 and at most L \+ lambda = 2"),
        ({"pl": 2.1}, r"at most L \+ lambda = 2, got 2.1"),
        ({"rho": -0.1}, "rho must be a finite number >= 0"),
        ({"variance": float("nan")}, "variance must be a finite number"),
        ({"steps": 0}, "steps must be a finite number >= 1"),
        ({"decay_at": "v"}, "decay_at must be 'w' or 'x', got 'v'"),
    ],
)
def test_what_is_not_proved_is_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        corollary_terms(**GOOD | change)


def test_the_theorem_needs_examples_and_a_small_step():
    good = {"loss": 1.0, "smooth": 1.0, "pl": 2.0, "variance": 0.5, "steps": 9, "lipschitz": 1.5}
    with pytest.raises(ValueError, match="examples must be a finite number >= 1, got 0"):
        theorem_terms(**good, lr=0.1, examples=0)
    with pytest.raises(ValueError, match="lr <= 1/.* = 0.333333"):
        theorem_terms(**good, lr=0.5, examples=5)


def test_what_only_the_theorem_assumes_is_named():
    assert {a.name for a in ASSUMPTIONS if a.theorem and not a.corollary} == {"Lipschitz", "lambda = 2L", "cancelling"}
    assert {"smooth", "PL", "unbiased", "variance"} <= {a.name for a in ASSUMPTIONS if a.theorem and a.corollary}
