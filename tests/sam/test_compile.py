"""torch.compile of the model: the same weights, no recompilation, whichever module the window hangs on."""

import pytest
import torch
import torch.nn.functional as F
from sam_common import FACTORIES, distance, make_data, make_net, same, snapshot, total

from s2sam import S2SAM

RHO = 0.3
STEPS = 20


class Wrapper(torch.nn.Module):
    """The model inside the compiled region: its hooks are traced."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x) * 1.0


def train(place, backend, rho=RHO):
    """Train for STEPS with changing lr and rho and an evaluation now and then; the weights, x norms and recompiles."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    net = make_net(torch.float32)
    whole = Wrapper(net) if place == "nested" else net
    compiled = torch.compile(whole, backend=backend) if backend else whole
    optimizer = FACTORIES["sgd"](net.parameters())
    S2SAM(optimizer, model=compiled if place == "outer" else net, rho=rho)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    radii, outputs, frames = [], [], []
    for step, (x, y) in enumerate(make_data(STEPS, torch.float32)):
        optimizer.param_groups[0]["rho"] = rho * (1 + step % 3)
        w = snapshot(net)
        loss = F.cross_entropy(compiled(x), y)
        radii.append(total([p - q for p, q in zip(net.parameters(), w, strict=True)]))
        if step % 5 == 3:
            with torch.no_grad():
                compiled.eval()
                outputs.append(compiled(x))
                compiled.train()
            assert same(compiled.state_dict().values(), w)
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        assert step == 0 or not same(net.parameters(), w)
        frames.append(torch._dynamo.utils.counters["frames"]["total"])
    return snapshot(net), radii, outputs, frames


@pytest.mark.parametrize(
    ("place", "backend"),
    [("inner", "eager"), ("inner", "aot_eager"), ("outer", "aot_eager"), ("nested", "aot_eager")],
)
def test_compiled_equals_eager_and_lr_and_rho_recompile_nothing(place, backend):
    expected, radii, outputs, _ = train("nested" if place == "nested" else "inner", None)
    found, compiled_radii, compiled_outputs, frames = train(place, backend)
    assert distance(found, expected) < 1e-6
    assert distance(compiled_outputs, outputs) < 1e-6
    assert compiled_radii[1:] == pytest.approx([RHO * (1 + step % 3) for step in range(1, STEPS)], rel=1e-3)
    assert radii == pytest.approx(compiled_radii, rel=1e-3)
    assert frames[0] > 0  # something was compiled
    assert frames[4:] == frames[4:5] * (STEPS - 4)  # training and evaluation have both run by then
    without, _, _, _ = train(place, None, rho=0.0)
    assert distance(without, expected) > 1e-3


def test_the_hooks_of_a_model_compiled_in_place():
    """module.compile() compiles the call itself, hooks included."""
    torch._dynamo.reset()
    weights = []
    for compiled in (False, True):
        net = make_net(torch.float32)
        if compiled:
            net.compile(backend="aot_eager")
        optimizer = FACTORIES["sgd"](net.parameters())
        S2SAM(optimizer, model=net, rho=RHO)
        for step, (x, y) in enumerate(make_data(8, torch.float32)):
            w = snapshot(net)
            F.cross_entropy(net(x), y).backward()
            e = total([p - q for p, q in zip(net.parameters(), w, strict=True)])
            assert e == pytest.approx(RHO if step else 0.0, rel=1e-3)
            with torch.no_grad():
                net(x)
            optimizer.step()
            optimizer.zero_grad()
        weights.append(snapshot(net))
    assert distance(*weights) < 1e-6
