"""Batches that come twice in a row (echo): the same draws, epochs of as many steps, resume between the visits."""

import pytest
import torch

from s2sam.data.loader import Batches


def make(n=11, size=3, visits=2, seed=0):
    def augment(x, generator):
        return x + torch.rand(x.shape, generator=generator)

    return Batches(
        torch.arange(float(n)), torch.arange(n), size, torch.Generator().manual_seed(seed), augment, visits=visits
    )


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(p, q) for x, y in zip(a, b, strict=True) for p, q in zip(x, y, strict=True)
    )


@pytest.mark.parametrize("n", [11, 12, 15])
def test_every_batch_comes_twice_with_the_same_draws_and_a_permutation_lasts_two_epochs(n):
    batches = make(n)
    seen = [batch for _ in range(4) for batch in batches]
    assert len(seen) == 4 * len(batches)
    assert same(seen[::2], seen[1::2])
    for start in (0, 2 * len(batches)):  # all images, each twice
        labels = torch.cat([y for _, y in seen[start : start + 2 * len(batches)]])
        assert sorted(labels.tolist()) == sorted([*range(n), *range(n)])
    assert not same(seen[: 2 * len(batches)], seen[2 * len(batches) :])


def test_the_distinct_batches_are_those_of_one_visit_if_nothing_is_drawn_besides():
    plain = Batches(torch.arange(12.0), torch.arange(12), 3, torch.Generator().manual_seed(0))
    twice = Batches(torch.arange(12.0), torch.arange(12), 3, torch.Generator().manual_seed(0), visits=2)
    assert same([*plain], [*twice, *twice][::2])


@pytest.mark.parametrize("n", [11, 15])
@pytest.mark.parametrize("position", range(0, 17))
def test_resume_is_bit_equal_between_any_two_visits(n, position):
    whole, batches = make(n), make(n)
    expected = [batch for _ in range(6) for batch in whole]
    found, epoch, state = [], iter(batches), None
    while len(found) < position:
        try:
            found.append(next(epoch))
        except StopIteration:
            epoch = iter(batches)
    between = position % len(batches) == 0 and position > 0
    for ended in (False, True) if between else (False,):  # saved before, and after, the epoch has ended
        if ended:
            assert next(epoch, None) is None
        state = batches.state_dict()
        again = make(n, seed=5)
        again.load_state_dict(state)
        rest = [batch for _ in range(7) for batch in again][: len(expected) - position]
        assert same(rest, expected[position:])
        assert sum(1 for _ in make_loaded(n, state)) == (
            len(batches) if ended or not position else (-position) % len(batches)
        )


def make_loaded(n, state):
    batches = make(n, seed=7)
    batches.load_state_dict(state)
    return batches


def test_what_a_caller_draws_after_a_batch_is_the_same_in_both_visits():
    batches, drawn = make(), []
    for _ in batches:
        drawn.append(float(torch.rand((), generator=batches.generator)))
    assert drawn[0::2] == drawn[1::2] and drawn[0] != drawn[2]
