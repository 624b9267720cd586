"""Runs as jobs of a SLURM cluster, through submitit: in arrays, one job a run; a requeued job goes on where it was."""

from __future__ import annotations

import io
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from s2sam.sparse.names import unknown
from s2sam.suite.pool import Outcome, train_one
from s2sam.suite.result import one_line
from s2sam.train.config import TrainConfig

DEFAULTS = {"timeout_min": 24 * 60, "cpus_per_task": 1}
ARRAY_SIZE = 1000  #: jobs of an array; SLURM takes 1001 unless its MaxArraySize says otherwise
POLL = {"slurm": 10.0, "local": 0.2, "debug": 0.0}  #: clusters, and the seconds between two looks at their jobs
#: options that would contradict the launcher, and what to do instead
REFUSED = {
    "slurm_array_parallelism": "--jobs says how many run at a time",
    "slurm_time": "give timeout_min, in minutes",
    **dict.fromkeys(
        (f"{prefix}{name}" for prefix in ("", "slurm_") for name in ("nodes", "tasks_per_node", "ntasks_per_node")),
        "a job is one process",
    ),
}


class Task:
    """What a job does. submitit calls `checkpoint` when the job is preempted or out of time.

    The trainer saves before (:mod:`s2sam.train.signals`), if there is a run under way.
    """

    def __call__(self, name: str, config: TrainConfig) -> Outcome:
        """Train, or go on training, one run."""
        return train_one(name, config)

    def checkpoint(self, name: str, config: TrainConfig) -> Any:
        """Submit the same job again; the run goes on from its last checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, name, config)


def slurm_runner(
    folder: Path, options: Mapping[str, Any] | None = None, *, cluster: str = "slurm", array_size: int = ARRAY_SIZE
) -> Callable[[Mapping[str, TrainConfig], int], Iterator[Outcome]]:
    """A runner for :func:`s2sam.suite.pool.train_all`; at most `jobs` jobs run at a time.

    Arrays are submitted one after another. If the runner is stopped, jobs of SLURM go on, those of this machine do not.

    Args:
        folder: where submitit writes its logs; all machines must see it, the runs and the data.
        options: of submitit's `update_parameters`, such as {"slurm_partition": "gpu", "gpus_per_node": 1}.
        cluster: "slurm"; or "local": processes of this machine, "debug": this process, as submitit knows them.
        array_size: jobs of an array at most.

    Raises:
        RuntimeError: submitit is not installed, there is no SLURM here, or it takes no jobs (when the runner runs).
        ValueError: an option that submitit does not know, or that contradicts the launcher.
    """
    try:
        import submitit
    except ModuleNotFoundError:
        raise RuntimeError("--launcher slurm needs the package submitit; pip install 's2sam[slurm]'") from None
    given = {**DEFAULTS, **(options or {})}
    _check(given, cluster, array_size)
    executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
    _update(executor, given)

    def run(configs: Mapping[str, TrainConfig], jobs: int) -> Iterator[Outcome]:
        executor.update_parameters(slurm_array_parallelism=jobs)
        queue, names = list(configs.items()), dict[Any, str]()
        try:
            while queue or names:
                free = jobs - len(names) if cluster != "slurm" else 0 if names else array_size
                names |= _submit(executor, queue[:free])
                del queue[:free]
                for job in [job for job in names if job.done()]:
                    yield _outcome(job, names.pop(job))
                if names:
                    time.sleep(POLL[cluster])
        finally:
            if cluster == "local":
                for job in names:
                    job.cancel()

    return run


def _check(options: Mapping[str, Any], cluster: str, array_size: int) -> None:
    """Refuse what submitit would take, or would only tell by a traceback."""
    if cluster not in POLL:
        raise unknown("cluster", cluster, POLL)
    if type(array_size) is not int or array_size < 1:
        raise ValueError(f"array_size must be a whole number of at least 1, got {array_size!r}")
    for key in options:
        if key in REFUSED:
            raise ValueError(f"the launcher option {key} cannot be given: {REFUSED[key]}; leave it out")
    for command in ("sbatch", "srun"):
        if cluster == "slurm" and shutil.which(command) is None:
            raise RuntimeError(
                f"--launcher slurm finds no SLURM here: there is no command {command}; start it where jobs can be "
                "submitted, or leave --launcher out to train on this machine"
            )


def _update(executor: Any, options: Mapping[str, Any]) -> None:
    try:
        executor.update_parameters(**options)
    except (NameError, AssertionError, TypeError, ValueError) as error:
        said = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(
            f"submitit does not take these launcher options: {said}; it knows timeout_min, mem_gb, cpus_per_task, "
            "gpus_per_node, name, and those of sbatch with slurm_ before them, such as slurm_partition"
        ) from None


def _submit(executor: Any, runs: Sequence[tuple[str, TrainConfig]]) -> dict[Any, str]:
    """The jobs of these runs, with their names."""
    if not runs:
        return {}
    names, configs = zip(*runs, strict=True)
    shown = io.StringIO()  # submitit shows what sbatch says and raises it: once is enough
    try:
        with redirect_stderr(shown):
            jobs = executor.map_array(Task(), names, configs)
    except RuntimeError as error:
        raise RuntimeError(
            f"the jobs could not be submitted: {one_line(str(error)) or 'sbatch gave no reason'}; mend the launcher "
            "options, or with array_size=100 submit fewer jobs at a time, and run the same command again"
        ) from error
    sys.stderr.write(shown.getvalue())
    return dict(zip(jobs, names, strict=True))


def _outcome(job: Any, name: str) -> Outcome:
    error = job.exception()
    outcome: Outcome = job.result() if error is None else (name, None, f"RuntimeError: {error}")
    return outcome
