"""What is prunable, why the rest is not, and patterns that match or fail to."""

import pytest
import torch
from torch import nn

from s2sam.sparse.prunable import discover


class Net(nn.Module):
    """One of everything."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.one_channel = nn.Conv2d(1, 4, 3)
        self.shortcut = nn.Conv2d(8, 8, 1)
        self.wave = nn.Conv1d(2, 2, 3)
        self.volume = nn.Conv3d(2, 2, 3)
        self.up = nn.ConvTranspose2d(4, 4, 2)
        self.embedding = nn.Embedding(5, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.norm = nn.LayerNorm(4)
        self.token = nn.Parameter(torch.zeros(1, 4))
        self.again = self.shortcut
        self.twin = nn.Linear(8, 8)
        self.twin2 = nn.Linear(8, 8)
        self.twin2.weight = self.twin.weight
        self.head = nn.Linear(4, 5)
        self.head.weight = self.embedding.weight
        self.lone = nn.Linear(4, 5, bias=False)


PRUNABLE = [
    "stem.weight", "grouped.weight", "one_channel.weight", "shortcut.weight", "wave.weight", "volume.weight",
    "attention.out_proj.weight", "twin.weight", "lone.weight",
]  # fmt: skip


def prunable(*args, **kw):
    return [e.name for e in discover(*args, **kw) if e.prunable]


def test_default_set_and_reasons():
    net = Net()
    entries = {e.name: e for e in discover(net)}
    assert sorted(e.name for e in entries.values() if e.prunable) == sorted(PRUNABLE)
    reasons = {name: e.reason for name, e in entries.items()}
    assert reasons["depthwise.weight"] == "depthwise convolution"
    assert reasons["embedding.weight"] == "tied to an embedding"
    assert reasons["stem.bias"] == "bias"
    assert reasons["bn.weight"] == "normalisation (BatchNorm2d)"
    assert "ConvTranspose2d" in reasons["up.weight"]
    assert "MultiheadAttention" in reasons["attention.in_proj_weight"]
    assert "Net" in reasons["token"]


def test_every_parameter_appears_once():
    net = Net()
    entries = discover(net)
    assert [e.name for e in entries] == [name for name, _ in net.named_parameters()]
    assert len({id(e.parameter) for e in entries}) == len(entries)


def test_a_linear_before_its_embedding_is_tied_as_well():
    net = nn.ModuleDict({"head": nn.Linear(4, 5, bias=False), "table": nn.Embedding(5, 4)})
    net["head"].weight = net["table"].weight
    assert [(e.name, e.reason) for e in discover(net)] == [("head.weight", "tied to an embedding")]
    assert discover(nn.Embedding(5, 4))[0].reason == "embedding"


@pytest.mark.parametrize(
    ("include", "exclude", "added", "removed"),
    [
        ("depthwise", None, {"depthwise.weight", "depthwise.bias"}, set()),
        ("depthwise.weight", None, {"depthwise.weight"}, set()),
        (["Embedding", r"in_proj_weight$"], None, {"embedding.weight", "attention.in_proj_weight"}, set()),
        (None, "stem", set(), {"stem.weight"}),
        (None, "again", set(), {"shortcut.weight"}),
        (None, "twin2", set(), {"twin.weight"}),
        (None, "Conv[13]d", set(), {"wave.weight", "volume.weight"}),
        (None, ["^lone", "Linear"], set(), {"lone.weight", "twin.weight"}),
        ("depthwise.weight", "depthwise", set(), set()),
    ],
)
def test_include_and_exclude(include, exclude, added, removed):
    assert set(prunable(Net(), include, exclude)) == (set(PRUNABLE) | added) - removed


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("stemm.weight", "did you mean 'stem.weight'"),
        ("Convv2d", "did you mean 'Conv2d'"),
        ("(", "no valid regular expression"),
    ],
)
def test_patterns_that_match_nothing(pattern, message):
    with pytest.raises(ValueError, match=message):
        discover(Net(), exclude=pattern)


def test_wrappers_do_not_change_names():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    assert prunable(torch.compile(net, backend="eager")) == prunable(nn.DataParallel(net)) == prunable(net)


def test_lazy_modules_must_have_run():
    with pytest.raises(ValueError, match="run the model once"):
        discover(nn.LazyLinear(3))


def test_a_layer_whose_class_has_norm_in_its_name_is_a_layer():
    class NormedLinear(nn.Linear):
        pass

    assert prunable(nn.Sequential(NormedLinear(4, 8), nn.LayerNorm(8))) == ["0.weight"]
