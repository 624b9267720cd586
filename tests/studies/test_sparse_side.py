"""HAM and SparseOpt follow their formulas, keep what the library promises, and are the same in the fast runner."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import batched
import side
from hooks import CLAMP, HAM, LARGEST_NORM, SparseOpt, neuron_factors
from s2sam import S2SAM, sparsify
from s2sam.data.augment import normalise
from s2sam.data.images import ImageData
from s2sam.data.loader import Batches
from s2sam.report.stats import Interval
from s2sam.train.config import ScheduleConfig
from s2sam.train.schedule import make_scheduler
from s2sam.train.seeding import generator
from steps import SideArm

DOUBLE = torch.float64
LR, DECAY = 0.1, 5e-3


def network(seed=0, norm=True):
    """Twelve inputs, two hidden layers, four classes."""
    torch.random.default_generator.manual_seed(seed)
    layers = [nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)]
    return nn.Sequential(*[layer for layer in layers if norm or not isinstance(layer, nn.BatchNorm1d)]).to(DOUBLE)


def training(method="static", sparsity=0.7, nesterov=False, momentum=0.9, lr=LR, kind=torch.optim.SGD, **kwargs):
    """A network, its optimizer and its sparsifier (None if dense)."""
    model = network()
    options = {"momentum": momentum, "nesterov": nesterov} if kind is torch.optim.SGD else {}
    optimizer = kind(model.parameters(), lr=lr, weight_decay=DECAY, **options, **kwargs)
    if not sparsity:
        return model, optimizer, None
    changes = {"total_steps": 40, "delta_t": 3} if method == "rigl" else {}
    draws = torch.Generator().manual_seed(5)
    return model, optimizer, sparsify(model, optimizer, method=method, sparsity=sparsity, generator=draws, **changes)


def backward(model, step):
    draws = torch.Generator().manual_seed(step)
    x, y = torch.randn(24, 12, generator=draws, dtype=DOUBLE), torch.randint(4, (24,), generator=draws)
    F.cross_entropy(model(x), y).backward()


def steps(model, optimizer, first, last):
    for step in range(first, last):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def pruned(sparsifier):
    return [w[~sparsifier.masks[name]] for name, w in sparsifier.weights.items()]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("sparsity", [0.0, 0.7])
def test_ham_multiplies_by_its_formula_after_the_optimizers_step(sparsity, kind):
    base, base_optimizer, _ = training(sparsity=sparsity, kind=kind)
    model, optimizer, sparsifier = training(sparsity=sparsity, kind=kind)
    HAM(optimizer, alpha=3.0, beta=0.02)
    for step in range(4):
        base.load_state_dict(model.state_dict())
        base_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for one in (base, model):
            backward(one, step)
        base_optimizer.step()
        optimizer.step()
        for p, q in zip(model.parameters(), base.parameters(), strict=True):
            expected = q.detach()
            if q.dim() > 1:
                expected = q.detach() * torch.exp(-LR * (3.0 * torch.sign(q.detach()) * q.grad + 0.02))
                assert float((expected - q.detach()).abs().max()) > 1e-4
            torch.testing.assert_close(p.detach(), expected, rtol=1e-15, atol=0)
        assert sparsifier is None or all(not w.any() for w in pruned(sparsifier))
        base_optimizer.zero_grad()
        optimizer.zero_grad()


def test_sparseopt_scales_each_neurons_gradient_by_its_density():
    base, base_optimizer, _ = training()
    model, optimizer, sparsifier = training()
    SparseOpt(sparsifier)
    for one, its in ((base, base_optimizer), (model, optimizer)):
        backward(one, 0)
        its.step()
    masks = {id(w): sparsifier.masks[name] for name, w in sparsifier.weights.items()}
    start = training()[0]
    differ = 0
    for p, q, w in zip(model.parameters(), base.parameters(), start.parameters(), strict=True):
        update = q.grad
        if id(p) in masks:
            share = masks[id(p)].sum(dim=1).to(DOUBLE) / masks[id(p)].shape[1]  # 1 - s_i
            factors = share.sqrt() / share.mean().sqrt()
            differ += int((factors != 1).sum())
            update = factors[:, None] * q.grad
        torch.testing.assert_close(p.detach(), w - LR * (update + DECAY * w), rtol=1e-15, atol=1e-17)
    assert differ > 10
    assert all(not w.any() for w in pruned(sparsifier))


def test_the_factors_of_a_layer_have_a_mean_square_of_1_and_are_1_where_it_is_dense():
    mask = torch.rand(20, 3, 5, generator=torch.Generator().manual_seed(0)) < 0.2
    mask[4] = False
    factors = neuron_factors(mask, DOUBLE)
    assert factors.shape == (20, 1, 1)
    assert float(factors[4]) == 0.0
    assert float(factors.square().mean()) == pytest.approx(1.0, rel=1e-14)
    shares = mask.flatten(1).to(DOUBLE).mean(dim=1)
    torch.testing.assert_close(factors.flatten(), ((shares / shares.mean()) ** 0.5), rtol=1e-14, atol=0)
    assert torch.equal(neuron_factors(torch.ones(7, 3, dtype=torch.bool), torch.float32), torch.ones(7, 1))
    assert not neuron_factors(torch.zeros(7, 3, dtype=torch.bool), torch.float16).any()


def test_sparseopt_leaves_dense_layers_as_they_are_bit_for_bit():
    found = []
    for hooked in (False, True):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=DECAY)
        sparsifier = sparsify(model, optimizer, method="static", sparsity=0.0)
        if hooked:
            SparseOpt(sparsifier)
        steps(model, optimizer, 0, 5)
        found.append(weights(model))
    assert same(*found)


@pytest.mark.parametrize("method", ["static", "rigl"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_ham_with_alpha_and_beta_0_is_the_base_bit_for_bit(method, nesterov):
    found = []
    for hooked in (False, True):
        model, optimizer, _ = training(method, nesterov=nesterov)
        if hooked:
            HAM(optimizer, alpha=0.0, beta=0.0)
        steps(model, optimizer, 0, 8)
        found.append(weights(model))
    assert same(*found)


def test_both_come_off_again():
    model, optimizer, sparsifier = training("rigl")
    base, base_optimizer, _ = training("rigl")
    for one in (HAM(optimizer), SparseOpt(sparsifier)):
        one.remove()
        one.remove()
    steps(model, optimizer, 0, 8)
    steps(base, base_optimizer, 0, 8)
    assert same(weights(model), weights(base))


def test_with_rigl_the_factors_follow_the_masks_and_growth_does_not_see_them():
    model, optimizer, sparsifier = training("rigl")
    base, base_optimizer, plain = training("rigl")
    SparseOpt(sparsifier)
    base.load_state_dict(model.state_dict())
    sparsifier.parts[0].step = plain.parts[0].step = 2  # the next step, the third, changes the masks
    old = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    for one, its in ((base, base_optimizer), (model, optimizer)):
        backward(one, 0)
        its.step()
        its.zero_grad()
    assert sparsifier.updates == 1
    assert any(not torch.equal(old[name], mask) for name, mask in sparsifier.masks.items())
    assert all(torch.equal(plain.masks[name], mask) for name, mask in sparsifier.masks.items())  # equal growth
    assert same(weights(model), weights(base))  # and that step moves no weight
    for one, its in ((base, base_optimizer), (model, optimizer)):
        backward(one, 1)
        its.step()
    changed = 0
    for name, w in sparsifier.weights.items():
        factors = neuron_factors(sparsifier.masks[name], DOUBLE)
        changed += int((factors != neuron_factors(old[name], DOUBLE)).sum())
        torch.testing.assert_close(w.grad, factors * plain.weights[name].grad, rtol=1e-15, atol=0)
    assert changed > 0
    assert all(not w.any() for w in pruned(sparsifier))


@pytest.mark.parametrize("method", ["static", "rigl"])
def test_pruned_weights_and_their_momentum_stay_exactly_0_with_both(method):
    model, optimizer, sparsifier = training(method)
    HAM(optimizer, alpha=10.0, beta=0.1)
    SparseOpt(sparsifier)
    for step in range(12):
        steps(model, optimizer, step, step + 1)
        assert all(not w.any() for w in pruned(sparsifier))
        for name, w in sparsifier.weights.items():
            assert not optimizer.state[w]["momentum_buffer"][~sparsifier.masks[name]].any()
    sparsifier.verify()
    assert method == "static" or sparsifier.updates > 0


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_is_skipped_changes_nothing(fused):
    model, optimizer, sparsifier = training("rigl", fused=fused)
    S2SAM(optimizer, model=model, rho=0.05)
    HAM(optimizer, alpha=10.0, beta=0.1)
    SparseOpt(sparsifier)
    model.train()
    steps(model, optimizer, 0, 2)
    backward(model, 2)
    next(iter(sparsifier.weights.values())).grad[sparsifier.masks["0.weight"]] = torch.inf
    sam_free = [w.clone() for w in weights_at_w(model, optimizer)]
    state = copy.deepcopy(optimizer.state_dict()["state"])
    masks = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    optimizer.step()
    assert same(weights_at_w(model, optimizer), sam_free)
    for i, kept in state.items():
        assert torch.equal(optimizer.state_dict()["state"][i]["momentum_buffer"], kept["momentum_buffer"])
    assert all(torch.equal(mask, masks[name]) for name, mask in sparsifier.masks.items())


def weights_at_w(model, optimizer):
    """The clean weights: a state_dict never holds displaced ones."""
    held = model.state_dict()
    return [held[name].clone() for name, _ in model.named_parameters()]


def test_weights_that_would_explode_are_one_sentence_and_are_not_written():
    model, optimizer, _ = training(lr=2.0)
    HAM(optimizer, alpha=1e4, beta=0.0)
    with pytest.raises(RuntimeError, match=r"above 1000.*lower alpha \(now 10000\), beta \(now 0\) or lr \(now 2\)"):
        steps(model, optimizer, 0, 20)
    assert all(bool(w.isfinite().all()) for w in model.parameters())
    assert all(float(w.detach().norm()) <= LARGEST_NORM for w in model.parameters() if w.dim() > 1)

    model, optimizer, _ = training(lr=2.0)
    HAM(optimizer, alpha=1e4, beta=0.0, scale_down=True)  # as the authors' code
    steps(model, optimizer, 0, 20)
    norms = [float(w.detach().norm()) for w in model.parameters() if w.dim() > 1]
    assert max(norms) == pytest.approx(LARGEST_NORM)


def test_weights_that_are_nan_already_are_an_error_whatever_the_limit():
    for scale_down in (False, True):
        model, optimizer, _ = training()
        HAM(optimizer, scale_down=scale_down)
        backward(model, 0)
        next(iter(model.parameters())).grad.fill_(torch.nan)
        with pytest.raises(RuntimeError, match="nan.*was not made; lower alpha"):
            optimizer.step()


def test_the_exponent_is_kept_within_5_in_one_step():
    w = nn.Parameter(torch.tensor([[1.0, -1.0, 0.0]], dtype=DOUBLE))
    optimizer = torch.optim.SGD([w], lr=1.0)
    HAM(optimizer, alpha=100.0, beta=0.0)
    w.grad = torch.tensor([[-0.5, -0.5, 0.0]], dtype=DOUBLE)
    optimizer.step()
    e = torch.tensor(CLAMP, dtype=DOUBLE).exp()
    torch.testing.assert_close(w.detach(), torch.tensor([[1.5, -0.5, 0.0]], dtype=DOUBLE) * torch.stack([e, 1 / e, e]))


@pytest.mark.parametrize("bad", [{"alpha": -1.0}, {"alpha": float("nan")}, {"beta": -0.1}, {"beta": "much"}])
def test_numbers_that_cannot_be_are_refused(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must be a finite number >= 0"):
        HAM(training()[1], **bad)


# -- the fast runner ---------------------------------------------------------------------------------------------------

STEPS, DELTA_T = 42, 6
ARMS = {
    "ham": SideArm(ham=True, beta=0.02),
    "ham nesterov": SideArm(ham=True, nesterov=True),
    "sparseopt": SideArm(sparseopt=True),
    "both": SideArm(ham=True, sparseopt=True),
}
RUNS = [batched.Run(4, 0.1, 5e-4, 1.0), batched.Run(7, 0.03, 5e-3, 20.0)]  # the last number is alpha


@pytest.fixture
def noise_images(monkeypatch):
    """Images of noise in place of the digits, some of whose pixels never change: see tests/studies/test_control.py."""

    def images_of(count, noise, seed):
        draws = torch.Generator().manual_seed(seed)

        def part(n):
            images = torch.randint(256, (n, 1, 8, 8), generator=draws, dtype=torch.uint8)
            return images, torch.randint(10, (n,), generator=draws)

        return ImageData.build("noise", part(count), part(50), part(60), [str(i) for i in range(10)])

    monkeypatch.setattr(batched, "images_of", images_of)


def by_the_hooks(cell, arm, run, count=STEPS):
    """The same training with the library's network, optimizer and sparsifier, and the hooks, in a plain loop."""
    model = batched.build(cell, run.seed).to(DOUBLE)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=run.lr, momentum=0.9, weight_decay=run.weight_decay, nesterov=arm.nesterov
    )
    total, sparsifier = batched.steps_of(cell, arm), None
    if cell.sparsity:
        options = {"delta_t": DELTA_T, "min_per_filter": 1} if cell.method == "rigl" else {}
        sparsifier = sparsify(
            model, optimizer, method=cell.method, sparsity=cell.sparsity, total_steps=total,
            generator=generator(run.seed, "sparsify"), **options,
        )  # fmt: skip
    if arm.sparseopt and sparsifier is not None:
        SparseOpt(sparsifier)
    if arm.ham:
        HAM(optimizer, alpha=run.rho, beta=arm.beta, scale_down=True)
    scheduler = make_scheduler(optimizer, ScheduleConfig(), total, 1)
    data = batched.data(cell, run.seed)
    x = normalise(data.train_x, data.mean, data.std).to(DOUBLE)
    batches = Batches(x, data.train_y, cell.batch_size, generator(run.seed, "data"))
    model.train()
    done = 0
    while done < count:
        for images, labels in batches:
            if done < count:
                F.cross_entropy(model(images), labels).backward()
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
                done += 1
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def cell_of(method, norm):
    sparsity = {"dense": 0.0, "static": 0.9, "rigl": 0.9}[method]
    return batched.Cell(
        noise=0.2, sparsity=sparsity, norm=norm, method=method, width=0.125, images=100, batch_size=24, epochs=20,
        delta_t=DELTA_T, split_seed=None,
    )  # fmt: skip


EQUAL = [("both", method, norm) for method in ("dense", "static", "rigl") for norm in (True, False)]
EQUAL += [(name, *where) for name in ARMS if name != "both" for where in (("static", False), ("rigl", True))]


@pytest.mark.parametrize(("name", "method", "norm"), EQUAL)
@pytest.mark.usefixtures("noise_images")
def test_the_fast_runner_takes_the_hooks_steps(name, method, norm):
    arm, cell = ARMS[name], cell_of(method, norm)
    networks = batched.train(cell, arm, RUNS, dtype=DOUBLE, steps=STEPS)
    whole = networks.dense(networks.w)
    plain = batched.train(cell, SideArm(nesterov=arm.nesterov), RUNS, dtype=DOUBLE, steps=STEPS)
    for i, run in enumerate(RUNS):
        expected = by_the_hooks(cell, arm, run)
        assert expected.isfinite().all()
        torch.testing.assert_close(whole[i], expected, atol=1e-8, rtol=1e-8)
        if name != "sparseopt" or method != "dense":
            assert float((whole[i] - plain.dense(plain.w)[i]).abs().max()) > 1e-4


@pytest.mark.usefixtures("noise_images")
def test_the_fast_runner_scales_down_as_the_hook_does():
    arm, cell = SideArm(ham=True), cell_of("static", True)
    runs = [batched.Run(4, 0.3, 5e-4, 300.0), batched.Run(7, 0.1, 5e-4, 3.0)]
    steps = 5
    networks = batched.train(cell, arm, runs, dtype=DOUBLE, steps=steps)
    whole = networks.dense(networks.w)
    norms = [[float(part.norm()) for part in row.split([s.numel() for _, s in networks.layout])] for row in whole]
    assert max(norms[0]) == pytest.approx(LARGEST_NORM)
    assert max(norms[1]) < LARGEST_NORM / 2
    for i, run in enumerate(runs):
        torch.testing.assert_close(whole[i], by_the_hooks(cell, arm, run, steps), atol=1e-8, rtol=1e-8)


# -- the plan and the report -------------------------------------------------------------------------------------------


def test_every_arm_has_enough_points_and_no_seed_two_uses():
    study = side.SidePlan.read()
    assert len(study.cells) == 16
    assert study.treated == ["ham", "sparseopt"]
    assert not set(study.tuning) & set(study.fresh)
    assert len(study.fresh) == 24
    sizes = study.settings["trials"]
    for arm in study.arms:
        lr, decay, alpha = study.axes(arm)
        assert len(lr) * len(decay) * len(alpha) >= sizes["number"] + sizes["extensions"] * sizes["extension"]
        assert len(study.start(arm)) < sizes["number"]
        assert (len(alpha) > 1) == (arm == "ham")


def test_the_verdict_is_the_joint_interval_over_all_cells(tmp_path, monkeypatch):
    settings = side.SidePlan.read().settings | {
        "cells": {"noise": [0.2], "networks": ["bn", "plain"], "masks": {"static95": ["static", 0.95]}}
    }
    study = side.SidePlan(settings, tmp_path / "runs.csv")
    (tmp_path / "environments.jsonl").write_text(
        '{"environment": "none", "changed": [], "commit": "c", "torch": "t", "python": "p", "processor": "q"}\n'
    )
    gain = {"sgd": 0.0, "nesterov": -0.01, "ham": 0.05, "sparseopt": 0.0}
    rows = []
    for cell in study.cells:
        for arm in study.arms:
            better = 0.02 * (arm == "nesterov") if cell == "20-plain-static95" else 0.0
            common = {
                "cell": cell, "arm": arm, "lr": 0.1, "weight_decay": 5e-4, "rho": 1.0 if arm == "ham" else 0.0,
                "epochs": 40, "seconds": 1, "train": 0.9, "environment": "none",
            }  # fmt: skip
            rows += [common | {"stage": "tune", "seed": s, "val": 0.5 + better} for s in study.tuning]
            for s in study.fresh:
                own = 0.01 * (s % 3 == 0) if arm in study.treated else 0.0
                rows.append(common | {"stage": "fresh", "seed": s, "val": 0.5, "test": 0.5 + gain[arm] + better + own})
    monkeypatch.setattr(side.SidePlan, "rows", lambda self: rows)
    found, missing = side.whole_cells(study, rows)
    assert missing == []
    baseline = {cell: side.better_baseline(study, rows, cell) for cell in found}
    assert baseline == {"20-bn-static95": "sgd", "20-plain-static95": "nesterov"}
    by_cells = side.primaries(study, found, baseline)
    mean = {key: sum(gap.values()) / len(gap) for key, gap in by_cells.items()}
    extra = 100 * 0.01 / 3
    assert mean["ham", "BatchNorm"] == pytest.approx(5 + extra)
    assert mean["ham", "all"] == pytest.approx(5 - 0.5 + extra)  # Nesterov has 1 point more than SGD in half of them
    assert mean["sparseopt", "BatchNorm"] == pytest.approx(extra)
    assert mean["sparseopt", "all"] == pytest.approx(-0.5 + extra)
    assert side.verdict(by_cells, "ham") == "supported"
    assert side.verdict(by_cells, "sparseopt") == "not supported"
    monkeypatch.setattr(side, "interval", lambda *_: Interval(-0.1, 3.0, 0.95))
    assert side.verdict(by_cells, "ham") == "not supported"
    text = side.report(study)
    assert "**sparseopt: not supported.**" in text
    assert (tmp_path / "report.md").read_text() == text
    rows.pop()
    assert side.whole_cells(study, rows)[1] == ["20-plain-static95"]
    assert "**Not whole**: 20-plain-static95." in side.report(study)
