"""surface.npz: the losses of a run's grids, whole or begun, with all that they depend on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from s2sam.analysis.roughness import roughness
from s2sam.analysis.surface import Point, SurfaceSettings
from s2sam.outside import COUNT, NUMBER, fit, parse_json, reading
from s2sam.train.atomic import atomic

FORMAT = 1
Loss = NDArray[np.float64]
_FACTS = {
    **dict.fromkeys(("weights_sha256?", "split?", "weights?", "data_digest?"), str),
    **dict.fromkeys(("images?", "all_images?", "calibration_images?"), (COUNT, None)),
}
_SETTINGS = ("points", "span", "pairs", "dims", "bn", "seed")


@dataclass(eq=False)
class Surface:
    """Losses on the grids of one run; those that are not finite are kept as they are.

    Shapes: loss, top1 float64 and done bool, all (pairs, points) or (pairs, points, points); the first index after the
    pair is that of d_1. Where `done` is False nothing has been measured yet.
    """

    label: str  #: what to call the run
    settings: SurfaceSettings
    facts: dict[str, Any]  #: what else the losses depend on: weights, images, masks
    loss: NDArray[np.float64]
    top1: NDArray[np.float64]
    done: NDArray[np.bool_]

    @classmethod
    def empty(cls, label: str, settings: SurfaceSettings, facts: dict[str, Any]) -> Surface:
        """Nothing measured yet."""
        nothing = np.full(settings.shape, np.nan)
        return cls(label, settings, facts, nothing, nothing.copy(), np.zeros(settings.shape, dtype=bool))

    @property
    def depends_on(self) -> dict[str, Any]:
        """Everything that the losses depend on, as plain values."""
        given = {name: getattr(self.settings, name) for name in _SETTINGS}
        return {
            "format": FORMAT, **given, "normalisation": "filter", "directions": "Gaussian, on the active weights",
            "unmoved": "biases and normalisation layers", "measure": "mean cross entropy in nats, linear scale",
            "augmentation": "none", **self.facts,
        }  # fmt: skip

    def todo(self) -> list[Point]:
        """The points that are not measured, grid by grid."""
        return [point for point in self.settings.all_points() if not self.done[point]]

    def put(self, point: Point, loss: float, top1: float) -> None:
        """Store one point."""
        self.loss[point], self.top1[point], self.done[point] = loss, top1, True

    @property
    def centre(self) -> tuple[float, float]:
        """(loss, top-1) at the weights themselves."""
        middle = (0, *[self.settings.points // 2] * self.settings.dims)
        return float(self.loss[middle]), float(self.top1[middle])

    def profiles(self) -> NDArray[np.float64]:
        """Losses along single directions, (profiles, points): of 2-D grids the two lines through the centre."""
        if self.settings.dims == 1:
            return self.loss
        middle = self.settings.points // 2
        return np.concatenate([self.loss[:, :, middle], self.loss[:, middle, :]])

    def summary(self) -> dict[str, Any]:
        """Ra over the grids with their mean and spread, loss and top-1 at the weights, and what they depend on.

        Raises:
            ValueError: the surface is not finished.
        """
        if not self.done.all():
            raise ValueError(f"the surface of {self.label} is not finished; run the same command again to go on")
        loss, top1 = self.centre
        finite = self.loss[np.isfinite(self.loss)]
        return {
            "run": self.label, "loss": loss, "top1": top1, "largest_loss": float(finite.max(initial=-np.inf)),
            "not_finite": self.loss.size - finite.size, **roughness(self.loss), **self.depends_on,
        }  # fmt: skip

    def save(self, path: Path) -> None:
        """Write the file whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.depends_on, sort_keys=True)
        with atomic(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(
                file, loss=self.loss, top1=self.top1, done=self.done, coordinates=self.settings.coordinates,
                label=np.array(self.label), settings=np.array(text),
            )  # fmt: skip

    def resume(self, path: Path) -> None:
        """Take over what `path` holds, if there is such a file.

        Raises:
            ValueError: it is damaged, or was made with other settings; the sentence names the first that differs.
        """
        if not path.exists():
            return
        (loss, top1, done), made_with, _ = _read(path)
        mine = json.loads(json.dumps(self.depends_on))
        for name in sorted(mine.keys() | made_with.keys()):
            if mine.get(name) != made_with.get(name):
                raise ValueError(
                    f"{path} was made with {name} {made_with.get(name)!r}, not {mine.get(name)!r}; give another --out, "
                    "or delete it"
                )
        if loss.shape != self.loss.shape:
            raise _damaged(path)
        self.loss, self.top1, self.done = loss, top1, done


def load_surface(path: Path) -> Surface:
    """The surface in `path`, whole or begun.

    Raises:
        ValueError: it is damaged, or no surface.
    """
    (loss, top1, done), made_with, label = _read(path)
    with reading(path, "damaged or no surface", "delete it or give another --out"):
        fit(made_with, {**dict.fromkeys(("points", "pairs", "dims", "seed"), COUNT), "span": NUMBER, "bn": str})
        settings = SurfaceSettings(**{name: made_with[name] for name in _SETTINGS})
        if loss.shape != settings.shape:
            raise ValueError(f"losses of shape {loss.shape} where its settings make {settings.shape}")
        own = Surface.empty(label, settings, {}).depends_on
        facts = {key: value for key, value in made_with.items() if key not in own}
        fit(facts, _FACTS)
    return Surface(label, settings, facts, loss, top1, done)


def _read(path: Path) -> tuple[tuple[Loss, Loss, NDArray[np.bool_]], dict[str, Any], str]:
    """Losses, accuracies and what is done; what they depend on; the label."""
    with (
        reading(path, "damaged or no surface", "delete it or give another --out"),
        open(path, "rb") as file,
        np.load(file, allow_pickle=False) as stored,
    ):
        loss, top1, done = (stored[name] for name in ("loss", "top1", "done"))
        made_with, label = parse_json(str(stored["settings"])), str(stored["label"])
        fit(made_with, {})
        if not loss.shape == top1.shape == done.shape or {loss.dtype.kind, top1.dtype.kind} != {"f"}:
            raise ValueError("its losses, accuracies and marks do not fit each other")
    return (loss.astype(np.float64), top1.astype(np.float64), done.astype(bool)), made_with, label


def _damaged(path: Path) -> ValueError:
    return ValueError(f"{path} is damaged or no surface; delete it or give another --out")
