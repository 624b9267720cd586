"""The small parts of the trainer: seeds, schedule, meters, timer, environment, atomic files."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from s2sam.train.atomic import atomic, write_text
from s2sam.train.config import ScheduleConfig
from s2sam.train.environment import environment
from s2sam.train.evaluate import BATCH, Meter, evaluate
from s2sam.train.final import beats
from s2sam.train.schedule import factor, make_scheduler
from s2sam.train.seeding import PURPOSES, derive, generator
from s2sam.train.state import choose_device
from s2sam.train.timing import WARM_UP, StepTimer


@given(st.integers(0, 10**6))
def test_seeds_differ_by_purpose_and_by_seed(seed):
    seeds = {derive(s, p) for s in (seed, seed + 1) for p in PURPOSES}
    assert len(seeds) == 2 * len(PURPOSES)
    assert all(0 <= s < 2**63 for s in seeds)


def test_generators_leave_the_global_state_alone():
    before = torch.get_rng_state()
    a, b = (torch.randn(8, generator=generator(0, p)) for p in ("init", "data"))
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(a, b)
    assert torch.equal(a, torch.randn(8, generator=generator(0, "init")))


@given(total=st.integers(2, 500), warmup=st.integers(0, 100), final=st.floats(0, 1))
def test_cosine_rises_in_warm_up_and_falls_to_final(total, warmup, final):
    warmup = min(warmup, total - 1)
    config = ScheduleConfig(final=final)
    values = [factor(t, total, warmup, config) for t in range(total)]
    assert values[:warmup] == sorted(values[:warmup])
    assert values[warmup:] == sorted(values[warmup:], reverse=True)
    assert values[warmup] == pytest.approx(1.0)
    assert factor(total, total, warmup, config) == pytest.approx(final, abs=1e-12)
    assert all(0 <= v <= 1 + 1e-12 for v in values)


def test_scheduler_sets_the_learning_rate_of_every_step():
    p = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([p], lr=0.4)
    scheduler = make_scheduler(optimizer, ScheduleConfig(warmup_epochs=1), total=8, steps_per_epoch=2)
    seen = []
    for _ in range(8):
        seen.append(optimizer.param_groups[0]["lr"])
        p.grad = torch.zeros(1)
        optimizer.step()
        scheduler.step()
    expected = [0.4 / 3, 0.8 / 3] + [0.2 * (1 + math.cos(math.pi * t / 6)) for t in range(6)]
    assert seen == pytest.approx(expected)
    constant = make_scheduler(optimizer, ScheduleConfig(name="constant"), total=8, steps_per_epoch=2)
    assert [constant.lr_lambdas[0](t) for t in (0, 7)] == [1.0, 1.0]


@pytest.mark.parametrize("total", [1, 2, 10, 37])
@pytest.mark.parametrize(
    ("config", "make"),
    [
        (ScheduleConfig(), lambda o, n: torch.optim.lr_scheduler.CosineAnnealingLR(o, n)),
        (
            ScheduleConfig(name="step", milestones=[0.5, 0.8], gamma=0.2),
            lambda o, n: torch.optim.lr_scheduler.MultiStepLR(o, [round(0.5 * n), round(0.8 * n)], 0.2),
        ),
        (
            ScheduleConfig(name="onecycle", rise=0.4),
            lambda o, n: torch.optim.lr_scheduler.OneCycleLR(o, 1.0, n, pct_start=0.4, cycle_momentum=False),
        ),
    ],
    ids=["cosine", "step", "onecycle"],
)
def test_schedules_are_those_of_torch(config, make, total):
    p = torch.nn.Parameter(torch.ones(1))
    ours, theirs = (torch.optim.SGD([p], lr=1.0) for _ in range(2))
    if (config.name, total) == ("onecycle", 1):
        pytest.skip("torch's divides by zero")
    mine, other = make_scheduler(ours, config, total, total), make(theirs, total)
    for _ in range(total):
        assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-9, abs=1e-15)
        for optimizer in (ours, theirs):
            optimizer.step()
        mine.step()
        if other.last_epoch < total - 1:
            other.step()


def test_meter_leaves_out_batches_that_are_not_finite():
    meter = Meter(torch.device("cpu"))
    good = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
    meter.add(good, torch.tensor([0, 1, 1]), torch.tensor(0.5))
    meter.add(good[:1], torch.tensor([0]), torch.tensor(math.nan))
    meter.add(good[:1], torch.tensor([0]), torch.tensor(1.5))
    loss, top1, bad, absurd = meter.read()
    assert loss == pytest.approx((3 * 0.5 + 1.5) / 4)
    assert (top1, bad, absurd) == (3 / 4, 1, 1)


def test_meter_counts_absurd_losses():
    meter = Meter(torch.device("cpu"), limit=10.0)
    for loss in (9.0, 10.0, 10.5, 1e30, -math.inf, math.nan):
        meter.add(torch.zeros(2, 2), torch.tensor([0, 1]), torch.tensor(loss))
    loss, _, bad, absurd = meter.read()
    assert loss == pytest.approx((9.0 + 10.0 + 10.5 + 1e30) / 4)
    assert (bad, absurd) == (2, 4)


def test_meter_without_a_finite_batch_is_nan():
    meter = Meter(torch.device("cpu"))
    meter.add(torch.zeros(2, 2), torch.tensor([0, 1]), torch.tensor(math.inf))
    loss, top1, bad, _ = meter.read()
    assert math.isnan(loss)
    assert math.isnan(top1)
    assert bad == 1


@pytest.mark.parametrize("count", [1, BATCH, BATCH + 1])
def test_evaluate_is_the_mean_over_all_images_in_eval_mode(count):
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(count, 3, generator=draw), torch.randint(0, 4, (count,), generator=draw)
    model = torch.nn.Sequential(torch.nn.Dropout(0.9), torch.nn.Linear(3, 4))
    model.train()
    loss, top1 = evaluate(model, x, y, lambda batch: batch * 2)
    logits = model[1](x * 2)
    assert loss == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-5)
    assert top1 == pytest.approx((logits.argmax(1) == y).float().mean().item())
    assert model.training
    assert model[1].weight.grad is None


def test_evaluate_of_nothing_is_none():
    model = torch.nn.Linear(3, 4)
    assert evaluate(model, torch.empty(0, 3), torch.empty(0, dtype=torch.int64), lambda x: x) == (None, None)


def test_timer_leaves_out_the_warm_up():
    timer = StepTimer(torch.device("cpu"))
    timer.seconds = [9.0] * WARM_UP + [1.0, 2.0, 3.0]
    assert timer.median() == 2.0
    timer.seconds = [4.0, 6.0]
    assert timer.median() == 5.0
    with timer.step():
        pass
    assert len(timer.seconds) == 3
    assert timer.seconds[-1] >= 0


def test_environment_names_versions_and_hardware():
    env = environment(torch.device("cpu"))
    assert env["versions"]["torch"] == torch.__version__
    assert {"python", "numpy", "s2sam"} <= set(env["versions"])
    assert env["hardware"]["cores"] >= 1
    assert env["hardware"]["device"] == "cpu"


def test_atomic_write_keeps_the_old_file_when_the_new_one_fails(tmp_path):
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(KeyError), atomic(path) as temporary:
        temporary.write_text("half of the n")
        raise KeyError("power cut")
    assert path.read_text() == "old"
    write_text(path, "new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


@pytest.mark.parametrize(
    ("record", "best", "expected"),
    [
        ((0.9, 0.5), None, True),
        ((0.9, 0.6), (0.9, 0.5), True),
        ((0.9, 0.5), (0.9, 0.5), False),
        ((0.9, 0.1), (0.5, 0.9), True),  # the sparsity still rose: earlier epochs do not count
        ((0.5, 0.9), (0.9, 0.1), False),
    ],
)
def test_best_is_chosen_at_the_highest_sparsity(record, best, expected):
    as_record = [None if v is None else {"sparsity": v[0], "val_top1": v[1]} for v in (record, best)]
    assert beats(*as_record) is expected


def test_cuda_is_refused_where_there_is_none():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert choose_device("auto").type == "cpu"
    with pytest.raises(ValueError, match="no CUDA device"):
        choose_device("cuda")
