"""`s2sam demo`: dense, sparse and sparse with sharpness, side by side on scikit-learn's digits, with an honest report.

Seven arms: a dense network with SGD; RigL and a random static ERK mask, both at 90 %, each with SGD, S2-SAM and SAM.

How the recipe was chosen: the network is the small MLP, because it can be trained to the end in the time there is, and
short runs reward fast optimisation. Learning rate and weight decay were chosen for plain SGD, by validation accuracy on
other seeds; `benchmarks/demo_settings.py` repeats that. S2-SAM and SAM take the same values and the library's default
rho, 0.05: nothing was tuned for them, and what comes out is reported as it is.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2sam.cli.arguments import Parser
from s2sam.cli.report import show

if TYPE_CHECKING:
    from rich.console import Console

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
#: name of the run, its final record if it succeeded, what went wrong else
Outcome = tuple[str, dict[str, Any] | None, str]


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
        default=min(_cores(), 8),
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
    failed = [outcome for outcome in train_all(todo, args.jobs, console) if outcome[1] is None]
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


def reusable(config: TrainConfig) -> bool:
    """True if the folder holds a whole run of the same settings, made by the same versions."""
    from importlib.metadata import version

    from s2sam import __version__
    from s2sam.report.read import read_run

    try:
        found = read_run(config.folder)
    except ValueError:
        return False
    wanted = config.as_dict()
    versions = found.env.get("versions", {})
    same_code = versions.get("s2sam") == __version__ and versions.get("torch") == version("torch")
    return same_code and {**found.config, "out": None} == {**wanted, "out": None}


def train_all(configs: dict[str, TrainConfig], jobs: int, console: Console) -> list[Outcome]:
    """Train these runs, `jobs` at a time, and say what has finished; a failure does not stop the others."""
    outcomes = []
    with _progress(console, len(configs)) as report:
        for outcome in _finished(configs, min(jobs, len(configs))):
            outcomes.append(outcome)
            report(outcome)
    return outcomes


def train_one(name: str, config: TrainConfig) -> Outcome:
    """Train one run with one thread; what goes wrong is returned as text, with the name of its type in front."""
    from s2sam.train.loop import run as train

    try:
        with one_thread():
            return name, train(config, overwrite=True), ""
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        return name, None, f"{type(error).__name__}: {error}"


@contextmanager
def one_thread() -> Iterator[None]:
    """torch with one thread: quickest for so small a network, and the same numbers on every machine with such a CPU."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _finished(configs: dict[str, TrainConfig], jobs: int) -> Iterator[Outcome]:
    """The outcomes as they come: in this process for one job, else in fresh ones."""
    if jobs <= 1:
        yield from (train_one(name, config) for name, config in configs.items())
        return
    import multiprocessing

    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        names: dict[Future[Outcome], str] = {
            pool.submit(train_one, name, config): name for name, config in configs.items()
        }
        waiting = set(names)
        try:
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    try:
                        yield future.result()
                    except BrokenProcessPool:
                        yield (
                            names[future],
                            None,
                            "RuntimeError: its process was ended from outside; was there enough memory?",
                        )
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Callable[[Outcome], None]]:
    """A bar on a terminal, a line for each finished run elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    def words(outcome: Outcome) -> str:
        name, final, _ = outcome
        return f"{name}: failed" if final is None else f"{name}: {100 * final['test_top1']:.1f} %"

    if not console.is_terminal:
        count = 0

        def line(outcome: Outcome) -> None:
            nonlocal count
            count += 1
            console.print(f"[{count}/{total}] {words(outcome)}", markup=False, soft_wrap=True)

        yield line
        return
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda outcome: progress.update(task, advance=1, description=words(outcome))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
