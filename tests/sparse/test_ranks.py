"""Two gloo ranks with different data: the same masks on both, and those of one process on the whole batch."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from s2sam.sparse import sync
from s2sam.sparse.masks import unpack_bits

sys.path.insert(0, str(Path(__file__).parent))
from sparse_ranks import STEPS, bn_net, scored_before_ddp, train
from sparse_support import equal_masks, make_net, rows

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


@pytest.mark.parametrize("name", ["snip", "grasp"])
def test_scores_taken_before_ddp_are_those_of_rank_0s_weights_and_all_data(name, ranks):
    one, two = (rank["scored"][name] for rank in ranks)
    single = scored_before_ddp(name, 0, 1)
    assert equal_masks(one, two)
    assert equal_masks(one, single)
    other = bn_net(seed=1)
    assert not torch.equal(other[0].weight, bn_net(seed=0)[0].weight)


def test_adopted_masks_are_rank_0s_zeros(ranks):
    for one, two, p in zip(*(rank["adopted"] for rank in ranks), [*make_net().parameters()] * 2, strict=True):
        wanted = torch.ones_like(p, dtype=torch.bool)
        wanted[:, ::2] = False
        assert torch.equal(one, wanted) and torch.equal(two, wanted)


def test_what_one_rank_finds_is_told_on_every_rank(ranks):
    assert all("would be pruned a second time" in rank["sparse on one rank"] for rank in ranks)
    for rank, before in zip(ranks, ("rank 1: ", ""), strict=True):
        assert len(rank["misfit on one rank"]) == 2
        assert all(f"{before}the masks do not fit the weights: 1 layers" in told for told in rank["misfit on one rank"])


@pytest.mark.parametrize("name", ["snip", "grasp"])
def test_a_rank_without_batches_lets_no_other_wait(name, ranks):
    for rank, before in zip(ranks, ("rank 1: ", ""), strict=True):
        assert f"{before}method '{name}' needs some batches and got 0" in rank["without batches"][name]


def test_join_is_refused_at_once_by_methods_that_change_masks_and_serves_the_others(ranks):
    for rank in ranks:
        for name in ("rigl", "gmp"):
            assert f"'{name}' changes its masks on all ranks at once" in rank["joined"][name]
            assert "(drop_last)" in rank["joined"][name] and "method='static'" in rank["joined"][name]
        assert rank["joined"]["static"] == rank["joined, frozen"] == ""


def test_one_process_alone_needs_no_process_group():
    assert sync.world_size() == 1
    masks = {"a": torch.tensor([True, False])}
    sync.broadcast_masks(masks)
    sync.check_same(masks)
    assert masks["a"].tolist() == [True, False]
    torch.random.default_generator.manual_seed(12)
    assert sync.shared_seed() == 12
