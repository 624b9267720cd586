"""Checkpoints: taking one never moves a weight, and training goes on from it bit for bit."""

import copy
import io
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sam_common import FACTORIES, make_data, make_net, same, snapshot, total
from torch import nn

from s2sam import S2SAM

RHO = 0.3
DATA = 14


class Run:
    """A model, an optimizer with S2SAM and a scheduler, made from nothing."""

    def __init__(self, factory="sgd", direction="gradient", seed=0, attach=True):
        self.net = make_net(torch.float32, seed=seed)
        self.optimizer = FACTORIES[factory](self.net.parameters())
        self.sam = None
        if attach:
            self.sam = S2SAM(
                self.optimizer,
                model=self.net,
                rho=lambda step: RHO * (1 + step % 4),
                direction=direction,
                stats_every=1,
            )
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, DATA)

    def forward(self, batch):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def finish(self, loss):
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()

    def train(self, data):
        for batch in data:
            self.finish(self.forward(batch))
        return self

    def save(self):
        parts = {"net": self.net, "optimizer": self.optimizer, "scheduler": self.scheduler}
        buffer = io.BytesIO()
        torch.save({name: part.state_dict() for name, part in parts.items()}, buffer)
        return buffer.getvalue()

    def load(self, saved, order=("net", "optimizer", "scheduler")):
        state = torch.load(io.BytesIO(saved), weights_only=True)
        for name in order:
            getattr(self, name).load_state_dict(state[name])
        return self

    def everything(self):
        """Weights and all optimizer state, buffers included."""
        tensors = [torch.as_tensor(v) for s in self.optimizer.state.values() for v in s.values()]
        return [*snapshot(self.net), *(t.clone() for t in tensors)]

    def x(self):
        """Where the next training forward would run."""
        with self.sam.displaced():
            return snapshot(self.net)


@pytest.fixture
def data():
    return make_data(DATA, torch.float32)


MOMENTS = ["between steps", "inside a window", "inside an evaluation", "after restore", "after a skipped step"]


def come_to(moment, run, data):
    """Bring `run` to `moment`; returns what is left to do for it and the data that remain."""
    if moment == "after a skipped step":
        run.train(data[:5])
        x, y = data[5]
        run.finish(run.forward((x * float("nan"), y)))
        return data[5:]
    run.train(data[:5])
    if moment != "between steps":
        run.forward(data[5])
    if moment == "after restore":
        run.sam.restore()
    return data[5:]


def saved_at(moment, run):
    if moment != "inside an evaluation":
        return run.save()
    with run.sam.clean():
        return run.save()


@pytest.mark.parametrize("order", [("net", "optimizer", "scheduler"), ("optimizer", "net", "scheduler")])
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(
    ("factory", "direction"),
    [
        ("sgd", "gradient"),
        ("sgd", "momentum"),
        ("sgd-fused", "gradient"),
        ("adamw", "gradient"),
        ("adamw-fused", "gradient"),
        ("sgd", "ema"),
        ("adamw-fused", "ema"),
        ("adamw", "random"),
        ("sgd-fused", "random"),
    ],
)
def test_resuming_in_fresh_objects_is_bit_equal(factory, direction, moment, order, data):
    run = Run(factory, direction)
    rest = come_to(moment, run, data)
    saved = saved_at(moment, run)
    fresh = Run(factory, direction, seed=5).load(saved, order)
    run.sam.restore()
    assert same(fresh.net.parameters(), run.net.parameters())
    assert fresh.sam.stats["step"] == run.sam.stats["step"] == (6 if "skipped" in moment else 5)
    x = fresh.x()
    assert same(x, run.x())
    assert total([p - q for p, q in zip(x, fresh.net.parameters(), strict=True)]) > 0.1
    for batch in rest:
        run.train([batch])
        fresh.train([batch])
        assert same(fresh.everything(), run.everything())
        assert fresh.sam.stats["displacement"] == run.sam.stats["displacement"]


@pytest.mark.parametrize("moment", ["between steps", "inside a window"])
def test_resuming_in_a_fresh_process_is_bit_equal(moment, data, tmp_path):
    run = Run("adamw")
    rest = come_to(moment, run, data)
    (tmp_path / "saved.pt").write_bytes(run.save())
    torch.save(rest, tmp_path / "data.pt")
    code = f"""
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_state_dict import Run
run = Run("adamw", seed=5).load(Path("saved.pt").read_bytes()).train(torch.load("data.pt", weights_only=True))
torch.save(run.everything(), "result.pt")
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=60)
    run.train(rest)
    assert same(torch.load(tmp_path / "result.pt", weights_only=True), run.everything())


@pytest.mark.parametrize("factory", ["sgd", "sgd-fused"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_state_dict_moves_no_weight_and_what_it_holds_is_clean(moment, factory, data):
    run = Run(factory)
    come_to("between steps", run, data)
    w = snapshot(run.net)
    rest = come_to(moment, run := Run(factory), data)
    shown = snapshot(run.net)
    versions = [p._version for p in run.net.parameters()]
    model, optimizer = run.net.state_dict(), run.optimizer.state_dict()
    part = run.net[2].state_dict()
    assert same(run.net.parameters(), shown)
    assert [p._version for p in run.net.parameters()] == versions
    assert same(model.values(), w)
    assert torch.equal(part["weight"], w[1])
    run.train(rest)
    if "window" in moment:  # a copy: later steps do not reach it
        assert same(model.values(), w)
    assert optimizer["param_groups"][0]["lr"] != run.optimizer.param_groups[0]["lr"]


def test_a_state_dict_taken_inside_clean_stays_clean_afterwards(data):
    run = Run().train(data[:3])
    w = snapshot(run.net)
    run.forward(data[3])
    with run.sam.clean():
        kept = run.net.state_dict()
    assert same(kept.values(), w)


def test_modules_added_after_attaching_are_clean_in_a_state_dict(data):
    run = Run().train(data[:2])
    run.net.append(nn.Linear(3, 3))
    run.optimizer.add_param_group({"params": list(run.net[5].parameters())})
    for batch in data[2:4]:
        loss = run.forward(batch)
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
    w = snapshot(run.net)
    run.forward(data[4])
    assert same(run.net.state_dict().values(), w)


def test_keep_vars_gives_the_parameters_themselves(data):
    run = Run().train(data[:3])
    run.forward(data[3])
    assert all(v is p for v, p in zip(run.net.state_dict(keep_vars=True).values(), run.net.parameters(), strict=True))


@pytest.mark.parametrize("factory", ["sgd", "adamw", "adamw-fused"])
def test_a_plain_checkpoint_loads_into_an_optimizer_with_s2sam(factory, data):
    plain = Run(factory, attach=False).train(data[:5])
    run = Run(factory, seed=5).train(data[7:9]).load(plain.save())  # it had directions of its own: they are gone
    assert same(run.net.parameters(), plain.net.parameters())
    assert run.optimizer.param_groups[0]["rho"] == 1.0
    assert same(run.x(), snapshot(plain.net))  # no direction yet: the first step is plain
    run.train(data[5:6])
    plain.train(data[5:6])
    assert same(run.net.parameters(), plain.net.parameters())
    run.train(data[6:7])
    assert run.sam.stats["displacement"] == pytest.approx(RHO * 2, rel=1e-4)


@pytest.mark.parametrize("moment", ["between steps", "inside a window"])
@pytest.mark.parametrize("factory", ["sgd", "adamw", "adamw-fused"])
def test_an_s2sam_checkpoint_loads_into_a_plain_optimizer(factory, moment, data):
    run = Run(factory)
    rest = come_to(moment, run, data)
    saved = run.save()
    run.sam.restore()
    run.sam.remove()
    plain = Run(factory, seed=5, attach=False).load(saved)
    plain.train(rest)
    run.optimizer.zero_grad()
    run.train(rest)
    assert same(plain.net.parameters(), run.net.parameters())


@pytest.mark.parametrize("moment", ["between steps", "inside a window"])
def test_attaching_after_loading_continues_as_attaching_before(moment, data):
    """optimizer.load_state_dict(...), then S2SAM(optimizer): b may hold x, and the step count is in the checkpoint."""
    run = Run()
    rest = come_to(moment, run, data)
    late = Run(seed=5, attach=False).load(run.save())
    late.sam = S2SAM(late.optimizer, model=late.net, rho=lambda step: RHO * (1 + step % 4), stats_every=1)
    run.sam.restore()
    assert late.sam.stats["step"] == 5
    assert same(late.x(), run.x())
    run.train(rest)
    late.train(rest)
    assert same(late.net.parameters(), run.net.parameters())
    assert late.optimizer.param_groups[0]["s2sam_twins"] == []  # used up
    assert late.optimizer.param_groups[0]["s2sam_step"] == run.optimizer.param_groups[0]["s2sam_step"]


def test_a_checkpoint_loaded_into_a_running_window_replaces_it(data):
    saved = Run().train(data[:5]).save()
    expected = Run().load(saved).train(data[5:])
    run = Run(seed=3).train(data[8:11])
    run.forward(data[11]).backward()
    run.load(saved)
    run.optimizer.zero_grad()
    assert same(run.train(data[5:]).net.parameters(), expected.net.parameters())


def test_loading_other_weights_after_a_checkpoint_with_an_open_window_forgets_its_x(data):
    run = Run().train(data[:5])
    run.forward(data[5])
    fresh = Run(seed=5).load(run.save(), ("optimizer", "net", "scheduler"))
    other = make_net(torch.float32, seed=8)
    fresh.net.load_state_dict(other.state_dict())
    fresh.forward(data[5])
    radius = RHO * 2
    assert total([p - q for p, q in zip(fresh.net.parameters(), other.parameters(), strict=True)]) < radius * 1.001
    fresh.sam.restore()
    assert same(fresh.net.parameters(), other.parameters())


def test_a_scheduler_drives_the_optimizer_without_a_warning(data):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = Run()
        rates = []
        for batch in data:
            run.train([batch])
            rates.append(run.optimizer.param_groups[0]["lr"])
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(0.0, abs=1e-9)
    w = snapshot(run.net)
    run.optimizer.param_groups[0]["lr"] = 0.0
    run.finish(run.forward(data[0]))
    assert same(run.net.parameters(), w)  # the lr of the group is the lr of the step


def test_a_checkpoint_of_another_shape_is_refused_and_nothing_changes(data):
    run = Run().train(data[:3])
    run.forward(data[3])
    saved = copy.deepcopy(run.optimizer.state_dict())
    saved["param_groups"].append(copy.deepcopy(saved["param_groups"][0]))
    x = snapshot(run.net)
    with pytest.raises(ValueError, match="parameter group"):
        run.optimizer.load_state_dict(saved)
    run.forward(data[3])
    assert same(run.net.parameters(), x)


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("moment", ["between steps", "inside a window"])
@pytest.mark.parametrize(
    ("factory", "direction"), [("sgd", "gradient"), ("adamw", "gradient"), ("sgd", "random"), ("sgd", "ema")]
)
def test_distributed_checkpoint_state_dicts_on_one_process(factory, direction, moment, flatten, data):
    dcp = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flatten)
    run = Run(factory, direction)
    rest = come_to(moment, run, data)
    model = copy.deepcopy(dcp.get_model_state_dict(run.net))
    optimizer = copy.deepcopy(dcp.get_optimizer_state_dict(run.net, run.optimizer, options=options))
    fresh = Run(factory, direction, seed=5)
    dcp.set_model_state_dict(fresh.net, model)
    dcp.set_optimizer_state_dict(fresh.net, fresh.optimizer, optimizer, options=options)
    fresh.scheduler.load_state_dict(run.scheduler.state_dict())
    run.sam.restore()
    run.optimizer.zero_grad()
    assert same(fresh.net.parameters(), run.net.parameters())
    assert fresh.sam.stats["step"] == 5
    assert same(fresh.x(), run.x())
    run.train(rest)
    fresh.train(rest)
    assert same(fresh.net.parameters(), run.net.parameters())
