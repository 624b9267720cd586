"""`s2sam demo`: two acts on scikit-learn's digits, and one page that shows what came of them.

Act 1, *what sparsity saves*: a dense network and RigL at four sparsities on right labels; accuracy against the
number of weights that are left, and the size of the file that holds them.

Act 2, *when flatness pays*: 40 % of the training labels are wrong, and a 90 % sparse network would memorise them. SGD,
Nesterov, the paper's S2-SAM, echo and SAM train with one learning rate and weight decay, the trainer's defaults, and
equally many gradients (SAM takes two a step and has half the steps), and SGD also with the learning rate and weight
decay that suit it best: the reference that a sharpness method must beat. Echo is also tuned in all of these.

Every other number in :data:`SPARSITY` and :data:`FLATNESS` was chosen by validation accuracy on seeds that the demo
does not use, with equally many trials for every arm that has something to choose: `benchmarks/demo_settings.py` does
that and wrote `benchmarks/results/demo_settings.json`.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2sam.cli.arguments import Parser
from s2sam.suite.pool import cores, one_thread, reusable, train_all

if TYPE_CHECKING:
    from rich.table import Table

    from s2sam.analysis.surface_file import Surface
    from s2sam.report.arms import Arm as ReadArm
    from s2sam.report.demo_page import Act, Files
    from s2sam.train.config import TrainConfig

HELP = "what sparsity saves and when flatness pays, on digits, in one page"
SEEDS = (10, 11, 12, 13, 14)  #: neither those of the tuning nor 0 to 5, which pilots of this case have looked at
SURFACES = ("sgd", "echo")  #: the arms of act 2 whose loss surfaces are measured, at the first seed
ROUNDS, POINTS, PAIRS = 8, 21, 3  #: of the step times; of the surfaces, along a side and of directions
NOISE = 0.4  #: share of wrong training labels in act 2
#: what is compared, each with what
SAVES_PAIRS = tuple((f"rigl{s}", "dense") for s in (80, 90, 95, 98))
FLAT_PAIRS = (
    *((arm, "sgd") for arm in ("nesterov", "s2sam", "echo", "sam", "sgd-tuned")),
    *((arm, "sgd-tuned") for arm in ("s2sam", "echo", "sam", "echo-tuned")),
)


@dataclass(frozen=True)
class Arm:
    """What tells one arm from the others of its act."""

    label: str
    lr: float
    weight_decay: float
    method: str = "static"
    sparsity: float = 0.9
    sharpness: str = "none"
    rho: float = 0.0
    scale: str = "auto"
    nesterov: bool = False

    @property
    def gradients_a_step(self) -> int:
        """SAM takes two, everything else one."""
        return 2 if self.sharpness == "sam" else 1


SPARSITY_EPOCHS, FLATNESS_EPOCHS = 30, 100  #: a pass over 1,294 and over 600 images, in batches of 64 and of 32
_CLEAN: dict[str, Any] = {"lr": 0.1, "weight_decay": 5e-3}
SPARSITY = {
    "dense": Arm("Dense", method="dense", **_CLEAN),
    **{f"rigl{s}": Arm(f"RigL {s} %", method="rigl", sparsity=s / 100, **_CLEAN) for s in (80, 90, 95, 98)},
}
FLATNESS = {
    "sgd": Arm("SGD", 0.1, 5e-4),
    "nesterov": Arm("Nesterov", 0.1, 5e-4, nesterov=True),
    "s2sam": Arm("S2-SAM (the paper's)", 0.1, 5e-4, sharpness="s2sam", rho=1.6, scale="norm"),
    "echo": Arm("Echo", 0.1, 5e-4, sharpness="echo", rho=0.22, scale="filter"),
    "sam": Arm("SAM", 0.1, 5e-4, sharpness="sam", rho=0.11, scale="filter"),
    "sgd-tuned": Arm("SGD, tuned", 0.003, 5e-2),
    "echo-tuned": Arm("Echo, tuned", 0.03, 5e-3, sharpness="echo", rho=0.16, scale="filter"),
}


def sparsity_config(arm: Arm, seed: int, out: str, epochs: int = SPARSITY_EPOCHS) -> TrainConfig:
    """A run of act 1: the MLP 64-256-256-10 on all training images with right labels.

    Raises:
        ValueError: an impossible seed or number of epochs.
    """
    from s2sam.train.config import DataConfig

    return _config(arm, seed, out, epochs, 64, 1.0, DataConfig(augment="none"), {"delta_t": 20, "min_per_filter": 1})


def flatness_config(arm: Arm, seed: int, out: str, epochs: int = FLATNESS_EPOCHS) -> TrainConfig:
    """A run of act 2: the MLP 64-128-128-10 on 600 images, 40 % of them with a wrong label; the seed draws both.

    Half of the images beside the test set validate, with right labels. SAM takes two gradients a step and so `epochs`
    halves; with echo an epoch is half a pass.

    Raises:
        ValueError: an impossible seed or number of epochs, or one that cannot be halved.
    """
    from s2sam.train.config import DataConfig

    if epochs % 2:
        raise ValueError(
            f"--epochs must be even, so that SAM can take as many gradients in half the epochs; got {epochs}"
        )
    data = DataConfig(augment="none", train_size=600, val_fraction=0.5, split_seed=seed, label_noise=NOISE)
    return _config(arm, seed, out, epochs // arm.gradients_a_step, 32, 0.5, data, {})


def _config(
    arm: Arm, seed: int, out: str, epochs: int, batch: int, width: float, data: Any, options: dict[str, Any]
) -> TrainConfig:
    from s2sam.train.config import OptimConfig, SamConfig, SparseConfig, TrainConfig

    return TrainConfig(
        data="digits", model="mlp", model_options={"width": width}, data_options=data, device="cpu", out=out, seed=seed,
        epochs=epochs, batch_size=batch, evaluate_every=max(1, epochs // 10),
        method=arm.method, sparsity=arm.sparsity, sparse=SparseConfig(distribution="erk", options=options),
        sharpness=arm.sharpness, rho=arm.rho, sam=SamConfig(scale=arm.scale, stats_every=10),
        lr=arm.lr, optim=OptimConfig(momentum=0.9, weight_decay=arm.weight_decay, nesterov=arm.nesterov),
    )  # fmt: skip


def run(argv: list[str]) -> int:
    """Train what is not there yet, write files and surfaces, print what came out, write the page.

    Returns:
        0; 2 if a run refused its settings or its folder; 1 if one failed in any other way.

    Raises:
        ValueError: an impossible option.
    """
    parser = Parser(prog="s2sam demo", description=HELP, allow_abbrev=False)
    parser.add_argument(
        "--out", default="runs/demo", metavar="FOLDER", help="where runs and page go (default: %(default)s)"
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        default=list(SEEDS),
        metavar="SEED",
        help="of both acts (default: 10 11 12 13 14)",
    )
    parser.add_argument(
        "--epochs", type=int, help=f"of both acts, even (default: {SPARSITY_EPOCHS} in act 1, {FLATNESS_EPOCHS} in 2)"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=min(cores(), 8),
        help="runs at a time, one thread each (default: one a core, at most 8)",
    )
    parser.add_argument("--fresh", action="store_true", help="train all runs again, also those that are finished")
    args = parser.parse_args(argv)
    if len(set(args.seeds)) < len(args.seeds):
        raise ValueError("--seeds names a seed twice; a seed gives the same run each time")
    if args.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {args.jobs}")

    from rich.console import Console

    from s2sam.report.cost import save_rounds
    from s2sam.report.demo_page import flat_verdict, make_act, render, saves_verdict, to_csv
    from s2sam.report.measure import measure_rounds
    from s2sam.train.atomic import write_text

    console, out = Console(highlight=False), Path(args.out)
    configs = make_configs(out, args.seeds, args.epochs)
    todo = {name: config for name, config in configs.items() if args.fresh or not reusable(config)}
    if len(todo) < len(configs):
        console.print(f"{len(configs) - len(todo)} finished runs are reused; --fresh trains them again", markup=False)
    failed = [outcome for outcome in train_all(todo, args.jobs, console, fresh=True) if outcome[1] is None]
    for name, _, reason in failed:
        console.print(f"failed: {name}: {reason}", style="bold red", markup=False, soft_wrap=True)
    if failed:
        return 2 if all(reason.startswith("ValueError") for _, _, reason in failed) else 1

    each = {name: arm.gradients_a_step for arms in (SPARSITY, FLATNESS) for name, arm in arms.items()}
    saves = make_act(read_arms(SPARSITY, "sparsity", configs, args.seeds), SAVES_PAIRS, each)
    flat = make_act(read_arms(FLATNESS, "flatness", configs, args.seeds), FLAT_PAIRS, each)
    with one_thread():
        console.print("writing files of active weights, measuring loss surfaces and step times", markup=False)
        sizes = {key: write_files(arm, out / "files", key) for key, arm in saves.arms.items()}
        surfaces = measure_surfaces(flat, min(args.seeds), out / "surface")
        first = {name.partition("/")[2].rpartition("-seed")[0]: config for name, config in reversed(configs.items())}
        first = {key: config for key, config in first.items() if not key.endswith("-tuned")}  # these take the same time
        rounds = measure_rounds(first, rounds=ROUNDS)
    named = {f"{arm.label}, SGD": key for key, arm in SPARSITY.items()}  # as `s2sam report` calls the arms of act 1
    named |= {arm.label: key for key, arm in FLATNESS.items() if key in rounds}
    save_rounds(out / "cost.json", {name: rounds[key] for name, key in named.items()})
    words = {
        "act 1": {arm.label: settings_of(arm) for arm in SPARSITY.values()},
        "act 2": {arm.label: settings_of(arm) for arm in FLATNESS.values()},
    }
    how = shlex.join(["s2sam", "demo", *argv])
    page = render(saves, flat, sizes, surfaces, rounds, words, noise=NOISE, how=how)
    write_text(out / "table.csv", to_csv({"1": saves, "2": flat}, sizes))
    write_text(out / "report.html", page)

    for title, act, verdict in (
        ("Act 1, what sparsity saves", saves, saves_verdict(saves, sizes)),
        ("Act 2, when flatness pays", flat, flat_verdict(flat, NOISE)),
    ):
        console.print()
        console.print(summary(title, act, sizes))
        console.print(verdict, style="bold", markup=False)
    console.print()
    for path in (out / "table.csv", out / "report.html"):
        console.print(str(path), markup=False, soft_wrap=True)
    return 0


def make_configs(out: Path, seeds: Sequence[int], epochs: int | None = None) -> dict[str, TrainConfig]:
    """The runs by name, such as "flatness/echo-seed0": every arm of both acts with every seed.

    Raises:
        ValueError: an impossible seed or number of epochs.
    """
    configs = {}
    for act, arms, make, usual in (
        ("sparsity", SPARSITY, sparsity_config, SPARSITY_EPOCHS),
        ("flatness", FLATNESS, flatness_config, FLATNESS_EPOCHS),
    ):
        for seed in seeds:
            for key, arm in arms.items():
                name = f"{act}/{key}-seed{seed}"
                configs[name] = make(arm, seed, str(out / name), usual if epochs is None else epochs)
    return configs


def read_arms(
    arms: Mapping[str, Arm], act: str, configs: Mapping[str, TrainConfig], seeds: Sequence[int]
) -> dict[str, ReadArm]:
    """The finished runs of an act as arms of the report, whose treatment is the label.

    Raises:
        ValueError: a run is not whole.
    """
    from s2sam.report.arms import Arm as ReadArm
    from s2sam.report.read import read_run

    return {
        key: ReadArm(
            base="", treatment=arm.label, base_key=(("method", arm.method),),
            treatment_key=(("sharpness", arm.sharpness),),
            runs={seed: read_run(configs[f"{act}/{key}-seed{seed}"].folder) for seed in sorted(seeds)},
        )
        for key, arm in arms.items()
    }  # fmt: skip


def write_files(arm: ReadArm, folder: Path, key: str) -> list[Files]:
    """Write the active weights of each sparse run of an arm to `folder`, read them back, and give all files' sizes.

    Raises:
        ValueError: a run's weights are damaged.
        RuntimeError: what was read back is not what the run folder holds.
    """
    import torch

    from s2sam.analysis.opened import load_masks
    from s2sam.export.active_weights import load_active, save_active
    from s2sam.report.demo_page import Files
    from s2sam.train.finished import read_tensors

    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for seed, one in arm.runs.items():
        tensors, masks = read_tensors(one.folder, "model.safetensors"), load_masks(one.folder)
        dense = (one.folder / "model.safetensors").stat().st_size
        if not masks:
            found.append(Files(dense, 0, dense))
            continue
        path = folder / f"{key}-seed{seed}.safetensors"
        size = save_active(path, tensors, masks)
        again, _ = load_active(path)
        if again.keys() != tensors.keys() or not all(torch.equal(again[name], tensors[name]) for name in tensors):
            raise RuntimeError(f"{path} does not hold the weights of {one.folder}; run the demo with --fresh")
        found.append(Files(dense, (one.folder / "masks.safetensors").stat().st_size, size))
    return found


def measure_surfaces(act: Act, seed: int, folder: Path) -> dict[ReadArm, Surface]:
    """The loss around one run of each arm of :data:`SURFACES`, over its training images, labels as they were given.

    A surface of other weights or settings that an earlier demo left is measured again.

    Raises:
        ValueError: the folder cannot be written.
    """
    from dataclasses import replace

    from s2sam.analysis.opened import load_common
    from s2sam.analysis.surface import SurfaceSettings
    from s2sam.analysis.surface_file import load_surface
    from s2sam.analysis.surface_run import measure, open_run

    settings = SurfaceSettings(points=POINTS, pairs=PAIRS)
    runs = {key: act.arms[key].runs[seed].folder for key in SURFACES}
    data, found = load_common(list(runs.values())), {}
    for key, run in runs.items():
        landscape, surface = open_run(run, data, settings, label=f"{key}-seed{seed}", images=None, device="cpu")
        path = folder / surface.label / "surface.npz"
        if path.exists() and load_surface(path).depends_on != surface.depends_on:
            path.unlink()
        found[replace(act.arms[key], base="Static ERK 90 %")] = measure(landscape, surface, path)
    return found


def settings_of(arm: Arm) -> str:
    """An arm's settings in words.

    >>> settings_of(FLATNESS["nesterov"])
    'static masks, 90 % sparse; nesterov; learning rate 0.1, weight decay 0.0005'
    """
    masks = {"static": "static masks", "rigl": "RigL, min_per_filter 1"}
    parts = ["dense" if arm.method == "dense" else f"{masks[arm.method]}, {100 * arm.sparsity:g} % sparse"]
    parts += ["nesterov"] if arm.nesterov else []
    parts += [f"sharpness {arm.sharpness}, scale {arm.scale}, rho {arm.rho:g}"] if arm.sharpness != "none" else []
    return "; ".join([*parts, f"learning rate {arm.lr:g}, weight decay {arm.weight_decay:g}"])


def summary(title: str, act: Act, sizes: Mapping[str, Sequence[Files]]) -> Table:
    """An act for a terminal of 80 columns."""
    from statistics import fmean

    from rich import box
    from rich.table import Table

    from s2sam.report.demo_page import kilobytes
    from s2sam.report.tables import interval_text, percent

    shown = Table(box=box.SIMPLE_HEAD, title=title, padding=(0, 1), show_edge=False)
    shown.title_justify, shown.title_style = "left", "bold"
    files = any(key in sizes for key in act.arms)
    shown.add_column("arm")
    for head in ("test %", *(["file"] if files else []), "minus", "points", f"95 %, all {len(act.rows)}"):
        shown.add_column(head, justify="left" if head == "minus" else "right", no_wrap=True)
    for key, arm in act.arms.items():
        rows = [row for row in act.rows if row.arm is arm]
        top1 = percent(fmean(arm.final("test_top1").values()))
        start = [arm.treatment, top1, *([kilobytes(fmean(one.active for one in sizes[key]))] if files else [])]
        for row in rows:
            assert row.difference is not None
            assert row.reference is not None
            style = {1: "bold green", -1: "bold red"}.get(row.difference.shows)
            cells = [percent(row.difference.mean, sign=True), interval_text(row.difference.simultaneous)]
            shown.add_row(*start, row.reference.treatment, *cells, style=style)
            start = [""] * len(start)
        if not rows:
            shown.add_row(*start, "", "", "")
    return shown
