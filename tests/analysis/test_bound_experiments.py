"""The experiments: they hold for other seeds, controls fail when they must, and a wrong bound is found out."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from s2sam.analysis import bound_average, bound_rates
from s2sam.analysis.bound_average import bounded, mean_iterate, negative_control, published, tight, unbiased
from s2sam.analysis.bound_check import Check
from s2sam.analysis.bound_suite import same_as_the_classes
from s2sam.analysis.descent import DIRECTIONS, descend
from s2sam.analysis.problems import Quadratic
from s2sam.sam.reference import ReferenceS2SAM

SMALL = {bound_rates.in_steps: {"longest": 800}, bound_rates.in_learning_rate: {"replicas": 48, "steps": 600},
         bound_rates.in_radius: {"steps": 400}, bound_rates.in_examples: {"replicas": 150, "steps": 60}}  # fmt: skip


def scalar(value: float, n: int = 1) -> torch.Tensor:
    return torch.full((n, 1), value, dtype=torch.float64)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_recursion_is_the_slow_twins(sign, make_generator):
    curvatures, start = torch.linspace(0.2, 1.5, 5).double(), torch.randn(1, 5, dtype=torch.float64)
    ref = ReferenceS2SAM(
        [start], lambda w: torch.optim.SGD([{"params": w, "rho": 0.3}], lr=0.4, weight_decay=0.1), sign=sign
    )
    for _ in range(50):
        (x,) = ref.displaced()
        ref.step([curvatures * x])
    run = descend(
        Quadratic(curvatures), start, lr=0.4, steps=50, rho=0.3, direction="+previous" if sign > 0 else "-previous",
        generator=make_generator(), decay=0.1,
    )  # fmt: skip
    torch.testing.assert_close(run.last, ref.weights[0], rtol=0, atol=1e-13)
    assert float((run.last - start).abs().max()) > 0.1


def test_rho_0_is_sgd_for_every_direction(make_generator):
    problem, start = Quadratic(torch.tensor([0.5, 1.0], dtype=torch.float64), sigma=0.2), scalar(1.0, 3).repeat(1, 2)
    ends = [
        descend(problem, start, lr=0.5, steps=20, rho=0.0, direction=d, generator=make_generator(1)).last
        for d in DIRECTIONS
        if d != "random"  # it draws more numbers
    ]
    assert all(torch.equal(end, ends[0]) for end in ends[1:])
    with pytest.raises(ValueError, match="did you mean 'random'"):
        descend(problem, start, lr=0.5, steps=1, rho=0.0, direction="randon", generator=make_generator())


def test_one_step_by_hand(make_generator):
    run = descend(Quadratic(torch.tensor([2.0], dtype=torch.float64)), scalar(1.0), lr=0.5, steps=3, rho=0.1,
                  direction="+previous", generator=make_generator())  # fmt: skip
    assert run.gaps[:, 0].tolist() == pytest.approx([1.0, 0.0, 0.01])  # 1, 0, -0.1
    assert run.last.item() == pytest.approx(-0.1)  # at -0.1 + 0.1 the gradient is 0


@pytest.mark.parametrize("seed", [1, 2])
def test_small_experiments_hold(seed, make_generator):
    checks = [
        *mean_iterate(make_generator(seed), replicas=8, steps=60),
        *tight(make_generator(seed), replicas=1000),
        *negative_control(make_generator(seed), replicas=1000),
        *unbiased(make_generator(seed)),
        *bound_average.random_iterate(make_generator(seed), replicas=500),
        *published(make_generator(seed)),
        *bound_rates.decay_place(make_generator(seed), steps=200),
        *same_as_the_classes(make_generator(seed), steps=20),
    ]
    assert [c for c in checks if not c.holds] == []
    assert sum(c.control for c in checks) == 6
    assert not any("[" in c.setting + c.experiment for c in checks)  # rich would take it for markup
    assert all(c.measured > 0 for c in checks if c.experiment in ("mean iterate", "last iterate", "theorem 1"))
    sine = {
        c.setting.split(", ")[1]: c.measured for c in checks if c.experiment == "last iterate" and "sin" in c.setting
    }
    assert min(sine[name] for name in ("+g_{t-1}", "-g_{t-1}", "random")) > 2 * sine["SGD"]  # the displacement is there


@pytest.mark.parametrize("rate", SMALL, ids=lambda f: f.__name__)
def test_rates(rate, make_generator):
    found = list(rate(make_generator(5), **SMALL[rate]))
    assert {r.method for r in found} >= {"+g_{t-1}", "-g_{t-1}"}
    for r in found:
        assert [c for c in r.checks() if not c.holds] == []
        wrong = dataclasses.replace(r, bounds=[0.5 * m for m in r.measured], expected=r.expected + 1)
        assert [c.holds for c in wrong.checks()] == [False, False]


def test_a_bound_that_is_one_percent_too_small_is_violated(make_generator):
    """The 1-D case is tight: nothing smaller than the corollary would pass."""
    checks = list(tight(make_generator(0), replicas=20_000))
    assert all(c.holds for c in checks)
    assert not any(dataclasses.replace(c, high=0.98 * c.high, low=-torch.inf).holds for c in checks)


def test_a_check_holds_within_its_error_only():
    claim = Check("a", "b", 1.0, high=0.9, error=0.03)
    assert claim.holds
    assert not dataclasses.replace(claim, error=0.02).holds
    control = dataclasses.replace(claim, control=True)
    assert not control.holds
    assert dataclasses.replace(control, error=0.02).holds
    assert not dataclasses.replace(claim, measured=float("nan")).holds
    assert not dataclasses.replace(claim, measured=float("inf"), control=True).holds


def test_terms_travel_with_the_check():
    terms = bound_average.run_terms(
        Quadratic(torch.ones(1).double()),
        descend(Quadratic(torch.ones(1).double()), scalar(2.0), lr=0.5, steps=4, rho=0.1, direction="none",
                generator=torch.Generator()), lr=0.5, rho=0.1,
    )  # fmt: skip
    check = bounded("a", "b", torch.tensor([0.1, 0.2]), terms)
    assert (terms.start, terms.radius) == (pytest.approx(1.0), pytest.approx(0.005))
    assert check.high == terms.total
    assert check.error == pytest.approx(0.05)
