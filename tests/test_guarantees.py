"""What a host may do to a model with S2SAM and a sparsifier attached: one row for each public way to touch parameters.

Each row runs with the window closed and, where that makes a difference, open (after forward and backward, before the
step). Whatever the row says, afterwards the weights are w bit for bit and fit the masks, and training goes on at the
promised displacement, unless the row says that the model was refused or replaced. docs/guarantees.md has the same rows.
"""

from __future__ import annotations

import copy
import io
import pickle
import re
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from s2sam import S2SAM, sparsify

RHO = 0.3
ROWS: dict[str, Row] = {}


class Net(nn.Sequential):
    """With a forward of its own: torch.compile leaves that of nn.Sequential alone."""

    def forward(self, x):
        for layer in self:
            x = layer(x)
        return x


class World:
    """A net with BatchNorm, RigL and S2SAM, three steps after the start."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.net = Net(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
        with torch.no_grad():
            for p in self.net.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.4)
        self.generator = generator
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9)
        options = {"method": "rigl", "sparsity": 0.5, "total_steps": 100, "delta_t": 2, "generator": generator}
        self.sparsifier = sparsify(self.net, self.optimizer, **options)
        self.sam = S2SAM(self.optimizer, model=self.net, rho=RHO)
        self.forward: nn.Module = self.net  #: what is called in a training step
        for _ in range(3):
            self.train_step()

    def batch(self):
        return torch.randn(12, 6, generator=self.generator), torch.randint(0, 3, (12,), generator=self.generator)

    def backward(self) -> None:
        x, y = self.batch()
        dtype = next(self.net.parameters()).dtype
        F.cross_entropy(self.forward(x.to(dtype)).float(), y).backward()

    def train_step(self) -> None:
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def clean(self) -> dict[str, torch.Tensor]:
        with self.sam.clean():
            return {name: p.detach().clone() for name, p in self.net.named_parameters()}

    def displacement(self) -> float:
        w = self.clean()
        moves = [(p.detach() - w[name]).double().square().sum() for name, p in self.net.named_parameters()]
        return float(sum(moves)) ** 0.5

    @property
    def x(self) -> torch.Tensor:
        return torch.ones(4, 6)


@dataclass(frozen=True)
class Row:
    """What is done, what comes of it ("works", "refused", "documented"), and when it is tried."""

    act: Callable[[World], object]
    verdict: str
    says: str  #: found in the refusal
    states: tuple[str, ...]
    same: bool  #: the weights stay what they were
    goes_on: bool  #: training goes on afterwards
    plain: bool  #: the next window has no direction: it was lost
    rel: float  #: how near ||x - w|| is to rho afterwards


def row(name, verdict="works", *, says="", states=("closed", "open"), same=True, goes_on=True, plain=False, rel=2e-3):
    def add(act):
        assert name not in ROWS
        ROWS[name] = Row(act, verdict, says, states, same, goes_on, plain, rel)
        return act

    return add


def equal(net: nn.Module, w: dict[str, torch.Tensor]) -> bool:
    found = dict(net.named_parameters())
    return found.keys() == w.keys() and all(torch.equal(found[name].to(w[name].dtype), w[name]) for name in w)


# --------------------------------------------------------------------------------------------------- export and tracing


def holds_w(world, state) -> bool:
    return all(torch.equal(state[name], w) for name, w in world.clean().items())


@row("torch.export.export, training mode")
def _(world):
    program = torch.export.export(world.net, (world.x,))
    assert holds_w(world, program.state_dict)
    hooks = [
        h for m in program.module().modules() for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())
    ]
    assert not any(type(h).__module__.startswith("s2sam") for h in hooks)


@row("torch.export.export, eval mode")
def _(world):
    world.net.eval()
    expected = world.net(world.x)
    program = torch.export.export(world.net, (world.x,))
    assert holds_w(world, program.state_dict)
    assert torch.equal(program.module()(world.x), expected)
    world.net.train()


@row("torch.export.export, strict=True", "refused", says="export copy.deepcopy")
def _(world):
    torch.export.export(world.net, (world.x,), strict=True)


@row("torch.export.export of a deepcopy, strict=True")
def _(world):
    with world.sam.clean():
        twin = copy.deepcopy(world.net).eval()
    world.net.eval()
    assert torch.equal(torch.export.export(twin, (world.x,), strict=True).module()(world.x), world.net(world.x))
    world.net.train()


@row("torch.onnx.export(dynamo=True)")
def _(world):
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs onnx and onnxscript")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(world.net, (world.x,), dynamo=True, verbose=False)
    found = {k: torch.from_numpy(v.const_value.numpy()) for k, v in program.model.graph.initializers.items()}
    clean = world.clean()  # the exporter folds BatchNorm into the first layer
    assert all(torch.equal(found[name], clean[name]) for name in ("3.weight", "3.bias", "5.weight", "5.bias"))


@row("torch.jit.trace")
def _(world):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(world.net, world.x, check_trace=False)
    assert holds_w(world, traced.state_dict())
    assert "copy_" not in str(traced.graph) and "_foreach" not in str(traced.graph)


@row("torch.jit.script", "refused", says="torch.jit.script cannot compile a hook")
def _(world):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(world.net)


@row("torch.fx.symbolic_trace")
def _(world):
    torch.fx.symbolic_trace(world.net)


@row("make_fx")
def _(world):
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(lambda x: world.net(x))(world.x)
    assert "_foreach" not in graph.code


@row("a forward under FakeTensorMode")
def _(world):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        world.net(torch.ones(4, 6))


@row("FlopCounterMode, torch.profiler, detect_anomaly")
def _(world):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as flops, torch.autograd.set_detect_anomaly(True, check_nan=True):
        world.net(world.x).sum()
    assert flops.get_total_flops() == 2 * 4 * (6 * 16 + 16 * 8 + 8 * 3)


# ------------------------------------------------------------------------------------------------- torch.func, autograd


@row("torch.func.grad, vmap, jacrev, jvp over inputs")
def _(world):
    world.net.eval()
    with torch.no_grad():
        expected = world.net(world.x)
        assert torch.allclose(torch.func.vmap(world.net)(world.x[None])[0], expected, atol=1e-6)
        torch.func.grad(lambda x: world.net(x).sum())(world.x)
        torch.func.jacrev(world.net)(world.x)
        assert torch.allclose(torch.func.jvp(world.net, (world.x,), (world.x,))[0], expected, atol=1e-6)
    world.net.train()


@row("torch.func.vmap in training mode")
def _(world):
    torch.func.vmap(world.net[0])(world.x)
    world.net.requires_grad_(True)
    for module in world.net.modules():
        module.track_running_stats = False  # batch statistics cannot be updated inside vmap
    torch.func.vmap(world.net)(world.x[None]).sum()
    for module in world.net.modules():
        module.track_running_stats = True
    assert world.displacement() == pytest.approx(RHO, rel=1e-3)


@row("functional_call with the model's own parameters")
def _(world):
    torch.func.functional_call(world.net, dict(world.net.named_parameters()), (world.x,))
    assert world.displacement() == pytest.approx(RHO, rel=1e-3)


@row("functional_call with other tensors, no gradient to the model")
def _(world):
    before = world.displacement()
    others = {name: p.detach().clone() for name, p in world.net.named_parameters()}
    torch.func.functional_call(world.net, others, (world.x,))
    assert world.displacement() == before


@row("functional_call with clones that lead to the parameters", "refused", says="clean weights", states=("closed",))
def _(world):
    clones = {name: p.clone() for name, p in world.net.named_parameters()}
    x, y = world.batch()
    F.cross_entropy(torch.func.functional_call(world.net, clones, (x,)), y).backward()
    try:
        world.optimizer.step()
    finally:
        world.optimizer.zero_grad()


@row("checkpoint(use_reentrant=False) around the model")
def _(world):
    from torch.utils.checkpoint import checkpoint

    checkpoint(world.net, world.x, use_reentrant=False).sum().backward()


@row("checkpoint(use_reentrant=True) around the model", "refused", says="use_reentrant=False", states=("closed",))
def _(world):
    from torch.utils.checkpoint import checkpoint

    checkpoint(world.net, world.x.requires_grad_(), use_reentrant=True).sum().backward()


@row("no_grad and inference_mode forwards, eval and training mode")
def _(world):
    for mode in (True, False):
        world.net.train(mode)
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                found = world.net(world.x)
                with world.sam.clean():
                    assert torch.equal(world.net(world.x), found)
    world.net.train()


@row("saved tensors on the CPU, full backward hooks")
def _(world):
    handle = world.net[0].register_full_backward_hook(lambda *_: None)
    with torch.autograd.graph.save_on_cpu():
        world.backward()
    handle.remove()


@row("an optimizer inside the backward", "refused", says="while the backward is still running", states=("closed",))
def _(world):
    handle = world.net[5].weight.register_post_accumulate_grad_hook(lambda _: world.optimizer.step())
    try:
        world.backward()
    finally:
        handle.remove()
        world.optimizer.zero_grad()


@row("a sub-module's forward, then the model's", "refused", says="taken at the clean weights are", states=("closed",))
def _(world):
    x, y = world.batch()
    F.cross_entropy(nn.Sequential(*world.net)(x), y).backward()
    try:
        world.backward()
    finally:
        world.optimizer.zero_grad()


# -------------------------------------------------------------------------------------------------------------- compile


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@row("torch.compile(model) after attaching")
def _(world):
    world.forward = torch.compile(world.net, backend="aot_eager")
    world.backward()


@row("torch.compile(model, fullgraph=True) after attaching", "refused", says="Compile first and attach")
def _(world):
    torch.compile(world.net, backend="aot_eager", fullgraph=True)(world.x)


@row("torch.compile(model, fullgraph=True) first, S2SAM(model=compiled)", states=("closed",))
def _(world):
    world.sam.remove()
    world.forward = torch.compile(world.net, backend="aot_eager", fullgraph=True)
    world.sam = S2SAM(world.optimizer, model=world.forward, rho=RHO)
    for _ in range(2):
        world.train_step()
    world.same = False


@row("model.compile(fullgraph=True) in place first, S2SAM(model=model)", states=("closed",))
def _(world):
    world.sam.remove()
    world.net.compile(backend="aot_eager", fullgraph=True)
    world.sam = S2SAM(world.optimizer, model=world.net, rho=RHO)
    for _ in range(2):
        world.train_step()
    world.same = False
    assert copy.deepcopy(world.net)._compiled_call_impl is None


@row("model.compile(fullgraph=True) in place after attaching", "refused", says="Compile first and attach")
def _(world):
    world.net.compile(backend="aot_eager", fullgraph=True)
    try:
        world.net(world.x)
    finally:
        world.net._compiled_call_impl = None


# ------------------------------------------------------------------------------------------ precision, devices, storage


@row("autocast to bfloat16", states=("closed",))
def _(world):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        world.net(world.x).float().sum().backward()
    world.optimizer.zero_grad()


@row("a step that GradScaler skips")
def _(world):
    scaler = torch.amp.GradScaler(device="cpu", init_scale=2.0)
    scaler.scale(world.net(world.x).sum() * float("inf")).backward()
    scaler.step(world.optimizer)
    scaler.update()
    world.optimizer.zero_grad()


@row("model.double(), .half(), .bfloat16() and back", same=False, rel=1e-2)  # x was rounded as well as w
def _(world):
    for dtype in (torch.float64, torch.bfloat16):
        world.net.to(dtype)
    if world.sam.is_displaced:
        world.sam.restore()
    world.optimizer.zero_grad()
    world.net.float()


@row("model.to() that puts new parameters in place", "refused", says="no longer in the model", goes_on=False)
def _(world):
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        world.net.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    world.net(world.x.double())


@row("torch.utils.swap_tensors, set_swap_module_params_on_conversion", states=("closed",), same=False)
def _(world):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        world.net.double().float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@row("model.share_memory(), channels_last, pinned storage")
def _(world):
    world.net.share_memory()
    world.net.to(memory_format=torch.channels_last)


@row("vector_to_parameters", states=("closed",))
def _(world):
    vector = nn.utils.parameters_to_vector(world.net.parameters()).detach().clone()
    nn.utils.vector_to_parameters(vector, world.net.parameters())


# ----------------------------------------------------------------------------------------------- parameters that change


@row("requires_grad_(False) on a layer, and back")
def _(world):
    world.net[0].requires_grad_(False)
    world.backward()
    world.net[0].requires_grad_(True)


class Twice(nn.Module):
    def forward(self, w):
        return w * 2


@row("parametrize.register_parametrization in an open window", "refused", says="wrote to", states=("open",), plain=True)
def _(world):
    parametrize.register_parametrization(world.net[3], "weight", Twice())
    try:
        world.backward()
    finally:
        parametrize.remove_parametrizations(world.net[3], "weight", leave_parametrized=False)


@row("parametrize.register_parametrization", states=("closed",))
def _(world):
    parametrize.register_parametrization(world.net[3], "weight", Twice())
    world.backward()
    parametrize.remove_parametrizations(world.net[3], "weight", leave_parametrized=False)


@row("weight_norm without a new optimizer", "refused", says="no longer in the model", goes_on=False, same=False)
def _(world):
    parametrizations.weight_norm(world.net[3])
    world.backward()


@row("torch.nn.utils.prune masks")
def _(world):
    prune.identity(world.net[3], "weight")
    world.backward()
    prune.remove(world.net[3], "weight")


@row("a new layer without a new optimizer", "refused", says="no longer in the model", goes_on=False, same=False)
def _(world):
    world.net[3] = nn.Linear(16, 8)
    world.backward()


@row("load_state_dict(assign=True)", "refused", says="no longer in the model", goes_on=False)
def _(world):
    world.net.load_state_dict({k: v.clone() for k, v in world.net.state_dict().items()}, assign=True)
    world.backward()


@row("state_dict and load_state_dict of model, optimizer, sparsifier")
def _(world):
    model, optimizer, masks = (part.state_dict() for part in (world.net, world.optimizer, world.sparsifier))
    assert holds_w(world, model)
    world.net.load_state_dict(model)
    world.optimizer.load_state_dict(optimizer)
    world.sparsifier.load_state_dict(masks)


@row(
    "an in-place write to displaced weights",
    "refused",
    says="wrote to weights while they were displaced",
    states=("open",),
    plain=True,
)
def _(world):
    with torch.no_grad():
        world.net[0].weight.mul_(2.0)
    try:
        world.optimizer.step()
    finally:
        world.optimizer.zero_grad()


@row("a write inside `with sam.clean():`", states=("open",), same=False, plain=True)
def _(world):
    with world.sam.clean(), torch.no_grad():
        world.net[0].weight.mul_(2.0)
        expected = world.net[0].weight.clone()
    assert torch.equal(world.clean()["0.weight"], expected)


@row("another optimizer steps on the same weights", "refused", says="looks after through another optimizer")
def _(world):
    if all(p.grad is None for p in world.net.parameters()):
        world.backward()
    other = torch.optim.AdamW(world.net.parameters())
    try:
        other.step()
    finally:
        world.optimizer.zero_grad()


@row("the old optimizer and what was attached to it are dropped, new ones attached", states=("closed",), same=False)
def _(world):
    world.sam = world.sparsifier = None
    world.optimizer = torch.optim.AdamW(world.net.parameters())
    with pytest.raises(ValueError, match="adopt"):
        sparsify(world.net, world.optimizer, method="rigl", sparsity=0.5, total_steps=100)
    options = {"method": "rigl", "sparsity": 0.5, "total_steps": 100, "delta_t": 2}
    world.sparsifier = sparsify(world.net, world.optimizer, init="adopt", **options)
    world.sam = S2SAM(world.optimizer, model=world.net, rho=RHO)
    for _ in range(2):
        world.train_step()


@row("add_param_group", states=("closed",))
def _(world):
    extra = nn.Parameter(torch.ones(3))
    world.optimizer.add_param_group({"params": [extra]})


# ------------------------------------------------------------------------------------------- copies, averages, wrappers


@row("copy.deepcopy and pickle of the model, inside `with sam.clean():`")
def _(world):
    with world.sam.clean():
        twins = [copy.deepcopy(world.net), pickle.loads(pickle.dumps(world.net))]
        buffer = io.BytesIO()
        torch.save(world.net, buffer)
        twins.append(torch.load(io.BytesIO(buffer.getvalue()), weights_only=False))
    for twin in twins:
        assert equal(twin, world.clean())
        twin(world.x).sum().backward()  # opens no window
        assert equal(twin, world.clean())


@row("copy.deepcopy of the model in an open window", "documented", states=("open",))
def _(world):
    assert world.displacement() == pytest.approx(RHO, rel=1e-3)
    assert equal(copy.deepcopy(world.net), dict(world.net.named_parameters()))  # it sees x


@row("pickle and deepcopy of S2SAM and the sparsifier")
def _(world):
    for one in (world.sam, world.sparsifier):
        for twin in (pickle.loads(pickle.dumps({"it": one}))["it"], copy.deepcopy({"it": one})["it"]):
            twin.remove()
            with pytest.raises(RuntimeError, match="copy"):
                twin.state_dict()


@row("AveragedModel, updated after the step, and sparsifier.apply_to", states=("closed",), same=False)
def _(world):
    average = torch.optim.swa_utils.AveragedModel(world.net)
    for _ in range(4):
        world.train_step()
        average.update_parameters(world.net)
    world.sparsifier.apply_to(average)
    for name, p in average.module.named_parameters():
        if name in world.sparsifier.masks:
            assert not p[~world.sparsifier.masks[name]].any()


@row("DistributedDataParallel around the model", states=("closed",))
def _(world):
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        world.forward = nn.parallel.DistributedDataParallel(world.net)
        w = world.clean()
        world.backward()
        assert world.displacement() == pytest.approx(RHO, rel=1e-3)
        world.sam.restore()
        assert equal(world.net, w)
        world.optimizer.zero_grad()
    finally:
        world.forward = world.net
        dist.destroy_process_group()


@row("an evaluation in another thread")
def _(world):
    found = []

    def evaluate():
        with torch.no_grad():
            found.append(world.net(world.x))

    world.net.eval()
    thread = threading.Thread(target=evaluate)
    thread.start()
    thread.join()
    with torch.no_grad(), world.sam.clean():
        assert torch.equal(world.net(world.x), found[0])
    world.net.train()


@row("quantization-aware prepare (torch.ao, eager)", goes_on=False)
def _(world):
    pytest.importorskip("torch.ao.quantization")
    world.net.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.ao.quantization.prepare_qat(world.net, inplace=True)
    world.backward()


# ------------------------------------------------------------------------------------------------------------- the test

CASES = [(name, state) for name, one in ROWS.items() for state in one.states]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("name", "state"), CASES, ids=[f"{name}-{state}" for name, state in CASES])
def test_row(name, state):
    one, world = ROWS[name], World()
    if state == "open":
        world.backward()
    w = world.clean()
    world.net.train()
    if one.verdict == "refused":
        with pytest.raises(Exception, match=one.says) as error:
            one.act(world)
        assert isinstance(
            error.value, (RuntimeError, ValueError, TypeError, AttributeError, torch._dynamo.exc.Unsupported)
        )
    else:
        one.act(world)
    world.sam.restore()
    assert not world.sam.is_displaced
    if one.same and getattr(world, "same", True):
        assert equal(world.net, w)
    if not one.goes_on:
        return
    world.sparsifier.check_fit()
    world.optimizer.zero_grad()
    world.net.train()
    for step in range(3):  # one of them may be RigL's, which moves no weight
        before = world.clean()
        world.backward()
        assert world.displacement() == pytest.approx(0.0 if one.plain and step == 0 else RHO, rel=one.rel)
        assert all(torch.equal(world.clean()[name], before[name]) for name in before)
        world.optimizer.step()
        world.optimizer.zero_grad()
    world.sparsifier.check_fit()
    assert world.sparsifier.sparsity() == pytest.approx(0.5, abs=0.01)


def test_the_page_has_the_same_rows():
    page = (Path(__file__).parents[1] / "docs" / "guarantees.md").read_text(encoding="utf-8")
    found = dict(re.findall(r"^\| (.+?) \| (works|refused|documented)\b", page, flags=re.M))
    assert {k.replace("`", ""): v for k, v in found.items()} == {k.replace("`", ""): v.verdict for k, v in ROWS.items()}
