"""`s2sam demo`: dense, sparse and sparse with sharpness, side by side on scikit-learn's digits, with an honest report.

Seven arms: a dense network with SGD; RigL and a random static ERK mask, both at 90 %, each with SGD, S2-SAM and SAM.

How the recipe was chosen: the network is the small MLP, because it can be trained to the end in the time there is, and
short runs reward fast optimisation. Learning rate and weight decay were chosen for plain SGD, by validation accuracy on
other seeds; `benchmarks/demo_settings.py` repeats that. S2-SAM and SAM take the same values and the library's default
rho, 0.05: nothing was tuned for them, and what comes out is reported as it is.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from s2sam.cli.arguments import Parser
from s2sam.cli.report import show
from s2sam.suite.pool import cores, one_thread, reusable, train_all

if TYPE_CHECKING:
    from s2sam.train.config import TrainConfig

HELP = "train seven arms on digits and compare them in one page"
ARMS = (
    ("dense", "none"),
    *((method, sharpness) for method in ("rigl", "static") for sharpness in ("none", "s2sam", "sam")),
)
EPOCHS, LR, WEIGHT_DECAY = 60, 0.05, 5e-4
ROUNDS = 15  #: of the cost measurement
REMARKS = (
    "Learning rate and weight decay were chosen for plain SGD by validation accuracy, on other seeds: lr 0.05 among "
    "0.02, 0.05, 0.1 and 0.2, weight decay 0.0005 among that and 0.005. S2-SAM and SAM take the same values and the "
    "default rho 0.05; nothing was tuned for them.",
    "A step of this network takes a few milliseconds, much of it the fixed price of calls, and S2-SAM adds calls: its "
    "ratio here is no measure of its cost on networks of useful size (see benchmarks/results/step_overhead_*.json).",
)


def run(argv: list[str]) -> int:
    """Train what is not there yet, measure the cost side by side, print the table, write the page.

    Returns:
        0; 2 if a run refused its settings or its folder; 1 if one failed in any other way.

    Raises:
        ValueError: an impossible option.
    """
    parser = Parser(prog="s2sam demo", description=HELP, allow_abbrev=False)
    parser.add_argument(
        "--out", default="runs/demo", metavar="FOLDER", help="where runs and page go (default: %(default)s)"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED", help="default: 0 1 2")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="default: %(default)s")
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

    from s2sam.report.arms import group_runs
    from s2sam.report.cost import save_rounds
    from s2sam.report.measure import measure_rounds
    from s2sam.report.read import read_runs
    from s2sam.report.write import make_table, write_report

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

    folders = [config.folder for config in configs.values()]
    by_folder = {config.folder: config for config in configs.values()}
    console.print("measuring the cost of a step, all arms in turn", markup=False)
    with one_thread():
        first = {arm.name: next(iter(arm.runs.values())) for arm in group_runs(read_runs(folders))}
        rounds = measure_rounds({name: by_folder[found.folder] for name, found in first.items()}, rounds=ROUNDS)
    save_rounds(out / "cost.json", rounds)
    table = make_table(folders, rounds)
    how = shlex.join(["s2sam", "demo", *argv])
    paths = write_report(
        table, out / "report.html", title="Dense, sparse, and sparse with sharpness on digits", how=how, remarks=REMARKS
    )
    show(table, console)
    for path in paths:
        console.print(str(path), markup=False, soft_wrap=True)
    return 0


def make_configs(out: Path, seeds: Sequence[int], epochs: int) -> dict[str, TrainConfig]:
    """The runs by name: every arm with every seed; besides the arm's own keys nothing differs between arms.

    Raises:
        ValueError: an impossible seed or number of epochs.
    """
    from s2sam.train.config import OptimConfig, SamConfig, SparseConfig, TrainConfig

    configs = {}
    for seed in seeds:
        for method, sharpness in ARMS:
            name = f"{method if method == 'dense' else f'{method}90'}-{sharpness}-seed{seed}"
            configs[name] = TrainConfig(
                data="digits",
                model="mlp",
                method=method,
                sparsity=0.9,
                sharpness=sharpness,
                rho=0.05,
                epochs=epochs,
                batch_size=64,
                lr=LR,
                seed=seed,
                out=str(out / name),
                device="cpu",
                sam=SamConfig(stats_every=10),
                sparse=SparseConfig(distribution="erk", options={"delta_t": 20}),
                optim=OptimConfig(name="sgd", momentum=0.9, weight_decay=WEIGHT_DECAY),
            )
    return configs
