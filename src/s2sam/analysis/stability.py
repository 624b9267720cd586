r"""The largest curvature at which training is stable, from the roots of a polynomial.

On a quadratic of curvature h, with learning rate eta, momentum mu and a displacement e = s c d that is proportional to
its direction d (c = rho/||g|| held fixed), the weights obey a linear recursion, whose modes are the roots z of

.. math::
    (z^2 - (1 + \mu) z + \mu)\, q(z) + \eta h z\, p(z) = 0

where p/q is what the displacement does to the gradient, g = h (p/q) w:

==================  =========================  ===========================  =================================
method              p                          q                            first unstable where
==================  =========================  ===========================  =================================
SGD                 1                          1                            eta h = 2 (1 + mu)
SAM                 1 + c h                    1                            eta h (1 + c h) = 2 (1 + mu)
direction gradient  z                          z - s c h                    s = -1: eta h = 2 (1 + mu) (1 - c h)
direction ema       z - beta                   z - beta - s c h (1 - beta)
direction momentum  z (1 - s c/eta) + s c/eta  z                            s = +1: c h = 1 - mu
                                                                            or (eta - 2 s c) h = 2 (1 + mu)
direction random    1                          1                            as SGD: noise feeds back nothing
==================  =========================  ===========================  =================================

Echo takes a plain and a displaced step in turn, so its recursion is linear from one pair of steps to the next: with
a = 1 + mu - eta h and k = eta c h^2 the pair maps (w_t, w_{t-1}) to (w_{t+2}, w_{t+1}) by

.. math::
    \begin{pmatrix} a^2 - \mu - k & -a \mu \\ a & -\mu \end{pmatrix}, \qquad
    Z^2 - (a^2 - 2 \mu - k) Z + \mu (\mu + k) = 0, \qquad Z = z^2

It is stable where mu (mu + k) < 1, eta h < (1 + mu) (2 + c h) and (1 - mu) k < (1 - mu)^2 + a^2.

A method is stable if all roots lie inside the unit circle. Nesterov is direction momentum with s = -1 and c = eta mu.
For direction gradient with s = +1 and mu > 0 a complex pair leaves the circle first, far below the limit of SAM; for
mu = 0 the method is stable where c h < 1 and eta h < 2 + 2 c h. c is per unit of d: momentum is longer than the
gradient, up to 1/(1 - mu) times, so at equal rho its c is smaller by as much.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from s2sam.hooks import check_number

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Method:
    """A row of the table above."""

    name: str
    kind: str  #: "sgd", "nesterov", "sam", "s2sam", or "echo" and "noise", the presets of S2SAM
    direction: str = "gradient"
    sign: int = 1


METHODS = (
    Method("SGD", "sgd"),
    Method("Nesterov", "nesterov"),
    Method("SAM", "sam"),
    Method("S2-SAM +gradient", "s2sam"),
    Method("S2-SAM -gradient", "s2sam", sign=-1),
    Method("S2-SAM +momentum", "s2sam", "momentum"),
    Method("S2-SAM -momentum", "s2sam", "momentum", -1),
    Method("S2-SAM +ema", "s2sam", "ema"),
    Method("S2-SAM -ema", "s2sam", "ema", -1),
    Method("S2-SAM random", "s2sam", "random"),  # noise has no sign
    Method("S2-SAM echo", "echo"),
    Method("S2-SAM noise", "noise", "random"),
)


@dataclass(frozen=True)
class Setting:
    """Hyper-parameters of a step.

    Raises:
        ValueError: one is out of range.
    """

    lr: float = 0.1  #: eta, > 0
    momentum: float = 0.9  #: mu
    c: float = 0.05  #: rho / ||d||
    beta: float = 0.9  #: of direction ema

    def __post_init__(self) -> None:
        if check_number("lr", self.lr) == 0:
            raise ValueError("lr must be above 0")
        check_number("c", self.c)
        for name in ("momentum", "beta"):
            if check_number(name, getattr(self, name), 0.0, 1.0) == 1:
                raise ValueError(f"{name} must be below 1")


def polynomials(method: Method, curvatures: Array, setting: Setting) -> Array:
    """Coefficients of the characteristic polynomial, highest power first: one row of 4 for each curvature.

    Polynomials of degree 2 are given a third root at 0. That of echo is in Z = z^2, for two steps.

    >>> polynomials(Method("SGD", "sgd"), np.array([10.0]), Setting()).round(3).tolist()
    [[1.0, -0.9, 0.9, 0.0]]
    """
    h, one = np.asarray(curvatures, dtype=np.float64), np.ones(len(curvatures))
    s, c, b = method.sign, setting.c, setting.beta
    if method.kind == "echo":
        a, k, mu = 1 + setting.momentum - setting.lr * h, setting.lr * c * h**2, setting.momentum
        return np.stack([one, -(a**2 - 2 * mu - k), mu * (mu + k), 0 * h], axis=1)
    if method.kind == "sgd" or method.direction == "random":
        p, q = (one, 0 * h), (one, 0 * h)  # both times z
    elif method.kind == "sam":
        p, q = (1 + c * h, 0 * h), (one, 0 * h)
    elif method.kind == "nesterov":
        p, q = ((1 + setting.momentum) * one, -setting.momentum * one), (one, 0 * h)
    elif method.direction == "gradient":
        p, q = (one, 0 * h), (one, -s * c * h)
    elif method.direction == "ema":
        p, q = (one, -b * one), (one, -b - s * c * h * (1 - b))
    else:
        p, q = ((1 - s * c / setting.lr) * one, s * c / setting.lr * one), (one, 0 * h)
    mu, pull = setting.momentum, setting.lr * h
    return np.stack(
        [
            q[0],
            q[1] - (1 + mu) * q[0] + pull * p[0],
            mu * q[0] - (1 + mu) * q[1] + pull * p[1],
            mu * q[1],
        ],
        axis=1,
    )


def root_radius(method: Method, curvatures: Array, setting: Setting) -> Array:
    """Largest modulus of the roots for each curvature: what a deviation is multiplied by in a step, in the long run."""
    coefficients = polynomials(method, curvatures, setting)
    companion = np.zeros((len(coefficients), 3, 3))
    companion[:, 0] = -coefficients[:, 1:] / coefficients[:, :1]
    companion[:, 1, 0] = companion[:, 2, 1] = 1
    radius: Array = np.abs(np.linalg.eigvals(companion)).max(axis=1)
    return radius ** (1 / period(method))


def period(method: Method) -> int:
    """Steps after which a method's recursion repeats: 2 for echo, 1 for all others."""
    return 2 if method.kind == "echo" else 1


def critical_curvature(method: Method, setting: Setting) -> float:
    """The lowest curvature at which the method is unstable; inf if there is none below 100/eta and 100/c.

    That of echo comes from its three conditions, since between two of them it may be unstable in a narrow band only.

    Example:
        >>> {m.name: round(critical_curvature(m, Setting()), 2) for m in METHODS[:5]}
        {'SGD': 38.0, 'Nesterov': 13.57, 'SAM': 19.33, 'S2-SAM +gradient': 3.85, 'S2-SAM -gradient': 13.1}
    """
    if method.kind == "echo":
        return echo_limit(setting)
    return first_unstable(lambda h: root_radius(method, h, setting) > 1 + 1e-9, setting, points=400)


def echo_limit(setting: Setting) -> float:
    r"""The lowest curvature that breaks one of the three conditions of echo's stability; inf if none does.

    .. math::
        h^2 = \frac{1 - \mu^2}{\mu \eta c}, \qquad h = \frac{2 (1 + \mu)}{\eta - (1 + \mu) c}, \qquad
        \eta (\eta - (1 - \mu) c) h^2 - 2 (1 + \mu) \eta h + 2 (1 + \mu^2) = 0

    Example:
        >>> round(echo_limit(Setting()), 3), round(echo_limit(Setting(c=0.0)), 3)
        (6.498, 38.0)
    """
    eta, mu, c = setting.lr, setting.momentum, setting.c
    limits = [math.sqrt((1 - mu * mu) / (mu * eta * c))] if mu * c > 0 else []
    if eta > (1 + mu) * c:
        limits.append(2 * (1 + mu) / (eta - (1 + mu) * c))
    bend, half, level = eta * (eta - (1 - mu) * c), (1 + mu) * eta, 2 * (1 + mu * mu)
    inside = half * half - bend * level
    if c > 0 and inside > 1e-12 * half * half:  # else it never breaks, or is touched at one point only
        limits.append(level / (half + math.sqrt(inside)))  # the smaller root above 0, also where bend is not
    return min(limits, default=math.inf)


def first_unstable(
    unstable: Callable[[Array], NDArray[np.bool_]], setting: Setting, *, points: int, within: float = 1e-5
) -> float:
    """The lowest curvature for which `unstable` is true, by narrowing a grid of `points`, to a relative `within`.

    Cost: 2 to 4 calls, each with all points of a grid.
    """
    low, high = 1e-4 / (setting.lr + setting.c), 100 * max(1 / setting.lr, 1 / setting.c if setting.c > 0 else 0.0)
    while high > low * (1 + within):
        grid = np.geomspace(low, high, points)
        found = np.flatnonzero(unstable(grid))
        if len(found) == 0:
            return float("inf")
        low, high = grid[max(int(found[0]) - 1, 0)], grid[found[0]]
        if low == high:  # unstable at the lowest curvature of all
            break
    return float(np.sqrt(low * high))


def alternating_cycle(curvature: float, setting: Setting) -> float:
    r"""Size, in units of rho, of the cycle w = +a, -a, ... of SAM and of -g_{t-1} with ||e|| = rho.

    .. math::
        a / \rho = h / (h_{SGD} - h), \qquad h_{SGD} = 2 (1 + \mu) / \eta

    It follows from eta g = 2 (1 + mu) w and g = h (w + rho sign w), which both methods give when w changes sign in
    every step. There is one for h < h_SGD; SAM has other cycles as well, and where it ends depends on its start.

    >>> round(alternating_cycle(20.0, Setting()), 4)
    1.1111
    """
    return curvature / (2 * (1 + setting.momentum) / setting.lr - curvature)


def quarter_turn_cycle(curvature: float, setting: Setting) -> float:
    r"""Root mean square, in units of rho, of the cycle w = a, b, -a, -b, ... of +g_{t-1} with ||e|| = rho.

    .. math::
        \eta h / \sqrt{(1 - \mu)^2 + (\eta h - 1 - \mu)^2}

    It is the mode z = i, driven by displacements of +-rho that lag a quarter turn. It grows towards eta h = 1 + mu,
    where only 1 - mu limits it: momentum makes it large.

    >>> round(quarter_turn_cycle(20.0, Setting()), 4)
    14.1421
    """
    pull, mu = setting.lr * curvature, setting.momentum
    return float(pull / np.hypot(1 - mu, pull - 1 - mu))
