"""Whole models: dense to compact and back, their states, and the choice of forms by timing."""

import copy
import itertools

import pytest
import torch
from torch import nn

import s2sam
import s2sam.compact.by_timing as by_timing
from s2sam import S2SAM, compact, sparsify


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) - 0.5


class Net(nn.Module):
    """A convolution in two places, tied layers, a grouped one, one that is not called, and a dense one."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(4, 16, 3, padding=1)
        self.point = nn.Conv2d(16, 16, 1, bias=False)
        self.again = self.point
        self.grouped = nn.Conv2d(16, 16, 3, groups=4)
        self.norm = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16 * 4 * 4, 32)
        self.tied, self.twin = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
        self.twin.weight = self.tied.weight
        self.unused, self.dense = nn.Linear(32, 8), nn.Linear(32, 5)
        self.table = nn.Embedding(3, 32)
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                if p.dim() > 1:
                    p.copy_(random(*p.shape, seed=i))
                    if p is not self.dense.weight:
                        p.mul_(random(*p.shape, seed=i + 50) > 0.4)

    def forward(self, x, scale=1.0):
        x = self.norm(self.grouped(self.again(torch.relu(self.point(torch.relu(self.stem(x)))))))
        x = self.twin(torch.relu(self.tied(torch.relu(self.fc(x.flatten(1))))))
        return {"logits": self.dense(x + self.table.weight[0]) * scale}


def masks_of(net):
    return {f"{name}.weight": net.get_submodule(name).weight != 0 for name in ("stem", "point", "fc")}


def test_the_package_is_loaded_lazily():
    assert s2sam.compact is compact
    assert {getattr(compact, name).__name__ for name in compact.__all__} == set(compact.__all__)


def test_a_model_becomes_compact_and_dense_again():
    net, x = Net().eval(), random(3, 4, 6, 6)
    before = copy.deepcopy(net.state_dict())
    small = compact.from_dense(net, masks_of(net))
    assert [type(small.get_submodule(n)).__name__ for n in ("stem", "point", "fc", "dense")] == [
        "SparseConv2d", "SparseConv2d", "SparseLinear", "Linear",
    ]  # fmt: skip
    assert small.again is small.point and small.twin.weight is small.tied.weight and not small.fc.training
    torch.testing.assert_close(small(x)["logits"], net(x)["logits"])
    back = compact.to_dense(small)
    assert type(back.fc) is nn.Linear and back.again is back.point
    for (name, was), now in zip(before.items(), back.state_dict().values(), strict=True):
        assert torch.equal(was, now) and torch.equal(was, net.state_dict()[name])
    back.load_state_dict(compact.dense_state(small.state_dict()))
    other = compact.from_dense(net, masks_of(net), block=1)
    other.load_state_dict(back.state_dict())
    assert torch.equal(other.fc.values, small.fc.values)


def test_the_masks_of_a_sparsifier_are_what_is_stored():
    net = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    sparsifier = sparsify(net, optimizer, method="magnitude", sparsity=0.8)
    small = compact.from_dense(net, sparsifier.masks)
    stored = sum(m.values.numel() for m in small if isinstance(m, compact.SparseLinear))
    assert stored == sum(int(mask.sum()) for mask in sparsifier.masks.values()) == round(0.2 * 720)
    x = random(5, 20)
    torch.testing.assert_close(small(x), net(x))


def test_a_single_layer_is_a_model():
    layer = nn.Linear(6, 4)
    small = compact.from_dense(layer, {"weight": layer.weight > 0})
    assert isinstance(small, compact.SparseLinear) and isinstance(compact.to_dense(small), nn.Linear)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "fc.wieght",
            "'fc.wieght' is no weight of a layer that can be converted; these are: stem.weight, point.weight",
        ),
        ("fc.bias", "'fc.bias' is no weight of a layer"),
        ("grouped.weight", "'grouped.weight' cannot be converted: it has 4 groups"),
        ("tied.weight", "'tied.weight' cannot be converted: it shares a parameter with 'twin'"),
        ("table.weight", "'table.weight' cannot be converted: its class is Embedding"),
        ("norm.weight", "'norm.weight' cannot be converted: it has no matrix of weights"),
        ("fc.weight", r"'fc.weight': the mask must be a bool tensor of the weight's shape \(32, 256\)"),
    ],
)
def test_what_cannot_be_converted_is_named(name, words):
    net = Net()
    with pytest.raises(ValueError, match=words):
        compact.from_dense(net, {**masks_of(net), name: torch.ones(2, 2, dtype=torch.bool)})
    assert type(net.stem) is nn.Conv2d


def test_a_damaged_state_is_refused_by_name():
    net = nn.ModuleDict({"fc": compact.SparseLinear.from_dense(nn.Linear(6, 4))})
    for key, value in {"fc.col": net["fc"].col + 1, "fc.crow": net["fc"].crow[:-1]}.items():
        with pytest.raises(ValueError, match=r"fc\.values of this state cannot be read: this is no sparse pattern"):
            compact.dense_state({**net.state_dict(), key: value})


# ------------------------------------------------------------------------------------------------------- accelerate()


@pytest.fixture
def pretend(monkeypatch):
    """`pretend(dense=2, csr=1, ...)`: what each form takes, whatever the clock says."""

    def set_times(**seconds):
        def interleaved(calls, rounds, device):
            for call in calls.values():
                call()
            return {name: list(itertools.repeat(seconds.get(name, 9.0), rounds)) for name in calls}

        monkeypatch.setattr(by_timing, "_interleaved", interleaved)

    return set_times


def test_the_fastest_form_takes_the_place_of_each_layer(pretend):
    pretend(dense=2.0, csr=1.0, compact=1.5)
    net, x = Net(), random(3, 4, 6, 6)
    before = copy.deepcopy(net.state_dict())
    fast, rows = compact.accelerate(net, {"x": x, "scale": 2.0})
    found = {row.name: row for row in rows}
    assert list(found) == ["stem", "point", "grouped", "fc", "tied", "twin", "unused", "dense", "table", "(model)"]
    for name in ("stem", "point", "fc"):
        row = found[name]
        assert (row.chosen, row.gain, row.reason) == ("csr", 2.0, "") and row.max_error < 1e-6
        assert row.zeros == pytest.approx(0.9, abs=0.05)
        assert isinstance(fast.get_submodule(name), (compact.SparseLinear, compact.SparseConv2d))
    reasons = {name: found[name].reason for name in ("grouped", "tied", "twin", "unused", "dense", "table")}
    assert reasons == {
        "grouped": "it has 4 groups",
        "tied": "it shares a parameter with 'twin'",
        "twin": "it shares a parameter with 'tied'",
        "unused": "not called on the example",
        "dense": "only 0.0% of its weights are 0",
        "table": "its class is Embedding, not Linear or Conv2d itself",
    }
    assert type(fast.dense) is type(fast.unused) is nn.Linear and fast.again is fast.point
    assert found["(model)"].gain == pytest.approx(2 / 1.5) and found["(model)"].max_error < 1e-5
    assert str(found["fc"]).startswith("fc (Linear 32 x 256, ") and "csr, 2.00 times as fast, max error" in str(
        found["fc"]
    )
    assert not fast.training and net.training  # the given model is as it was
    assert all(torch.equal(was, now) for was, now in zip(before.values(), net.state_dict().values(), strict=True))
    assert type(net.fc) is nn.Linear and not any(m._forward_hooks for m in [*net.modules(), *fast.modules()])
    with torch.no_grad():
        torch.testing.assert_close(fast(x)["logits"], copy.deepcopy(net).eval()(x)["logits"])


def test_blocks_where_they_are_faster(pretend):
    pretend(dense=2.0, csr=1.5, bsr4=1.0, compact=1.0)
    layer = nn.Linear(24, 16, bias=False)
    with torch.no_grad():
        layer.weight.mul_((random(4, 6) > 0.3).repeat_interleave(4, 0).repeat_interleave(4, 1))
    fast, rows = compact.accelerate(nn.Sequential(layer), (random(5, 24),), rounds=3)
    assert fast[0].block == 4 and rows[0].chosen == "bsr4"
    assert set(rows[0].seconds) == {"dense", "csr", "bsr2", "bsr4", "bsr8"}  # 16 does not divide 24
    fast, rows = compact.accelerate(layer, random(5, 24))
    assert isinstance(fast, compact.SparseLinear)


@pytest.mark.parametrize(("seconds", "gain"), [(1.0, "1.00"), (0.92, "1.09"), (1.25, "0.80")])
def test_too_small_a_gain_is_none(seconds, gain, pretend):
    pretend(dense=1.0, csr=seconds)
    net = Net()
    fast, rows = compact.accelerate(net, random(3, 4, 6, 6))
    assert rows[0].chosen == "dense" and type(fast.stem) is nn.Conv2d
    assert rows[0].reason == f"the fastest other form, csr, is {gain} times as fast"


def test_a_form_with_another_output_is_not_taken(pretend, monkeypatch):
    pretend(dense=2.0, csr=1.0)
    make = by_timing.compact_layer

    def wrong(*args, **options):
        layer = make(*args, **options)
        layer.values.data[0] += 1
        return layer

    monkeypatch.setattr(by_timing, "compact_layer", wrong)
    net = Net()
    fast, rows = compact.accelerate(net, random(3, 4, 6, 6))
    assert rows[0].reason.startswith("csr gives another output on the example, max error ")
    assert type(fast.stem) is nn.Conv2d and type(fast.fc) is nn.Linear
    assert rows[-1].max_error == 0


class ReadsWeights(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        with torch.no_grad():
            self.fc.weight.mul_(random(8, 8) > 0.3)

    def forward(self, x):
        return self.fc(x) + self.fc.weight.sum()


def test_a_model_that_reads_its_weights_is_told_what_to_do(pretend):
    pretend(dense=2.0, csr=1.0)
    with pytest.raises(RuntimeError, match="no attribute 'weight'.*exclude the layers whose attributes it reads"):
        compact.accelerate(ReadsWeights(), random(5, 8))
    fast, rows = compact.accelerate(ReadsWeights(), random(5, 8), exclude=["fc"])
    assert rows[0].reason == "excluded" and type(fast.fc) is nn.Linear


def test_a_model_that_is_random_is_refused(pretend):
    pretend(dense=2.0, csr=1.0)

    class Noisy(ReadsWeights):
        def forward(self, x):
            return self.fc(x) + torch.rand(8)

    with pytest.raises(RuntimeError, match="random in eval mode"):
        compact.accelerate(Noisy(), random(5, 8))


def test_the_hooks_of_s2sam_do_nothing_in_the_copy(pretend):
    pretend(dense=2.0, csr=1.0)
    net = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    sparsify(net, optimizer, method="static", sparsity=0.9, generator=torch.Generator().manual_seed(0))
    sam = S2SAM(optimizer, model=net, rho=0.5)
    for _ in range(2):
        net(random(5, 24)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    sam.restore()
    fast, rows = compact.accelerate(net, random(5, 24))
    assert rows[0].chosen == "csr"
    values, w = fast[0].values.clone(), net[0].weight.clone()
    fast.train()(random(5, 24)).sum().backward()
    assert torch.equal(fast[0].values, values) and torch.equal(net[0].weight, w)
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in net.parameters())


def test_a_layer_with_a_hook_keeps_it(pretend):
    pretend(dense=2.0, csr=1.0)
    net = Net()
    seen = []
    net.fc.register_forward_hook(lambda *_: seen.append(1))
    fast, rows = compact.accelerate(net, random(3, 4, 6, 6))
    assert {row.name: row.reason for row in rows}["fc"] == "it has hooks, which a new layer would not have"
    assert type(fast.fc) is nn.Linear


def test_compact_layers_stay_and_compiled_models_count_as_what_is_inside(pretend):
    pretend(dense=2.0, csr=1.0)
    net = nn.Sequential(compact.SparseLinear.from_dense(nn.Linear(8, 8), random(8, 8) > 0), nn.Linear(8, 8))
    fast, rows = compact.accelerate(torch.compile(net, backend="eager"), random(5, 8))
    assert rows[0].reason == "it is compact already" and isinstance(fast, nn.Sequential)


def test_bad_input_of_accelerate():
    net = Net()
    with pytest.raises(ValueError, match="rounds must be a positive whole number, got 0"):
        compact.accelerate(net, random(3, 4, 6, 6), rounds=0)
    with pytest.raises(ValueError, match="'fcc' in exclude is no layer with weights; these are: stem, point"):
        compact.accelerate(net, random(3, 4, 6, 6), exclude=["fcc"])


def test_the_clock_runs():
    """With real times: every form is timed, and what is chosen was at least 1.1 times as fast."""
    net = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 8))
    with torch.no_grad():
        net[0].weight.mul_(random(256, 128) > 0.49)
    fast, rows = compact.accelerate(net, random(64, 128), rounds=2)
    assert set(rows[0].seconds) >= {"dense", "csr", "bsr2"} and all(s > 0 for s in rows[0].seconds.values())
    assert (rows[0].chosen == "dense") == (type(fast[0]) is nn.Linear)
    assert rows[0].chosen == "dense" or rows[0].gain >= by_timing.LEAST_GAIN
    assert rows[-1].seconds["dense"] > 0
