"""DeepR by hand: fixed signs, death at 0, as many others at random, L1 and noise on what is active."""

import sys
from pathlib import Path

import pytest
import torch

from s2sam import S2SAM, sparsify

sys.path.insert(0, str(Path(__file__).parent))
from sparse_support import (
    copy_masks,
    equal_masks,
    generator,
    golden,
    loss_fn,
    make_batches,
    make_net,
    one_step,
    step_by,
)

# 12 weights, 6 active: .5 -.1 .3 -.2 .6 -.4; the learning rate is .5
MASK = [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
WEIGHTS = [0.5, -0.1, 0.3, -0.2, 0.6, -0.4, 0, 0, 0, 0, 0, 0]
PLAIN = {"l1": 0.0, "temperature": (0.0,), "min_per_filter": 0}


def layer_of(**options):
    layer, optimizer, deepr = golden(MASK, WEIGHTS, "deepr", **{**PLAIN, **options})
    step_by(layer, optimizer)  # takes the signs
    return layer, optimizer, deepr


def active(deepr):
    return deepr.masks["weight"].flatten().nonzero().flatten().tolist()


def values(layer):
    return layer.weight.detach().flatten().tolist()


def test_what_crosses_zero_gives_its_place_away():
    layer, optimizer, deepr = layer_of()
    assert deepr.updates == 1 and active(deepr) == [0, 1, 2, 3, 4, 5]
    step_by(layer, optimizer, [0.2, -0.4, 0.8, 0.1, 0.0, 0.1])  # .4  .1  -.1  -.25  .6  -.45: 1 and 2 have crossed
    assert active(deepr)[:4] == [0, 3, 4, 5]
    assert len(active(deepr)) == 6 and min(active(deepr)[4:]) > 5
    assert values(layer) == pytest.approx([0.4, 0, 0, -0.25, 0.6, -0.45, 0, 0, 0, 0, 0, 0])
    assert deepr.last_update.dropped == deepr.last_update.grown == {"weight": 2}
    assert optimizer.state[layer.weight]["momentum_buffer"].flatten()[[1, 2, *range(6, 12)]].abs().sum() == 0


def test_between_draws_a_weight_waits_at_zero_and_can_come_back():
    layer, optimizer, deepr = layer_of(delta_t=10)
    optimizer.param_groups[0]["momentum"] = 0.0
    step_by(layer, optimizer, [0.0, -0.4, 0.8])
    assert active(deepr) == [0, 1, 2, 3, 4, 5]
    assert values(layer)[:3] == pytest.approx([0.5, 0, 0])
    step_by(layer, optimizer, [0.0, -0.4, -0.8])  # 1 pushed further, 2 back to its own side
    assert values(layer)[:3] == pytest.approx([0.5, 0, 0.4])


def test_l1_pulls_active_weights_to_zero():
    layer, optimizer, deepr = layer_of(delta_t=10)
    object.__setattr__(deepr.options, "l1", 0.3)  # lr alpha = .15
    step_by(layer, optimizer)
    assert values(layer) == pytest.approx([0.35, 0, 0.15, -0.05, 0.45, -0.25, *[0.0] * 6])


def test_noise_has_its_variance_and_moves_active_weights_only():
    layer = torch.nn.Linear(100, 100, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    with torch.no_grad():
        layer.weight.fill_(10.0)
    deepr = sparsify(layer, optimizer, method="deepr", sparsity=0.5, generator=generator(), l1=0.0, temperature=(0.04,))
    step_by(layer, optimizer)
    moved = (layer.weight.detach() - 10)[deepr.masks["weight"]]
    assert float(moved.std()) == pytest.approx(0.2, rel=0.05)  # sqrt(2 * .5 * .04)
    assert abs(float(moved.mean())) < 0.02
    assert layer.weight.detach()[~deepr.masks["weight"]].abs().sum() == 0


def test_temperatures_follow_one_another():
    _, _, deepr = layer_of(temperature=(3.0, 2.0, 1.0), total_steps=6)
    assert [deepr.temperature(t) for t in range(1, 8)] == [3.0, 3.0, 2.0, 2.0, 1.0, 1.0, 1.0]
    _, _, deepr = layer_of(temperature=[0.5])
    assert deepr.temperature(10**9) == 0.5


def net_of(seed=0, **options):
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9)
    deepr = sparsify(net, optimizer, method="deepr", sparsity=0.7, total_steps=40, generator=generator(seed), **options)
    return net, optimizer, deepr


def test_no_sign_ever_changes_and_every_layer_keeps_its_number():
    net, optimizer, deepr = net_of(l1=0.02, temperature=(1e-4,))
    kept, born = dict(deepr.parts[0].kept), {name: w.detach().sign() for name, w in net.named_parameters()}
    moved = 0
    for batch in make_batches(40):
        one_step(net, optimizer, batch)
        for name, w in net.named_parameters():
            now = w.detach().sign()
            assert not bool((now * born[name] < 0).any()), "not even of one that died and came back"
            born[name] = torch.where(now != 0, now, born[name])
        assert {name: int(m.sum()) for name, m in deepr.masks.items()} == kept
        moved += sum(deepr.last_update.dropped.values())
    assert moved > 20
    assert deepr.explored() > 0.4


def test_without_noise_and_l1_it_is_sgd_on_a_mask_until_something_crosses():
    net, optimizer, deepr = net_of(**PLAIN)
    twin = make_net()
    other = torch.optim.SGD(twin.parameters(), lr=0.3, momentum=0.9)
    static = sparsify(twin, other, method="static", sparsity=0.7, generator=generator())
    assert equal_masks(static.masks, deepr.masks)
    for t, batch in enumerate(make_batches(40)):  # noqa: B007
        one_step(net, optimizer, batch)
        one_step(twin, other, batch)
        if sum(deepr.last_update.dropped.values()):
            break
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))
    assert 0 < t < 39
    assert sum(int((a != b).sum()) for a, b in zip(net.parameters(), twin.parameters(), strict=True)) <= 3


def test_the_noise_is_the_generator_s():
    found = []
    for seed in (1, 1, 2):
        net, optimizer, deepr = net_of(l1=0.0, temperature=(1e-4,))
        deepr.generator.manual_seed(seed)
        one_step(net, optimizer, make_batches(1)[0])
        found.append(net[0].weight.detach().clone())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_a_skipped_step_adds_no_noise():
    net, optimizer, deepr = net_of(l1=0.02, temperature=(1e-2,))
    sam = S2SAM(optimizer, model=net, rho=0.05)
    good, bad, after = make_batches(3)
    one_step(net, optimizer, good)
    weights, masks = [p.detach().clone() for p in net.parameters()], copy_masks(deepr)
    optimizer.zero_grad()
    (loss_fn(net(bad[0]), bad[1]) * torch.inf).backward()
    optimizer.step()
    sam.restore()
    assert all(torch.equal(a, b) for a, b in zip(weights, net.parameters(), strict=True))
    assert equal_masks(masks, deepr.masks)
    one_step(net, optimizer, after)
    assert not torch.equal(weights[0], net[0].weight)


def test_a_layer_with_few_dormant_weights_keeps_the_rest():
    layer, optimizer, deepr = golden([1] * 11 + [0], [0.1] * 11 + [0.0], "deepr", **PLAIN)
    step_by(layer, optimizer)
    step_by(layer, optimizer, [1.0] * 11 + [0.0])  # all cross
    assert deepr.last_update.dropped == {"weight": 1}
    assert active(deepr) == [*range(10), 11], "the last of equals goes"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": (1.0, 0.5)}, "give total_steps, or one value"),
        ({"temperature": 1.0}, "temperature must be a list"),
        ({"temperature": (-1.0,)}, "temperature must be"),
        ({"l1": -1}, "l1 must be"),
        ({"delta_t": 0}, "delta_t must be a whole number"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        golden(MASK, WEIGHTS, "deepr", **{**PLAIN, **options})
