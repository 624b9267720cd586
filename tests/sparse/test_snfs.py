"""SNFS by hand: a dense momentum of its own, growth spread by its mean over active weights, top |m| in each layer."""

import sys
from pathlib import Path

import pytest
import torch

from s2sam import S2SAM, SAM, sparsify

sys.path.insert(0, str(Path(__file__).parent))
from sparse_support import generator, golden_pair, loss_fn, make_batches, make_net, step_by, train_scaled

# |w| of a: .5 .1 .3 .2 .6 .4, of b: .4 .3 .2 .1
MASKS = {"a": [1] * 6 + [0] * 6, "b": [0] * 8 + [1] * 4}
WEIGHTS = {"a": [0.5, -0.1, 0.3, -0.2, 0.6, -0.4, *[0.0] * 6], "b": [*[0.0] * 8, 0.4, -0.3, 0.2, -0.1]}
HALF = {"total_steps": 10**6, "delta_t": 1, "drop_fraction": 0.5001}
A = [4e-3, 4e-3, 4e-3, 4e-3, 4e-3, 4e-3, 0.2e-3, 3e-3, 0.1e-3, -7e-3, 0.0, 1e-3]  # mean |m| over active weights: 4e-3
B = [5e-3, 0.0, 0.0, -9e-3, 0.0, 0.0, 0.0, 0.0, 6e-3, -6e-3, 6e-3, -6e-3]  # 6e-3


def pair(**options):
    return golden_pair(MASKS, WEIGHTS, "snfs", **{**HALF, **options})


def active(snfs):
    return {name: mask.flatten().nonzero().flatten().tolist() for name, mask in snfs.masks.items()}


def test_golden_change():
    net, optimizer, snfs = pair()
    step_by(net, optimizer, A, B)
    # a drops 1, 2, 3 and b 10, 11: five places, shared 2 to 3; the largest |m| not kept: a's 9 and 1, b's 3, 10, 11
    assert active(snfs) == {"a.weight": [0, 1, 4, 5, 9], "b.weight": [3, 8, 9, 10, 11]}
    assert snfs.last_update.grown == {"a.weight": 1, "b.weight": 1}
    a, b = (net[name].weight.detach().flatten() for name in "ab")
    assert float(a[9]) == float(b[3]) == 0.0
    assert float(a[1]) == pytest.approx(-0.1 - 0.5 * 4e-3), "dropped and grown at once: it keeps its value"


def test_what_was_dropped_stays_out_if_asked():
    net, optimizer, snfs = pair(regrow_dropped=False)
    step_by(net, optimizer, A, B)
    # two of a's six free places by |m|: 9, 7; three of b's: 3, 0, and of those with 0 the first
    assert active(snfs) == {"a.weight": [0, 4, 5, 7, 9], "b.weight": [0, 1, 3, 8, 9]}


def test_overflow_goes_to_the_other_layer():
    net, optimizer, snfs = golden_pair(
        {"a": [1] * 11 + [0], "b": MASKS["b"]}, {"a": [1.0] * 11 + [0.0], "b": WEIGHTS["b"]}, "snfs",
        **{**HALF, "regrow_dropped": False},
    )  # fmt: skip
    step_by(net, optimizer, [1.0] * 12, B)
    # a gives up the one weight it has a place for, b two; b takes two of the three, though it has hardly a share
    assert snfs.last_update.dropped == {"a.weight": 1, "b.weight": 2}
    assert snfs.last_update.grown == {"a.weight": 1, "b.weight": 2}


def test_a_dense_layer_takes_back_what_it_dropped_if_its_share_is_large():
    net, optimizer, snfs = golden_pair(
        {"a": [1] * 12, "b": MASKS["b"]}, {"a": [1.0] * 12, "b": WEIGHTS["b"]}, "snfs", **HALF
    )
    step_by(net, optimizer, [1e-2] * 12, [0.0] * 8 + [1e-4] * 4)
    assert snfs.parts[0].kept == {"a.weight": 12, "b.weight": 4}
    assert snfs.survival() == 1.0


def test_a_layer_keeps_a_weight():
    net, optimizer, snfs = pair(drop_fraction=1.0, regrow_dropped=False)
    step_by(net, optimizer, A, [0.0] * 12)
    # a gives up 5, b 3; a takes all it has room for, 6, and b the rest
    assert snfs.last_update.grown == {"a.weight": 6, "b.weight": 2}
    assert active(snfs)["b.weight"][-1] == 8


def test_the_momentum_is_dense_and_the_optimizer_s_is_not():
    net, optimizer, snfs = pair(delta_t=10, beta=0.5)
    step_by(net, optimizer, A, B)
    step_by(net, optimizer, B, A)
    expected = 0.5 * torch.tensor(A) + torch.tensor(B)
    assert torch.allclose(snfs.momentum["a.weight"].flatten(), expected)
    state = optimizer.state[net["a"].weight]["momentum_buffer"].flatten()
    assert state[6:].abs().sum() == 0 and state[:6].abs().min() > 0
    assert net["a"].weight.grad.flatten()[6:].abs().sum() == 0


def test_the_share_follows_the_cosine():
    _, _, snfs = pair(total_steps=10, drop_fraction=1.0)
    part = snfs.parts[0]
    assert [snfs.drop_count(part, "a.weight", t) for t in range(11)] == [5, 5, 5, 4, 3, 3, 2, 1, 0, 0, 0]
    assert not snfs.due(part, 10)


def test_gradients_masked_for_clipping_were_seen_before():
    nets = [pair(), pair()]
    for clipped, (net, optimizer, snfs) in enumerate(nets):
        for p, g in zip(net.parameters(), (A, B), strict=True):
            p.grad = torch.tensor(g).view(3, 4)
        if clipped:
            snfs.mask_gradients()
            assert net["a"].weight.grad.flatten()[6:].abs().sum() == 0
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    assert active(nets[0][2]) == active(nets[1][2])
    assert torch.equal(nets[0][2].momentum["a.weight"], nets[1][2].momentum["a.weight"]), "and once only"


@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_scale_makes_no_difference(fused):
    found = []
    for scaled in (False, True):
        net = make_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, fused=fused)
        snfs = sparsify(net, optimizer, method="snfs", sparsity=0.7, total_steps=60, delta_t=3, generator=generator())
        train_scaled(net, optimizer, enabled=scaled)
        found.append(snfs.momentum["0.weight"])
    assert found[0].abs().max() > 0
    assert torch.allclose(*found, atol=1e-7)


def test_bad_gradients_leave_no_trace():
    net, optimizer, snfs = pair(delta_t=10)
    bad = [*A[:6], torch.nan, torch.inf, -torch.inf, *A[9:]]
    step_by(net, optimizer, bad, B)
    assert torch.allclose(snfs.momentum["a.weight"].flatten(), torch.tensor([*A[:6], 0.0, 0.0, 0.0, *A[9:]]))


def test_with_s2sam_nothing_pruned_is_displaced_whatever_the_direction():
    for direction in ("gradient", "momentum"):
        net = make_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        snfs = sparsify(net, optimizer, method="snfs", sparsity=0.7, total_steps=60, delta_t=2, generator=generator())
        sam = S2SAM(optimizer, model=net, rho=0.05, direction=direction)
        for x, y in make_batches(5):
            optimizer.zero_grad()
            loss = loss_fn(net(x), y)
            assert all(net.get_parameter(name)[~mask].abs().sum() == 0 for name, mask in snfs.masks.items())
            loss.backward()
            optimizer.step()
        assert snfs.updates == 2 and sam is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": None}, "give total_steps"),
        ({"t_end": None}, "needs a t_end above 0"),
        ({"beta": 1.5}, "beta must be"),
        ({"drop_fraction": -1}, "drop_fraction must be"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        pair(**options)


@pytest.mark.parametrize("rho", [0.0, 0.05])
def test_one_look_a_step_with_sam_and_clipping(rho):
    """Clipping masks in both passes of SAM; the momentum grows by the gradient of the step alone."""
    found = []
    for clips in (False, True):
        net = make_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
        snfs = sparsify(net, optimizer, method="snfs", sparsity=0.5, total_steps=10, generator=generator())
        sam = SAM(optimizer, model=net, rho=rho)
        x, y = make_batches(1)[0]

        def closure(net=net, x=x, y=y, clips=clips, snfs=snfs):
            loss = loss_fn(net(x), y)
            loss.backward()
            if clips:
                snfs.mask_gradients()
            return loss

        optimizer.step(closure)
        sam.remove()
        found.append({name: m.clone() for name, m in snfs.momentum.items()})
    plain, clipped = found
    assert all(float(m.abs().sum()) > 0 for m in plain.values())
    for name, m in plain.items():
        torch.testing.assert_close(clipped[name], m, rtol=0, atol=0)
