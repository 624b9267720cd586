"""Shared fixtures: one torch thread, generators, and the folder of real images where there is one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)
hypothesis.settings.register_profile("no timings", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("no timings")


@pytest.fixture
def make_generator() -> Callable[[int], torch.Generator]:
    """`make_generator(seed)` -> a CPU generator of its own."""
    return lambda seed=0: torch.Generator().manual_seed(seed)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder that holds `cifar10-jpeg`: S2SAM_TEST_DATA, else ../shared/data beside the repository, else skip."""
    named = os.environ.get("S2SAM_TEST_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        if named:
            pytest.fail(f"S2SAM_TEST_DATA names {folder}, which is not a folder")
        pytest.skip("no real images: set S2SAM_TEST_DATA to a folder that holds cifar10-jpeg/train.parquet")
    return folder


@pytest.fixture(scope="session")
def cifar10(real_data: Path) -> Path:
    """The folder of CIFAR-10 as parquet, or skip."""
    folder = real_data / "cifar10-jpeg"
    if not (folder / "train.parquet").is_file():
        pytest.skip(f"no CIFAR-10: {folder} has no train.parquet")
    return folder


@pytest.fixture(autouse=True)
def _same_global_random_state() -> None:
    """Every test starts from the same global state, whatever ran before it."""
    torch.random.default_generator.manual_seed(0)
