"""Sharded parameters: what the ranks of sharded_ranks.py have saved equals one process; a window keeps its promises."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sharded_ranks as ranks
import torch
from sam_common import distance, same

SCRIPT = Path(__file__).parent / "sharded_ranks.py"
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """saved(job) -> what each rank has saved, by the names of its functions."""

    @functools.cache
    def run(job):
        folder, world = tmp_path_factory.mktemp(job), 4 if job.endswith("4") else 2
        started = [
            subprocess.Popen(
                [sys.executable, str(SCRIPT), str(rank), str(world), str(folder), job],
                env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
            for rank in range(world)
        ]  # fmt: skip
        try:
            errors = [rank.communicate(timeout=280)[1] for rank in started]
        finally:
            for rank in started:
                rank.kill()
        assert [rank.returncode for rank in started] == [0] * world, "\n".join(errors)
        return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world)]

    return run


def check_case(results, name):
    """Every rank has the weights, the displacements and the numbers of one process on the whole batches."""
    run, _way, factory, options = (ranks.CASES | ranks.CASES4)[name.removesuffix("-float32")]
    single = name.endswith("-float32")
    expected = run("none", factory, 0, options, torch.float32 if single else torch.float64)
    near = 2e-6 if single else 1e-12
    for rank, found in enumerate(results):
        assert same(found[name]["weights"], results[0][name]["weights"])  # ranks agree bit by bit
        assert distance(found[name]["weights"], expected["weights"]) < (1e-6 if single else 1e-12)
        assert found[name]["radii"] == pytest.approx(expected["radii"], rel=near)
        if not options.get("scale"):
            assert found[name]["radii"] == pytest.approx([ranks.RHO] * len(expected["radii"]), rel=near)
        for here, there in zip(found[name].get("stats", []), expected.get("stats", []), strict=True):
            for key in here:  # a fused step of one process does not tell the host that a window opens at the old x
                if (key, factory) != ("projection", "adamw-fused"):
                    assert here[key] == pytest.approx(there[key], rel=near, abs=near, nan_ok=True), key
        for here, there in zip(found[name].get("outputs", []), expected.get("outputs", []), strict=True):
            share = slice(rank * len(here), (rank + 1) * len(here)) if len(here) < len(there) else slice(None)
            if len(results) == 2:
                assert torch.allclose(here, there[share], rtol=near, atol=near)
        if options.get("direction") == "random":  # the noise is that of one process, bit by bit
            assert same(found[name]["buffers"], expected["buffers"])


@pytest.mark.parametrize("name", ranks.case_names(ranks.CASES))
def test_two_ranks_equal_one_process(saved, name):
    check_case([rank["cases"] for rank in saved("cases")], name)


@pytest.mark.parametrize("name", ranks.case_names(ranks.CASES4))
def test_two_dims_of_a_mesh_equal_one_process(saved, name):
    check_case([rank["cases4"] for rank in saved("cases4")], name)
