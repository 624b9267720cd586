r"""What is proved about echo, and about displacements along past gradients; proofs are in `docs/theory.md`.

*Lemma.* Under heavy-ball momentum mu with learning rate eta, let e_t = sum_k a_k g_{t-1-k} with fixed a_k. Then the
points x_t = w_t + e_t, where gradients are taken, follow a momentum filter, whatever the losses are:

.. math::
    x_{t+1} = x_t + \mu (x_t - x_{t-1}) + \sum_k b_k g_{t-k}, \qquad
    b = -\eta \delta_0 + a * (1, -(1 + \mu), \mu), \qquad \sum_k b_k = -\eta

*Pairs.* Echo's second visit is displaced along the gradient of its own batch, so its gradient is biased and the
corollary does not hold. If every batch's loss is L-smooth, F is PL(mu), eta <= 1/(8L) and there is neither momentum nor
weight decay, then over the first visits of T steps

.. math::
    \frac2T \sum_{k < T/2} E[F(w_{2k}) - F_*] \le \frac{16 (F(w_0) - F_*)}{15 \mu\eta T}
    + \frac{34 \eta L\sigma^2}{15 \mu} + \frac{2 L^2\rho^2}{3 \mu}
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from s2sam.analysis.bound import Terms, corollary_terms
from s2sam.analysis.bound_average import bounded, problems
from s2sam.analysis.bound_check import Check, mean_and_error
from s2sam.analysis.descent import unit
from s2sam.analysis.problems import LeastSquares, Problem, Quadratic
from s2sam.analysis.stability import Method, Setting
from s2sam.analysis.stability_measured import real_optimizer, step_at
from s2sam.hooks import check_number


def filter_coefficients(displacement: Tensor, *, lr: float, momentum: float) -> Tensor:
    r"""The b_0, b_1, ... of the lemma, from the a_0, a_1, ... of e_t = sum_k a_k g_{t-1-k}; two more than those.

    Example:
        >>> c = 0.02                                                  # of +g_{t-1}, momentum 0.5
        >>> filter_coefficients(torch.tensor([c]), lr=0.1, momentum=0.5)     # c - lr, -1.5 c, 0.5 c
        tensor([-0.0800, -0.0300,  0.0100])
    """
    b = displacement.new_zeros(len(displacement) + 2)
    for shift, factor in enumerate((1.0, -(1 + momentum), momentum)):
        b[shift : shift + len(displacement)] += factor * displacement
    b[0] -= lr
    return b


def momentum_filter(generator: torch.Generator, *, steps: int = 200) -> Iterator[Check]:
    """The points at which the real S2SAM takes gradients are those of the lemma's recursion, which runs by itself."""
    curvatures = torch.linspace(0.1, 2.0, 12).double()
    noise = 0.1 * torch.randn(steps, 12, dtype=torch.float64, generator=generator)
    start, lr, c, beta = torch.ones(12, dtype=torch.float64), 0.1, 0.05, 0.9
    past = torch.arange(steps, dtype=torch.float64)
    for momentum in (0.0, 0.5, 0.9):
        for direction in ("gradient", "ema", "momentum") if momentum else ("gradient", "ema"):
            for sign in (1, -1):
                setting = Setting(lr=lr, momentum=momentum, c=c, beta=beta)
                actual = _class_points(Method("", "s2sam", direction, sign), setting, curvatures, noise, start)
                weights = {"gradient": 0.0**past, "ema": (1 - beta) * beta**past, "momentum": momentum**past}[direction]
                b = filter_coefficients(sign * c * weights, lr=lr, momentum=momentum)
                x, gradients = [start, start], []  # x_{-1} is w_0, too: the first step has no momentum
                for t in range(steps):
                    gradients.append(curvatures * x[-1] + noise[t])
                    pushes = torch.stack(gradients[::-1])
                    x.append(x[-1] + momentum * (x[-1] - x[-2]) + b[: len(pushes)] @ pushes)
                apart = float((torch.stack(x[1:-1]) - actual).abs().max())
                name = f"{'+' if sign > 0 else '-'}{direction}, mu {momentum:g}"
                yield Check("displacement is a momentum filter", name, apart, 1e-10, unit="weight")


def _class_points(method: Method, setting: Setting, curvatures: Tensor, noise: Tensor, start: Tensor) -> Tensor:
    """x_0, x_1, ... of S2SAM with scale "step" (e = c d) on torch's SGD."""
    w, points = torch.nn.Parameter(start.clone()), []
    optimizer, single = real_optimizer(method, w, setting, rho=setting.c / setting.lr, scale="step")
    for one in noise:

        def fill(one: Tensor = one) -> None:
            points.append(w.detach().clone())
            w.grad = curvatures * points[-1] + one

        step_at(optimizer, single, fill)
    return torch.stack(points)


def echo_terms(*, gap: float, smooth: float, pl: float, variance: float, lr: float, steps: int, rho: float) -> Terms:
    r"""The bound on the mean gap at echo's first visits.

    Args:
        gap: F(w_0) - F_*.
        smooth: L of every batch's loss, not only of their mean.
        pl: mu.
        variance: sigma^2 = E||grad L_B - grad F||^2 at the first visits, or its mean over them.
        lr: eta, at most 1/(8L).
        steps: T, both visits counted; even.
        rho: radius of the second visits.

    Raises:
        ValueError: a number for which the bound is not proved.

    Source: derived in `docs/theory.md`.

    Example:
        >>> echo_terms(gap=1.5, smooth=2.0, pl=0.5, variance=0.15, lr=0.05, steps=64, rho=0.25)
        Terms(start=1.0, noise=0.068, radius=0.333..., generalisation=0.0)
    """
    for name, value in {"gap": gap, "variance": variance, "rho": rho, "smooth": smooth, "lr": lr}.items():
        check_number(name, value)
    if not 0 < check_number("pl", pl) <= smooth * (1 + 1e-12):
        raise ValueError(f"pl (mu) must be above 0 and at most L = {smooth:g}, got {pl:g}")
    if not 0 < 8 * lr * smooth <= 1 + 1e-12:
        raise ValueError(f"echo's bound needs 0 < lr <= 1/(8L) = {1 / (8 * smooth):g}, got lr = {lr:g}")
    if steps < 2 or steps % 2:
        raise ValueError(f"echo's bound is about pairs of steps; give an even number of at least 2, got {steps}")
    return Terms(
        start=16 * gap / (15 * pl * lr * steps),
        noise=34 * lr * smooth * variance / (15 * pl),
        radius=2 * (smooth * rho) ** 2 / (3 * pl),
    )


def echo_descent(
    problem: Problem, start: Tensor, *, lr: float, pairs: int, rho: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Pairs of steps on one batch each, R replicas at a time, without hooks.

    .. math::
        w' = w - \eta \nabla L_B(w), \qquad w'' = w' - \eta \nabla L_B(w' + \rho u), \qquad
        u = \nabla L_B(w) / \|\nabla L_B(w)\|

    Returns:
        gaps at every step, shape (2 x pairs, R); variances at first visits, (pairs, R); the last weights, (R, d).
    """
    w, gaps, variances = start.clone(), [], []
    for _ in range(pairs):
        batch = problem.draw(len(w), generator)
        variances.append(problem.variance(w))
        gaps.append(problem.loss(w) - problem.minimum)
        first = problem.sample_gradient(w, batch)
        w = w - lr * first
        gaps.append(problem.loss(w) - problem.minimum)
        w = w - lr * problem.sample_gradient(w + rho * unit(first), batch)
    return torch.stack(gaps), torch.stack(variances), w


def echo_pairs(generator: torch.Generator, *, replicas: int = 48, pairs: int = 300) -> Iterator[Check]:
    """Echo keeps the bound that is proved for its pairs; the corollary, which is not for it, it exceeds (control)."""
    for name, (problem, start) in problems(generator).items():
        smooth = float((problem.rows**2).sum(1).max()) if isinstance(problem, LeastSquares) else problem.smooth
        lr, rho = 1 / (8 * smooth), 0.1
        gaps, variances, _ = echo_descent(
            problem, start.repeat(replicas, 1), lr=lr, pairs=pairs, rho=rho, generator=generator
        )
        terms = echo_terms(
            gap=float(gaps[0].mean()), smooth=smooth, pl=problem.pl, variance=float(variances.mean()), lr=lr,
            steps=2 * pairs, rho=rho,
        )  # fmt: skip
        yield bounded("echo, first visits", f"{name}, eta 1/(8L)", gaps[::2].mean(0), terms)
    one, rho, steps = Quadratic(torch.tensor([2.0], dtype=torch.float64), sigma=0.4), 0.3, 60
    far = torch.full((4000, 1), 1.5, dtype=torch.float64)
    gaps, variances, _ = echo_descent(one, far, lr=0.5, pairs=steps // 2, rho=rho, generator=generator)
    plain = corollary_terms(
        gap=float(gaps[0].mean()), smooth=2.0, pl=2.0, variance=float(variances.mean()), lr=0.5, steps=steps,
        rho=rho / 2**0.5,  # root mean square: every second step has none
    )  # fmt: skip
    measured, error = mean_and_error(gaps.mean(0))
    setting = "1-D, eta 1/L, echo (direction of the same batch)"
    yield Check("negative control", setting, measured, plain.total, -torch.inf, error, True, plain, "loss")
