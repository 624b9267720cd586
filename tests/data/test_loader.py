"""Batches: each image once an epoch, and a resume that is equal bit by bit from every position."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor

from s2sam.data.augment import Augment
from s2sam.data.loader import Batches

N = 11


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels() -> Tensor:
    return torch.randint(0, 256, (N, 3, 8, 8), dtype=torch.uint8, generator=gen(9))


def make(seed: int = 0, batch_size: int = 4, drop_last: bool = False) -> Batches:
    augment = Augment(torch.full((3,), 0.5), torch.full((3,), 0.25), "crop+flip", padding=2)
    return Batches(pixels(), torch.arange(N), batch_size, gen(seed), augment, drop_last)


def take(batches: Batches, count: int) -> list[tuple[Tensor, Tensor]]:
    """The next `count` batches, over as many epochs as it takes."""
    found: list[tuple[Tensor, Tensor]] = []
    while len(found) < count:
        for batch in batches:
            found.append(batch)
            if len(found) == count:
                break
    return found


def same(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(p, q) for x, y in zip(a, b, strict=True) for p, q in zip(x, y, strict=True)
    )


@pytest.mark.parametrize(("batch_size", "drop_last", "sizes"), [
    (4, False, [4, 4, 3]), (4, True, [4, 4]), (11, True, [11]), (50, False, [11]), (1, False, [1] * 11),
])  # fmt: skip
def test_an_epoch_is_a_permutation(batch_size: int, drop_last: bool, sizes: list[int]) -> None:
    batches = Batches(pixels(), torch.arange(N), batch_size, gen(), drop_last=drop_last)
    seen = list(batches)
    assert [len(y) for _, y in seen] == sizes
    assert len(batches) == len(sizes)
    order = torch.cat([y for _, y in seen])
    assert len(order.unique()) == len(order) == sum(sizes)
    assert torch.equal(torch.cat([x for x, _ in seen]), pixels()[order])  # images and labels stay together


def test_epochs_differ_and_seeds_repeat() -> None:
    batches = make()
    first, second = list(batches), list(batches)
    assert not torch.equal(first[0][1], second[0][1])
    assert same(take(make(), 6), first + second)
    assert not same(list(make(1)), first)


def test_order_is_uniform() -> None:
    batches = Batches(torch.zeros(3), torch.arange(3), 3, gen())
    orders = torch.stack([next(iter(batches))[1] for _ in range(6000)])
    counts = (orders * torch.tensor([9, 3, 1])).sum(dim=1).unique(return_counts=True)[1]
    assert len(counts) == 6
    assert ((counts - 1000).abs() < 150).all()


def test_global_random_state_is_untouched() -> None:
    before = torch.random.get_rng_state()
    list(make())
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("position", range(10))
def test_resume_is_bit_equal_from_every_position(position: int) -> None:
    """State after k batches, saved in the loop body as a trainer does, mid-epoch and at both ends of epochs."""
    run = make(7)
    before: list[tuple[Tensor, Tensor]] = []
    rest: list[tuple[Tensor, Tensor]] = []
    state = run.state_dict() if position == 0 else None
    for _ in range(4):
        for batch in run:
            (before if state is None else rest).append(batch)
            if len(before) == position and state is None:
                buffer = io.BytesIO()
                torch.save(run.state_dict(), buffer)
                buffer.seek(0)
                state = torch.load(buffer, weights_only=True)
    assert len(before) == position
    assert len(rest) == 12 - position

    resumed = make(seed=99)  # another seed: everything must come from the state
    assert state is not None
    resumed.load_state_dict(state)
    again = [batch for _ in range(5) for batch in resumed][: len(rest)]
    assert same(again, rest)


def test_a_state_of_the_last_batch_ends_its_epoch_first() -> None:
    run = make()
    for i, _ in enumerate(run):
        if i == 2:
            state = run.state_dict()
    resumed = make(5)
    resumed.load_state_dict(state)
    assert list(resumed) == []  # nothing is left of that epoch
    assert same(list(resumed), list(run))


def test_a_state_between_epochs_starts_a_new_one() -> None:
    run = make()
    list(run)
    state = run.state_dict()
    assert state["position"] == 0
    assert state["epoch_start"] is None
    resumed = make(5)
    resumed.load_state_dict(state)
    assert same(list(resumed), list(run))


def test_draws_of_others_between_batches_are_resumed_too() -> None:
    run = make()
    iterator = iter(run)
    next(iterator)
    torch.rand(3, generator=run.generator)  # another consumer of the same generator
    state = run.state_dict()
    rest = list(iterator)
    resumed = make(5)
    resumed.load_state_dict(state)
    assert same(list(resumed), rest)


def test_loading_in_the_middle_of_another_epoch() -> None:
    run, other = make(1), make(2)
    next(iter(run))
    state = run.state_dict()
    next(iter(other))
    other.load_state_dict(state)
    twin = make(3)
    twin.load_state_dict(state)
    assert same(list(other), list(twin))


def test_break_starts_a_new_epoch() -> None:
    batches = make()
    for _ in batches:
        break
    assert sorted(torch.cat([y for _, y in batches]).tolist()) == list(range(N))


def test_a_state_is_not_changed_by_going_on() -> None:
    batches = make()
    next(iter(batches))
    state = batches.state_dict()
    copy = {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
    list(batches)
    assert all(torch.equal(v, copy[k]) if isinstance(v, Tensor) else v == copy[k] for k, v in state.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(5), torch.zeros(4), 2), "images and labels must match: 5 on cpu and 4 on cpu"),
        ((torch.zeros(5), torch.zeros(5, device="meta"), 2), "5 on cpu and 5 on meta"),
        ((torch.zeros(5), torch.zeros(5), 0), "batch_size must be a whole number of at least 1, got 0"),
        ((torch.zeros(5), torch.zeros(5), 2.0), "batch_size must be"),
        ((torch.zeros(0), torch.zeros(0), 2), "0 images make no batch of 2"),
    ],
)
def test_bad_arguments(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batches(*arguments, gen())


def test_an_epoch_without_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="5 images make no batch of 6; lower batch_size"):
        Batches(torch.zeros(5), torch.zeros(5), 6, gen(), drop_last=True)


@pytest.mark.parametrize(("key", "value"), [("images", 12), ("batch_size", 5), ("drop_last", True)])
def test_a_foreign_state_is_refused(key: str, value: int) -> None:
    state = make().state_dict() | {key: value}
    with pytest.raises(ValueError, match=f"saved with {key}={value}, but the loader has {key}="):
        make().load_state_dict(state)
