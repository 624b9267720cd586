"""What the methods that score weights before training share: no trace of scoring, what they read, what they refuse."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from s2sam import S2SAM, Sparsifier, sparsify
from s2sam.registry import list_methods
from s2sam.sparse.saliency import Batch, checked

sys.path.insert(0, str(Path(__file__).parent))
from sparse_support import copy_masks, equal_masks, generator, loss_fn, make_batches, make_net, one_step

METHODS = ["snip", "grasp", "synflow"]
WITH_DATA = ["snip", "grasp"]
every = pytest.mark.parametrize("method", METHODS)
with_data = pytest.mark.parametrize("method", WITH_DATA)


def sgd(net):
    return torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def score(net, method, *, batches=None, **kw):
    """The masks that `method` finds for `net`."""
    batches = make_batches(2) if batches is None else batches
    return copy_masks(sparsify(net, sgd(net), **{"method": method, "sparsity": 0.6, "batches": batches} | kw))


def conv_net(seed=0):
    """Everything that scoring could disturb: BatchNorm with a history, dropout, a frozen and an eval-mode part."""
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(6, 4, 3, bias=False),
        nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip
    g = generator(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.4)
        for p in (net[1].weight, net[5].weight):
            p.abs_().add_(0.5)
        for bn in (net[1], net[5]):
            bn.running_mean.copy_(torch.randn(bn.running_mean.shape, generator=g))
            bn.running_var.copy_(torch.rand(bn.running_var.shape, generator=g) + 0.5)
    net[1].bias.requires_grad_(False)
    net[5].eval()
    return net


def images(n=2, size=12, seed=4):
    g = generator(seed)
    return [(torch.randn(size, 2, 6, 6, generator=g), torch.randint(0, 3, (size,), generator=g)) for _ in range(n)]


# -- scoring leaves no trace ------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("bn_mode", ["train", "eval"])
def test_scoring_changes_nothing_but_the_pruned_weights(method, bn_mode):
    net = conv_net()
    optimizer = sgd(net)
    for x, y in images(1):
        loss_fn(net(x), y).backward()
    optimizer.step()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    moments = copy.deepcopy(optimizer.state_dict()["state"])
    grads = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    flags = [m.training for m in net.modules()]
    random = torch.random.get_rng_state()
    options = {"bn_mode": bn_mode} if method in WITH_DATA else {}
    sparsifier = sparsify(net, optimizer, method=method, sparsity=0.6, batches=images(), **options)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert [m.training for m in net.modules()] == flags
    for name, value in net.state_dict().items():
        expected = state[name].where(sparsifier.masks[name], 0.0) if name in sparsifier.masks else state[name]
        assert torch.equal(value, expected), name
    assert {n for n, p in net.named_parameters() if p.grad is not None} == set(grads)
    assert all(torch.equal(net.get_parameter(name).grad, g) for name, g in grads.items())
    names = [name for name, p in net.named_parameters() if p.requires_grad]
    for i, entry in optimizer.state_dict()["state"].items():
        mask = sparsifier.masks.get(names[i], torch.tensor(True))
        assert torch.equal(entry["momentum_buffer"], moments[i]["momentum_buffer"] * mask)


@every
def test_an_attached_s2sam_goes_on_as_if_the_masks_had_been_given(method):
    class Given(Sparsifier):
        method = "given"

        def initial_masks(self, *_):
            return runs[0][2]

    runs = []
    for by_hand in (False, True):
        net = make_net()
        optimizer = sgd(net)
        sam = S2SAM(optimizer, model=net, rho=0.1, stats_every=1)
        for batch in make_batches(2):
            one_step(net, optimizer, batch)
        clean = [p.detach().clone() for p in net.parameters()]
        kw = {"method": Given} if by_hand else {"method": method, "batches": make_batches(2, seed=9)}
        sparsifier = sparsify(net, optimizer, sparsity=0.6, **kw)
        for (name, p), old in zip(net.named_parameters(), clean, strict=True):
            assert torch.equal(p, old * sparsifier.masks[name]), "no window was opened"
        masks = copy_masks(sparsifier)
        for batch in make_batches(5, seed=8):
            one_step(net, optimizer, batch)
        runs.append((dict(sam.stats), [p.detach().clone() for p in net.parameters()], masks))
    assert equal_masks(runs[0][2], runs[1][2])
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))
    assert runs[0][0] == runs[1][0]
    assert runs[0][0]["displacement"] == pytest.approx(0.1, rel=1e-3)


@every
def test_autocast_no_grad_and_the_training_flag_outside_make_no_difference(method):
    expected = score(make_net(), method)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert equal_masks(expected, score(make_net(), method))
    with torch.no_grad():
        assert equal_masks(expected, score(make_net(), method))
    assert equal_masks(expected, score(make_net().eval(), method))
    assert equal_masks(expected, score(nn.DataParallel(make_net()), method))


@with_data
def test_autocast_outside_changes_no_bit_of_the_scores(method):
    net = conv_net()
    sparsifier = sparsify(net, sgd(net), method=method, sparsity=0.0, batches=images())
    plain = sparsifier.initial_scores(net)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = sparsifier.initial_scores(net)
        coarse = net(images()[0][0])
    assert coarse.dtype == torch.bfloat16, "autocast does act on this network"
    assert all(torch.equal(inside[name], s) for name, s in plain.items())


@every
def test_a_network_that_draws_while_it_is_scored_leaves_the_random_state_alone(method):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.draws = make_net(), []

        def forward(self, x):
            before = torch.random.get_rng_state()
            x = x + F.dropout(torch.ones_like(x), 0.1, training=True)  # whatever mode the module is in
            self.draws.append(not torch.equal(torch.random.get_rng_state(), before))
            return self.net(x)

    net = Noisy()
    twins = []
    net.register_forward_hook(lambda module, args, output: twins.append(module))
    state = torch.random.get_rng_state()
    shape = {} if method in WITH_DATA else {"input_shape": make_batches(1)[0][0].shape[1:]}
    sparsify(net, sgd(net), method=method, sparsity=0.3, batches=make_batches(2), **shape)
    assert any(twin.draws and all(twin.draws) for twin in twins), "scoring did draw"
    assert torch.equal(torch.random.get_rng_state(), state)


@with_data
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": 5}, r"batches must be a list or a loader of \(input, target\) pairs, got int"),
        ({"batches": [(torch.ones(4, 99), torch.zeros(4).long())]}, "the model fails on what it is scored with .*99"),
        ({"batches": [(torch.ones(4, 6), torch.full((4,), 77))]}, "the loss fails on what it is scored with .*77"),
        ({"batches": [(torch.ones(4, 6), torch.zeros(3).long())]}, r"the loss fails .*of shape \(4, 3\), \(3,\)"),
        ({"loss_fn": 5}, "loss_fn must be a function of output and target, got int"),
        ({"loss_fn": lambda a: a}, "the loss fails on what it is scored with"),
    ],
)
def test_what_cannot_be_scored_is_told_in_one_sentence(method, options, message):
    with pytest.raises(ValueError, match=message) as error:
        score(make_net(), method, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_shape": (99,)}, "the model fails on what it is scored with .*99"),
        ({"input_shape": 5.5}, r"input_shape must be a list such as \(3, 32, 32\), got 5.5"),
        ({"batches": 5}, "batches must be a list or a loader"),
    ],
)
def test_synflow_says_what_shape_it_cannot_use(options, message):
    with pytest.raises(ValueError, match=message):
        score(make_net(), "synflow", **options)


@every
def test_half_precision_is_scored_in_full(method):
    net = make_net().bfloat16()
    assert equal_masks(score(copy.deepcopy(net).float(), method), score(net, method))


@every
def test_scoring_a_sparse_network_keeps_to_its_weights(method):
    net = make_net()
    optimizer = sgd(net)
    first = sparsify(net, optimizer, method="static", sparsity=0.5, generator=generator())
    before = copy_masks(first)
    first.remove()
    second = sparsify(net, optimizer, method=method, sparsity=0.8, batches=make_batches(2))
    if method != "grasp":  # there a 0 ranks above weights that gradient flow is better without
        assert not any((mask & ~before[name]).any() for name, mask in second.masks.items())
    assert sum(int(m.sum()) for m in second.masks.values()) == round(0.2 * 222)


# -- what is read -----------------------------------------------------------------------------------------------------


@with_data
def test_every_sample_counts_the_same_however_the_batches_are_cut(method):
    ((x, y),) = make_batches(1, size=30)
    net = make_net().double()
    scores = []
    for cuts in ([30], [13, 17], [1] * 30):
        pairs = list(zip(x.split(cuts), y.split(cuts), strict=True))
        twin = copy.deepcopy(net)
        sparsifier = sparsify(twin, sgd(twin), method=method, sparsity=0.0, batches=pairs)
        scores.append(sparsifier.initial_scores(twin))
    for other in scores[1:]:
        assert all(torch.allclose(s, other[name], rtol=1e-9, atol=0) for name, s in scores[0].items())


@with_data
def test_num_batches_takes_the_first(method):
    batches = make_batches(5)
    two, five = (score(make_net(), method, batches=batches[:n]) for n in (2, 5))
    assert equal_masks(two, score(make_net(), method, batches=batches, num_batches=2))
    assert not equal_masks(two, five)


@with_data
def test_an_iterator_that_is_used_up_will_do(method):
    assert equal_masks(score(make_net(), method), score(make_net(), method, batches=iter(make_batches(2))))


@with_data
def test_arguments_by_position_and_by_name(method):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = make_net()

        def forward(self, x, *, shift):
            return self.net(x + shift)

    class Pair(Two):
        def forward(self, x, shift):
            return self.net(x + shift)

    g = generator()
    plain = [(x, y) for x, y in make_batches(2)]
    shifts = [torch.randn(x.shape, generator=g) for x, _ in plain]
    named = [({"x": x - s, "shift": s}, y) for (x, y), s in zip(plain, shifts, strict=True)]
    by_place = [((x - s, s), y) for (x, y), s in zip(plain, shifts, strict=True)]
    expected = list(score(make_net(), method, batches=plain).values())
    for net, batches in ((Two(), named), (Pair(), by_place)):
        found = score(net, method, batches=batches).values()
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@with_data
def test_batch_norm_follows_bn_mode_and_dropout_is_off(method):
    def shifted(shift):
        net = conv_net()
        for bn in (net[1], net[5]):
            bn.running_mean.add_(shift)
        return net

    found = {}
    for bn_mode in ("train", "eval"):
        for shift in (0.0, 3.0):
            found[bn_mode, shift] = score(shifted(shift), method, batches=images(), bn_mode=bn_mode)
    assert equal_masks(found["train", 0.0], found["train", 3.0]), "the batch's own statistics"
    assert not equal_masks(found["eval", 0.0], found["eval", 3.0]), "the running ones"
    again = score(shifted(0.0), method, batches=images())
    assert equal_masks(again, found["train", 0.0]), "train is the default, and dropout draws nothing"


# -- budgets ----------------------------------------------------------------------------------------------------------


@every
def test_the_default_is_a_choice_over_all_layers(method):
    assert equal_masks(score(make_net(), method), score(make_net(), method, distribution="global"))
    kept = {name: int(m.sum()) for name, m in score(make_net(), method, distribution="uniform", sparsity=0.5).items()}
    assert kept == {"0.weight": 36, "2.weight": 60, "4.weight": 15}
    static = sparsify(net := make_net(), sgd(net), method="static", sparsity=0.5)
    erk = {name: int(m.sum()) for name, m in score(make_net(), method, distribution="erk", sparsity=0.5).items()}
    assert erk == static.parts[0].kept, "auto is erk for a method that scores nothing"


@every
def test_min_per_layer_holds_a_layer_up(method):
    net = make_net()
    with torch.no_grad():  # a layer that scores next to nothing; for synflow all but one unit of it
        net[2].weight[1 if method == "synflow" else 0 :].mul_(1e-6)
    kw = {"sparsity": 0.8} | ({"rounds": 1} if method == "synflow" else {})
    bare = {name: int(m.sum()) for name, m in score(copy.deepcopy(net), method, **kw).items()}
    held = {name: int(m.sum()) for name, m in score(copy.deepcopy(net), method, min_per_layer=14, **kw).items()}
    assert bare["2.weight"] < 14
    assert held["2.weight"] == 14
    assert sum(bare.values()) == sum(held.values()) == round(0.2 * 222)
    with pytest.raises(ValueError, match="cannot keep 20 in each of 3 layers with 44 in all"):
        score(net, method, min_per_layer=20, **kw)


@every
def test_a_layer_smaller_than_the_minimum_is_kept_whole(method):
    assert score(make_net(), method, min_per_layer=29, sparsity=0.6)["4.weight"].sum() >= 29
    assert score(make_net(), method, min_per_layer=31, sparsity=0.55)["4.weight"].sum() == 30


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"batches": None}, "scores weights with data: give batches="),
        ({"batches": []}, "needs some batches and got 0"),
        ({"num_batches": 3}, "needs 3 batches and got 2"),
        ({"num_batches": 0}, "num_batches must be a whole number of at least 1"),
        ({"bn_mode": "trian"}, "unknown bn_mode 'trian'; did you mean 'train'"),
        ({"min_per_layer": 0}, "min_per_layer must be a whole number of at least 1, got 0"),
        ({"batches": [torch.ones(3, 6)]}, r"must hold \(input, target\) pairs, got a Tensor"),
        ({"batches": [("text", torch.zeros(1))]}, "the input of a batch must hold tensors, got a str"),
        ({"batches": [(torch.ones(3, 6), torch.ones(3, 3))]}, "needs loss_fn=, as the targets"),
        ({"loss_fn": lambda a, b: F.cross_entropy(a, b, reduction="none")}, "must return the mean loss of the batch"),
        ({"batches": [(torch.full((3, 6), torch.nan), torch.zeros(3).long())]}, "scores of '0.weight' are not finite"),
        ({"loss_fn": lambda a, b: torch.zeros(())}, "all scores are zero"),
    ],
)
@with_data
def test_bad_batches_and_options(method, kw, message):
    net = make_net()
    with pytest.raises(ValueError, match=message):
        sparsify(net, sgd(net), **{"method": method, "sparsity": 0.5, "batches": make_batches(2)} | kw)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), make_net().parameters(), strict=True))


@every
def test_scores_that_are_all_zero_say_nothing(method):
    net = make_net()
    torch.nn.init.zeros_(net[2].weight)  # one zero layer is enough but for grasp
    torch.nn.init.zeros_(net[4].weight)
    with pytest.raises(ValueError, match=f"method '{method}': all scores are zero, so they say nothing"):
        score(net, method)


@every
def test_a_model_that_cannot_be_copied(method):
    net = make_net()
    net[0].kept = net[0].weight * 2  # no leaf of the graph
    with pytest.raises(ValueError, match="this model cannot be copied, and weights are scored on a copy"):
        score(net, method)


@every
def test_resuming_needs_no_data(method):
    net = make_net()
    saved = sparsify(net, sgd(net), method=method, sparsity=0.6, batches=make_batches(2)).state_dict()
    other = make_net()
    resumed = sparsify(other, sgd(other), method=method, sparsity=0.6, init=False)
    resumed.load_state_dict(saved)
    resumed.apply()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_every_row_that_uses_batches_says_so_when_it_gets_none():
    for info in list_methods():
        if info.load().needs_batches:
            net = make_net()
            with pytest.raises(ValueError, match=f"method '{info.name}'.*batches"):
                sparsify(net, sgd(net), method=info.name, sparsity=0.5, total_steps=10)


# -- parts ------------------------------------------------------------------------------------------------------------


def test_a_batch_moves_to_the_width_of_the_weights():
    weight = torch.zeros(1, dtype=torch.float64)
    batch = Batch.read(({"ids": torch.ones(4, 2).long(), "x": [torch.ones(4), "text"]}, torch.ones(4)), weight)
    assert batch.size == 4
    assert batch.kwargs["ids"].dtype == torch.int64
    assert batch.kwargs["x"][0].dtype == batch.target.dtype == torch.float64
    assert batch.kwargs["x"][1] == "text"


def test_checked_passes_scores_on():
    scores = {"a": torch.zeros(2), "b": torch.tensor([0.0, -1.0])}
    assert checked(scores, "snip") is scores
    with pytest.raises(ValueError, match="'b' are not finite"):
        checked({"a": torch.ones(1), "b": torch.tensor([torch.inf])}, "snip")
