"""The plan of the image study, and one of its runs: the library's own parts, without checkpoints or a run folder.

The trials, the table of runs and the choices are those of studies/control/plan.py, which has to be on the path.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml

from plan import Plan, Point, Row, append, environment, processor
from s2sam.data import load_data
from s2sam.train.config import DataConfig, OptimConfig, SamConfig, TrainConfig
from s2sam.train.evaluate import evaluate_split
from s2sam.train.fast import quickest_convolutions
from s2sam.train.state import TrainState, build
from s2sam.train.step import train_step

HERE = Path(__file__).resolve().parent
CODE = (".", "../control/plan.py", "../control/analyse.py", "../../src")  #: what the numbers depend on
CHANCE = 0.1
VARIANTS = ("large", "smoke")


@dataclass(frozen=True)
class ImageCell:
    """What is trained.

    Args:
        noise: share of the training labels that are wrong.
        augment: as `data_options.augment` of a run.
        method: static or dense.
        sparsity: 0 = dense.
    """

    noise: float
    augment: str
    method: str
    sparsity: float


@dataclass(frozen=True)
class ImageArm:
    """How it is trained.

    Args:
        sharpness: as that of a run: none, sam, s2sam or echo.
        scale: unit of the radius.
        nesterov: of the base optimizer.
    """

    sharpness: str = "none"
    scale: str = "norm"
    nesterov: bool = False

    @property
    def displace(self) -> bool:
        """Whether the arm has a radius."""
        return self.sharpness != "none"

    @property
    def gradients(self) -> int:
        """Gradients a step."""
        return 2 if self.sharpness == "sam" else 1


@dataclass(frozen=True)
class ImagePlan(Plan):
    """What settings.yaml says, of one budget.

    Args:
        settings: see there.
        table: of the runs.
        data: the .npz file with the pooled images.
        device: cpu or cuda.
    """

    data: Path = HERE / "pooled.npz"
    device: str = "cpu"
    grain: ClassVar[float] = 100 / 10_000
    equal_arms: ClassVar[tuple[str, ...]] = ("sgd",)

    @classmethod
    def read(  # type: ignore[override]
        cls, variant: str = "", *, out: Path = HERE, data: Path = HERE / "pooled.npz", device: str = "cpu"
    ) -> ImagePlan:
        """The settings; those of a variant ("large", "smoke") have a table of their own, in the folder of that name."""
        settings = yaml.safe_load((HERE / "settings.yaml").read_text(encoding="utf-8"))
        changes = {name: settings.pop(name) for name in VARIANTS}
        for key, value in changes.get(variant, {}).items():
            settings[key] = settings[key] | value
        return cls(settings, out / variant / "runs.csv", data, device)

    @cached_property
    def cells(self) -> dict[str, ImageCell]:  # type: ignore[override]
        """Name -> cell, such as "40-raw-static95": wrong labels in %, images, masks; in the order of running."""
        found = self.settings["cells"]
        return {
            f"{100 * noise:.0f}-{images}-{masks}": ImageCell(noise, augment, method, sparsity)
            for (images, augment), noise, (masks, (method, sparsity)) in product(
                found["augment"].items(), found["noise"], found["masks"].items()
            )
        }

    @cached_property
    def arms(self) -> dict[str, ImageArm]:  # type: ignore[override]
        """Name -> arm."""
        return {name: ImageArm(**options) for name, options in self.settings["arms"].items()}

    def arms_in(self, cell: str) -> dict[str, ImageArm]:  # type: ignore[override]
        """The arms of a cell: all of them."""
        return self.arms

    def fresh_arms(self, cell: str) -> list[str]:
        """What runs on the fresh seeds of a cell."""
        return list(self.arms)

    # -- a cell begins where an earlier one ended ----------------------------------------------------------------------

    def before(self, cell: str) -> str | None:
        """The cell whose choices are the first trials of this one; None if it begins anew.

        With other masks that is the cell with the first masks; with those, and augmentation, that without augmentation.
        """
        noise, images, masks = cell.split("-")
        first_masks, first_images = (next(iter(self.settings["cells"][key])) for key in ("masks", "augment"))
        if masks != first_masks:
            return f"{noise}-{images}-{first_masks}"
        return None if images == first_images else f"{noise}-{first_images}-{first_masks}"

    def number(self, cell: str) -> int:
        """How many trials each arm of a cell has before any round for edges; fewer where it does not begin anew."""
        return int(self.settings["trials"]["number" if self.before(cell) is None else "after"])

    def first_trials(self, cell: str, arm: str, rows: Sequence[Row]) -> list[Point]:
        """A product of a few values, or the choice of the same arm in the cell before.

        Raises:
            ValueError: the tuning of the cell before is not complete.
        """
        earlier = self.before(cell)
        if earlier is None:
            return self.start(arm)
        if missing := self.untuned(earlier, rows):
            raise ValueError(
                f"{cell} begins at the choices of {earlier}, whose tuning is not complete ({'; '.join(missing)}); "
                "tune that cell first"
            )
        return [self.chosen(earlier, arm, rows)]

    # -- one run -------------------------------------------------------------------------------------------------------

    def config(self, cell: str, arm: str, point: Point, seed: int) -> TrainConfig:
        """The run, as `s2sam train` takes it. The arm with two gradients a step has half the epochs."""
        where, made, common = self.cells[cell], self.arms[arm], self.settings["training"]
        lr, weight_decay, rho = point
        epochs = common["epochs"] // made.gradients
        return TrainConfig(
            data=str(self.data), model="resnet8", model_options={"width": common["width"]}, method=where.method,
            sparsity=where.sparsity, sharpness=made.sharpness, rho=rho, epochs=epochs, batch_size=common["batch_size"],
            lr=lr, seed=seed, device=self.device, channels_last=True, evaluate_every=epochs,
            sam=SamConfig(scale=made.scale, stats_every=0),
            optim=OptimConfig(weight_decay=weight_decay, nesterov=made.nesterov),
            data_options=DataConfig(
                train_size=common["images"], val_fraction=common["val_fraction"], split_seed=seed,
                label_noise=where.noise, augment=where.augment,
            ),
        )  # fmt: skip

    @cached_property
    def facts(self) -> tuple[tuple[str, str], ...]:
        """What environments.jsonl tells besides versions: which images, and the device."""
        name = torch.cuda.get_device_name() if self.device == "cuda" else processor()
        return ("data", load_data(self.data, val_fraction=0.0).digest[:12]), ("processor", name)


def train(config: TrainConfig, *, test: bool = True) -> dict[str, float]:
    """Train to the end; top-1 on validation, test (if wanted) and training images, the latter with their own labels.

    The steps are those of :func:`s2sam.train.loop.run`; what it measures on the way, logs and saves is left out. A run
    whose weights or losses are not finite has the accuracy of chance.
    """
    began = time.process_time()
    state = trained(config)
    found = {split: accuracy(state, split) for split in ("val", "train", *(["test"] if test else []))}
    return found | {"seconds": time.process_time() - began}


def trained(config: TrainConfig) -> TrainState:
    """The run after its last step, or after the epoch in which its weights ceased to be finite."""
    state = build(config)
    state.model.train()
    with quickest_convolutions(state.device):
        for _ in range(config.epochs):
            for batch in state.batches:
                train_step(state, *state.mix(*batch))
                state.advance()
            state.epoch += 1
            if not finite(state):
                break
    if state.sparsifier is not None and finite(state):
        state.sparsifier.verify()
    return state


def finite(state: TrainState) -> bool:
    """Whether all weights and BatchNorm statistics are."""
    return all(bool(tensor.isfinite().all()) for tensor in state.model.state_dict().values())


def accuracy(state: TrainState, split: str) -> float:
    """Top-1 on a split at the clean weights, or chance."""
    if not finite(state):
        return CHANCE
    loss, top1 = evaluate_split(state.model, state.data, split, state.augment)
    return top1 if top1 is not None and loss is not None and math.isfinite(loss) else CHANCE


def execute(
    plan: ImagePlan,
    stage: str,
    cell: str,
    wanted: Mapping[str, Sequence[tuple[Point, int]]],
    pool: Executor | None = None,
) -> None:
    """Train the runs of each arm that the table does not hold yet, in the processes of `pool` or in this one.

    In the tuning the runs of an arm enter the table together, so that a study that was stopped goes on with the trials
    that it would have had.

    Raises:
        ValueError: the table holds runs on other images.
    """
    keys = ("arm", "lr", "weight_decay", "rho", "seed")
    done = {tuple(r[key] for key in keys) for r in plan.rows() if (r["stage"], r["cell"]) == (stage, cell)}
    todo = [(arm, *run) for arm, runs in wanted.items() for run in runs if (arm, *run[0], run[1]) not in done]
    if not todo:
        return
    name = environment(plan.table, HERE, CODE, plan.facts)
    check_images(plan)
    waiting: dict[Any, list[Row]] = {}
    groups = [arm if stage == "tune" else i for i, (arm, _, _) in enumerate(todo)]
    configs = [plan.config(cell, *one) for one in todo]
    for i, found in results(configs, test=stage != "tune", pool=pool):  # nothing is chosen by test images
        arm, (lr, weight_decay, rho), seed = todo[i]
        waiting.setdefault(groups[i], []).append(
            {
                "stage": stage, "cell": cell, "arm": arm, "lr": lr, "weight_decay": weight_decay, "rho": rho,
                "seed": seed, "epochs": configs[i].epochs, "environment": name,
            } | {key: round(value, 2 if key == "seconds" else 6) for key, value in found.items()}
        )  # fmt: skip
        if len(waiting[groups[i]]) == groups.count(groups[i]):
            append(plan.table, waiting.pop(groups[i]))


def results(
    configs: Sequence[TrainConfig], *, test: bool, pool: Executor | None
) -> Iterator[tuple[int, dict[str, float]]]:
    """(which, what it measured) of each run, as they end."""
    if pool is None:
        for i, config in enumerate(configs):
            yield i, train(config, test=test)
        return
    futures = {pool.submit(train, config, test=test): i for i, config in enumerate(configs)}
    for future in as_completed(futures):
        yield futures[future], future.result()


def check_images(plan: ImagePlan) -> None:
    """Raise ValueError if a run of the table was trained on other images than those that are there now."""
    lines = plan.table.with_name("environments.jsonl").read_text(encoding="utf-8").splitlines()
    digests = {one["environment"]: one["data"] for one in map(json.loads, lines)}
    mine = dict(plan.facts)["data"]
    others = {digests[row["environment"]] for row in plan.rows()} - {mine}
    if others:
        raise ValueError(
            f"{plan.table} holds runs on other images (digest {', '.join(sorted(others))}) than those in {plan.data} "
            f"({mine}); give the images that it was begun with, or another --out"
        )


def tune(plan: ImagePlan, cell: str, pool: Executor | None = None) -> None:
    """All arms of a cell, with the same number of trials; more for all of them while a choice is on an edge."""
    for extension in range(plan.rounds(cell) + 1):
        number = plan.number(cell) + extension * plan.settings["trials"]["extension"]
        while any(wanted := next_runs(plan, cell, number)):
            execute(plan, "tune", cell, dict(zip(plan.arms, wanted, strict=True)), pool)
        if not plan.untuned(cell, plan.rows()):
            return


def next_runs(plan: ImagePlan, cell: str, number: int) -> list[list[tuple[Point, int]]]:
    """What each arm trains next until it has `number` trials, or as many as another arm has already."""
    rows = plan.rows()
    number = max(number, *(len(plan.screened(plan.tried(cell, arm, rows))) for arm in plan.arms))
    return [plan.next_runs(cell, arm, number, rows) for arm in plan.arms]


def fresh(plan: ImagePlan, cell: str, pool: Executor | None = None) -> None:
    """All arms of a cell at their choices, on the fresh seeds; and SGD at the common learning rate and weight decay.

    Raises:
        ValueError: the tuning of the cell is not complete.
    """
    rows = plan.rows()
    if missing := plan.refusals(cell, rows):
        raise ValueError(f"the tuning of {cell} is not complete ({'; '.join(missing)}); run `run.py tune` first")
    points = {arm: plan.chosen(cell, arm, rows) for arm in plan.arms}
    execute(plan, "fresh", cell, {arm: [(point, s) for s in plan.fresh] for arm, point in points.items()}, pool)
    common = (plan.settings["equal"]["lr"], plan.settings["equal"]["weight_decay"], 0.0)
    execute(plan, "equal", cell, {arm: [(common, s) for s in plan.fresh] for arm in plan.equal_arms}, pool)
