"""Every direction x scale x sign equals the slow twin to 1e-12 over 100 eventful steps, for every scope too."""

import io
import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from sam_common import FACTORIES, distance, make_data, make_net, snapshot, total
from torch import nn
from torch.func import functional_call

from s2sam import S2SAM, sparsify
from s2sam.sam.directions import DIRECTIONS, draw_batches, noise_seed
from s2sam.sam.reference import ReferenceS2SAM
from s2sam.sam.scales import SCALES

STEPS = 100
RHOS = [0.05, 0.05, 0.0, 0.1, 0.1, 0.05]
OPTIMIZERS = ("sgd", "sgd-fused", "adamw")
COMBINATIONS = list(itertools.product(DIRECTIONS, SCALES, (1, -1)))
HIGHER = {"step": 20.0, "filter": 1.0}  #: rho times this


def factor(step):
    return (1.0 + 0.5 * (step % 7 == 0)) * (step % 11 != 3)


class Fast:
    """Net, optimizer, masks and S2SAM, made anew from nothing or from a checkpoint."""

    def __init__(self, name, options, net, saved=None):
        self.net = net
        rhos = [r * HIGHER.get(options["scale"], 1.0) for r in RHOS]
        groups = [{"params": [w], "rho": r} for w, r in zip(net.parameters(), rhos, strict=False)]
        self.optimizer = FACTORIES[name](groups)
        make = {"generator": torch.Generator().manual_seed(3), "sparsity": 0.5, "method": "static"}
        generator = torch.Generator().manual_seed(9 if saved is None else 10)
        noise = {"generator": generator} if options["direction"] == "random" else {}
        attach = [
            lambda: S2SAM(self.optimizer, model=net, rho=factor, **options, **noise),
            lambda: sparsify(net, self.optimizer, init=saved is None, **make),
        ]
        order = (0, 1) if saved is None else (1, 0)  # a resumed run attaches them the other way round
        made = {i: attach[i]() for i in order}
        self.sam, self.sparsifier = made[0], made[1]
        if saved is not None:
            state = torch.load(io.BytesIO(saved), weights_only=True)
            for part, value in zip((net, self.optimizer, self.sparsifier), state, strict=True):
                part.load_state_dict(value)

    def save(self):
        buffer = io.BytesIO()
        torch.save([part.state_dict() for part in (self.net, self.optimizer, self.sparsifier)], buffer)
        return buffer.getvalue()


def noise_of(optimizer, inside):
    """What `direction="random"` draws: a function of the seed, the step and the place of the parameter."""
    seed = optimizer.param_groups[0]["s2sam_seed"]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    members = {i: p for i, p in enumerate(params) if inside[i]}
    batches = [[i for shape in batch for i in shape] for batch in draw_batches(members)]
    assert max(map(len, batches)) > 1

    def noise(step):
        found = {i: torch.zeros_like(p) for i, p in enumerate(params)}
        for batch in batches:
            generator = torch.Generator().manual_seed(noise_seed(seed, step, batch[0]))
            values = iter(torch.randn(sum(params[i].numel() for i in batch), generator=generator, dtype=torch.float64))
            for i in batch:
                found[i] = torch.stack([next(values) for _ in range(params[i].numel())]).reshape(params[i].shape)
        return [found[i] for i in range(len(params))]

    return noise


def gradients_at(net, names, xs, batches):
    xs = [x.requires_grad_() for x in xs]
    loss = sum(F.cross_entropy(functional_call(net, dict(zip(names, xs, strict=True)), (x,)), y) for x, y in batches)
    return torch.autograd.grad(loss / len(batches), xs)


def compare(name, options, build, in_scope=None):
    """Train both; weights agree after every step, x inside every window."""
    fast, twin = Fast(name, options, build()), build()
    names = [n for n, _ in twin.named_parameters()]
    rhos = [r * HIGHER.get(options["scale"], 1.0) for r in RHOS]
    inside = in_scope or [p.dim() > 1 or options["scale"] != "filter" for p in twin.parameters()]
    ref = ReferenceS2SAM(
        snapshot(fast.net),
        lambda weights: FACTORIES[name]([{"params": [w], "rho": r} for w, r in zip(weights, rhos, strict=False)]),
        masks=[fast.sparsifier.masks.get(n) for n in names],
        factor=factor,
        scope=in_scope,
        noise=noise_of(fast.optimizer, inside) if options["direction"] == "random" else None,
        **{k: v for k, v in options.items() if k != "scope"},
    )
    schedule = [torch.optim.lr_scheduler.CosineAnnealingLR(o, STEPS) for o in (fast.optimizer, ref.optimizer)]
    rng, data, moved = random.Random(0), iter(make_data(3 * STEPS)), []
    for step in range(STEPS):
        batches = [next(data) for _ in range(rng.choice([1, 1, 2]))]
        if step in (5, 6, 60):
            batches[0][0][0, 0] = float("nan")
        displaced = ref.displaced()
        gradients = gradients_at(twin, names, [x.clone() for x in displaced], batches)
        if rng.random() < 0.06 or step == 6:  # a checkpoint inside the window, into new objects
            fast.net(batches[0][0])
            saved = fast.save()
            fast = Fast(name, options, build(), saved)
            schedule[0].optimizer = fast.optimizer
        for x, y in batches:
            (F.cross_entropy(fast.net(x), y) / len(batches)).backward()
            assert distance(fast.net.parameters(), displaced) < 1e-12
            moved.append(total([p - w for p, w in zip(fast.net.parameters(), ref.weights, strict=True)]))
            if rng.random() < 0.3:  # an evaluation inside the window
                with fast.net.eval() and torch.no_grad():
                    out = fast.net(x)
                fast.net.train()
                clean = functional_call(twin, dict(zip(names, ref.weights, strict=True)), (x,))
                assert torch.allclose(out, clean, atol=1e-12, equal_nan=True)
            if rng.random() < 0.2:
                fast.sam.restore()
        fast.optimizer.step()
        fast.optimizer.zero_grad(set_to_none=rng.random() < 0.5)
        ref.step(gradients)
        for s in schedule:
            s.step()
        assert distance(fast.net.parameters(), ref.weights) < 1e-12, step
    assert sorted(moved)[len(moved) // 3] > 1e-4  # the displacements are no rounding errors
    for p, m in zip(fast.net.parameters(), ref.masks, strict=True):
        for t in fast.optimizer.state[p].values() if m is not None else ():
            if torch.is_tensor(t) and t.shape == p.shape:
                assert float(t[~m].abs().sum()) == 0
    return fast


@pytest.mark.parametrize(("direction", "scale", "sign"), COMBINATIONS)
def test_every_combination_equals_the_slow_twin(direction, scale, sign):
    name = OPTIMIZERS[COMBINATIONS.index((direction, scale, sign)) % len(OPTIMIZERS)]
    options = {"direction": direction, "scale": scale, "sign": sign, "ema_beta": 0.8}
    compare(name, options, lambda: make_net(bias=True))


def normed():
    """Three linear layers without biases, the first two followed by a LayerNorm with affine parameters."""
    net = make_net()
    net = nn.Sequential(net[0], nn.LayerNorm(8, dtype=torch.float64), net[1], net[2], net[3], net[4])
    with torch.no_grad():
        net[1].bias.add_(0.1)
    return net


@pytest.mark.parametrize("scope", ["weights", "norm"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_scopes_equal_the_slow_twin(direction, scope):
    norm = [(".weight" in n and n.startswith("1.")) or n == "1.bias" for n, _ in normed().named_parameters()]
    assert sum(norm) == 2
    inside = norm if scope == "norm" else [not n for n in norm]
    options = {"direction": direction, "scale": "relative", "sign": 1, "ema_beta": 0.9, "scope": scope}
    fast = compare(OPTIMIZERS[DIRECTIONS.index(direction) % 3], options, normed, inside)
    for p, within in zip(fast.net.parameters(), inside, strict=True):
        assert ("s2sam_buffer" in fast.optimizer.state[p]) == within
        assert ("s2sam_ema" in fast.optimizer.state[p]) == (within and direction == "ema")
