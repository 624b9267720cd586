"""Two gloo ranks with different data: the same masks on both, and those of one process on the whole batch."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from s2sam.sparse import sync
from s2sam.sparse.masks import unpack_bits

sys.path.insert(0, str(Path(__file__).parent))
from sparse_ranks import STEPS, train
from sparse_support import rows

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Both ranks' results."""
    folder = tmp_path_factory.mktemp("ranks")
    workers = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("sparse_ranks.py")), str(rank), "2", str(folder)]
        )
        for rank in (0, 1)
    ]
    try:
        assert [worker.wait(timeout=100) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@rows()
def test_ranks_agree_with_each_other_and_with_one_process(info, ranks):
    one, two = (rank[info.name] for rank in ranks)
    single, sparsifier, net = train(info, 0, 1)
    assert len(one["path"]) == len(two["path"]) == len(single) == STEPS + 1
    for step, (a, b, masks) in enumerate(zip(one["path"], two["path"], single, strict=True)):
        for name, mask in masks.items():
            assert torch.equal(a[name], b[name]), f"ranks differ in {name} after step {step}"
            assert torch.equal(unpack_bits(a[name], mask.shape), mask), (
                f"{name} differs from one process after step {step}"
            )
    assert torch.equal(one["generator"], two["generator"])
    assert torch.equal(one["generator"], sparsifier.generator.get_state())
    assert all(torch.equal(a, b) for a, b in zip(one["weights"], two["weights"], strict=True))
    assert all(torch.allclose(a, p, rtol=1e-9) for a, p in zip(one["weights"], net.parameters(), strict=True))
    changed = any(not torch.equal(single[0][name], mask) for name, mask in single[-1].items())
    assert changed == (info.kind in ("dynamic", "structured"))


@rows()
def test_masks_are_rank_0s_even_where_gradients_are_not_averaged(info, ranks):
    one, two = (rank[f"{info.name}-alone"] for rank in ranks)
    assert not any(torch.equal(a, b) for a, b in zip(one["weights"], two["weights"], strict=True))
    assert all(torch.equal(one["masks"][name], two["masks"][name]) for name in one["masks"])


def test_top_kasts_second_set_is_rank_0s_before_ddp_shares_the_weights(ranks):
    # nothing is averaged here, so that each rank would choose another one
    one, two = (rank["top-kast-alone"]["backward"] for rank in ranks)
    assert one.keys() == two.keys() != set()
    assert all(torch.equal(mask, two[name]) for name, mask in one.items())


def test_generators_of_ranks_take_over_rank_0s_state(ranks):
    one, two = (rank["own generators"] for rank in ranks)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_rank_may_load_weights_alone(ranks):
    assert [rank["loaded"] for rank in ranks] == [3, 3]


def test_ranks_that_disagree_are_named(ranks):
    assert all("the masks of ranks [1] differ from rank 0's" in rank["broken"] for rank in ranks)


def test_one_process_alone_needs_no_process_group():
    assert sync.world_size() == 1
    masks = {"a": torch.tensor([True, False])}
    sync.broadcast_masks(masks)
    sync.check_same(masks)
    assert masks["a"].tolist() == [True, False]
    torch.random.default_generator.manual_seed(12)
    assert sync.shared_seed() == 12
