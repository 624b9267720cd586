"""slim(): the slim network computes what the masked one does, and training goes on as if nothing had happened."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "sparse"))
pytest.importorskip("torch_pruning")
from channel_nets import NAMES, build

from s2sam import S2SAM, sparsify
from s2sam.analysis.flops import count_macs
from s2sam.export.slim import slim
from s2sam.sparse.channels import rows
from s2sam.sparse.structured import Structured


class Half(Structured):
    """Prunes half of the channels of each group, drawn at random, at the start."""

    method = "half"

    def initial_masks(self, model, sparsity, distribution, power_scale):
        for group in self.channels.groups:
            order = torch.randperm(group.size, generator=self.generator)
            self.keep[group.name] = order >= group.size // 2
        self._set_riders()
        return self.weight_masks()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "plain": lambda p: torch.optim.SGD(p, lr=0.05),
}


def train(net, optimizer, x, steps=1, seed=1):
    g = torch.Generator().manual_seed(seed)
    net.train()
    for _ in range(steps):
        y = torch.randint(0, 3, (len(x),), generator=g)
        optimizer.zero_grad()
        F.cross_entropy(net(x + 0.1 * torch.randn(x.shape, generator=g).to(x)), y).backward()
        optimizer.step()


def masked(name, optimizer="sgd", *, dtype=torch.float32, steps=3, rho=None, split=False):
    net, x = build(name)
    net, x = net.to(dtype), x.to(dtype)
    p = list(net.parameters())
    groups = [{"params": p[::2]}, {"params": p[1::2], "lr": 0.02}] if split else p
    o = OPTIMIZERS[optimizer](groups)
    s = sparsify(net, o, method=Half, sparsity=0.5, batches=[(x, None)], generator=torch.Generator().manual_seed(2))
    sam = S2SAM(o, model=net, rho=rho) if rho else None
    train(net, o, x, steps)
    return net, x, o, s, sam


@torch.no_grad()
def evaluate(net, x):
    return net.eval()(x)


@pytest.mark.parametrize("name", NAMES)
def test_slim_computes_what_the_masked_network_does(name):
    net, x, o, s, _ = masked(name)
    s.verify()
    small = slim(net, s, x)
    out = evaluate(net, x)
    assert torch.allclose(evaluate(small.model, x), out, rtol=0, atol=2e-6 * float(out.abs().max()))
    assert float(out.std()) > 0.01
    for group in s.channels.groups:
        assert small.removed[group.name] == group.size // 2
    before, after = small.parameters
    assert before == sum(p.numel() for p in net.parameters())
    assert after == sum(p.numel() for p in small.model.parameters()) < 0.6 * before
    assert small.model(x).requires_grad
    assert all(p.grad is None for p in small.model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_the_counts_of_parameters_and_flops_are_those_of_the_masks(name):
    net, x, o, s, _ = masked(name)
    small = slim(net, s, x).model
    tensors = dict(net.named_parameters())
    kept = {k: int(v.sum()) for k, v in s.masks.items()}
    kept |= {k: int(m.sum()) for _, riders in s.riders for k, m in riders.masks.items()}
    sizes = {k: p.numel() for k, p in tensors.items()}
    assert {k: p.numel() for k, p in small.named_parameters()} == sizes | kept
    dense, slimmed = count_macs(net, x[:1]), count_macs(small, x[:1])
    expected = {k: macs * kept[k] / sizes[k] for k, macs in dense.items()}
    assert slimmed == pytest.approx(expected)
    assert sum(slimmed.values()) < 0.6 * sum(dense.values())


@pytest.mark.parametrize("name", ["resnet8", "mixed", "dense", "mlp"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_next_steps_are_those_of_the_masked_network(name, optimizer):
    """In float64, so that a state cut wrongly shows. Adafactor's statistics are means over the rows there are."""
    net, x, o, s, _ = masked(name, optimizer, dtype=torch.float64, split=True)
    small = slim(net, s, x, o)
    assert type(small.optimizer) is type(o) and small.optimizer is not o
    assert [g["lr"] for g in small.optimizer.param_groups] == [g["lr"] for g in o.param_groups]
    alive = rows(s.channels.groups, s.keep)
    before, states = [q.detach().clone() for q in small.model.parameters()], 0
    for p, q in zip(net.parameters(), small.model.parameters(), strict=True):
        assert o.state[p].keys() == small.optimizer.state[q].keys()
        states += sum(v.shape == q.shape for v in small.optimizer.state[q].values() if isinstance(v, torch.Tensor))
    assert states >= {"sgd": 1, "adamw": 3}.get(optimizer, 0) * len(before)
    if optimizer == "adafactor":
        return
    for steps in (1, 3):
        train(net, o, x, steps, seed=steps)
        train(small.model, small.optimizer, x, steps, seed=steps)
        for (k, p), q in zip(net.named_parameters(), small.model.named_parameters(), strict=True):
            value = p.detach()
            for dim, keep in alive.get(k, {}).items():
                value = value.index_select(dim, keep.nonzero().flatten())
            assert torch.allclose(value, q[1], rtol=1e-9, atol=1e-11), k
    assert any(not torch.equal(b, q) for b, q in zip(before, small.model.parameters(), strict=True))
    assert torch.allclose(evaluate(net, x), evaluate(small.model, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("when", ["between steps", "in a window"])
def test_s2sam_goes_on_from_the_same_direction(when):
    net, x, o, s, sam = masked("resnet8", dtype=torch.float64, rho=0.3)
    if when == "in a window":
        net.train()(x)
        assert sam.is_displaced
    w = {k: v.clone() for k, v in net.state_dict().items()}
    small = slim(net, s, x, o)
    assert sam.is_displaced == (when == "in a window")
    assert sum(float(p.detach().pow(2).sum()) for p in small.model.parameters()) == pytest.approx(
        sum(float(w[k].pow(2).sum()) for k, _ in net.named_parameters()), rel=1e-12
    )
    assert torch.allclose(evaluate(net, x), evaluate(small.model, x), rtol=1e-9, atol=1e-9)
    again = S2SAM(small.optimizer, model=small.model, rho=0.3, stats_every=1)
    plain = copy.deepcopy(small.model)
    train(net, o, x)
    train(small.model, small.optimizer, x)
    assert again.stats["displacement"] == pytest.approx(0.3)
    for p, q in zip(net.parameters(), small.model.parameters(), strict=True):
        active = p.detach()[p.detach() != 0]
        assert torch.allclose(active.sort().values, q.detach()[q.detach() != 0].sort().values, rtol=1e-9, atol=1e-11)
    moved = copy.deepcopy(plain)
    train(moved, torch.optim.SGD(moved.parameters(), lr=0.05), x)
    assert not torch.allclose(moved.classifier.weight, small.model.classifier.weight, rtol=1e-6)


def test_zeros_alone_are_enough():
    """No sparsifier: channels that nothing reads, and those that nothing makes; one that BatchNorm moves stays."""
    net, x = build("resnet8")
    with torch.no_grad():
        net.stages[1][0].conv2.weight[:, 3] = 0  # nothing reads channel 3 of conv1
        for t in (net.stages[2][0].conv1.weight, net.stages[2][0].bn1.weight, net.stages[2][0].bn1.bias):
            t[[1, 2]] = 0
        net.stages[2][0].bn1.bias[1] = 0.5
    small = slim(net, None, x)
    assert {k: n for k, n in small.removed.items() if n} == {"stages.1.0.conv1": 1, "stages.2.0.conv1": 1}
    assert torch.allclose(evaluate(net, x), evaluate(small.model, x), atol=1e-5)


class Gated(nn.Module):
    """Activations with f(0) = 1/2 and f(0) = 0, before a grouped convolution, a padded one and a linear layer."""

    def __init__(self, activation):
        super().__init__()
        self.a, self.bn = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.b, self.c = nn.Conv2d(6, 8, 3, padding=1, groups=2), nn.Conv2d(8, 5, 3)
        self.fc, self.activation = nn.Linear(5 * 4, 3), activation

    def forward(self, x):
        x = self.activation(self.bn(self.a(x)))
        x = self.activation(self.c(self.activation(self.b(x))))
        return self.fc(x.flatten(1))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("activation", "cut"),
    [(torch.sigmoid, 0), (F.softplus, 0), (torch.cos, 0), (F.relu, 1), (torch.tanh, 1), (F.silu, 1), (F.hardtanh, 1)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_channel_that_nothing_feeds_stays_where_it_is_a_constant(activation, cut, training):
    """Behind f(0) != 0 it is a bias of what reads it, at the edges of a padded image another one than inside."""
    net, x = Gated(activation).train(training), torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for t in (net.a.weight, net.a.bias, net.bn.weight, net.bn.bias):
            t[[1, 4]] = 0  # channel 1 of both convolution groups of b
        for t in (net.c.weight, net.c.bias):
            t[2] = 0
        net.fc.weight[:, 12:16] = 0  # and nothing reads channel 3 of c, whatever it is
    small = slim(net, None, x)
    assert small.removed == {"a": cut, "b": 0, "c": 1 + cut}
    assert small.model.training == training
    assert torch.allclose(evaluate(net, x), evaluate(small.model, x), atol=1e-6)


def test_each_layer_keeps_its_own_mode():
    net, x = build("resnet8")
    net.train()
    frozen = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)][:2]
    for m in frozen:
        m.eval()
    small = slim(net, None, x).model
    assert [m.training for m in small.modules()] == [m.training for m in net.modules()]
    assert sum(not m.training for m in small.modules()) == 2


def test_masks_of_weights_are_applied_to_the_copy_alone():
    net, x = build("mixed")
    masks = {k: torch.ones_like(p, dtype=torch.bool) for k, p in net.named_parameters() if p.dim() > 1}
    masks["fc.weight"][:, 16:32] = False  # what reads channel 1 of the first convolution group
    masks["fc.weight"][:, 96:112] = False  # and of the second
    masks["left.weight"][0, 0] = False
    small = slim(net, masks, x)
    assert {k: n for k, n in small.removed.items() if n} == {"grouped": 1}
    assert small.model.grouped.out_channels == 8 and small.model.fc.in_features == 128
    assert small.masks["fc.weight"].all() and not small.masks["left.weight"].all()
    assert (net.fc.weight != 0).all()
    with torch.no_grad():
        for k, m in masks.items():
            net.get_parameter(k).mul_(m)
    assert torch.allclose(evaluate(net, x), evaluate(small.model, x), atol=1e-5)


def test_an_unstructured_sparsifier_keeps_its_masks():
    net, x = build("mlp")
    o = torch.optim.SGD(net.parameters(), lr=0.1)
    s = sparsify(net, o, method="magnitude", sparsity=0.9)
    small = slim(net, s, x, o)
    assert small.model.training
    assert sum(small.removed.values()) == 0 or small.parameters[1] < small.parameters[0]
    for k, p in small.model.named_parameters():
        if k in small.masks:
            assert small.masks[k].shape == p.shape and bool((p[~small.masks[k]] == 0).all())


def test_a_group_of_dead_channels_keeps_one():
    net, x = build("mlp")
    with torch.no_grad():
        net.classifier.weight.zero_()
    small = slim(net, None, x).model
    assert small.classifier.in_features == 1
    assert torch.allclose(evaluate(net, x), evaluate(small, x))


def test_modules_that_count_their_channels_are_refused():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.b(self.a(x)) * self.a.out_features

    net = Counting()
    o = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="the model has no channels to prune"):
        sparsify(net, o, method=Half, sparsity=0.5, batches=[(torch.zeros(2, 4), None)])


class Counting(torch.optim.SGD):
    """An optimizer with something of its own."""

    def __init__(self, params, kept):
        super().__init__(params, lr=0.1)
        self.kept, self.calls = kept, 0

    def step(self, closure=None):
        self.calls += 1
        return super().step(closure)


def test_numbers_of_an_optimizer_of_its_own_are_carried_and_tensors_refused():
    net, x = build("mlp")
    o = Counting(net.parameters(), kept="all")
    torch.optim.lr_scheduler.StepLR(o, 1)  # wraps step() of this instance
    s = sparsify(net, o, method=Half, sparsity=0.5, batches=[(x, None)])
    train(net, o, x, steps=2)
    small = slim(net, s, x, o)
    assert (small.optimizer.kept, small.optimizer.calls) == ("all", 2)
    before = small.model.classifier.weight.detach().clone()
    train(small.model, small.optimizer, x)
    assert (small.optimizer.calls, o.calls) == (3, 2)
    assert not torch.equal(small.model.classifier.weight, before)
    o.kept = [torch.zeros(3)]
    with pytest.raises(ValueError, match="Counting keeps 'kept' beside its state"):
        slim(net, s, x, o)


def test_the_weights_of_an_open_window_are_not_what_is_cut():
    net, x = build("mlp")
    o = OPTIMIZERS["sgd"](net.parameters())
    s = sparsify(net, o, method=Half, sparsity=0.5, batches=[(x, None)])
    S2SAM(o, model=net, rho=1.0)
    train(net, o, x, steps=2)
    clean = dict(slim(net, s).model.named_parameters())
    net.train()
    net(x)  # opens the window
    assert not torch.equal(net.classifier.bias, clean["classifier.bias"])
    assert all(torch.equal(p, clean[name]) for name, p in slim(net, s).model.named_parameters())


def test_bad_input():
    net, x = build("mlp")
    with pytest.raises(ValueError, match="carries one optimizer, got list"):
        slim(net, None, x, [OPTIMIZERS["sgd"](net.parameters())])
    with pytest.raises(ValueError, match="needs example_input="):
        slim(net)
    with pytest.raises(ValueError, match=r"has shape \(2, 2\), the model has \(4, 26\)"):
        slim(net, {"classifier.weight": torch.ones(2, 2, dtype=torch.bool)}, x)
    with pytest.raises(ValueError, match="no such parameter"):
        slim(net, {"klassifier": torch.ones(2, 2, dtype=torch.bool)}, x)
    with pytest.raises(ValueError, match="fails on the example input"):
        slim(net, None, x[:, :, :2])
