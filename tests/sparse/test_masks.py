"""MaskSet: in place, exact zeros, any state tensor, bits and back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.overrides import TorchFunctionMode

from s2sam.sparse.masks import MaskSet, pack_bits, unpack_bits


def make(shape=(4, 6)):
    w = nn.Parameter(torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape))
    layers = MaskSet({"w": w})
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[..., ::2] = True
    return w, layers, mask


def test_masks_change_in_place():
    w, layers, mask = make()
    place = layers.masks["w"].data_ptr()
    assert layers.masks["w"].dtype == torch.bool
    assert layers.kept() == {"w": 24}
    layers.set_({"w": mask})
    assert layers.masks["w"].data_ptr() == place
    assert layers.kept() == {"w": 12}
    place = w.data_ptr()
    layers.apply_to_weights()
    assert w.data_ptr() == place
    assert torch.equal(w != 0, mask)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_gradient_at_a_pruned_position_becomes_zero(bad):
    w, layers, mask = make()
    layers.set_({"w": mask})
    w.grad = torch.full_like(w, bad)
    w.grad[mask] = 2.0
    grad = w.grad
    layers.apply_to_gradients()
    assert w.grad is grad
    assert grad[mask].eq(2.0).all()
    assert grad[~mask].eq(0.0).all()


def test_missing_gradients_stay_missing_and_sparse_ones_are_refused():
    w, layers, _ = make()
    layers.apply_to_gradients()
    assert w.grad is None
    w.grad = torch.eye(4, 6).to_sparse()
    with pytest.raises(RuntimeError, match="sparse=False"):
        layers.apply_to_gradients()


def test_state_of_the_weights_shape_is_masked_whoever_put_it_there():
    w, layers, mask = make()
    layers.set_({"w": mask})
    optimizer = torch.optim.Adam([w])
    ones = {
        "exp_avg": torch.ones(4, 6),
        "mine": torch.ones(4, 6, dtype=torch.float64),
        "flags": torch.ones(4, 6, dtype=torch.bool),
    }
    optimizer.state[w] = {**ones, "step": torch.tensor(3.0), "row": torch.ones(4), "note": "text"}
    layers.apply_to_state(optimizer)
    state = optimizer.state[w]
    assert all(torch.equal(state[key] != 0, mask) for key in ones)
    assert state["step"] == 3
    assert state["row"].sum() == 4
    assert len(optimizer.state) == 1


def test_masks_follow_the_weights_to_another_device():
    w, layers, _ = make()
    layers.weights["w"] = w.to("meta")  # stands for any device
    layers.follow_device()
    assert layers.masks["w"].device.type == "meta"


def test_fits_and_misfits():
    w, layers, mask = make()
    layers.set_({"w": mask})
    assert not layers.fits()
    assert layers.misfits() == ["w"]
    assert layers.fits({"w": w.detach() * mask})
    layers.apply_to_weights()
    assert layers.fits()


@given(st.lists(st.booleans(), min_size=1, max_size=50))
def test_bits_round_trip(bits):
    mask = torch.tensor(bits)
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8
    assert packed.numel() == (len(bits) + 7) // 8
    assert torch.equal(unpack_bits(packed, mask.shape), mask)


def test_bits_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="no packed mask of shape"):
        unpack_bits(torch.zeros(3, dtype=torch.uint8), (3, 3))


def test_a_step_costs_one_call_per_gradient_and_one_each_for_weights_and_state():
    class Count(TorchFunctionMode):
        def __init__(self):
            super().__init__()
            self.calls = []

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.calls.append(getattr(func, "__name__", str(func)))
            return func(*args, **(kwargs or {}))

    weights = {str(i): nn.Parameter(torch.ones(3, 3)) for i in range(10)}
    optimizer = torch.optim.SGD(weights.values(), lr=0.1, momentum=0.9)
    layers = MaskSet(weights)
    for w in weights.values():
        w.grad = torch.ones(3, 3)
    optimizer.step()
    with Count() as count:
        layers.apply_to_gradients()
        layers.apply_to_weights()
        layers.apply_to_state(optimizer)
    assert count.calls.count("where") == 10
    assert count.calls.count("_foreach_mul_") == 2
