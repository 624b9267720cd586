"""GraSP: by hand, the product with the Hessian against two other ways, and the sign against removing every weight."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from s2sam import sparsify

sys.path.insert(0, str(Path(__file__).parent))
from sparse_support import generator, make_batches, make_net


def attach(net, batches, *, sparsity=0.0, **kw):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    return sparsify(net, optimizer, method="grasp", sparsity=sparsity, batches=batches, **kw)


def scores_of(net, batches, **kw):
    return attach(net, batches, **kw).initial_scores(net)


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


class Flow:
    """The summed loss, its gradient and g'g of a network as functions of one vector of all its weights."""

    def __init__(self, net, batches, temperature):
        self.net, self.temperature = net, temperature
        self.names = [name for name, _ in net.named_parameters()]
        self.shapes = [p.shape for p in net.parameters()]
        self.x, self.y = (torch.cat([b[i] for b in batches]) for i in (0, 1))
        self.w = flat([p.detach() for p in net.parameters()])

    def loss(self, w):
        parts = torch.split(w, [s.numel() for s in self.shapes])
        weights = {n: p.view(s) for n, p, s in zip(self.names, parts, self.shapes, strict=True)}
        output = torch.func.functional_call(self.net, weights, (self.x,)) / self.temperature
        return F.cross_entropy(output, self.y, reduction="sum")

    def gradient(self, w):
        return torch.func.grad(self.loss)(w)

    def flow(self, w):
        return self.gradient(w).square().sum()


def make_flow(temperature, scale=1.0):
    net = make_net().double()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(scale)
    batches = [(x.double(), y) for x, y in make_batches(2)]
    return net, batches, Flow(net, batches, temperature)


def test_by_hand():
    """L = o^2 / 2 with o = w.x: g = o x, H = x x', H g = o |x|^2 x, S = -w (H g)."""
    layer = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, -1.0]]))
    kw = {"loss_fn": lambda output, _: output.square().sum() / 2, "temperature": 1.0}
    batch = (torch.tensor([[1.0, 2.0]]), torch.zeros(1))
    # o = 1, g = (1, 2), |x|^2 = 5, H g = (5, 10), S = (-15, 10): the second weight goes
    assert scores_of(layer, [batch], **kw)["weight"].tolist() == [[15, -10]]
    assert attach(layer, [batch], sparsity=0.5, **kw).masks["weight"].tolist() == [[True, False]]
    # indeed: without the second weight o = 3 and g'g = 9 * 5, without the first o = -2 and g'g = 4 * 5; it was 5


@pytest.mark.parametrize("temperature", [1.0, 200.0])
def test_the_product_is_that_of_torch_func_and_of_finite_differences(temperature):
    net, batches, f = make_flow(temperature)
    found = flat(scores_of(net, batches, temperature=temperature).values())
    g = f.gradient(f.w)
    _, hg = torch.func.jvp(f.gradient, (f.w,), (g,))
    assert torch.allclose(found, f.w * hg, rtol=1e-9, atol=1e-12 * float((f.w * hg).abs().max()))
    step = 1e-5 / float(g.norm())
    slope = (f.gradient(f.w + step * g) - f.gradient(f.w - step * g)) / (2 * step)
    assert torch.allclose(found, f.w * slope, rtol=1e-4, atol=1e-6 * float(found.abs().max()))
    assert found.abs().max() > 0


def test_200_is_the_default_temperature():
    net, batches, _ = make_flow(200.0)
    default, given = scores_of(net, batches), scores_of(net, batches, temperature=200.0)
    other = scores_of(net, batches, temperature=2.0)
    assert all(torch.equal(default[name], given[name]) for name in default)
    assert not any(torch.allclose(default[name], other[name], rtol=0.1) for name in default)


def test_the_sign_by_removing_a_little_of_every_weight():
    """d/d eps of g'g, where w_q becomes (1 - eps) w_q, is 2 S_q."""
    net, batches, f = make_flow(200.0)
    s = -flat(scores_of(net, batches).values())
    eps = 1e-6
    steps = eps * f.w * torch.eye(len(f.w)).double()
    change = torch.stack([f.flow(f.w - step) - f.flow(f.w + step) for step in steps])
    assert torch.allclose(change / (2 * eps), 2 * s, rtol=1e-3, atol=1e-4 * float(s.abs().max()))
    assert (s > 0).any() and (s < 0).any()


def test_the_sign_by_removing_every_weight():
    """Brute force: g'g without each weight. The weights that go are those without which it is larger."""
    net, batches, f = make_flow(200.0)
    s = -flat(scores_of(net, batches).values())
    without = torch.stack([f.flow(f.w * (1 - e)) for e in torch.eye(len(f.w)).double()]) - f.flow(f.w)
    ranks = torch.stack([s.argsort().argsort(), without.argsort().argsort()]).double()
    assert torch.corrcoef(ranks)[0, 1] > 0.9
    removed = ~flat(attach(net, batches, sparsity=0.3).masks.values())
    assert without[removed].mean() > without[~removed].mean() + without.std()
    order = s.argsort(descending=True)
    most, least = torch.ones(len(s)).double(), torch.ones(len(s)).double()
    most[order[:20]], least[order[-20:]] = 0, 0
    assert f.flow(f.w * most) > f.flow(f.w) > f.flow(f.w * least)
    assert torch.equal(removed.nonzero().flatten().sort().values, order[: int(removed.sum())].sort().values)


def test_attention_is_differentiated_twice():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, 3)

        def forward(self, x):  # (batch, 6) as a sequence of 3 equal tokens, shifted
            tokens = torch.stack([x, x.roll(1, 1), x.roll(2, 1)], 1)
            q, k, v = self.qkv(tokens)[:, None].chunk(3, -1)
            return self.out(F.scaled_dot_product_attention(q, k, v)[:, 0].mean(1))

    net = Attention()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator()))
    scores = scores_of(net, make_batches(2))
    assert all(s.abs().max() > 0 for s in scores.values())


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"temperature": 0}, "temperature must be above 0, got 0"),
        ({"temperature": -1}, "temperature must be a finite number >= 0, got -1"),
        ({"tempreature": 1}, "unknown option of method 'grasp': 'tempreature'; did you mean 'temperature'"),
    ],
)
def test_bad_options(kw, message):
    with pytest.raises(ValueError, match=message):
        attach(make_net(), make_batches(1), **kw)


def test_an_output_that_is_no_tensor():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = make_net()

        def forward(self, x):
            return self.net(x), x

    with pytest.raises(ValueError, match="output by a temperature, so it must be a tensor, not a tuple"):
        attach(Pair(), make_batches(1))


def test_a_loss_without_curvature_says_nothing():
    layer = nn.Linear(2, 1, bias=False)
    with pytest.raises(ValueError, match="all scores are zero"):
        attach(layer, [(torch.ones(1, 2), torch.zeros(1))], loss_fn=lambda output, _: output.sum())
