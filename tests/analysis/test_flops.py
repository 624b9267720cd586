"""Multiply-accumulates: hand counts, published totals, and a model that is left as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from s2sam.analysis.flops import count_macs, inference_flops
from s2sam.models import create_model
from s2sam.sparse.budget import densities


def net(name: str, **options: object) -> nn.Module:
    return create_model(name, num_classes=10, generator=torch.Generator().manual_seed(0), **options)


class Odd(nn.Module):
    """Everything that makes counting by module names hard."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.Linear(8, 8)])
        self.free = nn.Parameter(torch.ones(8, 5))
        self.tied = nn.Linear(8, 8, bias=False)
        self.tied.weight = self.parts[1].weight
        self.drop = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        h = self.parts[0](x).mean((2, 3))
        h = self.drop(torch.relu(self.tied(self.parts[1](h))))
        return h @ self.free + torch.rand(5)


def test_hand_counts_of_an_odd_model() -> None:
    macs = count_macs(Odd(), torch.zeros(1, 4, 6, 6))
    assert macs == {"free": 8 * 5, "parts.0.weight": 36 * 8 * 2 * 9, "parts.1.weight": 2 * 64}  # tied: used twice


def test_mlp_macs_are_its_weights() -> None:
    model = net("mlp", in_channels=1, image_size=8)
    assert count_macs(model, torch.zeros(1, 1, 8, 8)) == {
        name: p.numel() for name, p in model.named_parameters() if p.ndim == 2
    }


def test_batches_scale_the_count() -> None:
    model = net("resnet20", width=0.5)
    one, three = (sum(count_macs(model, torch.zeros(n, 3, 16, 16)).values()) for n in (1, 3))
    assert three == 3 * one > 0


def test_resnet32_double_width_golden() -> None:
    model = net("resnet32", width=2.0)
    flops = inference_flops(model, (3, 32, 32))
    assert flops.dense == 275_612_928 == flops.sparse
    assert flops.fraction == 1.0
    assert list(flops.macs) == [name for name, p in model.named_parameters() if p.ndim >= 2]
    for name, p in model.named_parameters():  # a convolution costs its weights times the pixels it produces
        if p.ndim >= 2:
            side = {"stem": 32, "stag": 0, "clas": 1}[name[:4]] or 32 >> int(name.split(".")[1])
            assert flops.macs[name] == p.numel() * side**2, name


@pytest.mark.parametrize(("sparsity", "fraction"), [(0.90, 0.175), (0.95, 0.088), (0.98, 0.035)])
def test_erk_fractions_golden(sparsity: float, fraction: float) -> None:
    model = net("resnet32", width=2.0)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.ndim >= 2}
    flops = inference_flops(model, (3, 32, 32), densities(shapes, sparsity, "erk"))
    assert round(flops.fraction, 3) == fraction


def test_densities_come_from_the_weights_if_not_given() -> None:
    model = net("mlp", in_channels=1, image_size=8)
    with torch.no_grad():
        model.body.fc2.weight.flatten()[: 256 * 256 // 4 * 3] = 0.0  # type: ignore[union-attr]
    flops = inference_flops(model, (1, 8, 8))
    assert flops.densities["body.fc2.weight"] == 0.25
    assert flops.sparse == flops.dense - 0.75 * 256 * 256
    assert inference_flops(model, (1, 8, 8), {"body.fc1.weight": 0.5}).sparse == flops.dense - 0.5 * 64 * 256


def test_attention_scores_have_no_weight_and_stay_dense() -> None:
    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    macs = count_macs(Attend(), torch.zeros(1, 5, 16))
    assert macs == {
        "attention.in_proj_weight": 5 * 16 * 48,
        "attention.out_proj.weight": 5 * 16 * 16,
        "": 2 * 5 * 5 * 16,
    }


def test_meta_models_cost_no_memory() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(1000, 1000), nn.Linear(1000, 10))
    assert count_macs(model, torch.zeros(1, 1000, device="meta")) == {"0.weight": 10**6, "1.weight": 10**4}


def test_model_and_random_state_are_left_alone() -> None:
    model = Odd()
    model.drop.eval()  # a mixed mode must survive as such
    before = torch.random.get_rng_state()
    grads = model.free.grad
    count_macs(model, torch.zeros(2, 4, 6, 6))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.training
    assert not model.drop.training
    assert model.parts[0].training
    assert model.calls == 0
    assert model.free.grad is grads

    resnet = net("resnet20", width=0.5)
    saved = {k: v.clone() for k, v in resnet.state_dict().items()}
    inference_flops(resnet, (3, 16, 16))
    assert all(torch.equal(v, saved[k]) for k, v in resnet.state_dict().items())
    assert resnet.training


def test_an_exception_in_the_forward_restores_the_mode() -> None:
    model = Odd()
    with pytest.raises(RuntimeError):
        count_macs(model, torch.zeros(1, 3, 6, 6))
    assert model.training
    assert model.drop.training
    assert model.calls == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"stem.wieght": 0.5}, "no weight 'stem.wieght'"), ({"stem.weight": 1.5}, "between 0 and 1, got 1.5")],
)
def test_bad_densities(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inference_flops(net("resnet20"), (3, 32, 32), wrong)
