"""Estimates of L, mu, sigma^2 and B: on their side of the truth, near it where they can be; and terms made of them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from s2sam.analysis.bound import corollary_terms, theorem_terms
from s2sam.analysis.bound_network import Constants, Rates, constants, network_terms
from s2sam.analysis.bound_objective import Objective, flat
from s2sam.analysis.bound_probe import Probe, Stop, measure, quotient
from s2sam.analysis.bound_words import ALL, premises, sentences, verdicts
from s2sam.analysis.problems import LeastSquares, Quadratic

D, N, BATCH = 6, 160, 4
ALL_ACTIVE = torch.ones(D, dtype=torch.bool)


def half_squares(out, y):
    return 0.5 * (out[:, 0] - y) ** 2


def least_squares(generator, scales=(3.0, 2.0, 1.5, 1.0, 0.7, 0.5)):
    """The problem with known constants, and the same as a network on fixed batches."""
    rows = torch.randn(N, D, dtype=torch.float64, generator=generator) * torch.tensor(scales, dtype=torch.float64)
    targets = rows @ torch.ones(D, dtype=torch.float64)
    targets += 0.5 * torch.randn(N, dtype=torch.float64, generator=generator)
    model = nn.Linear(D, 1, bias=False, dtype=torch.float64)
    batches = list(zip(rows.split(BATCH), targets.split(BATCH), strict=True))
    return LeastSquares(rows, targets, BATCH), Objective(model, batches, half_squares)


def descent(problem, start, *, lr, steps, e=None, active=ALL_ACTIVE):
    """Stops of gradient descent on the active weights."""
    w = start * active
    for _ in range(steps + 1):
        yield Stop(w, active, lambda gradient: e)
        w = w - lr * problem.gradient(w[None])[0] * active


@pytest.fixture
def generator(make_generator):
    return make_generator(3)


def test_a_look_is_loss_gradient_and_variance(generator):
    problem, objective = least_squares(generator)
    w = torch.randn(D, dtype=torch.float64, generator=generator)
    look = objective.look(w, ALL_ACTIVE)
    assert look.loss == pytest.approx(float(problem.loss(w[None])), rel=1e-12)
    assert torch.allclose(look.gradient, problem.gradient(w[None])[0], rtol=1e-10)
    assert look.variance == pytest.approx(float(problem.variance(w[None])), rel=0.3)  # 40 batches
    residuals = problem.rows @ w - problem.targets
    pulls = residuals[:, None] * problem.rows
    norms = pulls.norm(dim=1)
    assert look.largest == pytest.approx(float(pulls.unflatten(0, (-1, BATCH)).mean(1).norm(dim=1).max()), rel=1e-10)
    worst = objective.largest_example(w, ALL_ACTIVE, look.losses, 5)
    assert worst == pytest.approx(float(norms[residuals.abs().topk(5).indices].max()), rel=1e-10)
    assert objective.largest_example(w, ALL_ACTIVE, look.losses, N) == pytest.approx(float(norms.max()), rel=1e-10)


def test_known_constants_come_out_on_their_side_and_near(generator):
    problem, objective = least_squares(generator)
    best = torch.linalg.pinv(problem.rows) @ problem.targets
    hessian = problem.rows.T @ problem.rows / N
    lowest = torch.linalg.eigh(hessian).eigenvectors[:, 0]
    start = best + 5 * lowest + 0.3 * torch.randn(D, dtype=torch.float64, generator=generator)
    e = 0.05 * torch.nn.functional.normalize(torch.randn(D, dtype=torch.float64, generator=generator), dim=0)
    path = [stop.w for stop in descent(problem, start, lr=0.5 / problem.smooth, steps=12)] + [best]
    probe = measure(objective, [Stop(w, ALL_ACTIVE, lambda gradient: e) for w in path], examples=N, power=12)
    found = constants([probe])
    assert problem.smooth / 1.02 <= found.smooth <= problem.smooth * (1 + 1e-9)
    assert set(probe.quotients) == {"step", "chord", "+e", "-e", "+-e", "curvature"}
    assert all(problem.pl * (1 - 1e-9) <= q for kind in probe.quotients.values() for q in kind)
    assert problem.pl <= found.pl <= 1.3 * problem.pl
    assert found.pl_if_fitted < problem.pl  # F* = 0 is below the true one
    assert found.best >= problem.minimum and found.best == pytest.approx(problem.minimum)
    assert found.gap <= float(problem.loss(start[None])) - problem.minimum
    points = torch.stack(path)
    exact = problem.variance(points + e)
    assert found.variance == pytest.approx(float(exact.mean()), rel=0.3)
    assert found.largest_variance <= 1.3 * float(exact.max())
    assert probe.variances[3] == objective.look(path[3] + e, ALL_ACTIVE).variance  # where the gradient is taken
    gradients = ((points @ problem.rows.T - problem.targets)[..., None] * problem.rows).norm(dim=2)
    assert found.lipschitz == pytest.approx(float(gradients[[0, -1]].max()), rel=1e-10)
    assert found.lipschitz <= float(gradients.max()) * (1 + 1e-12)
    assert probe.displacements == pytest.approx([0.05] * 14)
    assert (found.start, found.norm) == (probe.losses[0], pytest.approx(float(start.norm())))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), power=st.integers(0, 4), decay=st.sampled_from([0.0, 0.1]))
def test_no_estimate_is_ever_on_the_wrong_side(seed, power, decay):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(12, 3, dtype=torch.float64, generator=generator)
    problem = LeastSquares(rows, torch.randn(12, dtype=torch.float64, generator=generator), 3)
    model = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    batches = list(zip(rows.split(3), problem.targets.split(3), strict=True))
    start, active = torch.randn(3, dtype=torch.float64, generator=generator), torch.ones(3, dtype=torch.bool)
    stops = descent(problem, start, lr=0.3 / problem.smooth, steps=4, active=active)
    found = constants([measure(Objective(model, batches, half_squares), stops, decay=decay, examples=2, power=power)])
    hessian = torch.linalg.eigvalsh(rows.T @ rows / 12) + decay
    assert found.smooth <= problem.smooth * (1 + 1e-9)
    assert found.pl is None or found.pl >= float(hessian.min()) * (1 - 1e-9)


def test_pruned_weights_are_in_no_estimate(generator):
    problem, objective = least_squares(generator)
    active = torch.tensor([False, True, False, True, True, False])
    kept = problem.rows[:, active]
    smooth = float(torch.linalg.eigvalsh(kept.T @ kept / N).max())
    start = 3 * torch.ones(D, dtype=torch.float64)
    stops = list(descent(problem, start, lr=0.02, steps=5, active=active))
    look = objective.look(stops[0].w, active)
    assert bool((look.gradient[~active] == 0).all()) and bool((look.gradient[active] != 0).all())
    found = constants([measure(objective, stops, examples=N, power=15)])
    assert smooth / 1.02 <= found.smooth <= smooth * (1 + 1e-9) < problem.smooth / 1.2
    w = stops[0].w
    expected = ((kept @ w[active] - problem.targets)[:, None] * kept).norm(dim=1).max()
    assert found.lipschitz == pytest.approx(float(expected), rel=1e-10)


def test_a_step_that_changes_masks_gives_no_quotient(generator):
    problem, objective = least_squares(generator)
    a, b = ALL_ACTIVE.clone(), ALL_ACTIVE.clone()
    b[0] = False
    w = torch.ones(D, dtype=torch.float64)
    probe = measure(objective, [Stop(2 * w, a), Stop(w * b, b), Stop(0.5 * w * b, b)], power=0)
    assert probe.moved_masks == 1
    assert {kind: len(found) for kind, found in probe.quotients.items()} == {"step": 1}


class Bowls:
    """F(w) = (w_1 - 1)^2 / 2 + 2 (w_2 - 1)^2 on the active weights: mu is 1 on {w_1} and 4 on {w_2}."""

    @staticmethod
    def probe(w, active, moved=0):
        """The points of gradient descent from w, with learning rate 0.1."""
        points, curvature = [], (1.0, 4.0)
        w = [x * a for x, a in zip(w, active, strict=True)]
        for _ in range(20):
            slope = [h * (x - 1) * a for h, x, a in zip(curvature, w, active, strict=True)]
            loss = sum(h * (x - 1) ** 2 / 2 for h, x in zip(curvature, w, strict=True))
            points.append((loss, math.hypot(*slope)))
            w = [x - 0.1 * g for x, g in zip(w, slope, strict=True)]
        return Probe(
            points=points, losses=[points[0][0]], quotients={"step": [4.0]}, variances=[0.0], moved_masks=moved
        )


def test_mu_is_not_below_that_of_any_mask_when_masks_move():
    first, second = Bowls.probe((3.0, 3.0), (1, 0)), Bowls.probe((3.0, 3.0), (0, 1))
    each = [constants([probe]).pl for probe in (first, second)]
    assert each == pytest.approx([1.0, 4.0], rel=0.2) and each[0] >= 1 and each[1] >= 4
    assert constants([first, second], ["a", "b"]).pl == min(each)
    assert constants([first, second]).pl < 0.1  # as if they had one mask: far below either mu
    assert constants([first, second], ["a", "b"]).best == min(constants([p]).best for p in (first, second))
    moving = Bowls.probe((3.0, 3.0), (1, 0), moved=1)
    assert constants([moving, second], ["a", "b"]).pl == each[1]
    assert constants([moving, moving], ["a", "a"]).pl is None
    assert constants([first, Bowls.probe((1.5, 3.0), (1, 0))], ["a", "a"]).pl <= each[0]  # one mask: all points count


def test_batch_statistics_are_those_of_the_batch(generator):
    """F of a network with BatchNorm does not depend on running statistics, and a look moves none."""
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3))
    x, y = torch.randn(12, 4, generator=generator), torch.randint(0, 3, (12,), generator=generator)
    batches = [(x[:6], y[:6]), (x[6:], y[6:])]
    w = flat(list(model.parameters()))
    active = torch.ones_like(w, dtype=torch.bool)
    first = Objective(model, batches)
    looks = [first.look(w, active), first.look(w, active)]
    model[1].running_mean += 7
    looks.append(Objective(model, batches).look(w, active))
    assert len({look.loss for look in looks}) == 1
    model[2].eval()
    expected = sum(float(nn.functional.cross_entropy(model(a), b).detach()) for a, b in batches) / 2
    assert looks[0].loss == pytest.approx(expected, rel=1e-6)
    assert (first.images, looks[0].losses.shape) == (12, (2, 6))


def test_rounding_and_nothing_are_no_quotient():
    w, v = torch.zeros(2), torch.tensor([0.0, 1e-3])
    g = torch.tensor([1.0, 1.0])
    assert quotient(w, g, v, g + torch.tensor([0.0, 5e-5])) is None
    assert quotient(w, g, w, g) is None
    assert quotient(w, g, v, torch.tensor([math.nan, 0.0])) is None
    assert quotient(w, g, v, g + torch.tensor([0.0, 1e-2])) == pytest.approx(10.0, rel=1e-3)


def test_losses_that_are_not_finite(generator):
    problem, objective = least_squares(generator)
    w, bad = torch.ones(D, dtype=torch.float64), torch.full((D,), math.nan, dtype=torch.float64)
    probe = measure(objective, [Stop(w, ALL_ACTIVE), Stop(0.9 * w, ALL_ACTIVE), Stop(bad, ALL_ACTIVE)])
    assert (probe.stopped, len(probe.losses), len(probe.variances)) == (True, 2, 2)
    assert constants([probe]).smooth <= problem.smooth * (1 + 1e-9)
    far = measure(objective, [Stop(w, ALL_ACTIVE, lambda gradient: bad)])  # w is finite, w + e is not
    assert not far.stopped and all(map(math.isfinite, (v for point in far.points for v in point)))
    with pytest.raises(ValueError, match="not finite where the probe begins"):
        measure(objective, [Stop(bad, ALL_ACTIVE)])
    with pytest.raises(ValueError, match="at least one stop"):
        measure(objective, [])
    with pytest.raises(ValueError, match="no two gradients of the run differ"):
        constants([Probe(points=[(1.0, 1.0)], losses=[1.0], variances=[0.0])])
    with pytest.raises(ValueError, match="at least two batches"):
        Objective(nn.Linear(1, 1), [(torch.ones(1, 1), torch.ones(1))])


FOUND = Constants(
    smooth=2.0, pl=0.5, pl_if_fitted=0.4, variance=0.1, largest_variance=0.2, lipschitz=1.5, start=1.25, best=0.25,
    norm=3.0,
)  # fmt: skip


def test_terms_are_those_of_the_published_bounds():
    lr, steps = 0.1, 40
    terms = network_terms(FOUND, Rates.of([lr] * steps), squared_radius=0.09, decay=0.3, examples=50)
    alike = {"smooth": 2.0, "pl": 0.5, "lr": lr, "steps": steps}
    expected = corollary_terms(gap=1.0, variance=0.1, rho=0.3, decay=0.3, **alike)
    for name in ("start", "noise", "radius", "generalisation"):
        assert getattr(terms["corollary"], name) == pytest.approx(getattr(expected, name))
    assert terms["theorem 1, own decay"].noise == pytest.approx(lr * 2.3 * 0.2 / (2 * 0.5))
    assert terms["theorem 1, own decay"].start == pytest.approx(1.25 / (0.5 * lr * steps))
    for pl in (2.0, 4.0, 6.0):  # mu between L and 3L, as lambda = 2L makes it
        whole = theorem_terms(
            loss=1.0 + 2.0 * 3.0**2, smooth=2.0, pl=pl, variance=0.2, lr=lr, steps=steps, lipschitz=1.5, examples=50
        )
        assert terms["theorem 1"].noise <= whole.noise * (1 + 1e-12)
        assert terms["theorem 1"].start <= whole.start
        assert terms["theorem 1"].generalisation == whole.generalisation == pytest.approx(0.2)
    assert terms["theorem 1"].noise == pytest.approx(whole.noise)


def test_terms_without_mu_are_the_least_they_can_be():
    from dataclasses import replace

    terms = network_terms(replace(FOUND, pl=None), Rates.of([0.1]), squared_radius=1.0, decay=0.0, examples=50)
    assert terms["corollary"].total == 0.0
    assert terms["theorem 1, own decay"].total == pytest.approx(0.2)
    with pytest.raises(ValueError, match="learning rate is 0 in every step"):
        Rates.of([0.0, 0.0])


def test_the_corollary_with_a_changing_learning_rate_holds(make_generator):
    """docs/theory.md: R drawn in proportion to eta_t; on a quadratic with noise, displaced by the previous gradient."""
    problem = Quadratic(torch.tensor([0.2, 1.0, 2.0], dtype=torch.float64), sigma=0.3)
    rates = [0.5 * (1 + math.cos(math.pi * t / 60)) / 2 for t in range(60)]
    generator = make_generator(0)
    w = torch.ones(4000, 3, dtype=torch.float64)
    start, e, rho, mean = float(problem.loss(w[:1])), torch.zeros_like(w), 0.1, 0.0
    summed = Rates.of(rates)
    for lr in rates:
        mean += lr * float(problem.loss(w).mean()) / summed.total
        g = problem.sample_gradient(w + e, problem.draw(len(w), generator))
        e, w = rho * torch.nn.functional.normalize(g, dim=1), w - lr * g
    exact = Constants(
        smooth=2.0, pl=0.2, pl_if_fitted=0.2, variance=0.09, largest_variance=0.09, lipschitz=1.0, start=start,
        best=0.0, norm=3**0.5,
    )  # fmt: skip
    terms = network_terms(exact, summed, squared_radius=rho**2, decay=0.0, examples=10)["corollary"]
    assert 0.1 * terms.total < mean <= terms.total


RESULT = {
    "run": "a", "classes": 10, "weight_decay": 5e-4, "optimizer": "sgd", "momentum": 0.9, "sharpness": "s2sam",
    "squared_radius": 0.0025, "step_condition": 4.0, "decay_share": 1e-5, "constants": {"pl": 0.5},
    "terms": {
        "theorem 1": {"start": 20.0, "noise": 0.1, "radius": 0.0, "generalisation": 0.2, "total": 20.3},
        "theorem 1, own decay": {"start": 0.2, "noise": 1.5, "radius": 0.0, "generalisation": 0.2, "total": 1.9},
        "corollary": {"start": 0.2, "noise": 0.1, "radius": 0.04, "generalisation": 0.0, "total": 0.34},
    },
    "measured": {"test_loss": 0.5, "train_loss": 0.68, "epochs": 3, "tested_epochs": 3},
    "probes": [{"at": "start", "moved_masks": 0, "stopped": False, "losses": [1.0]}],
}  # fmt: skip


def test_words_go_as_far_as_the_numbers():
    first, second, third = verdicts(RESULT)
    assert first.startswith(
        "theorem 1: at least 20.3 nats, most of it start; the run's mean test loss was 0.5, 40.6 times"
    )
    assert first.endswith("vacuous: guessing costs 2.3")
    assert "most of it noise" in second and second.endswith("less than the 2.3 of guessing, so not shown to be vacuous")
    assert "times less" not in third and "was 0.68; less than" in third
    lines = premises(RESULT)
    assert "reaches at least 4, so the corollary's proof does not apply" in lines[0]
    assert "momentum 0.9: both bounds are without; it makes steps up to 10 times as long" in lines
    assert "displacement 0.05 (root mean square): without it the corollary is 0.3" in lines
    rarely = {**RESULT, "measured": {**RESULT["measured"], "tested_epochs": 1}}
    assert "mean test loss (1 of 3 epochs) was 0.5" in verdicts(rarely)[0]
    assert sentences([RESULT, {**RESULT, "run": "b"}])[-len(ALL) :] == list(ALL)
    assert sum(line.startswith("b: ") for line in sentences([RESULT, {**RESULT, "run": "b"}])) == 3 + len(lines)


def test_words_about_what_a_run_breaks():
    def said(**changed):
        return " | ".join(premises({**RESULT, **changed}))

    assert "neither applies" in said(sharpness="sam") and "neither applies" not in said()
    echo = said(sharpness="echo", squared_radius=0.0)  # also without a radius, since a batch's second visit knows it
    assert "so the gradients of second visits are biased and neither bound applies" in echo and "SGD's" not in echo
    assert "the corollary's bound is SGD's" in said(sharpness="none", squared_radius=0.0)
    assert "this run used adamw" in said(optimizer="adamw", momentum=None)
    assert "not shown to break" in said(step_condition=0.5)
    assert "no point is known to lie above the lowest loss on its masks" in said(constants={"pl": None})
    stayed = [{**RESULT["probes"][0], "mask": mask} for mask in "aa"]
    assert "masks" not in said(probes=stayed, method="rigl")
    apart = said(probes=[stayed[0], {**stayed[1], "mask": "b"}], method="rigl")
    assert "mu: masks moved, so F is compared with the lowest on the same masks" in apart
    assert "masks changed between" not in apart
    assert "mu: taken over all masks together, so it is on no side if they moved" in said(method="rigl")
    changed = [{"at": "best", "moved_masks": 2, "stopped": True, "losses": [1.0, 2.0]}]
    assert "masks changed" in said(probes=changed) and "the loss was not finite 2 steps after best" in said(
        probes=changed
    )
