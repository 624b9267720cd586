"""Weights that are sparse already are never pruned a second time in silence; their zeros can seed a method."""

import copy
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from s2sam import S2SAM, sparsify
from s2sam.models import create_model
from s2sam.registry import find, list_methods
from s2sam.sparse.geometry import is_blocks, is_n_of_m
from s2sam.sparse.methods.srigl import per_row

sys.path.insert(0, str(Path(__file__).parent))
from sparse_support import (
    attach,
    copy_masks,
    equal_masks,
    generator,
    make_batches,
    make_net,
    one_step,
    rows,
    sgd,
)  # fmt: skip

TWICE = "the model is sparse already, and would be pruned a second time"
BY_SIZE = ("magnitude", "nm", "mest", "top-kast", "sr-ste", "snip", "synflow")  # keep what is left
REFUSE = ("ac-dc", "lt", "top-kast", "chex")
GRADUAL = ("gmp", "granet", "str")


def row(name):
    return find(list_methods(), name, "method")


def sparse_net(sparsity=0.7, seed=0, method="static", **kw):
    """A net with trained sparse weights, and no sparsifier any longer."""
    net = make_net(seed)
    optimizer = sgd(net)
    sparsifier = sparsify(net, optimizer, method=method, sparsity=sparsity, generator=generator(seed + 50), **kw)
    for batch in make_batches(3):
        one_step(net, optimizer, batch)
    sparsifier.remove()
    return net


def nonzero(net):
    return {name: p.detach() != 0 for name, p in net.named_parameters()}


def patterned(info, net):
    """Zeros in the pattern that the method keeps, the same share in each layer."""
    with torch.no_grad():
        for p in net.parameters():
            if info.name == "srigl":
                p.mul_(per_row(p.abs(), round(0.5 * p.shape[1])))
            elif "m" in info.defaults or info.defaults.get("block"):
                kept = torch.arange(p.shape[1]) % 4 < 2 if info.name == "block-rigl" else torch.arange(p.shape[1]) % 2
                p.mul_(kept)
    return net


# -- refused ---------------------------------------------------------------------------------------------------------


def test_the_story_of_a_host_that_loads_weights_before_the_optimizer_is_made():
    # Lightning before configure_optimizers, HF Trainer before create_optimizer: 410 weights would become about 40
    net = nn.Sequential(nn.Linear(60, 50, bias=False), nn.Linear(50, 22, bias=False))
    options = {"method": "rigl", "sparsity": 0.9, "total_steps": 100, "delta_t": 10}
    first = sparsify(net, sgd(net), generator=generator(1), **options)
    assert sum(int(m.sum()) for m in first.masks.values()) == 410
    weights, state = copy.deepcopy(net.state_dict()), first.state_dict()
    resumed = nn.Sequential(nn.Linear(60, 50, bias=False), nn.Linear(50, 22, bias=False))
    resumed.load_state_dict(weights)
    optimizer, draws = sgd(resumed), generator(2)
    with pytest.raises(ValueError, match=TWICE + ".*init='adopt'.*init=False.*init='anew'"):
        sparsify(resumed, optimizer, generator=draws, **options)
    assert torch.equal(draws.get_state(), generator(2).get_state())
    assert all(torch.equal(value, weights[name]) for name, value in resumed.state_dict().items())
    second = sparsify(resumed, optimizer, init=False, **options)
    second.load_state_dict(state)
    second.verify()
    assert equal_masks(second.masks, first.masks)


def test_masks_loaded_after_pruning_twice_do_not_pass_verify():
    net = make_net()
    first = attach(row("static"), net, sgd(net), seed=3)
    state, again = first.state_dict(), make_net(1)
    again.load_state_dict(net.state_dict())
    second = attach(row("static"), again, sgd(again), seed=4, init="anew")
    second.load_state_dict(state)
    with pytest.raises(RuntimeError, match="active at all times are exactly 0"):
        second.verify()


@rows()
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_no_method_keeps_zeros_of_a_sparse_model_in_silence(info, sparsity):
    net = sparse_net(sparsity)
    before, optimizer = nonzero(net), sgd(net)
    weights = copy.deepcopy(net.state_dict())
    kw = {} if "m" in info.defaults or info.name == "chex" else {"sparsity": sparsity}
    refused = ""
    try:
        sparsifier = attach(info, net, optimizer, seed=9, init=True, **kw)
    except ValueError as error:
        refused = str(error)
    if refused:  # SNIP and SynFlow have scores of 0 alone where no path through the network is left
        assert TWICE in refused or (info.name in BY_SIZE and "all scores are zero" in refused)
        assert all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())
    else:
        assert info.name in BY_SIZE
        kept = sum(int((m & before[name]).sum()) for name, m in sparsifier.masks.items())
        assert kept > 0.9 * sum(int(m.sum()) for m in sparsifier.masks.values())


def fill(net, draw, dtype):
    net = net.to(dtype)
    with torch.no_grad():
        for p in net.parameters():
            draw(p)
    return net


INITS = {
    "kaiming_uniform": lambda p: nn.init.kaiming_uniform_(p, generator=generator(1)),
    "xavier_normal": lambda p: nn.init.xavier_normal_(p, generator=generator(1)),
    "trunc_normal": lambda p: nn.init.trunc_normal_(p, std=0.02, generator=generator(1)),  # ViT
    "normal": lambda p: nn.init.normal_(p, std=0.02, generator=generator(1)),  # GPT-2
    "orthogonal": lambda p: p.copy_(nn.init.orthogonal_(torch.empty(p.shape), generator=generator(1))),
    "zeros": nn.init.zeros_,
}


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["static", "gmp"])
def test_ordinary_initialisations_are_no_alarm(init, dtype, method):
    net = fill(nn.Sequential(nn.Linear(200, 200, bias=False), nn.Linear(200, 10, bias=False)), INITS[init], dtype)
    with torch.no_grad():
        net[1].weight.zero_()  # a head that begins at 0
    sparsifier = sparsify(net, sgd(net), method=method, sparsity=0.9, total_steps=9, generator=generator())
    sparsifier.verify()
    assert not sparsifier.adopted


@pytest.mark.parametrize("model", ["resnet20", "vgg19"])
def test_the_models_here_are_no_alarm(model):
    net = create_model(model, num_classes=10, generator=generator())
    sparsify(net, sgd(net), method="static", sparsity=0.9, generator=generator()).verify()


@pytest.mark.parametrize("init", ["dirac", "eye", "sparse"])
def test_initial_weights_that_are_mostly_zeros_need_a_word(init):
    net = nn.Sequential(nn.Conv2d(16, 16, 3, bias=False), nn.Conv2d(16, 16, 3, bias=False))
    draw = nn.init.dirac_
    if init != "dirac":
        net = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 16, bias=False))
        draw = nn.init.eye_ if init == "eye" else lambda w: nn.init.sparse_(w, 0.5, generator=generator(1))
    for layer in net:
        draw(layer.weight)
    with pytest.raises(ValueError, match=r"init='anew' to prune all the same \(after dirac_ or eye_, say\)"):
        sparsify(net, sgd(net), method="static", sparsity=0.5, generator=generator())
    sparsifier = sparsify(net, sgd(net), method="static", sparsity=0.5, generator=generator(), init="anew")
    sparsifier.verify()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sparsifier.sparsity() == 0.5


def test_the_largest_of_mostly_zeros_are_what_is_there():
    other = nn.Sequential(nn.Conv2d(16, 16, 3, bias=False))
    nn.init.dirac_(other[0].weight)
    kept = sparsify(other, sgd(other), method="magnitude", sparsity=143 / 144, distribution="uniform")
    assert torch.equal(kept.masks["0.weight"], other[0].weight != 0)


@pytest.mark.parametrize("bad", ["adapt", 2, None])
def test_init_is_one_of_four_values(bad):
    net = make_net()
    with pytest.raises(
        ValueError, match="unknown init 'adapt'; did you mean 'adopt'" if bad == "adapt" else "init must"
    ):
        sparsify(net, sgd(net), method="static", sparsity=0.5, init=bad)


@pytest.mark.parametrize("init", [True, False, "anew"])
def test_no_sparsity_is_for_adopt_alone(init):
    net = make_net()
    with pytest.raises(ValueError, match="sparsity=None means the one that is there, for init='adopt' alone"):
        sparsify(net, sgd(net), method="static", sparsity=None, init=init)


# -- adopted ---------------------------------------------------------------------------------------------------------


def adopt(info, net, optimizer, **kw):
    kw = {"sparsity": None, "init": "adopt", **kw}
    if info.name in GRADUAL and "initial_sparsity" not in kw:
        kw["initial_sparsity"] = 0.0
    return attach(info, net, optimizer, **kw)


@rows()
def test_a_sparse_model_seeds_every_method_or_is_refused_in_a_sentence(info):
    pattern = info.name == "srigl" or "m" in info.defaults or bool(info.defaults.get("block"))
    net = patterned(info, make_net()) if pattern else sparse_net(0.7)
    before, weights, optimizer = nonzero(net), copy.deepcopy(net.state_dict()), sgd(net)
    kw = {"sparsity": 0.5} if info.name in ("chex", "top-kast") else {}
    if info.name in REFUSE:
        with pytest.raises(ValueError, match=f"'{info.name}' cannot take its masks from zeros: .*; .*init='anew'"):
            adopt(info, net, optimizer, **kw)
        return
    sparsifier = adopt(info, net, optimizer, **kw)
    assert equal_masks(sparsifier.masks, before)
    assert all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())
    there = sum(int(m.sum()) for m in before.values())
    assert sparsifier.final_sparsity == pytest.approx(1 - there / 222, abs=1e-12)
    assert sparsifier.sparsity() == pytest.approx(1 - there / 222, abs=1e-12)
    for batch in make_batches(16):
        one_step(net, optimizer, batch)
        sparsifier.verify()
    if info.name != "chase":  # in which weights are over the target on its way
        assert sum(int(m.sum()) for m in sparsifier.masks.values()) == there
    moves = info.kind in ("dynamic", "structured") and info.name not in (*GRADUAL, "mest")
    assert equal_masks(sparsifier.masks, before) != (moves or info.name in ("mest", "granet"))


@pytest.mark.parametrize("method", [*GRADUAL, "mest"])
@pytest.mark.parametrize("distribution", ["auto", "global"])
def test_a_gradual_method_prunes_on_from_what_is_there_and_grows_nothing_back(method, distribution):
    net = sparse_net(0.5)
    before, optimizer = nonzero(net), sgd(net)
    sparsifier = adopt(row(method), net, optimizer, sparsity=0.8, distribution=distribution)
    first = sum(int(m.sum()) for m in sparsifier.masks.values())
    assert first == (111 if method in GRADUAL else 44), "MEST's plan begins at its target"
    seen, past = [first], before
    for batch in make_batches(14):
        one_step(net, optimizer, batch)
        sparsifier.verify()
        if method in ("gmp", "str"):
            assert not any((m & ~past[name]).any() for name, m in sparsifier.masks.items())
        if method == "gmp":
            past = copy_masks(sparsifier)
        seen.append(sum(int(m.sum()) for m in sparsifier.masks.values()))
        assert seen[-1] == round((1 - sparsifier.target_sparsity(len(seen) - 1)) * 222)
    assert seen == sorted(seen, reverse=True) and seen[-1] == 44
    if method == "gmp" and distribution == "auto":  # each layer keeps its share of what was there
        for name, mask in sparsifier.masks.items():
            assert int(mask.sum()) == pytest.approx(int(before[name].sum()) * 44 / 111, abs=1)


def test_a_plan_that_begins_sparser_prunes_the_smallest_at_once():
    net = sparse_net(0.5)
    before, weights = nonzero(net), {name: p.detach().abs().clone() for name, p in net.named_parameters()}
    sparsifier = adopt(row("gmp"), net, sgd(net), sparsity=0.9, initial_sparsity=0.7, min_per_filter=0)
    assert sum(int(m.sum()) for m in sparsifier.masks.values()) == round(0.3 * 222)
    for name, mask in sparsifier.masks.items():
        assert weights[name][mask].min() >= weights[name][before[name] & ~mask].max()


@pytest.mark.parametrize(
    ("name", "kw", "message"),
    [
        (
            "static",
            {"sparsity": 0.8},
            r"have a sparsity of 0\.698198, and sparsity=0\.8 .*give sparsity=0\.698198, or None",
        ),
        ("rigl", {"sparsity": 0.5}, r"sparsity of 0\.698198, and sparsity=0\.5 was asked for"),
        ("gmp", {"sparsity": 0.6}, r"'gmp' cannot make of them; give sparsity=0\.698198 or more, or None"),
        ("gmp", {"initial_sparsity": 0.8}, "initial_sparsity 0.8 is above"),
        (
            "mest",
            {"variant": "em_s"},
            r"plans for a sparsity of 0\.6482 on its way, and the model to adopt has 0\.6982",
        ),
        ("srigl", {}, "the neurons of '0.weight' have different numbers of inputs"),
        ("nm", {"n": 1}, "sparsity 0.698198 is not that of 1:2"),
        ("block-rigl", {}, r"'0\.weight' has blocks of \(1, 2\) that are 0 in part"),
        ("static", {"block": (1, 2)}, r"blocks of \(1, 2\) that are 0 in part"),
    ],
)
def test_what_cannot_be_adopted_changes_nothing(name, kw, message):
    net = sparse_net(0.7)
    weights = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=message):
        adopt(row(name), net, sgd(net), **kw)
    assert all(torch.equal(value, weights[key]) for key, value in net.state_dict().items())


def test_groups_with_too_many_weights_are_not_adopted():
    net = sparse_net(0.5)
    with pytest.raises(ValueError, match=r"'0\.weight' has groups of 2 with more than 1 weights that are not 0"):
        adopt(row("nm-rigl"), net, sgd(net), sparsity=0.5)


def test_a_dense_model_and_a_layer_of_zeros_are_not_adopted():
    net = make_net()
    with pytest.raises(ValueError, match=r"only 0\.0% of the weights are exactly 0.*init=True to prune now"):
        adopt(row("static"), net, sgd(net))
    net = sparse_net(0.5)
    with torch.no_grad():
        net[4].weight.zero_()
    with pytest.raises(ValueError, match=r"'4\.weight' is entirely 0.*exclude='4\.weight'"):
        adopt(row("static"), net, sgd(net))
    assert adopt(row("static"), net, sgd(net), exclude="4.weight").sparsity() > 0.4


def test_a_sparsity_that_was_rounded_is_the_one_that_is_there():
    net = sparse_net(0.7)
    assert adopt(row("rigl"), net, sgd(net), sparsity=0.7).final_sparsity == pytest.approx(155 / 222)


def test_a_distribution_is_not_used_and_that_is_told():
    net = sparse_net(0.7)
    with pytest.warns(UserWarning, match="init='adopt' takes each layer's share as it is"):
        adopt(row("static"), net, sgd(net), distribution="uniform")


@pytest.mark.parametrize("method", ["gmp", "str", "rigl", "deepr", "dsr", "mest", "snfs", "chase"])
def test_an_adopted_run_resumes_bit_for_bit(method):
    info = row(method)
    if method == "chase":
        pytest.importorskip("torch_pruning")
    target = {"sparsity": 0.8} if method in ("gmp", "str") else {}
    ends = []
    for stop in (None, 4):
        net = sparse_net(0.5)
        optimizer = sgd(net)
        sparsifier = adopt(info, net, optimizer, **target)
        for t, batch in enumerate(make_batches(14)):
            if t == stop:
                saved = copy.deepcopy([net.state_dict(), optimizer.state_dict(), sparsifier.state_dict()])
                net = make_net(9)
                optimizer = sgd(net)
                same = {"sparsity": sparsifier.final_sparsity}
                sparsifier = adopt(info, net, optimizer, **{**same, "init": False})
                for one, state in zip((net, optimizer, sparsifier), saved, strict=True):
                    one.load_state_dict(state)
            one_step(net, optimizer, batch)
        ends.append([*net.parameters(), *sparsifier.masks.values()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_patterns_stay_what_they_are():
    for name in ("nm-rigl", "sr-ste", "block-rigl"):
        info = row(name)
        net = patterned(info, make_net())
        optimizer = sgd(net)
        sparsifier = adopt(info, net, optimizer)
        for batch in make_batches(7):
            one_step(net, optimizer, batch)
        assert sparsifier.updates
        for mask in sparsifier.masks.values():
            assert is_blocks(mask, (1, 2)) if name == "block-rigl" else is_n_of_m(mask, 1, 2)


# -- inside a window of S2SAM ----------------------------------------------------------------------------------------


def test_nothing_is_pruned_while_s2sam_has_displaced_the_weights():
    net = make_net()
    optimizer = sgd(net)
    sam = S2SAM(optimizer, model=net, rho=0.5)
    for batch in make_batches(2):
        one_step(net, optimizer, batch)
    clean = [p.detach().clone() for p in net.parameters()]
    net(make_batches(1)[0][0])
    assert sam.is_displaced
    for init in (True, "adopt", "anew"):
        with pytest.raises(RuntimeError, match=r"displaced; call sam.restore\(\) before sparsify\(\)"):
            sparsify(net, optimizer, method="magnitude", sparsity=0.5, init=init)
    sam.restore()
    assert all(torch.equal(a, b) for a, b in zip(clean, net.parameters(), strict=True))
    sparsifier = sparsify(net, optimizer, method="magnitude", sparsity=0.5)
    net(make_batches(1)[0][0])
    with pytest.raises(RuntimeError, match=r"displaced; call sam.restore\(\) before sparsifier.apply\(\)"):
        sparsifier.apply()
    sam.restore()
    sparsifier.verify()
