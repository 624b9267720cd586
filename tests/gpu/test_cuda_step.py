"""What only a GPU can show: a fused step with S2SAM never waits for the device, and equals the slow reference there."""

import pytest
import torch
import torch.nn.functional as F
from sam_common import distance, make_data, make_net, snapshot
from torch.func import functional_call

from s2sam import S2SAM
from s2sam.sam.reference import ReferenceS2SAM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

FUSED = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
}


@pytest.mark.parametrize("name", FUSED)
def test_a_fused_step_does_not_wait_for_the_device(name):
    net = make_net(torch.float32).cuda()
    optimizer = FUSED[name](net.parameters())
    sam = S2SAM(optimizer, model=net, rho=0.05)
    data = [(x.cuda(), y.cuda()) for x, y in make_data(6, torch.float32)]
    try:
        for step, (x, y) in enumerate(data):
            if step == 2:  # every parameter has had its first gradient
                torch.cuda.set_sync_debug_mode("error")
            F.cross_entropy(net(x * float("nan") if step == 4 else x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sam.stats["skipped"] == 1
    assert all(bool(torch.isfinite(p).all()) for p in net.parameters())


@pytest.mark.parametrize("name", FUSED)
def test_equals_the_reference_on_the_device(name):
    net, twin = make_net().cuda(), make_net().cuda()
    names = [n for n, _ in net.named_parameters()]
    optimizer = FUSED[name](net.parameters())
    S2SAM(optimizer, model=net, rho=0.05)
    ref = ReferenceS2SAM(snapshot(net), lambda w: FUSED[name]([{"params": w, "rho": 0.05}]))
    for step, (x, y) in enumerate(make_data(60)):
        x, y = x.cuda(), y.cuda()
        if step == 7:
            x = x * float("nan")
        xs = [v.requires_grad_() for v in ref.displaced()]
        loss = F.cross_entropy(functional_call(twin, dict(zip(names, xs, strict=True)), (x,)), y)
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        ref.step(torch.autograd.grad(loss, xs))
        assert distance(net.parameters(), ref.weights) < 1e-10
