"""Runs as tasks of a Ray cluster: where RAY_ADDRESS says, else on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from s2sam.suite.pool import Outcome, train_one
from s2sam.train.config import TrainConfig


def ray_runner(
    options: Mapping[str, Any] | None = None,
) -> Callable[[Mapping[str, TrainConfig], int], Iterator[Outcome]]:
    """A runner for :func:`s2sam.suite.pool.train_all`; at most `jobs` tasks run at a time.

    Args:
        options: of `ray.remote`, such as {"num_gpus": 0.25}; all machines must see the runs and the data.

    Raises:
        RuntimeError: ray is not installed.
        ValueError: an option that `ray.remote` does not know.
    """
    try:
        import ray
    except ModuleNotFoundError:
        raise RuntimeError("--launcher ray needs the package ray; pip install 's2sam[ray]'") from None
    try:
        train = ray.remote(**{"num_cpus": 1, "max_retries": 2, **(options or {})})(train_one)
    except (ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"Ray does not take these launcher options: {error}") from None

    def run(configs: Mapping[str, TrainConfig], jobs: int) -> Iterator[Outcome]:
        started = not ray.is_initialized()
        if started:
            ray.init(log_to_driver=False)
        queue, names = list(configs.items()), dict[Any, str]()
        try:
            while queue or names:
                while queue and len(names) < jobs:
                    name, config = queue.pop(0)
                    names[train.remote(name, config)] = name
                done, _ = ray.wait(list(names), num_returns=1)
                name = names.pop(done[0])
                try:
                    yield ray.get(done[0])
                except ray.exceptions.RayError as error:
                    yield name, None, f"RuntimeError: {error}"
        finally:
            for reference in names:
                ray.cancel(reference)
            if started:
                ray.shutdown()

    return run
