"""DistributedDataParallel on two processes equals one process on the concatenated batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sam_common import FACTORIES, distance, make_data, make_net, same, snapshot, total

from s2sam import S2SAM

RHO = 0.3
STEPS = 12
CASES = [
    {"view": view, "factory": factory, "place": place, "direction": direction}
    for view, factory, place, direction in [
        (False, "sgd", "inner", "gradient"),
        (True, "sgd", "inner", "gradient"),
        (True, "sgd-fused", "outer", "gradient"),
        (False, "adamw", "outer", "gradient"),
        (False, "sgd", "outer", "random"),
        (False, "sgd", "outer", "ema"),
    ]
]


def train(net, wrap, factory, place, batches, bad, direction):
    """Train with accumulation every third step and a bad batch at one; returns weights and ||x - w|| of every step."""
    model = wrap(net)
    optimizer = FACTORIES[factory](net.parameters())
    sam = S2SAM(optimizer, model=model if place == "outer" else net, rho=RHO, direction=direction)
    radii = []
    for step, parts in enumerate(batches):
        w = snapshot(net)
        for i, (x, y) in enumerate(parts):
            if step == 7 and bad:
                x = x * float("nan")
            last = i == len(parts) - 1
            with model.no_sync() if hasattr(model, "no_sync") and not last else torch.enable_grad():
                (F.cross_entropy(model(x), y) / len(parts)).backward()
        radii.append(total([p - q for p, q in zip(net.parameters(), w, strict=True)]))
        optimizer.step()
        optimizer.zero_grad()
        assert same(net.parameters(), w) == (step == 7)
    assert sam.stats["skipped"] == 1
    return snapshot(net), radii


def batches_of(rank=None):
    """Steps of one or two micro-batches of 16; half of each for a rank."""
    data = iter(make_data(2 * STEPS))
    halves = slice(None) if rank is None else slice(8 * rank, 8 * rank + 8)
    return [
        [(x[halves], y[halves]) for x, y in (next(data) for _ in range(1 + (step % 3 == 0)))] for step in range(STEPS)
    ]


def worker(folder):
    """One rank: every case, its results into `folder`."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    store = dist.FileStore(str(Path(folder) / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    for number, case in enumerate(CASES):
        wrap = lambda net, case=case: DistributedDataParallel(net, gradient_as_bucket_view=case["view"])  # noqa: E731
        # only rank 1 sees the bad batch: the skip must be common all the same
        torch.manual_seed(5 + 10 * rank)  # the noise is that of rank 0
        result = train(make_net(), wrap, case["factory"], case["place"], batches_of(rank), rank == 1, case["direction"])
        torch.save(result, Path(folder) / f"{number}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the two ranks saved."""
    folder = tmp_path_factory.mktemp("ddp")
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_distributed as t; t.worker('.')"
    )
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=folder, env=os.environ | {"RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        errors = [rank.communicate(timeout=90)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("number", range(len(CASES)), ids=["-".join(map(str, c.values())) for c in CASES])
def test_two_ranks_equal_one_process(results, number):
    case = CASES[number]
    (first, first_radii), (second, second_radii) = (
        torch.load(results / f"{number}-{rank}.pt", weights_only=True) for rank in range(2)
    )
    assert same(first, second)  # ranks agree bit by bit
    assert first_radii == second_radii
    torch.manual_seed(5)
    expected, radii = train(
        make_net(), lambda net: net, case["factory"], "inner", batches_of(), True, case["direction"]
    )
    assert distance(first, expected) < 1e-12
    assert radii[1:] == pytest.approx([RHO] * (STEPS - 1), rel=1e-9)
    assert first_radii == pytest.approx(radii, rel=1e-9)
