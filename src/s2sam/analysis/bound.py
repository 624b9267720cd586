r"""The convergence theorem of S2-SAM and the corollary that can be proved in two lines, term by term.

**Theorem 1** (Ji et al., NeurIPS 2024). R is a uniformly drawn iterate, F the risk, w_* where it is smallest, F_S the
mean of the loss over n examples, \hat F_S = F_S + (lambda/2) ||w||^2 the regularised one:

.. math::
    E[F(w_R)] - E[F(w_*)] \le \frac{\hat F_S(w_0)}{\mu\eta T} + \frac{\eta (L + \lambda) \sigma^2}{2\mu}
    + \frac{6B + 1}{n}

**Corollary** (own derivation, `docs/theory.md`). The same first two terms, and what the displacement costs:

.. math::
    \frac1T \sum_{t<T} E[F(w_t) - F_*] \le \frac{F(w_0) - F_*}{\mu\eta T} + \frac{\eta L\sigma^2}{2\mu}
    + \frac{L^2\rho^2}{2\mu}

It holds for **every** direction u_t of length at most 1 that is known before batch t is drawn, and its right side is
smallest at rho = 0, where it is SGD's. So it certifies that the displacement does no more harm than its third term. It
says nothing about a gain, and nothing about two-step SAM and echo, whose direction is that of the same batch; for echo
see :mod:`s2sam.analysis.bound_echo`. What each of the two assumes is in :data:`ASSUMPTIONS`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from s2sam.hooks import check_number


@dataclass(frozen=True)
class Assumption:
    """What must be true, and for which of the two."""

    name: str
    says: str
    theorem: bool = True
    corollary: bool = True


ASSUMPTIONS = (
    Assumption("smooth", "the gradient is L-Lipschitz: ||grad F(w) - grad F(v)|| <= L ||w - v||"),
    Assumption("PL", "||grad F(w)||^2 >= 2 mu (F(w) - F*), with mu > 0 (of the regularised F in the theorem)"),
    Assumption("unbiased", "E(g_t | past) = grad F(x_t): the displacement is fixed before batch t is drawn; g_{t-1} "
               "is, the gradient of the same batch (two-step SAM, echo) is not"),
    Assumption("variance", "E(||g_t - grad F(x_t)||^2 | past) <= sigma^2"),
    Assumption("step", "eta <= 1/L, or 1/(L + lambda) with weight decay", theorem=False),
    Assumption("radius", "||u_t|| <= 1 and a fixed rho; nothing else about the direction", theorem=False),
    Assumption("Lipschitz", "every example's loss is B-Lipschitz; with PL that is possible on a bounded region only, "
               "within B/mu of the minimisers", corollary=False),
    Assumption("lambda = 2L", "weight decay of twice the smoothness constant", corollary=False),
    Assumption("cancelling", "min F_S + (lambda/2)||.||^2 <= min F_S + (lambda/2)||w_t||^2 at every iterate; at the "
               "regularised minimum itself this fails unless that also minimises F_S", corollary=False),
)  # fmt: skip


@dataclass(frozen=True)
class Terms:
    """The terms of a bound; a term that a bound does not have is 0."""

    start: float  #: falls as 1/T
    noise: float  #: of the batches; falls with eta
    radius: float = 0.0  #: of the displacement; falls as rho^2
    generalisation: float = 0.0  #: from n examples to the risk; falls as 1/n

    @property
    def total(self) -> float:
        """The right side."""
        return self.start + self.noise + self.radius + self.generalisation


def corollary_terms(
    *,
    gap: float,
    smooth: float,
    pl: float,
    variance: float,
    lr: float,
    steps: int,
    rho: float,
    decay: float = 0.0,
    decay_at: str = "w",
) -> Terms:
    r"""Bound on the mean over t < T of E[F(w_t) - F_*], for SGD and for any direction known before its batch.

    .. math::
        \frac{F(w_0) - F_*}{\mu\eta T} + \frac{\eta (L+\lambda) \sigma^2}{2\mu} + \frac{L_e^2 \rho^2}{2\mu}

    L_e = L if weight decay acts at w (as torch's and S2SAM's do), L + lambda if it acts at x = w + rho u.

    Args:
        gap: F(w_0) - F_*, of the loss with weight decay.
        smooth: L, of the loss without weight decay.
        pl: mu, of the loss with weight decay.
        variance: sigma^2 = E||g - grad F(x)||^2, or its mean along the trajectory: the proof needs no more.
        lr: eta, at most 1/(L + lambda).
        steps: T.
        rho: radius.
        decay: lambda.
        decay_at: "w" or "x".

    Raises:
        ValueError: a number for which the bound is not proved.

    Source: derived in `docs/theory.md`; the first two terms are those of the published theorem.

    Example:
        >>> corollary_terms(gap=1.0, smooth=2.0, pl=0.5, variance=0.1, lr=0.5, steps=100, rho=0.25)
        Terms(start=0.04, noise=0.1, radius=0.25, generalisation=0.0)
    """
    if decay_at not in ("w", "x"):
        raise ValueError(f"decay_at must be 'w' or 'x', got {decay_at!r}")
    _check(gap=gap, variance=variance, rho=rho, decay=decay)
    _check_rates(smooth, pl, lr, steps, decay)
    bent = smooth + (decay if decay_at == "x" else 0.0)
    return Terms(
        start=gap / (pl * lr * steps),
        noise=lr * (smooth + decay) * variance / (2 * pl),
        radius=(bent * rho) ** 2 / (2 * pl),
    )


def last_iterate_bound(terms: Terms, *, gap: float, pl: float, lr: float, steps: int) -> float:
    r"""Bound on E[F(w_T) - F_*], the last iterate, under the assumptions of the corollary whose terms are given.

    .. math::
        (1 - \eta\mu)^T (F(w_0) - F_*) + \text{noise} + \text{radius}

    Example:
        >>> last_iterate_bound(Terms(start=0.04, noise=0.1, radius=0.01), gap=1.0, pl=0.5, lr=0.5, steps=100)
        0.1100000000003...
    """
    return (1 - lr * pl) ** steps * gap + terms.noise + terms.radius


def theorem_terms(
    *, loss: float, smooth: float, pl: float, variance: float, lr: float, steps: int, lipschitz: float, examples: int
) -> Terms:
    r"""The right side of Theorem 1, with lambda = 2L as it demands.

    .. math::
        \frac{\hat F_S(w_0)}{\mu\eta T} + \frac{3 \eta L \sigma^2}{2\mu} + \frac{6B+1}{n}

    Args:
        loss: \hat F_S(w_0), the loss at the start with weight decay, not the gap to the minimum.
        smooth: L, of the loss without weight decay.
        pl: mu, of the loss with weight decay.
        variance: sigma^2.
        lr: eta, at most 1/(3L) = 1/(L + lambda): the slides print no condition, a descent needs this one.
        steps: T.
        lipschitz: B, of every example's loss on the region of the iterates.
        examples: n.

    Raises:
        ValueError: a number that the theorem does not allow.

    Source: Ji et al., NeurIPS 2024, Theorem 1, as their slides print it. Neither rho nor the direction occurs in it.

    Example:
        >>> theorem_terms(
        ...     loss=1.0, smooth=1.0, pl=2.0, variance=0.5, lr=0.25, steps=100, lipschitz=1.5, examples=50
        ... )
        Terms(start=0.02, noise=0.09375, radius=0.0, generalisation=0.2)
    """
    _check(loss=loss, variance=variance, lipschitz=lipschitz)
    _check_rates(smooth, pl, lr, steps, 2 * smooth)
    _check_count(examples=examples)
    return Terms(
        start=loss / (pl * lr * steps),
        noise=3 * lr * smooth * variance / (2 * pl),
        generalisation=(6 * lipschitz + 1) / examples,
    )


def matching_radius(*, smooth: float, pl: float, examples: int, decay: float = 0.0) -> float:
    r"""The radius whose term in the corollary is exactly 1/n.

    .. math::
        \rho = \sqrt{2\mu/n} / L

    It would explain the "+1" in (6B + 1)/n; that is a guess, for the published proof was not at hand.

    Example:
        >>> matching_radius(smooth=2.0, pl=0.5, examples=100)
        0.05
    """
    _check_curvatures(smooth, pl, check_number("decay", decay))
    _check_count(examples=examples)
    return math.sqrt(2 * pl / examples) / smooth


def _check(**numbers: float) -> None:
    for name, value in numbers.items():
        check_number(name, value)


def _check_count(**counts: int) -> None:
    for name, value in counts.items():
        check_number(name, value, 1)


def _check_curvatures(smooth: float, pl: float, decay: float) -> None:
    _check(smooth=smooth, pl=pl)
    if not 0 < pl <= (smooth + decay) * (1 + 1e-12):
        raise ValueError(f"pl (mu) must be above 0 and at most L + lambda = {smooth + decay:g}, got {pl:g}")


def _check_rates(smooth: float, pl: float, lr: float, steps: int, decay: float) -> None:
    _check_curvatures(smooth, pl, decay)
    if not 0 < check_number("lr", lr) * (smooth + decay) <= 1 + 1e-12:
        raise ValueError(f"the bound needs 0 < lr <= 1/(L + lambda) = {1 / (smooth + decay):g}, got lr = {lr:g}")
    _check_count(steps=steps)
