"""What methods are given that they may not expect: layers of every kind, no layers, another sparsity, no batches."""

import dataclasses
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from s2sam import sparsify
from s2sam.registry import list_methods

sys.path.insert(0, str(Path(__file__).parent))
from sparse_support import attach, generator, make_batches, make_net, one_step, usable, usual

NAMES = [row.name for row in list_methods()]
ROWS = {row.name: row for row in list_methods()}


def sgd(net):
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


class Convolutions(nn.Module):
    """A grouped, a depthwise and a transposed convolution before the classifier."""

    def __init__(self):
        super().__init__()
        self.grouped = nn.Conv2d(8, 16, 3, padding=1, groups=4, bias=False)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.up = nn.ConvTranspose2d(16, 8, 2, groups=2, bias=False)
        self.head = nn.Linear(8, 4, bias=False)

    def forward(self, x):
        return self.head(torch.tanh(self.up(torch.tanh(self.depthwise(self.grouped(x))))).mean((2, 3)))


class Tokens(nn.Module):
    """Attention, and an embedding whose table is the classifier's weight as well."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(12, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.inner = nn.Linear(16, 16)
        self.head = nn.Linear(16, 12, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        h = self.table(tokens)
        h = self.norm(h + self.attention(h, h, h, need_weights=False)[0])
        return self.head(h + self.inner(h)).mean(1)


def images(n=3):
    g = generator(5)
    return [(torch.randn(6, 8, 5, 5, generator=g), torch.randint(4, (6,), generator=g)) for _ in range(n)]


def sentences(n=3):
    g = generator(6)
    return [(torch.randint(12, (6, 7), generator=g), torch.randint(12, (6,), generator=g)) for _ in range(n)]


WORLDS = {"convolutions": (Convolutions, images), "tokens": (Tokens, sentences)}
DEFAULT = {
    "convolutions": {"grouped.weight", "head.weight"},
    "tokens": {"attention.out_proj.weight", "inner.weight"},
}
MORE = {"convolutions": ["depthwise", "up"], "tokens": ["in_proj_weight", "table"]}  #: patterns for include
ADDED = {
    "convolutions": {"depthwise.weight", "up.weight"},
    "tokens": {"attention.in_proj_weight", "table.weight"},
}  #: what they add
REFUSED = {
    "srigl": r"needs the neurons of a layer in its first dimension.*leave it dense with exclude=",
    "synflow": r"sends ones through the model.*choose another method",
    "chex": r"no channels to prune.*(ConvTranspose2d|MultiheadAttention)",
    "chase": r"no channels to prune.*(ConvTranspose2d|MultiheadAttention)",
}  #: what these say of a layer that they cannot have; any other method takes all


def sparse(name, world, **options):
    """The net of a world under a method, trained for three steps; None if it was refused with its sentence."""
    make, data = WORLDS[world]
    net, batches = make(), data()
    optimizer = sgd(net)
    given = {"batches": batches, "loss_fn": F.cross_entropy} if ROWS[name].load().needs_batches else {}
    try:
        sparsifier = attach(ROWS[name], net, optimizer, delta_t=2, sparsity=0.5, **given, **options)
    except ValueError as error:
        sentence = str(error)
        if "\n" in sentence or not re.search(REFUSED.get(name, "$^"), sentence):
            raise
        return None
    before = {key: p.detach().clone() for key, p in net.named_parameters()}
    for batch in batches:
        one_step(net, optimizer, batch)
    sparsifier.verify()
    return net, sparsifier, before


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", NAMES)
def test_layers_of_every_kind_are_trained_or_refused(name, world):
    found = sparse(name, world)
    if found is None:
        return
    net, sparsifier, before = found
    assert set(sparsifier.masks) == DEFAULT[world]
    for key, p in net.named_parameters():
        assert not torch.equal(p, before[key]) or key in sparsifier.masks, f"{key} has not been trained"
        if key in sparsifier.masks:
            assert not p.detach()[~sparsifier.masks[key]].any()
        else:
            assert torch.count_nonzero(p) > 0.9 * p.numel(), f"{key} was to stay dense"


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", ["static", "rigl", "snfs", "snip", "srigl"])
def test_what_is_left_out_can_be_included(name, world):
    found = sparse(name, world, include=MORE[world])
    if found is None:
        assert (name, world) == ("srigl", "convolutions")
        return
    net, sparsifier, _ = found
    added = set(sparsifier.masks) - DEFAULT[world]
    assert added == ADDED[world]
    for key in added:
        kept, weight = sparsifier.masks[key], dict(net.named_parameters())[key]
        assert torch.equal(weight != 0, kept)
    pruned = sum(int((~mask).sum()) for mask in sparsifier.masks.values())
    assert pruned == pytest.approx(0.5 * sum(m.numel() for m in sparsifier.masks.values()), rel=0.02)


def test_the_report_says_why_each_is_left_out():
    reasons = {}
    for make, _ in WORLDS.values():
        net = make()
        reasons |= {row.name: row.reason for row in sparsify(net, sgd(net), method="static", sparsity=0.5).report()}
    assert reasons["depthwise.weight"] == "depthwise convolution"
    assert reasons["up.weight"] == "a parameter of ConvTranspose2d, which is neither Conv1d/2d/3d nor Linear"
    assert reasons["attention.in_proj_weight"].startswith("a parameter of MultiheadAttention")
    assert reasons["table.weight"] == "tied to an embedding"
    assert reasons["grouped.weight"] == reasons["attention.out_proj.weight"] == ""


def test_attention_computes_with_the_weights_that_are_left():
    """Its fast path in eval mode reads the weight of out_proj itself; a row of zeros must silence that output."""
    net = Tokens()
    sparsifier = sparsify(net, sgd(net), method="static", sparsity=0.5, exclude="inner")
    x = torch.randn(2, 5, 16, generator=generator())
    for training in (True, False):
        net.attention.train(training)
        with torch.no_grad():
            net.attention.out_proj.weight[3] = 0.0
            out = net.attention(x, x, x, need_weights=False)[0]
        assert torch.equal(out[..., 3], net.attention.out_proj.bias[3].expand(2, 5))
    assert not net.attention.out_proj.weight.detach()[~sparsifier.masks["attention.out_proj.weight"]].any()


def test_a_tied_table_stays_one_tensor():
    for include in (None, "head"):  # the name of either end will do
        net, sparsifier, _ = sparse("rigl", "tokens", include=include)
        assert net.head.weight is net.table.weight
        assert ("table.weight" in sparsifier.masks) == (include is not None)
        assert bool((net.head.weight == 0).any()) == (include is not None)


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=False)[0]).mean(1)


DENSE = {
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(2, 4, 2), nn.ConvTranspose2d(4, 3, 2)), (2, 3, 3), {}),
    "transposed, included": (
        lambda: nn.Sequential(nn.ConvTranspose2d(2, 4, 2), nn.ReLU(), nn.ConvTranspose2d(4, 3, 2)),
        (2, 3, 3),
        {"include": "ConvTranspose2d"},
    ),
    "layer norm": (lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)), (4,), {}),
    "group norm": (lambda: nn.Sequential(nn.Conv2d(2, 6, 1), nn.GroupNorm(2, 6), nn.Conv2d(6, 3, 1)), (2, 3, 3), {}),
    "attention": (Attending, (5, 8), {}),
}


@pytest.mark.parametrize("case", DENSE)
@pytest.mark.parametrize("name", [row.name for row in ROWS.values() if row.kind == "structured" and usable(row)])
def test_a_model_whose_layers_all_stay_dense_in_the_channel_graph(name, case):
    make, shape, options = DENSE[case]
    net = make()
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(ValueError, match=r"no (channels to prune|prunable weight) \(.+\)") as caught:
        sparsify(net, sgd(net), method=name, sparsity=0.5, total_steps=9, batches=[(torch.ones(2, *shape), None)],
                 **options)  # fmt: skip
    sentence = str(caught.value)
    assert "\n" not in sentence and ". " not in sentence and len(sentence) < 400
    assert re.search("ConvTranspose2d|LayerNorm|GroupNorm|MultiheadAttention", sentence)
    assert all(torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_model_without_prunable_layers(name):
    net = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4))
    message = (
        r"no prunable weight \(0.weight: embedding; 1.weight: normalisation \(LayerNorm\); 1.bias: bias\); name some"
    )
    with pytest.raises(ValueError, match=message):
        sparsify(net, sgd(net), method=name, sparsity=0.5, total_steps=10)


def test_a_model_without_parameters():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    with pytest.raises(ValueError, match="the model has no parameters"):
        sparsify(nn.ReLU(), optimizer, method="static", sparsity=0.5)


@pytest.mark.parametrize("name", [name for name in NAMES if ROWS[name].load().needs_batches])
def test_methods_that_need_batches_say_so(name):
    net = make_net()
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(ValueError, match=f"method '{name}' .*batches="):
        sparsify(net, sgd(net), method=name, sparsity=0.5, total_steps=10)
    assert all(torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))


# Another sparsity in the middle of a run


@pytest.mark.parametrize("name", NAMES)
def test_the_sparsity_of_a_run_cannot_be_set(name):
    row, net = ROWS[name], make_net()
    try:
        sparsifier = attach(row, net, sgd(net))
    except ValueError as error:
        pytest.skip(f"{name} refuses this net: {error}")
    with pytest.raises(AttributeError, match=r"from 0\.\d+ to 0\.99; call sparsifier\.remove\(\) and sparsify\(\)"):
        sparsifier.final_sparsity = 0.99
    assert sparsifier.final_sparsity == usual(row)


def test_remove_and_sparsify_again_is_the_way_to_another_sparsity():
    net = make_net()
    optimizer = sgd(net)
    first = sparsify(net, optimizer, method="magnitude", sparsity=0.5)
    first.remove()
    second = sparsify(net, optimizer, method="magnitude", sparsity=0.8)
    for batch in make_batches(2):
        one_step(net, optimizer, batch)
    assert second.sparsity() == pytest.approx(0.8, abs=1e-2)
    assert all(not (second.masks[name] & ~mask).any() for name, mask in first.masks.items()), "it went on from there"


@pytest.mark.parametrize("name", ["static", "rigl", "gmp", "mest"])
def test_a_state_of_another_sparsity_is_refused(name):
    net, other = make_net(), make_net(seed=1)
    saved = attach(ROWS[name], net, sgd(net), sparsity=0.5).state_dict()
    resumed = attach(ROWS[name], other, sgd(other), sparsity=0.8, init=False)
    with pytest.raises(ValueError, match=r"saved at a target sparsity of 0\.5, .* is 0\.8; .* with sparsity=0\.5"):
        resumed.load_state_dict(saved)
    assert all(torch.equal(p, q) for p, q in zip(other.parameters(), make_net(seed=1).parameters(), strict=True))


def test_a_state_without_its_sparsity_still_loads():
    net = make_net()
    sparsifier = attach(ROWS["rigl"], net, sgd(net))
    old = {key: value for key, value in sparsifier.state_dict().items() if key != "sparsity"}
    other = make_net()
    resumed = attach(ROWS["rigl"], other, sgd(other), init=False)
    resumed.load_state_dict(old)
    assert all(torch.equal(mask, sparsifier.masks[name]) for name, mask in resumed.masks.items())


def test_a_run_is_not_resumed_at_another_sparsity(tmp_path):
    from s2sam.track.base import Loggers
    from s2sam.train.config import DataConfig, TrainConfig
    from s2sam.train.folder import RunFolder
    from s2sam.train.loop import Trainer
    from s2sam.train.resume import find_resume
    from s2sam.train.state import build

    config = TrainConfig(data_options=DataConfig(train_size=64), model_options={"width": 0.125}, out=str(tmp_path))
    folder = RunFolder(config.folder)
    folder.checkpoints.mkdir(parents=True)
    Trainer(build(config), Loggers([]), folder).save("last.pt")
    assert find_resume(folder, config, "auto") is not None
    with pytest.raises(ValueError, match=r"other settings: sparsity is 0\.9 there and 0\.5 here; add --resume never"):
        find_resume(folder, dataclasses.replace(config, sparsity=0.5), "auto")
