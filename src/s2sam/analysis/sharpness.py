r"""How much the loss rises around the weights: worst case, on average, adaptive, by groups of images; and curvature.

Every displacement is e = s * u (elementwise) with ||u|| <= radius, on the active weights: s = 1 for the plain ball,
s = |w| for the adaptive one, in which a weight moves in proportion to its size.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from s2sam.analysis.hessian import BN_MODES, ActiveLoss
from s2sam.analysis.hessian_trace import trace
from s2sam.analysis.lanczos import Eigenvalue, extremes, gaussian, quadrature
from s2sam.sparse.names import unknown
from s2sam.train.config import number, whole
from s2sam.train.seeding import derive

PRECISIONS = {"fp32": torch.float32, "fp64": torch.float64}
#: the forms that do not change if a filter before a normalisation layer, or two layers in a row, are rescaled without a
#: change of the function: verdicts go by these
INVARIANT = ("worst_adaptive", "average_adaptive")
#: in units of ||w||: the same if all weights are rescaled alike, but others if one layer or filter is; no verdict
SCALED = ("lambda_w2", "trace_w2_n")


class Loss(Protocol):
    """What the measures need to know; `ActiveLoss` for networks."""

    @property
    def weights(self) -> Tensor:
        """w (n,)."""

    def loss(self, e: Tensor | None = None) -> float:
        """L(w + e)."""

    def gradient(self, e: Tensor | None = None) -> tuple[float, Tensor]:
        """L(w + e) and its gradient there."""


@dataclass(frozen=True, kw_only=True)
class SharpnessSettings:
    """What is measured and how exactly.

    Args:
        rho: radius of the plain ball.
        adaptive_rho: radius of the adaptive ball, ||e / |w| || <= adaptive_rho.
        steps: of projected ascent for the worst case; the first is SAM's.
        sigma: length of the random displacements that are relative to the weights.
        draws: random directions, each looked at on both sides.
        group: images in a group of m-sharpness, whose gradients c = rho / ||g|| is of as well.
        eigenvalues: how many of the largest.
        tolerance: largest residual of an eigenvalue that counts as converged, relative to the largest |eigenvalue|.
        max_steps: of Lanczos, for the eigenvalues.
        queries: products for the trace, at least 6; 0 = no trace.
        probes: random starts of the spectral density; 0 = none.
        density_steps: of Lanczos, for the density.
        bn: eval = BatchNorm's running statistics; train = those of each batch.
        precision: fp32 or fp64.
        batch_size: images that pass the network at once.
        seed: of the random vectors and of the choice of images.

    Raises:
        ValueError: none of this.
    """

    rho: float = 0.05
    adaptive_rho: float = 0.5
    steps: int = 10
    sigma: float = 0.05
    draws: int = 5
    group: int = 128
    eigenvalues: int = 3
    tolerance: float = 1e-3
    max_steps: int = 60
    queries: int = 30
    probes: int = 2
    density_steps: int = 30
    bn: str = "eval"
    precision: str = "fp32"
    batch_size: int = 250
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rho", "adaptive_rho", "sigma"):
            number(name, getattr(self, name), 0.0)
            if getattr(self, name) == 0:
                raise ValueError(f"{name} must be above 0: at the weights themselves nothing rises")
        for name in ("steps", "group", "eigenvalues", "max_steps", "density_steps"):
            whole(name, getattr(self, name), 1)
        for name, low in (("draws", 2), ("batch_size", 2), ("probes", 0), ("queries", 0), ("seed", 0)):
            whole(name, getattr(self, name), low)
        if 0 < self.queries < 6:
            raise ValueError(f"the trace takes at least 6 products, got {self.queries}; 0 leaves it out")
        number("tolerance", self.tolerance, 1e-12, below=1.0)
        if self.bn not in BN_MODES:
            raise unknown("BatchNorm mode", self.bn, BN_MODES)
        if self.bn == "train" and self.group < 2:
            raise ValueError("a group of one image has no statistics of its own; take a larger group, or bn eval")
        if self.precision not in PRECISIONS:
            raise unknown("precision", self.precision, list(PRECISIONS))

    @property
    def passes(self) -> int:
        """Passes over the images at most: losses, gradients and products alike."""
        rises = 2 * (self.steps + 1) + 6 * self.draws + 3
        return rises + self.max_steps + self.queries // 3 * 3 + self.probes * self.density_steps


def ascent(
    loss: Loss,
    radius: float,
    steps: int = 1,
    *,
    scale: Tensor | None = None,
    start: tuple[float, Tensor] | None = None,
) -> list[float]:
    r"""L(w + e_j) - L(w) after each step of projected, normalised gradient ascent in the ball ||e / s|| <= radius.

    .. math:: u_{j+1} = P\Bigl(u_j + \mathrm{radius}\,\frac{s\,\nabla L(w + s u_j)}{\|s\,\nabla L(w + s u_j)\|}\Bigr)

    The first entry is SAM's displacement (with s = |w| ASAM's). The largest is the worst case found, from below: a
    better maximiser could only find more. An entry that is not finite ends the ascent.

    Args:
        loss: with `gradient` and `loss`.
        radius: of the ball.
        steps: how many.
        scale: s (n,); None = 1.
        start: what `loss.gradient()` gives, if it is known already.

    Source: Foret et al., SAM, 2021 (one step); Kwon et al., ASAM, 2021 (s = |w|).
    Cost: `steps` gradients and one loss; one gradient less with `start`.
    """
    base, g = loss.gradient() if start is None else start
    u = torch.zeros_like(g)
    rises: list[float] = []
    for left in range(steps - 1, -1, -1):
        bent = g if scale is None else g * scale
        length = bent.norm()
        if not 0.0 < float(length) < math.inf:
            rises.append(0.0 if not rises else rises[-1])
            break
        u = u + radius * bent / length
        u = u / max(1.0, float(u.norm()) / radius)
        e = u if scale is None else u * scale
        value, g = loss.gradient(e) if left else (loss.loss(e), g)
        rises.append(value - base)
        if not math.isfinite(value):
            break
    return rises


def along(loss: Loss, base: float, e: Tensor) -> tuple[float, float]:
    r"""(odd, even) part of the loss along e: the slope and the curvature that a displacement meets.

    .. math:: \tfrac12 (L(w+e) - L(w-e)), \qquad \tfrac12 (L(w+e) + L(w-e)) - L(w)

    Cost: two losses.
    """
    plus, minus = loss.loss(e), loss.loss(-e)
    return (plus - minus) / 2, (plus + minus) / 2 - base


def average(
    loss: Loss, base: float, radius: float, draws: int, generator: torch.Generator, *, scale: Tensor | None = None
) -> list[float]:
    r"""Even part of the loss along `draws` random directions e = s u, ||u|| = radius, u / ||u|| uniform.

    For small radii it is near radius^2 tr(S H S) / (2 n), S = diag(s). Both sides are looked at, so that the slope,
    whose mean is 0, adds no spread.

    Cost: two losses a draw.
    """
    found = []
    for _ in range(draws):
        u = gaussian((1, len(loss.weights)), generator, loss.weights)[0]
        u = u * (radius / float(u.norm()))
        found.append(along(loss, base, u if scale is None else u * scale)[1])
    return found


def m_sharpness(parts: Sequence[Loss], radius: float) -> tuple[list[float], list[float]]:
    """SAM's one-step rise and the gradient norm of each group of images by itself.

    Cost: a gradient and a loss over each.
    """
    starts = [part.gradient() for part in parts]
    rises = [ascent(part, radius, start=start)[0] for part, start in zip(parts, starts, strict=True)]
    return rises, [float(g.norm()) for _, g in starts]


def measure(
    loss: ActiveLoss, settings: SharpnessSettings, *, on_pass: Callable[[int], None] = lambda done: None
) -> dict[str, Any]:
    """All measures of one network, as plain values for JSON; what is not finite is None.

    Args:
        loss: on the images to measure on; with a process group all ranks measure together, and all get the result.
        settings: which measures.
        on_pass: called now and then with how many of `settings.passes` are done.

    Raises:
        RuntimeError: the loss, its gradient or the Hessian is not finite at the weights.
    """

    def draws(purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(derive(settings.seed, f"sharpness {purpose}"))

    def tell() -> None:
        on_pass(min(sum(loss.passes.values()), settings.passes - 1))

    def operator(vectors: Tensor) -> Tensor:
        found = loss.product(vectors)
        tell()
        return found

    w = loss.weights
    size, n = float(w.norm()), loss.size
    start = loss.gradient()
    base, slope = start[0], float(start[1].norm())
    if not math.isfinite(base) or not math.isfinite(slope):
        raise RuntimeError("the loss or its gradient is not finite at the weights themselves; nothing to measure there")
    found: dict[str, Any] = {"loss": base, "gradient_norm": slope, "weight_norm": size}
    worst = ascent(loss, settings.rho, settings.steps, start=start)
    found["worst"] = _ascent(worst, settings.rho)
    tell()
    adaptive = ascent(loss, settings.adaptive_rho, settings.steps, scale=w.abs(), start=start)
    found["worst_adaptive"] = _ascent(adaptive, settings.adaptive_rho)
    tell()
    for name, radius, scale in (
        ("average", settings.rho, None),
        ("average_relative", settings.sigma * size, None),
        ("average_adaptive", settings.sigma * math.sqrt(n), w.abs()),
    ):
        rises = average(loss, base, radius, settings.draws, draws(name), scale=scale)
        found[name] = {"radius": radius, **_spread(rises)}
        tell()
    own = m_sharpness(loss.ranks.share(loss.split(settings.group)), settings.rho)
    rises, norms = map(loss.ranks.gather, own)
    loss.passes["gradient"] += 1
    loss.passes["loss"] += 1
    found["m_sharpness"] = {"radius": settings.rho, "images": min(settings.group, len(loss.x)), **_spread(rises)}
    steep = statistics.fmean(norms)
    found["group_gradient_norm"] = _plain(steep)

    ends = extremes(
        operator, n, draws("eigenvalues"), count=settings.eigenvalues, tolerance=settings.tolerance,
        max_steps=settings.max_steps, like=w,
    )  # fmt: skip
    top = ends.top[0]
    found |= {
        "eigenvalues": [asdict(one) for one in ends.top], "lowest_eigenvalue": asdict(ends.lowest),
        "eigenvalue_steps": ends.steps, "lambda_max": asdict(top),
    }  # fmt: skip
    found["trace"] = (
        asdict(trace(operator, n, draws("trace"), queries=settings.queries, like=w)) if settings.queries else None
    )
    found["density"] = None
    if settings.probes:
        spectrum = quadrature(
            operator, n, draws("density"), probes=settings.probes, steps=settings.density_steps, like=w
        )
        found["density"] = {"nodes": spectrum.nodes.tolist(), "weights": spectrum.weights.tolist()}
    c = settings.rho / steep if 0 < steep < math.inf else math.inf
    found |= {
        "lambda_w2": _times(top, size**2),
        "trace_w2_n": None if found["trace"] is None else {
            "value": found["trace"]["value"] * size**2 / n, "error": found["trace"]["error"] * size**2 / n,
            "terms": settings.queries // 3,  # random ones, whose deviation the error is of
        },
        "rho_over_w": settings.rho / size, "c": _plain(c), "c_lambda_max": _times(top, c), "passes": dict(loss.passes),
    }  # fmt: skip
    on_pass(settings.passes)
    return found


def _ascent(rises: list[float], radius: float) -> dict[str, Any]:
    worst = math.inf if not all(map(math.isfinite, rises)) else max(rises)
    return {"radius": radius, "one_step": _plain(rises[0]), "value": _plain(worst), "rises": list(map(_plain, rises))}


def _spread(values: list[float]) -> dict[str, Any]:
    """Mean and standard deviation of the values, and the values."""
    whole = all(map(math.isfinite, values))
    mean = statistics.fmean(values) if whole else None
    sd = statistics.stdev(values) if whole and len(values) > 1 else None
    return {"value": mean, "sd": sd, "each": list(map(_plain, values))}


def _times(one: Eigenvalue, factor: float) -> dict[str, Any]:
    return {
        "value": _plain(one.value * factor), "error": _plain(one.residual * factor), "converged": one.converged,
    }  # fmt: skip


def _plain(value: float) -> float | None:
    """A number that JSON knows."""
    return value if math.isfinite(value) else None
