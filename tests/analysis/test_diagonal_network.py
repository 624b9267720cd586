"""The diagonal linear network: one runner for all problems, equal to the real optimizers on one of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from s2sam import S2SAM, SAM
from s2sam.analysis.diagonal_network import (
    ARMS,
    GRADIENTS,
    WEIGHTS,
    DiagonalNetworks,
    fade,
    recovery,
    same_batch_force,
    train,
)

BY_DIRECTION = {arm.direction: arm for arm in ARMS}
TUNING = Path(__file__).resolve().parents[2] / "results" / "theory" / "diagonal_network_tuning.json"


def with_the_class(arm, problem, *, gradients, generator):
    """One problem in torch's SGD, u and v as two parameters whose loss autograd differentiates."""
    parameters = [torch.nn.Parameter(part.clone()) for part in problem.start()[0].chunk(2)]
    optimizer = torch.optim.SGD(parameters, lr=arm.lr)
    per_step, radius = 1, arm.rho
    if arm.direction == "same batch":
        SAM(optimizer, rho=arm.rho)
        per_step = 2
    elif arm.direction == "echo":
        S2SAM.echo(optimizer, rho=arm.rho, scale="norm")
        radius = 1.0  # the group's "rho" multiplies that of the preset
    else:
        S2SAM.paper(optimizer, rho=arm.rho)
    for step in range(gradients // per_step):
        share = fade(step * per_step, gradients)
        optimizer.param_groups[0] |= {"lr": share * arm.lr, "rho": share * radius}
        if arm.direction != "echo" or step % 2 == 0:
            batch = problem.draw(generator)

        def closure(batch=batch):
            u, v = parameters
            loss = (problem.rows[0, batch[0]] @ (u * v) - problem.targets[0, batch[0]]).square().mean() / 2
            loss.backward()
            return loss

        optimizer.step(closure)
        optimizer.zero_grad()
    return torch.cat([p.detach() for p in parameters])[None]


@pytest.mark.parametrize("direction", ["same batch", "echo", "previous"])
def test_the_runner_is_the_real_optimizer(direction, make_generator):
    arm = BY_DIRECTION[direction]
    problem = DiagonalNetworks.drawn(1, make_generator(1))
    expected = train(arm, problem, gradients=240, generator=make_generator(2))
    actual = with_the_class(arm, problem, gradients=240, generator=make_generator(2))
    assert float((actual - expected).abs().max()) < 1e-10
    plain = train(replace(arm, rho=0.0), problem, gradients=240, generator=make_generator(2))
    assert float((plain - expected).abs().max()) > 1e-2


def replayed(problem, places, draws):
    """Some of the problems, with batches that were drawn before."""
    some, batches = DiagonalNetworks(problem.rows[places], problem.solutions[places]), iter(draws)
    object.__setattr__(some, "draw", lambda generator: next(batches)[places])
    return some


@pytest.mark.parametrize("direction", ["none", "same batch", "other batch", "previous", "echo"])
def test_problems_side_by_side_are_problems_alone(direction, make_generator):
    """A problem's steps depend on its own rows, batches and norm only."""
    arm, both = BY_DIRECTION[direction], DiagonalNetworks.drawn(2, make_generator(3))
    draws = [both.draw(make_generator(seed)) for seed in range(120)]
    together = train(arm, replayed(both, slice(None), draws), gradients=120, generator=make_generator())
    for place in range(2):
        one = replayed(both, slice(place, place + 1), draws)
        alone = train(arm, one, gradients=120, generator=make_generator())
        torch.testing.assert_close(alone[0], together[place], rtol=0, atol=1e-12)


def test_gradient_is_the_derivative_and_counts_are_equal(make_generator):
    problem = DiagonalNetworks.drawn(3, make_generator(1))
    x = torch.randn(3, 2 * WEIGHTS, dtype=torch.float64, generator=make_generator(2)).requires_grad_()
    sample = problem.draw(make_generator(3))
    u, v = x.chunk(2, dim=1)
    each = torch.arange(3)[:, None]
    outputs = torch.einsum("rbd,rd->rb", problem.rows[each, sample], u * v)
    ((outputs - problem.targets[each, sample]).square().mean(1) / 2).sum().backward()
    torch.testing.assert_close(problem.sample_gradient(x.detach(), sample), x.grad, rtol=1e-12, atol=1e-12)
    for arm in ARMS:
        counted = []

        class Counting(DiagonalNetworks):
            def sample_gradient(self, x, sample, counted=counted):
                counted.append(1)
                return super().sample_gradient(x, sample)

        train(arm, Counting(problem.rows, problem.solutions), gradients=64, generator=make_generator(4))
        assert len(counted) == 64, arm.name


def test_the_verdicts_hold_in_a_shorter_run(make_generator):
    checks = list(recovery(make_generator(1), replicas=64, gradients=5000))
    assert [c.setting for c in checks if not c.holds] == []
    assert len(checks) == 3 + 2 * 3 and sum(c.control for c in checks) == 3


def test_a_method_without_its_displacement_is_not_found_to_recover(make_generator):
    """Each batch twice is not enough: without the displacement echo's claims fail, and a claim against SAM too."""
    arms = (ARMS[0], replace(BY_DIRECTION["echo"], rho=0.0), replace(BY_DIRECTION["same batch"], finds=False))
    checks = list(recovery(make_generator(1), arms=arms, replicas=64, gradients=5000))
    assert [c.holds for c in checks] == [True, False, False, False]


def test_weights_that_diverge_count_as_knowing_nothing(make_generator):
    """At a learning rate of 5 everything diverges: that is missed, and no method may be said to have found it."""
    arms = tuple(replace(arm, lr=5.0) for arm in (ARMS[0], BY_DIRECTION["echo"], BY_DIRECTION["previous"]))
    checks = list(recovery(make_generator(1), arms=arms, replicas=4, gradients=400))
    assert [(c.measured, c.holds) for c in checks] == [(1.0, True), (1.0, False), (0.0, False), (1.0, True)]


def test_the_force_of_sam_is_the_slope_of_the_norm(make_generator):
    sam, echo, independent = same_batch_force(make_generator(1))
    assert sam.holds and echo.holds and independent.holds
    assert max(sam.measured, echo.measured) < 1e-4 and independent.measured > 0.8


def test_the_suite_uses_what_the_tuning_chose():
    tuned = json.loads(TUNING.read_text())
    assert tuned["gradients"] == GRADIENTS
    assert {name: tuple(row["chosen"].values()) for name, row in tuned["arms"].items()} == {
        arm.name: (arm.lr, arm.rho) for arm in ARMS
    }
