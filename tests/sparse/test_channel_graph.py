"""The channels of networks: which go together, by hand and by cutting them out."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("torch_pruning")
from channel_nets import NAMES, build

from s2sam.models import create_model
from s2sam.sparse import channel_graph
from s2sam.sparse.channel_cut import cut
from s2sam.sparse.channel_graph import channel_groups
from s2sam.sparse.channels import cost, masks_of, rows


def members(group):
    return {(m.name, m.dim, m.role) for m in group.members}


def find(net, *shape):
    return channel_groups(net, (torch.zeros(2, *shape), None))


def test_a_residual_stage_is_one_group():
    net, x = build("resnet8")
    found = channel_groups(net, (x, None))
    assert [(g.name, g.size) for g in found.groups] == [
        ("stem", 4), ("stages.0.0.conv1", 4), ("stages.1.0.conv1", 8), ("stages.1.0.conv2", 8),
        ("stages.2.0.conv1", 16), ("stages.2.0.conv2", 16),
    ]  # fmt: skip
    bn = {("weight", "scale"), ("bias", "shift"), ("running_mean", "statistic"), ("running_var", "statistic")}
    assert members(found["stem"]) == {
        ("stem.weight", 0, "out"), ("stages.0.0.conv2.weight", 0, "out"), ("stages.0.0.conv1.weight", 1, "in"),
        ("stages.1.0.conv1.weight", 1, "in"), ("stages.1.0.shortcut.conv.weight", 1, "in"),
        *((f"{layer}.{key}", 0, role) for layer in ("bn", "stages.0.0.bn2") for key, role in bn),
    }  # fmt: skip
    assert found.dense == {"classifier": "it is part of the output"}


def test_concatenation_and_grouped_convolution_by_hand():
    net, x = build("mixed")
    found = channel_groups(net, (x, None))
    assert [(g.name, g.size) for g in found.groups] == [("a", 8), ("left", 6), ("grouped", 5)]
    assert {m.name for m in found["a"].of("out", "slope")} == {"a.weight", "dw.weight", "act.weight"}
    # 12 inputs in two groups: input j of the first half (left) goes with j of the second (right), column j of both
    owners = {m.name: m.owner.tolist() for m in found["left"].of("out", "in")}
    assert owners == {key: [*range(6)] for key in ("left.weight", "right.weight", "grouped.weight")}
    # output j of the first convolution group goes with output j of the second; 16 pixels of each are flattened
    owners = {m.name: m.owner.tolist() for m in found["grouped"].of("out", "in")}
    assert owners["grouped.weight"] == [0, 1, 2, 3, 4] * 2
    assert owners["fc.weight"] == [i // 16 % 5 for i in range(160)]


def test_batchnorm_over_a_concatenation_belongs_to_both():
    net, x = build("dense")
    found = channel_groups(net, (x, None))
    owner = {g.name: next(m.owner.tolist() for m in g.members if m.name == "bn.weight") for g in found.groups[:2]}
    assert owner == {"one": [*range(6), *[-1] * 4], "two": [*[-1] * 6, *range(4)]}


@pytest.mark.parametrize("name", NAMES)
def test_every_channel_can_be_cut_alone(name):
    """Against brute force: masked and cut networks agree in float64 for every single channel (some of VGG's)."""
    net, x = build(name)
    net, x = net.double().eval(), x.double()[:2]
    found = channel_groups(net, (x, None))
    if name == "vgg19":
        found = type(found)(found.groups[::6], {})
    for group in found.groups:
        for channel in range(0, group.size, 1 if name in ("mixed", "dense") else 5):
            keep = found.all_alive()
            keep[group.name][channel] = False
            masked, slim = copy.deepcopy(net), copy.deepcopy(net)
            parameters = dict(masked.named_parameters())
            with torch.no_grad():
                for key, mask in masks_of(found.groups, keep, parameters).items():
                    parameters[key].mul_(mask)
            slim.load_state_dict(masked.state_dict())
            cut(slim, rows(found.groups, keep))
            with torch.no_grad():
                assert torch.allclose(masked(x), slim(x), rtol=1e-12, atol=1e-12), (group.name, channel)
            assert sum(p.numel() for p in slim.parameters()) < sum(p.numel() for p in net.parameters())


class Shifted(nn.Module):
    """A residual sum with 2 channels padded in front: channel i meets channel i + 2, which tracing does not see."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 6, 1), nn.Linear(6, 2)

    def forward(self, x):
        y = self.a(x)
        return self.fc((F.pad(y, (0, 0, 0, 0, 2, 0)) + self.b(y)).mean((2, 3)))


class FromInput(nn.Module):
    """The residual sum is with the input, which cannot lose a channel; the other layer can."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Linear(4, 4), nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.fc(F.relu(self.b(x + self.a(x))))


class Sized(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.fc(F.relu(self.b(self.a(x).view(-1, 6))))


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x):
        features = self.a(x)
        return {"features": features, "logits": self.fc(F.relu(self.b(features)))}


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.fc = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.fc(F.relu(self.c(self.b(F.relu(self.b(self.a(x)))))))


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b, self.fc = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.fc(F.relu(self.b(self.norm(self.a(x)))))


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.fc = nn.Linear(4, 6), nn.Linear(6, 7), nn.Linear(7, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.fc(F.relu(self.c(F.linear(self.a(x), self.b.weight))))


class Recurrent(nn.Module):
    """Features go on into an LSTM, whose columns the library cannot map."""

    def __init__(self, kind=nn.LSTM):
        super().__init__()
        self.a, self.rnn = nn.Linear(4, 8), kind(8, 6, batch_first=True)
        self.b, self.fc = nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.fc(F.relu(self.b(self.rnn(F.relu(self.a(x[:, None])))[0][:, -1])))


class HeadForTraining(nn.Module):
    """What `a` makes is read by a head that runs in training mode alone."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc, self.aux = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 2), nn.Linear(6, 2)

    def forward(self, x):
        x = F.relu(self.a(x))
        y = self.fc(F.relu(F.dropout(self.b(x), 0.5, self.training)))
        return (y, self.aux(x)) if self.training else y


def tied():
    net = nn.Sequential(
        nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)
    )
    net[2].weight = net[0].weight
    return net


REFUSED = {
    "shifted": (Shifted, (1, 3, 3), {"a": "computes something else"}),
    "from input": (FromInput, (4,), {"a": "computes something else"}),
    "sized": (Sized, (4,), {"a": "computes something else"}),
    "two heads": (TwoHeads, (4,), {"a": "computes something else"}),
    "twice": (Twice, (4,), {"a": "is called 2 times", "b": "is called 2 times"}),
    "normed": (Normed, (4,), {"a": "is a LayerNorm, whose channels cannot be cut"}),
    "lstm": (Recurrent, (4,), {"a": "LSTM, whose channels cannot be cut"}),
    "gru": (lambda: Recurrent(nn.GRU), (4,), {"a": "meets a parameter of no layer"}),
    "head for training": (HeadForTraining, (4,), {"a": "computes something else"}),
    "tied": (tied, (4,), {"0": "shares a parameter", "2": "shares a parameter"}),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(2, 4, 2), nn.Conv2d(4, 5, 1), nn.ReLU(), nn.Conv2d(5, 2, 1)),
        (2, 3, 3),
        {},
    ),
    "weight norm": (
        lambda: nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)
        ),
        (4,),
        {"0": "weight that is computed"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_cut_stays_dense_and_says_why(case):
    make, shape, reasons = REFUSED[case]
    found = find(make(), *shape)
    assert {g.size for g in found.groups} == (set() if case == "shifted" else {5})
    for name, reason in reasons.items():
        assert reason in found.dense[name]


def test_models_that_are_random_or_do_not_run_in_training_mode_are_proved_in_eval_mode():
    for behind in (nn.Dropout(0.5), nn.RReLU()):
        assert [g.size for g in find(nn.Sequential(nn.Linear(4, 6), behind, nn.Linear(6, 2)), 4).groups] == [6]
    one = torch.zeros(1, 4), None  # BatchNorm refuses a single value
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    state = torch.get_rng_state()
    assert [g.size for g in channel_groups(net, one).groups] == [6]
    assert torch.equal(torch.get_rng_state(), state)


def test_functional_calls_do_not_break_what_is_found():
    net = Functional()
    found = find(net, 4)
    assert {g.name for g in found.groups} == {"c"}


def test_the_parameter_free_shortcut_of_a_resnet_is_proved_against():
    net = create_model("resnet8", num_classes=4, generator=torch.Generator(), shortcut="A", width=0.25)
    found = find(net, 3, 8, 8)
    assert [g.name for g in found.groups] == ["stages.0.0.conv1", "stages.1.0.conv1", "stages.2.0.conv1"]
    assert "computes something else" in found.dense["stem"]


def test_the_model_is_left_as_it_was():
    net, x = build("resnet8")
    net.train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state = torch.random.get_rng_state()
    channel_groups(net, (x, None))
    assert net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(state, torch.random.get_rng_state())
    assert not any(m._forward_hooks for m in net.modules())


def test_the_cost_of_a_channel():
    net, x = build("dense")
    found = channel_groups(net, (x, None))
    tensors = dict(net.named_parameters())
    sizes, shapes = {n: p.numel() for n, p in tensors.items()}, {n: p.shape for n, p in tensors.items()}
    # one: 3 * 9 weights made, 4 * 9 read by two, 5 read by three
    assert cost(found["one"], sizes, shapes).tolist() == [27 + 36 + 5] * 6
    assert cost(found["one"], {"one.weight": 6000}, shapes).tolist() == [1000.0] * 6


def test_the_matrix_of_a_group_holds_each_channels_weights():
    net, x = build("mixed")
    found = channel_groups(net, (x, None))
    matrix = found["grouped"].matrix(dict(net.named_parameters()), "out")
    assert matrix.shape == (5, 2 * 6 * 9)
    weight = net.grouped.weight.detach()
    assert torch.equal(matrix[3], torch.cat([weight[3].flatten(), weight[8].flatten()]))


def test_bad_input(monkeypatch):
    net, _ = build("mixed")
    with pytest.raises(ValueError, match="fails on the example input"):
        find(net, 2, 4, 4)
    with pytest.raises(ValueError, match="unknown channel group 'lift'; did you mean 'left'"):
        find(net, 3, 4, 4)["lift"]
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ValueError, match=r"pip install 's2sam\[structured\]'"):
        find(net, 3, 4, 4)
    assert channel_graph.__doc__
