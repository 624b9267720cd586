"""Sharded parameters: what the ranks of sharded_ranks.py have saved equals one process; a window keeps its promises."""

import functools
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sharded_ranks as ranks
import torch
from sam_common import distance, same

SCRIPT = Path(__file__).parent / "sharded_ranks.py"
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """saved(job) -> what each rank has saved, by the names of its functions. Workers of pytest-xdist share the runs."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    @functools.cache
    def run(job):
        folder, world = base / f"sharded-{job}", 4 if job.endswith("4") else 2
        try:
            folder.mkdir()
        except FileExistsError:
            while not (folder / "done").exists():  # pytest's timeout ends this if the other worker died
                time.sleep(0.2)
        else:
            errors = start(job, folder, world)
            (folder / "started").write_text(errors)
            (folder / "started").rename(folder / "done")
        assert not (folder / "done").read_text(), (folder / "done").read_text()
        return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world)]

    def start(job, folder, world):
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
        return "" if not any(rank.returncode for rank in started) else "\n".join(errors) or "a rank failed"

    return run


def test_importing_s2sam_and_sam_loads_nothing_of_dtensors():
    code = (
        "import sys, s2sam.sam.two_step, s2sam.sam.single_step;"
        "print(any(name.startswith('torch.distributed.tensor') for name in sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert run.stdout == "False\n", run.stderr


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


@pytest.mark.parametrize("name", sorted(ranks.case_names(ranks.CASES)))
def test_two_ranks_equal_one_process(saved, name):
    job = "sam" if name.startswith("sam") else name.partition("-")[0]
    check_case([rank[f"{job}_cases"] for rank in saved(job)], name)


@pytest.mark.parametrize("name", ranks.case_names(ranks.CASES4))
def test_two_dims_of_a_mesh_equal_one_process(saved, name):
    check_case([rank["cases4"] for rank in saved("cases4")], name)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_norms_count_every_entry_of_every_mesh_once(saved, dtype):
    for rank in saved("cases4"):
        for name, (here, there) in rank["norms4"][f"torch.{dtype}"].items():
            assert here == pytest.approx(there, rel=1e-12 if dtype == "float64" else 1e-6), name
            assert there != 0
        assert rank["norms4"]["one infinite"] is False


def test_ranks_outside_the_mesh_of_the_parameters_do_not_wait(saved):
    found = [rank["outside4"] for rank in saved("cases4")]
    whole = torch.cat([rank["shard"] for rank in found])
    assert torch.allclose(whole, 1 - 0.3 * torch.arange(4.0, dtype=torch.float64), rtol=1e-12)
    assert [rank["displacement"] for rank in found] == pytest.approx([ranks.RHO, ranks.RHO, 0, 0], rel=1e-12)


@pytest.mark.parametrize("way", ["fsdp", "bf16", "kept", "tp"])
def test_every_forward_sees_the_weights_that_it_should(saved, way):
    """FSDP2 keeps the gathered weights of its root after a forward: they go whenever the weights move."""
    for rank in saved("windows"):
        found = rank["looks"][way]
        assert found["distance"] == pytest.approx(ranks.RHO, rel=1e-6)
        assert found["back"] == 0  # restored exactly
        assert found["doubled"] == pytest.approx(2 * ranks.RHO, rel=1e-6)
        assert all(torch.equal(out, found["w"][0]) for out in found["w"][1:])
        assert all(torch.equal(out, found["x"][0]) for out in found["x"][1:])
        for out, plain in zip((found["w"][0], found["x"][0]), found["plain"], strict=True):
            assert float((out - plain).abs().max()) < (0.05 if way == "bf16" else 1e-12)
        assert float((found["w"][0] - found["x"][0]).abs().max()) > 0.5


@pytest.mark.parametrize("way", ["fsdp", "tp"])
def test_displaced_without_a_model_drops_gathered_weights_too(saved, way):
    for rank in saved("windows"):
        found = rank["without_a_model"][way]
        assert found["distance"] == pytest.approx(ranks.RHO, rel=1e-12)
        for out, plain in zip(found["outputs"], found["plain"], strict=True):
            assert torch.allclose(out, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", ["fsdp", "tp"])
def test_the_backward_of_a_look_is_taken_at_w(saved, way):
    assert all(rank["graphs"][way]["distance"] < 1e-12 for rank in saved("windows"))


@pytest.mark.parametrize("part", ["up", "all"])
@pytest.mark.parametrize("way", ["fsdp", "tp"])
def test_a_backward_after_its_weights_have_moved_raises(saved, way, part):
    assert all("modified by an inplace operation" in rank["graphs"][way][part] for rank in saved("windows"))


@pytest.mark.parametrize(
    ("case", "skips"),
    [
        ("fsdp-sgd-False", 2),
        ("fsdp-adamw-fused-False", 2),
        ("fsdp-adamw-fused-True", 2),
        ("fsdp-sgd-True", 0),  # this optimizer is not called by a GradScaler that skips
        ("tp-adamw-False", 2),
        ("sam-sgd-False", 2),
    ],
)
def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all(saved, case, skips):
    for rank in saved("windows"):
        assert rank["agreement"][case] == [[False, False, True], skips, True]


@pytest.mark.parametrize("moment", ["open", "closed"])
@pytest.mark.parametrize("case", ["fsdp-sgd", "fsdp-adamw", "tp-adamw"])
def test_a_distributed_checkpoint_holds_w_and_goes_on_bit_for_bit(saved, case, moment):
    for number, rank in enumerate(saved("checkpoints")):
        found = rank["checkpoints"][f"{case}-{moment}"]
        if moment == "open":
            assert found["sharded"] == 0
            assert number == 1 or found["full"] == 0  # torch gives it to rank 0 alone, or to all
        assert found["weights"]
        assert found["buffers"]
        assert found["steps"] == 9


REFUSALS = {
    **{f"fsdp1-{how}{who}": "fully_shard (FSDP2)" for how in (True, False) for who in ("", "-sam", "-alone")},
    "filter": "is sharded along dim 1; use another scale",
    "meshes": "meshes of different ranks ([0] and [0, 1])",
    "inner": "(the root) as model=...",
    "whole": "set_optimizer_state_dict",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_on_every_rank_change_nothing(saved, name):
    sentences = [rank["refusals"][name] for rank in saved("windows")]
    assert REFUSALS[name] in sentences[0]
    assert sentences[0] == sentences[1]
