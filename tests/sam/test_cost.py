"""Invariant 5: calls, bytes and host reads that S2SAM adds to a step, counted at the dispatcher."""

import pytest
import torch

from _counters import OpCounter
from s2sam import S2SAM

N_TENSORS, NUMEL = 100, 1000


def measure(factory, attach):
    """Calls and bytes of the third step, displacement included."""
    g = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(NUMEL, generator=g)) for _ in range(N_TENSORS)]
    optimizer = factory(params)
    sam = attach(optimizer) if attach else None
    for _ in range(3):
        gradients = [torch.randn(NUMEL, generator=g) for _ in params]
        optimizer.zero_grad()
        with OpCounter() as count:
            if sam:
                sam.displace()
            for p, gradient in zip(params, gradients, strict=True):
                p.grad = gradient
            optimizer.step()
    return count


SGD = {"default": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}


@pytest.mark.parametrize("direction", ["gradient", "momentum"])
@pytest.mark.parametrize("kind", SGD)
def test_calls_bytes_and_host_reads_added_to_a_step(kind, direction):
    def factory(params):
        return torch.optim.SGD(params, lr=0.1, momentum=0.9, **SGD[kind])

    base = measure(factory, None)
    ours = measure(factory, lambda o: S2SAM(o, direction=direction))
    added = ours.by_name - base.by_name
    per_parameter = (ours.bytes - base.bytes) / (N_TENSORS * NUMEL)
    assert 0 < added.total() <= 20
    assert added["_local_scalar_dense"] == (0 if kind == "fused" else 1)
    assert 8 <= per_parameter <= 64


@pytest.mark.parametrize("kind", ["default", "fused"])
def test_ignoring_non_finite_gradients_reads_nothing_back(kind):
    added = measure(
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, **SGD[kind]), lambda o: S2SAM(o, nonfinite="ignore")
    ).by_name
    assert added["_local_scalar_dense"] == 0


def test_rho_zero_adds_no_displacement():
    ours = measure(lambda p: torch.optim.SGD(p, lr=0.1), lambda o: S2SAM(o, rho=0.0, nonfinite="ignore"))
    base = measure(lambda p: torch.optim.SGD(p, lr=0.1), None)
    assert (ours.by_name - base.by_name) == {"_foreach_copy_": 1}


def test_no_recount_without_stats_and_some_with():
    few = measure(lambda p: torch.optim.SGD(p, lr=0.1), lambda o: S2SAM(o)).calls
    many = measure(lambda p: torch.optim.SGD(p, lr=0.1), lambda o: S2SAM(o, stats_every=1)).calls
    assert many > few + 100
