"""The guard: step() refuses gradients that were taken at the clean weights, and only those."""

import copy
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from sam_common import make_data, snapshot, total
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from s2sam import S2SAM

RHO = 0.3


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.encoder, self.head, self.spare = (nn.Linear(*shape).double() for shape in [(6, 8), (8, 3), (6, 3)])
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=g) * 0.4)

    def forward(self, x, spare=True):
        out = self.head(torch.tanh(self.encoder(x)))
        return out + self.spare(x) if spare else out


@dataclass
class World:
    """A model with an optimizer and S2SAM, and how far from w each forward of the encoder ran."""

    options: dict = field(default_factory=dict)
    with_model: bool = True

    def __post_init__(self):
        self.net = Net()
        self.data = iter(make_data(20))
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)
        self.sam = S2SAM(self.optimizer, model=self.net if self.with_model else None, **{"rho": RHO} | self.options)
        self.moves = []
        self.clean = snapshot(self.net)
        self.net.encoder.register_forward_hook(self._measure)

    def _measure(self, *_):
        self.moves.append(total([p - w for p, w in zip(self.net.parameters(), self.clean, strict=True)]))

    def loss(self, forward=None):
        x, y = next(self.data)
        return F.cross_entropy((forward or self.net)(x), y)

    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.clean = snapshot(self.net)

    def warm(self, steps=2):
        for _ in range(steps):
            if self.with_model:
                self.loss().backward()
            else:
                with self.sam.displaced():
                    self.loss().backward()
            self.step()
        return self


def by_parts(world):
    """The same function, called through sub-modules only, so that no hook of the model fires."""
    return lambda x: world.net.head(torch.tanh(world.net.encoder(x))) + world.net.spare(x)


# Situations: each ends with a step. The number is how far from w the last forward of the encoder ran; "raises" that the
# step is refused.
SITUATIONS = {}


def situation(expected, *, warm=2, with_model=True, **options):
    def add(function):
        name = function.__name__ + "_on_schedule" * callable(options.get("rho"))
        SITUATIONS[name] = (function, expected, warm, with_model, options)
        return function

    return add


@situation(RHO)
def an_ordinary_step(world):
    world.loss().backward()


@situation(0.0, warm=0)
def the_first_step(world):
    world.loss().backward()


@situation(RHO)
def input_gradients_for_pgd_before_the_training_forward(world):
    x, y = next(world.data)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(world.net(x), y), x)
    world.loss(lambda z: world.net(z + 0.1 * gradient.sign())).backward()


@situation(RHO)
def input_gradients_for_pgd_in_eval_mode_before_the_training_forward(world):
    x, y = next(world.data)
    x.requires_grad_()
    world.net.eval()
    torch.autograd.grad(F.cross_entropy(world.net(x), y), x)
    assert world.moves[-1] == 0.0
    world.net.train()
    world.loss().backward()


@situation(RHO)
def a_discarded_batch(world):
    world.loss()
    world.loss().backward()


@situation(RHO)
def an_ema_teacher_forward_before_the_students(world):
    teacher = copy.deepcopy(world.net)
    teacher(next(world.data)[0])
    world.loss().backward()


@situation("raises")
def only_the_teacher_went_through_its_forward(world):
    teacher = copy.deepcopy(world.net)
    teacher(next(world.data)[0])
    world.loss(by_parts(world)).backward()


@situation("raises")
def sub_modules_called_directly(world):
    world.loss(by_parts(world)).backward()


@situation(RHO)
def functional_call_with_the_models_own_parameters(world):
    world.loss(lambda x: functional_call(world.net, dict(world.net.named_parameters()), (x,))).backward()


@situation(0.0)
def functional_call_with_foreign_parameters_leaves_no_gradient(world):
    foreign = {n: p.detach().clone().requires_grad_() for n, p in world.net.named_parameters()}
    world.loss(lambda x: functional_call(world.net, foreign, (x,))).backward()
    assert all(p.grad is None for p in world.net.parameters())


@situation("raises")
def functional_call_with_clones_of_the_parameters(world):
    clones = {n: p.clone() for n, p in world.net.named_parameters()}  # at w; the gradient flows back to p
    world.loss(lambda x: functional_call(world.net, clones, (x,))).backward()


@situation("raises")
def a_training_forward_without_gradients_does_not_count(world):
    with torch.no_grad():
        world.loss()
    world.loss(by_parts(world)).backward()


@situation("raises")
def training_in_eval_mode(world):
    world.net.eval()
    world.loss().backward()


@situation("raises")
def a_forward_inside_clean(world):
    with world.sam.clean():
        world.loss().backward()


@situation("raises")
def step_called_twice(world):
    world.loss().backward()
    world.optimizer.step()


@situation(RHO)
def step_called_twice_with_cleared_gradients(world):
    world.loss().backward()
    world.step()


@situation(0.0, warm=0)
def zero_gradients_on_a_first_step_as_checkpoint_loaders_make(world):
    for p in world.net.parameters():
        p.grad = torch.zeros_like(p)
    world.step()
    assert all("s2sam_buffer" in s for s in world.optimizer.state_dict()["state"].values())
    world.loss().backward()


@situation("raises in backward")
def a_reentrant_checkpoint_of_the_whole_model(world):
    x, y = next(world.data)
    out = checkpoint(world.net, x.requires_grad_(), use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        F.cross_entropy(out, y).backward()


@situation(0.0, warm=0)
def a_reentrant_checkpoint_of_the_whole_model_on_the_first_step(world):
    world.loss(lambda x: checkpoint(world.net, x.requires_grad_(), use_reentrant=True)).backward()


@situation(RHO)
def a_reentrant_checkpoint_of_a_sub_module(world):
    def forward(x):
        h = checkpoint(world.net.encoder, x.requires_grad_(), use_reentrant=True)
        return world.net.head(torch.tanh(h))

    world.net.forward = forward
    world.loss().backward()


@situation(RHO)
def a_checkpoint_that_is_not_reentrant(world):
    world.loss(lambda x: checkpoint(world.net, x, use_reentrant=False)).backward()


@situation(RHO)
def a_frozen_parameter(world):
    world.net.encoder.requires_grad_(False)
    world.loss().backward()


@situation("raises")
def a_frozen_parameter_does_not_excuse_the_others(world):
    world.net.encoder.requires_grad_(False)
    world.loss(by_parts(world)).backward()


@situation(RHO)
def an_unused_parameter(world):
    world.loss(lambda x: world.net(x, spare=False)).backward()


@situation(RHO)
def a_parameter_that_was_never_used_before(world):
    world.net.spare.extra = nn.Parameter(torch.ones(3, dtype=torch.float64))
    world.optimizer.add_param_group({"params": [world.net.spare.extra]})
    world.clean = snapshot(world.net)
    world.loss(lambda x: world.net(x) + world.net.spare.extra).backward()


@situation(RHO)
def tied_parameters(world):
    world.net.alias = world.net.head
    world.loss(lambda x: world.net(x) + world.net.alias(torch.tanh(world.net.encoder(x)))).backward()


@situation("raises")
def stale_zero_gradients(world):
    world.loss().backward()
    world.optimizer.step()
    world.optimizer.zero_grad(set_to_none=False)


@situation(RHO)
def zeroed_gradients_with_a_forward(world):
    world.loss().backward()
    world.optimizer.step()
    world.optimizer.zero_grad(set_to_none=False)
    world.clean = snapshot(world.net)
    world.loss().backward()


@situation(RHO)
def no_gradients_at_all(world):
    world.loss()


@situation(RHO)
def an_exception_between_forward_and_step(world):
    world.loss()
    with pytest.raises(IndexError):
        raise IndexError("the user's own")
    world.loss().backward()


@situation(RHO)
def an_exception_in_the_forward(world):
    with pytest.raises(RuntimeError, match="shapes"):
        world.net(torch.zeros(2, 5, dtype=torch.float64))
    world.loss().backward()


@situation(RHO)
def a_keyboard_interrupt_in_an_evaluation(world):
    def interrupt(*_):
        raise KeyboardInterrupt

    world.net.eval()
    handle = world.net.head.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        world.loss()
    handle.remove()
    world.net.train()
    world.loss().backward()


@situation(RHO)
def a_step_that_the_grad_scaler_skips(world):
    scaler = torch.amp.GradScaler(device="cpu", init_scale=2.0)
    scaler.scale(world.loss() * float("inf")).backward()
    scaler.step(world.optimizer)
    scaler.update()
    world.optimizer.zero_grad()
    world.loss().backward()


@situation(RHO)
def restore_before_step(world):
    world.loss().backward()
    world.sam.restore()


@situation(0.0, rho=lambda step: 0.1 if step < 2 else 0.0)
@situation(0.0, rho=0.0)
def rho_zero(world):
    world.loss(by_parts(world)).backward()


@situation(RHO, direction="momentum")
def the_momentum_direction(world):
    world.loss().backward()


@situation("raises", direction="momentum")
def the_momentum_direction_at_clean_weights(world):
    world.loss(by_parts(world)).backward()


@situation(0.0, on_clean_grad="ignore")
def told_to_ignore_it(world):
    world.loss(by_parts(world)).backward()


@situation("raises", with_model=False)
def neither_model_nor_displace(world):
    world.loss().backward()


@situation(RHO, with_model=False)
def displace_without_a_model(world):
    world.sam.displace()
    world.loss().backward()


@situation(RHO, with_model=False)
def displaced_without_a_model(world):
    with world.sam.displaced():
        world.loss().backward()


@situation(RHO, with_model=False)
def the_closure_form_without_a_model(world):
    def closure():
        world.optimizer.zero_grad()
        loss = world.loss()
        loss.backward()
        return loss

    assert world.optimizer.step(closure).isfinite()
    world.optimizer.zero_grad()


@pytest.mark.parametrize("name", SITUATIONS)
def test_situation(name):
    act, expected, warm, with_model, options = SITUATIONS[name]
    world = World(options, with_model).warm(warm)
    before = len(world.moves)
    act(world)
    if expected == "raises":
        w = snapshot(world.net)
        with pytest.raises(RuntimeError, match="clean weights") as error:
            world.optimizer.step()
        assert total([p - q for p, q in zip(world.net.parameters(), w, strict=True)]) == 0.0
        for advice in ("model=", "displace()", "training mode", "set_to_none=True", "on_clean_grad='ignore'"):
            assert advice in str(error.value)
        return
    world.optimizer.step()
    world.sam.restore()
    if not isinstance(expected, str):
        assert len(world.moves) > before
        assert world.moves[-1] == pytest.approx(expected, rel=1e-9)
