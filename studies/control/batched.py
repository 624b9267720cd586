"""Many trainings of the library's MLP at once, on one thread: the same steps as the library's, with fewer calls.

All runs of a batch share the arm, the network's shape, the number of active weights and the wrong labels; they differ
in seed, learning rate, weight decay and radius. Every tensor has a leading dimension "run". The masks, the initial
weights, the order of the images and the noise come from the library itself, with the generators of `s2sam train`, and
tests/studies/test_control.py holds the weights after many steps equal to those of the library's own loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from s2sam import sparsify
from s2sam.data import load_data
from s2sam.data.augment import normalise
from s2sam.data.images import ImageData
from s2sam.data.loader import Batches
from s2sam.hooks import step_hooks
from s2sam.models import create_model
from s2sam.sam.directions import draw_batches, noise_seed
from s2sam.train.schedule import factor
from s2sam.train.seeding import generator

MOMENTUM, CLASSES = 0.9, 10
VAL_FRACTION = 0.5
EPS, BN_MOMENTUM = 1e-5, 0.1  #: of torch's BatchNorm1d
FLOOR = 1e-19  #: of s2sam.sam.norms
CHANCE = 1 / CLASSES
SEED_RANGE = 2**63 - 1  #: from which S2SAM draws the seeds of its noise


@dataclass(frozen=True)
class Arm:
    """What is done in a step.

    Args:
        displace: "" (never), "gradient" (of the step before), "momentum", "random", "sam" (of the same batch), "batch"
            (of a batch of its own) or "echo" (only second visits, by the first visit's gradient).
        sign: +1 or -1.
        scale: as S2SAM's: norm, relative, rms or filter.
        nesterov: of the base optimizer.
        visits: how often each batch comes in a row.
    """

    displace: str = ""
    sign: int = 1
    scale: str = "norm"
    nesterov: bool = False
    visits: int = 1

    @property
    def gradients(self) -> int:
        """Gradients a step."""
        return 2 if self.displace in ("sam", "batch") else 1

    @property
    def batches(self) -> int:
        """Batches of the loader that a step takes."""
        return 2 if self.displace == "batch" else 1

    def extra(self, networks: Networks, runs: Sequence[Run]) -> Extra | None:
        """What a subclass does beside the step; here nothing."""
        return None


class Extra:
    """What an arm does beside the step of SGD, for all runs; a step that changes RigL's masks undoes it."""

    def before(self, g: Tensor) -> Tensor:
        """The gradient (R, k) that the step is to take."""
        return g

    def after(self, w: Tensor, g: Tensor, lr: Tensor) -> None:
        """Change w (R, k) in place after a step along `g` with the learning rates (R, 1)."""


@dataclass(frozen=True)
class Cell:
    """What is trained.

    Args:
        noise: share of the training labels that are wrong.
        sparsity: 0 = dense.
        norm: whether the network has BatchNorm.
        method: static, rigl (with min_per_filter = 1), or dense.
        width: 1 = 256 units in each hidden layer.
        images: for training.
        batch_size: images a gradient.
        epochs: each as many gradients as a pass of plain SGD over the images takes.
        delta_t: gradients from one change of RigL's masks to the next.
        split_seed: which images are for training, and which labels are wrong; None = by the run's own seed.
    """

    noise: float = 0.4
    sparsity: float = 0.0
    norm: bool = True
    method: str = "static"
    width: float = 1.0
    images: int = 600
    batch_size: int = 32
    epochs: int = 100
    delta_t: int = 50
    split_seed: int | None = 0


@dataclass(frozen=True)
class Run:
    """One training of a batch of them."""

    seed: int
    lr: float
    weight_decay: float
    rho: float = 0.0


def data(cell: Cell, seed: int) -> ImageData:
    """The images of a run. Half of the pool, 719 images, are validation images; their labels are right."""
    return images_of(cell.images, cell.noise, seed if cell.split_seed is None else cell.split_seed)


@lru_cache(maxsize=256)
def images_of(count: int, noise: float, seed: int) -> ImageData:
    """`count` training images by this split seed."""
    return load_data("digits", train_size=count, val_fraction=VAL_FRACTION, label_noise=noise, seed=seed)


def prepared(cell: Cell, seeds: Sequence[int], split: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Images (S, N, 64) as the network takes them and labels (S, N), for each seed."""
    found = [data(cell, seed) for seed in seeds]
    images = [normalise(one.split(split)[0], one.mean, one.std).flatten(1).to(dtype) for one in found]
    return torch.stack(images), torch.stack([one.split(split)[1] for one in found])


def build(cell: Cell, seed: int) -> nn.Module:
    """The library's network, before it is made sparse."""
    return create_model(
        "mlp", num_classes=CLASSES, in_channels=1, image_size=(8, 8), generator=generator(seed, "init"),
        width=cell.width, norm=cell.norm,
    )  # fmt: skip


@lru_cache(maxsize=256)
def start(
    norm: bool, width: float, method: str, sparsity: float, seed: int
) -> tuple[tuple[tuple[str, torch.Size], ...], Tensor, Tensor]:
    """Names and shapes of the parameters, the initial weights as one vector, and the places of the active ones."""
    cell = Cell(norm=norm, width=width, sparsity=sparsity)
    model = build(cell, seed)
    layout = tuple((name, p.shape) for name, p in model.named_parameters())
    masks: Mapping[str, Tensor] = {}
    if sparsity:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        options: dict[str, Any] = (
            {"total_steps": 1000} if method == "rigl" else {}
        )  # of which the first mask knows nothing
        made = sparsify(
            model, optimizer, method=method, sparsity=sparsity, generator=generator(seed, "sparsify"), **options
        )
        masks = {name: mask.clone() for name, mask in made.masks.items()}
    w = torch.cat([p.detach().flatten() for p in model.parameters()])
    active = [masks[n].flatten() if n in masks else torch.ones(s.numel(), dtype=torch.bool) for n, s in layout]
    return layout, w, torch.cat(active).nonzero().flatten()


def steps_of(cell: Cell, arm: Arm) -> int:
    """Steps of a run: all arms take the same number of gradients, those with two a step take half the steps."""
    return cell.epochs * -(-cell.images // cell.batch_size) // arm.gradients


def order(cell: Cell, arm: Arm, seed: int) -> Iterator[Tensor]:
    """Which images are in each batch, for ever: the library's own order."""
    rows = torch.arange(cell.images)
    batches = Batches(rows, rows, cell.batch_size, generator(seed, "data"), visits=arm.visits)
    while True:
        for chosen, _ in batches:
            yield chosen


class Networks:
    """R networks of one shape: the active weights (R, k), the whole weights (R, P) with views per parameter."""

    def __init__(self, cell: Cell, seeds: Sequence[int], dtype: torch.dtype) -> None:
        made = [start(cell.norm, cell.width, cell.method, cell.sparsity, seed) for seed in seeds]
        self.layout, runs = made[0][0], len(seeds)
        self.norm, self.sparse = cell.norm, bool(cell.sparsity)
        self.active = torch.stack([places for *_, places in made])
        whole = torch.stack([w for _, w, _ in made]).to(dtype)
        self.w = whole.gather(1, self.active) if self.sparse else whole
        self.x = torch.zeros_like(whole)  #: where the gradient is taken
        self.g = torch.zeros_like(whole)
        self.x_of, self.g_of = self._views(self.x), self._views(self.g)
        hidden = self.layout[0][1][0]
        self.means = [torch.zeros(runs, hidden, dtype=dtype) for _ in range(2)]
        self.variances = [torch.ones(runs, hidden, dtype=dtype) for _ in range(2)]

    def _views(self, flat: Tensor) -> dict[str, Tensor]:
        found, at = {}, 0
        for name, shape in self.layout:
            found[name] = flat[:, at : at + shape.numel()].view(len(flat), *shape)
            at += shape.numel()
        return found

    def put(self, w: Tensor) -> None:
        """The gradient is to be taken at these active weights."""
        if self.sparse:
            self.x.scatter_(1, self.active, w)
        else:
            self.x.copy_(w)

    def dense(self, w: Tensor) -> Tensor:
        """Active weights (R, k) as whole ones (R, P)."""
        return torch.zeros_like(self.x).scatter_(1, self.active, w) if self.sparse else w

    def forward(self, images: Tensor, *, training: bool, keep_statistics: bool = False) -> tuple[Tensor, list[Any]]:
        """Logits (R, B, 10) of images (R, B, 64), and what the backward needs."""
        p, a, kept = self.x_of, images, []
        for i in range(2):
            z, layer = torch.bmm(a, p[f"body.fc{i + 1}.weight"].mT), i + 1
            xhat = inverse = None
            if self.norm:
                xhat, inverse = self._normalise(z, i, training=training, keep=keep_statistics)
                gamma, beta = p[f"body.bn{layer}.weight"], p[f"body.bn{layer}.bias"]
                z = torch.addcmul(beta[:, None], xhat, gamma[:, None])
            else:
                z += p[f"body.fc{layer}.bias"][:, None]
            kept.append((a, xhat, inverse))
            a = z.relu_()
        kept.append((a, None, None))
        return torch.baddbmm(p["classifier.bias"][:, None], a, p["classifier.weight"].mT), kept

    def _normalise(self, z: Tensor, i: int, *, training: bool, keep: bool) -> tuple[Tensor, Tensor]:
        if not training:
            inverse = (self.variances[i] + EPS).rsqrt()
            return (z - self.means[i][:, None]) * inverse[:, None], inverse
        variance, mean = torch.var_mean(z, dim=1, correction=0)
        if not keep:
            n = z.shape[1]
            self.means[i].lerp_(mean, BN_MOMENTUM)
            self.variances[i].lerp_(variance * (n / (n - 1)), BN_MOMENTUM)
        inverse = (variance + EPS).rsqrt()
        return (z - mean[:, None]) * inverse[:, None], inverse

    def gradient(self, images: Tensor, labels: Tensor, *, keep_statistics: bool = False) -> Tensor:
        """The gradient (R, k) of the mean cross entropy at what was :meth:`put`, of the active weights."""
        logits, kept = self.forward(images, training=True, keep_statistics=keep_statistics)
        p, g, n = self.x_of, self.g_of, images.shape[1]
        d = logits.softmax(dim=2)
        d.scatter_add_(2, labels[:, :, None], torch.full_like(d[:, :, :1], -1.0))
        d /= n
        a = kept[2][0]
        torch.sum(d, dim=1, out=g["classifier.bias"])
        g["classifier.weight"].copy_(torch.bmm(d.mT, a))
        d = torch.bmm(d, p["classifier.weight"])
        for layer in (2, 1):
            d.masked_fill_(a <= 0, 0.0)
            a, xhat, inverse = kept[layer - 1]
            if self.norm:
                d_beta, d_gamma = d.sum(dim=1), (d * xhat).sum(dim=1)
                g[f"body.bn{layer}.weight"].copy_(d_gamma)
                g[f"body.bn{layer}.bias"].copy_(d_beta)
                d = d - (xhat * (d_gamma / n)[:, None]).add_((d_beta / n)[:, None])
                d *= (p[f"body.bn{layer}.weight"] * inverse)[:, None]
            else:
                torch.sum(d, dim=1, out=g[f"body.fc{layer}.bias"])
            g[f"body.fc{layer}.weight"].copy_(torch.bmm(d.mT, a))
            if layer == 2:
                d = torch.bmm(d, p["body.fc2.weight"])
        return self.g.gather(1, self.active) if self.sparse else self.g.clone()

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> list[float]:
        """Top-1 of every run at the clean weights, with running statistics; CHANCE where weights are not finite."""
        self.put(self.w)
        logits, _ = self.forward(images, training=False)
        right = (logits.argmax(dim=2) == labels).to(torch.float64).mean(dim=1)
        sound = self.w.isfinite().all(dim=1) & logits.isfinite().flatten(1).all(dim=1)
        return torch.where(sound, right, CHANCE).tolist()


class Noise:
    """The draws of S2SAM's direction "random", run by run."""

    def __init__(self, networks: Networks, seeds: Sequence[int]) -> None:
        self.networks = networks
        self.seeds = [draw(torch.Generator().manual_seed(draw(generator(seed, "sharpness")))) for seed in seeds]
        members = {i: torch.empty(shape, dtype=networks.w.dtype) for i, (_, shape) in enumerate(networks.layout)}
        (self.batch,) = draw_batches(members)  # one draw holds all parameters, shape by shape
        sizes = [shape.numel() for _, shape in networks.layout]
        starts = torch.tensor([0, *sizes]).cumsum(0).tolist()
        self.places = torch.cat([torch.arange(starts[i], starts[i + 1]) for shape in self.batch for i in shape])
        self.generator = torch.Generator()

    def __call__(self, step: int, g: Tensor, w: Tensor) -> Tensor:
        """The direction (R, k) that the step leaves: N(0, 1) where a gradient or a weight is not 0."""
        drawn = torch.empty_like(self.networks.x)
        for row, seed in zip(drawn, self.seeds, strict=True):
            made = torch.empty_like(row)
            made.normal_(generator=self.generator.manual_seed(noise_seed(seed, step, self.batch[0][0])))
            row[self.places] = made
        if self.networks.sparse:
            drawn = drawn.gather(1, self.networks.active)
        return drawn * ((g != 0) | (w != 0))


class Topology:
    """RigL's changes, made by the library itself: each run has a network and a sparsifier that wait for them."""

    def __init__(self, cell: Cell, arm: Arm, runs: Sequence[Run], dtype: torch.dtype, total: int) -> None:
        self.delta_t = cell.delta_t // arm.gradients  #: in steps, so that all arms change their masks equally often
        self.models = [build(cell, run.seed).to(dtype) for run in runs]
        self.optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=MOMENTUM) for model in self.models]
        self.sparsifiers = [
            sparsify(
                model, optimizer, method="rigl", sparsity=cell.sparsity, total_steps=total, delta_t=self.delta_t,
                min_per_filter=1, generator=generator(run.seed, "sparsify"),
            )
            for model, optimizer, run in zip(self.models, self.optimizers, runs, strict=True)
        ]  # fmt: skip
        if arm.displace == "echo":
            for optimizer in self.optimizers:
                step_hooks(optimizer).visits = 2

    def due(self, step: int) -> list[int]:
        """The runs whose masks change in this step, counted from 1."""
        if step % self.delta_t > 1:
            return []
        parts = [sparsifier.parts[0] for sparsifier in self.sparsifiers]
        return [i for i, part in enumerate(parts) if part.due_at(step)]

    def change(self, i: int, step: int, networks: Networks, momentum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The library's step `step` of run `i`; active weights, momentum and gradient under the new masks."""
        model, optimizer, sparsifier = self.models[i], self.optimizers[i], self.sparsifiers[i]
        places = networks.active[i]
        w, buffer = (torch.zeros_like(networks.x[i]).scatter_(0, places, t) for t in (networks.w[i], momentum))
        whole = w, networks.g[i], buffer
        if not all(bool(t.isfinite().all()) for t in whole):
            return networks.w[i], momentum, networks.g[i].gather(0, places)
        sizes = [p.numel() for p in model.parameters()]
        for p, *parts in zip(model.parameters(), *(t.split(sizes) for t in whole), strict=True):
            p.data, p.grad, kept = (t.clone().view_as(p) for t in parts)
            optimizer.state[p]["momentum_buffer"] = kept
        sparsifier.parts[0].step = step - 1
        optimizer.step()
        masks = [sparsifier.masks.get(n, torch.ones_like(p)).flatten().bool() for n, p in model.named_parameters()]
        networks.active[i] = places = torch.cat(masks).nonzero().flatten()
        networks.x[i].zero_()
        new = zip(*((p.data, optimizer.state[p]["momentum_buffer"], p.grad) for p in model.parameters()), strict=True)
        w, buffer, gradient = (torch.cat([t.flatten() for t in column]).gather(0, places) for column in new)
        return w, buffer, gradient


def draw(source: torch.Generator) -> int:
    """A seed, as S2SAM draws it."""
    return int(torch.randint(SEED_RANGE, (), generator=source))


def displaced(networks: Networks, arm: Arm, rho: Tensor, d: Tensor) -> Tensor:
    """w + e (R, k) for the direction d; rho is (R, 1)."""
    w = networks.w
    if arm.scale == "filter":
        e = by_filter(networks, networks.dense(d), networks.dense(w)) * (arm.sign * rho)
        return w + (e.gather(1, networks.active) if networks.sparse else e)
    unit: Tensor | float = 1.0
    if arm.scale == "relative":
        unit = torch.linalg.vector_norm(w, dim=1, keepdim=True)
    elif arm.scale == "rms":
        unit = (w != 0).sum(dim=1, keepdim=True).to(w.dtype).sqrt()
    elif arm.scale != "norm":
        raise ValueError(f"scale must be norm, relative, rms or filter here, got {arm.scale!r}")
    length = torch.linalg.vector_norm(d, dim=1, keepdim=True).clamp_min(FLOOR)
    return torch.addcmul(w, d, arm.sign * rho * unit / length)


def by_filter(networks: Networks, d: Tensor, w: Tensor) -> Tensor:
    """||w_f|| d_f / ||d_f|| for each row of the matrices, 0 for the vectors; (R, P)."""
    e = torch.zeros_like(d)
    of = zip(networks._views(e).values(), networks._views(d).values(), networks._views(w).values(), strict=True)
    for out, dd, ww in of:
        if out.dim() == 3:
            size, length = (torch.linalg.vector_norm(t, dim=2, keepdim=True) for t in (ww, dd))
            out.copy_(dd * (size / length.clamp_min(FLOOR)))
    return e


@torch.no_grad()
def train(
    cell: Cell, arm: Arm, runs: Sequence[Run], *, dtype: torch.dtype = torch.float32, steps: int | None = None,
    epochs: int | None = None,
) -> Networks:  # fmt: skip
    """Train all runs of one arm and cell to their end (or `steps` steps of a schedule over the whole length)."""
    if (cell.sparsity == 0) != (cell.method == "dense") or cell.method not in ("dense", "static", "rigl"):
        raise ValueError(f"a cell is dense with sparsity 0, static or rigl, got {cell.method!r} with {cell.sparsity}")
    total = steps_of(cell, arm)
    networks = Networks(cell, [run.seed for run in runs], dtype)
    lr, decay, rho = (
        torch.tensor([getattr(run, key) for run in runs], dtype=dtype)[:, None] for key in ("lr", "weight_decay", "rho")
    )
    seeds = sorted({run.seed for run in runs})
    which = torch.tensor([seeds.index(run.seed) for run in runs])
    images, labels = prepared(cell, seeds, "train", dtype)
    orders = [order(cell, arm, seed) for seed in seeds]
    noise = Noise(networks, [run.seed for run in runs]) if arm.displace == "random" else None
    topology = Topology(cell, arm, runs, dtype, total) if cell.method == "rigl" else None
    extra = arm.extra(networks, runs)
    momentum = torch.zeros_like(networks.w)
    direction: Tensor | None = None

    def batch() -> tuple[Tensor, Tensor]:
        rows = torch.stack([next(o) for o in orders])[which]
        return images[which[:, None], rows], labels[which[:, None], rows]

    for step in range(total if steps is None else steps):
        here = batch()
        w, at = networks.w, networks.w
        if arm.gradients == 2:
            networks.put(w)
            first = networks.gradient(*here)
            at = displaced(networks, arm, rho, first)
            here = batch() if arm.batches == 2 else here
        elif direction is not None and (arm.displace != "echo" or step % 2):
            at = displaced(networks, arm, rho, direction)
        networks.put(at)
        g = networks.gradient(*here, keep_statistics=arm.gradients == 2)
        due = topology.due(step + 1) if topology is not None else []
        before = (w.clone(), momentum.clone()) if due else ()
        g = g if extra is None else extra.before(g)
        update = torch.addcmul(g, w, decay)
        momentum = update.clone() if step == 0 else momentum.mul_(MOMENTUM).add_(update)
        update = update.add_(momentum, alpha=MOMENTUM) if arm.nesterov else momentum
        w.addcmul_(update, lr, value=-factor(step, total))
        if extra is not None:
            extra.after(w, g, lr * factor(step, total))
        if topology is not None:
            for i in due:  # these steps change the masks in place of moving the weights
                w[i], momentum[i] = (t[i] for t in before)
                w[i], momentum[i], g[i] = topology.change(i, step + 1, networks, momentum[i])
        if arm.displace in ("gradient", "echo"):
            direction = g
        elif arm.displace == "momentum":
            direction = momentum
        elif noise is not None:
            direction = noise(step, g, w)
    return networks


def accuracies(cell: Cell, networks: Networks, runs: Sequence[Run]) -> list[dict[str, float]]:
    """Accuracy of every run on test, validation and (with the labels that it was trained on) training images."""
    seeds = sorted({run.seed for run in runs})
    which = torch.tensor([seeds.index(run.seed) for run in runs])
    found = {}
    for split in ("val", "test", "train"):
        images, labels = prepared(cell, seeds, split, networks.w.dtype)
        found[split] = networks.accuracy(images[which], labels[which])
    return [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)]
