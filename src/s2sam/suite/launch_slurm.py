"""Runs as jobs of a SLURM cluster, through submitit: one array, one job a run; a requeued job goes on where it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from s2sam.suite.pool import Outcome, train_one
from s2sam.train.config import TrainConfig

DEFAULTS = {"timeout_min": 24 * 60, "cpus_per_task": 1}


class Task:
    """What a job does. submitit calls `checkpoint` when the job is preempted or out of time."""

    def __call__(self, name: str, config: TrainConfig) -> Outcome:
        """Train, or go on training, one run."""
        return train_one(name, config)

    def checkpoint(self, name: str, config: TrainConfig) -> Any:
        """Submit the same job again; the run goes on from its last checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, name, config)


def slurm_runner(
    folder: Path, options: Mapping[str, Any] | None = None, *, cluster: str | None = None
) -> Callable[[Mapping[str, TrainConfig], int], Iterator[Outcome]]:
    """A runner for :func:`s2sam.suite.pool.train_all`; at most `jobs` jobs run at a time.

    Args:
        folder: where submitit writes its logs; all machines must see it, the runs and the data.
        options: of submitit's `update_parameters`, such as {"slurm_partition": "gpu", "gpus_per_node": 1}.
        cluster: "slurm", "local" or "debug" as submitit knows them; None = SLURM where there is one, else local.

    Raises:
        RuntimeError: submitit is not installed.
    """
    try:
        import submitit
    except ModuleNotFoundError:
        raise RuntimeError("--launcher slurm needs the package submitit; pip install 's2sam[slurm]'") from None

    def run(configs: Mapping[str, TrainConfig], jobs: int) -> Iterator[Outcome]:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        executor.update_parameters(**{**DEFAULTS, "slurm_array_parallelism": jobs, **(options or {})})
        submitted = executor.map_array(Task(), list(configs), list(configs.values()))
        names = dict(zip((job.job_id for job in submitted), configs, strict=True))
        for job in submitit.helpers.as_completed(submitted):
            error = job.exception()
            yield job.result() if error is None else (names[job.job_id], None, f"RuntimeError: {error}")

    return run
