"""One battery for every optimizer: sparsity and S2SAM together, in both attach orders, with and without closure."""

import pytest
import torch
import torch.nn.functional as F
from sam_common import BATTERY, FACTORIES, WITHOUT_MOMENTUM, distance, make_data, make_net, same, snapshot, total
from torch.func import functional_call

from s2sam import S2SAM, sparsify
from s2sam.sam.reference import ReferenceS2SAM

RHO = 0.05


def attach(net, optimizer, order, method="static", **options):
    """(sparsifier, sam), attached in the order asked for."""
    made = {}
    for what in order:
        if what == "sparsify":
            made[what] = sparsify(
                net, optimizer, method=method, sparsity=0.6, generator=torch.Generator().manual_seed(3),
                **({} if method == "static" else {"total_steps": 100, "delta_t": 5}),
            )  # fmt: skip
        else:
            made[what] = S2SAM(optimizer, model=net, rho=RHO, stats_every=1, **options)
    return made["sparsify"], made["s2sam"]


def one_step(net, optimizer, x, y, use_closure):
    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return loss

    if use_closure:
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()


ORDERS = {"sparsify-first": ("sparsify", "s2sam"), "s2sam-first": ("s2sam", "sparsify")}


@pytest.mark.parametrize("use_closure", [False, True], ids=["plain", "closure"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", BATTERY)
def test_equals_the_masked_reference(name, order, use_closure):
    for direction in ("gradient", "ema") if name in WITHOUT_MOMENTUM else ("gradient", "momentum", "ema"):
        net, twin = make_net(), make_net()
        names = [n for n, _ in net.named_parameters()]
        optimizer = FACTORIES[name](net.parameters())
        sparsifier, sam = attach(net, optimizer, ORDERS[order], direction=direction)
        masks = [sparsifier.masks[n] for n in names]
        ref = ReferenceS2SAM(
            snapshot(net), lambda w: FACTORIES[name]([{"params": w, "rho": RHO}]), masks=masks, direction=direction
        )
        inside = []
        net[0].register_forward_hook(lambda *_, net=net, inside=inside: inside.append(snapshot(net)))
        for step, (x, y) in enumerate(make_data(40)):
            if step == 7:
                x = x * float("nan")
            w = snapshot(net)
            xs = [v.requires_grad_() for v in ref.displaced()]
            loss = F.cross_entropy(functional_call(twin, dict(zip(names, xs, strict=True)), (x,)), y)
            one_step(net, optimizer, x, y, use_closure)
            ref.step(torch.autograd.grad(loss, xs))
            assert distance(net.parameters(), ref.weights) < 1e-12, step
            move = [a - b for a, b in zip(inside[-1], w, strict=True)]
            assert total(move) == pytest.approx(RHO if step > 0 else 0.0, rel=1e-9)
            for p, m, e in zip(inside[-1], masks, move, strict=True):
                assert float(p[~m].abs().sum()) == 0 and float(e[~m].abs().sum()) == 0
        assert sam.stats["skipped"] == 1
        assert same(inside[7], inside[8])  # the direction was kept
        for p, m in zip(net.parameters(), masks, strict=True):
            for value in optimizer.state[p].values():
                if torch.is_tensor(value) and value.shape == p.shape:
                    assert float(value[~m].abs().sum()) == 0


@pytest.mark.parametrize("use_closure", [False, True], ids=["plain", "closure"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("method", ["set", "rigl"])
@pytest.mark.parametrize("name", BATTERY)
def test_moving_masks_keep_every_promise(name, method, order, use_closure):
    net = make_net()
    optimizer = FACTORIES[name](net.parameters())
    sparsifier, sam = attach(net, optimizer, ORDERS[order], method=method)
    counts = {n: int(m.sum()) for n, m in sparsifier.masks.items()}
    initial = {n: m.clone() for n, m in sparsifier.masks.items()}
    inside = []
    net[0].register_forward_hook(lambda *_: inside.append(snapshot(net)))
    for step, (x, y) in enumerate(make_data(30)):
        before = {n: m.clone() for n, m in sparsifier.masks.items()}
        w = snapshot(net)
        one_step(net, optimizer, x, y, use_closure)
        assert {n: int(m.sum()) for n, m in sparsifier.masks.items()} == counts
        assert total([a - b for a, b in zip(inside[-1], w, strict=True)]) == pytest.approx(
            RHO if step > 0 else 0.0, rel=1e-9
        )
        changed = any(not torch.equal(before[n], m) for n, m in sparsifier.masks.items())
        for (n, p), seen in zip(net.named_parameters(), inside[-1], strict=True):
            assert float(seen[~before[n]].abs().sum()) == 0
            off = ~sparsifier.masks[n]
            new = sparsifier.masks[n] & ~before[n]
            assert float(p[off].abs().sum()) == 0 and float(p[new].abs().sum()) == 0
            for value in optimizer.state[p].values():
                if torch.is_tensor(value) and value.shape == p.shape:
                    assert float(value[off].abs().sum()) == 0
                    assert not changed or float(value[new].abs().sum()) == 0
        if changed and method == "rigl":  # the update replaced the gradient step
            for (n, p), old in zip(net.named_parameters(), w, strict=True):
                kept = before[n] & sparsifier.masks[n]
                assert torch.equal(p[kept], old[kept])
    assert any(not torch.equal(initial[n], m) for n, m in sparsifier.masks.items())


@pytest.mark.parametrize("use_closure", [False, True], ids=["plain", "closure"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("method", ["static", "rigl"])
@pytest.mark.parametrize("name", BATTERY)
def test_a_non_finite_gradient_changes_nothing(name, method, order, use_closure):
    """Also where it stands at a pruned position, and also on a step where a topology update is due."""
    net = make_net()
    optimizer = FACTORIES[name](net.parameters())
    sparsifier, sam = attach(net, optimizer, ORDERS[order], method=method)
    data = make_data(8)
    for x, y in data[:4]:
        one_step(net, optimizer, x, y, use_closure)
    net.train()
    sam.displace()
    displaced = snapshot(net)
    sam.restore()
    weights, masks = snapshot(net), [m.clone() for m in sparsifier.masks.values()]
    state = {(i, k): torch.as_tensor(v).clone() for i, s in enumerate(optimizer.state.values()) for k, v in s.items()}
    pruned = torch.nonzero(~masks[0])[0]
    infinity = torch.tensor(float("inf"), dtype=torch.float64)
    handle = net[0].weight.register_hook(lambda g: g.index_put((pruned[0], pruned[1]), infinity))
    one_step(net, optimizer, *data[4], use_closure)
    handle.remove()
    assert same(net.parameters(), weights)
    assert same(sparsifier.masks.values(), masks)
    for i, s in enumerate(optimizer.state.values()):
        for k, v in s.items():
            if k != "s2sam_buffer":  # holds the twin x now
                assert torch.equal(torch.as_tensor(v), state[i, k]), k
    sam.displace()
    assert same(net.parameters(), displaced)
    sam.restore()
    assert sam.stats["skipped"] == 1
    one_step(net, optimizer, *data[5], use_closure)
    assert distance(net.parameters(), weights) > 0
