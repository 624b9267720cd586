"""Scores: values, and that they take only what they are given."""

import pytest
import torch

from s2sam.sparse import scores


def test_magnitude_and_gradient():
    w = torch.tensor([-2.0, 0.5], requires_grad=True)
    (w * torch.tensor([3.0, -4.0])).sum().backward()
    assert scores.magnitude(w).tolist() == [2.0, 0.5]
    assert scores.gradient_magnitude(w).tolist() == [3.0, 4.0]
    assert not scores.magnitude(w).requires_grad


def test_gradient_of_micro_batches_is_their_sum():
    w = torch.tensor([1.0, 1.0], requires_grad=True)
    (w * torch.tensor([3.0, 1.0])).sum().backward()
    (w * torch.tensor([-3.0, 1.0])).sum().backward()
    assert scores.gradient_magnitude(w).tolist() == [0.0, 2.0]


def test_gradient_that_is_missing():
    with pytest.raises(RuntimeError, match="run backward"):
        scores.gradient_magnitude(torch.zeros(2))


def test_random_draws_from_the_generator_alone(make_generator):
    before = torch.random.get_rng_state()
    one, same, other = (scores.random(torch.zeros(5, 3), make_generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.shape == (5, 3)
    assert torch.equal(torch.random.get_rng_state(), before)
