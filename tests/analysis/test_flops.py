"""Multiply-accumulates: hand counts, published totals, and a model that is left as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from s2sam.analysis.flops import (
    TRAINING_RULES,
    count_macs,
    inference_flops,
    mean_sparse,
    method_flops,
    training_flops,
)
from s2sam.models import create_model
from s2sam.registry import list_methods
from s2sam.sparse.base import Sparsifier
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


def resnet32_macs(width: int) -> int:
    """By hand: stem, ten 3x3 convolutions a stage but two where the channels double, two 1x1 shortcuts, classifier."""
    c, pixels = [16 * width, 32 * width, 64 * width], [1024, 256, 64]
    stages = sum(p * 9 * a * a * (10 - (i > 0)) for i, (a, p) in enumerate(zip(c, pixels, strict=True)))
    doubling = sum(p * (9 + 1) * a * b for a, b, p in zip(c, c[1:], pixels[1:], strict=False))
    return 1024 * 27 * c[0] + stages + doubling + 10 * c[2]


def test_vgg19_and_resnet32_single_width_golden() -> None:
    vgg = inference_flops(net("vgg19"), (3, 32, 32))
    sides = [32] * 2 + [16] * 2 + [8] * 4 + [4] * 4 + [2] * 4
    plan = [3] + [64] * 2 + [128] * 2 + [256] * 4 + [512] * 8
    by_hand = [9 * a * b * s * s for a, b, s in zip(plan, plan[1:], sides, strict=False)]
    assert list(vgg.macs.values()) == [*by_hand, 5120]
    assert vgg.dense == 398_136_320  # 3.981e8
    single = inference_flops(net("resnet32"), (3, 32, 32))
    assert single.dense == resnet32_macs(1) == 69_124_736
    assert resnet32_macs(2) == 275_612_928


@pytest.mark.parametrize(
    ("name", "width", "sparsity", "fraction"),
    [
        ("resnet32", 2.0, 0.90, 0.175), ("resnet32", 2.0, 0.95, 0.088), ("resnet32", 2.0, 0.98, 0.035),
        ("vgg19", 1.0, 0.90, 0.222), ("vgg19", 1.0, 0.95, 0.113), ("vgg19", 1.0, 0.98, 0.047),
    ],
)  # fmt: skip
def test_erk_fractions_golden(name: str, width: float, sparsity: float, fraction: float) -> None:
    model = net(name, width=width)
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


@pytest.mark.parametrize(("kind", "gates"), [(nn.RNN, 1), (nn.GRU, 3), (nn.LSTM, 4)])
def test_recurrent_layers_are_counted_however_they_are_fused(kind: type[nn.Module], gates: int) -> None:
    enabled = torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled
    macs = count_macs(kind(8, 6, batch_first=True), torch.zeros(1, 4, 8))
    assert macs == {"weight_ih_l0": 4 * gates * 6 * 8, "weight_hh_l0": 4 * gates * 6 * 6}
    assert (torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled) == enabled


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


@pytest.mark.parametrize(
    ("rule", "delta_t", "sharpness", "by_hand"),
    [
        ("dense", None, "none", 300.0),
        ("dense", None, "s2sam", 300.0),
        ("dense", None, "sam", 600.0),
        ("sparse", None, "none", 30.0),
        ("sparse", None, "s2sam", 30.0),
        ("sparse", None, "sam", 60.0),
        ("dense_gradient", None, "none", 120.0),
        ("dense_gradient", None, "sam", 150.0),  # 30 for the first pass, 20 + 100 for the second
        ("rigl", 1, "none", 75.0),  # (30 + 120) / 2
        ("rigl", 100, "none", (30 * 100 + 120) / 101),
        ("rigl", 100, "s2sam", (30 * 100 + 120) / 101),
        ("rigl", 100, "sam", (60 * 100 + 150) / 101),
    ],
)
def test_training_step_by_hand(rule: str, delta_t: int | None, sharpness: str, by_hand: float) -> None:
    assert training_flops(10, 100, rule=rule, delta_t=delta_t, sharpness=sharpness) == by_hand


def test_training_costs_are_ordered_and_scale() -> None:
    def cost(rule: str, scale: float = 1.0) -> float:
        return training_flops(scale * 7, scale * 50, rule=rule, delta_t=20 if rule == "rigl" else None)

    assert cost("sparse") < cost("rigl") < cost("dense_gradient") < cost("dense")
    for rule in TRAINING_RULES:
        assert cost(rule, 4.0) == pytest.approx(4 * cost(rule))
        assert training_flops(50, 50, rule=rule, delta_t=20 if rule == "rigl" else None) == pytest.approx(150)


def test_dense_gradients_of_rigl_add_little() -> None:
    """At DT = 100 the dense gradients of RigL add a quarter of a percent of dense training to a mask of cost 0.23."""
    static, rigl = (training_flops(0.23, 1.0, rule=r, delta_t=d) / 3 for r, d in (("sparse", None), ("rigl", 100)))
    assert static == pytest.approx(0.23)
    assert rigl == pytest.approx(0.23 + (1 - 0.23) / 3 / 101)


def test_mean_cost_of_moving_densities() -> None:
    macs = {"a": 100, "b": 10, "": 1}
    topology = [(0, {"a": 1.0}), (10, {"a": 0.5, "b": 0.0}), (40, {"a": 0.1, "b": 1.0})]
    assert mean_sparse(macs, topology, 100) == pytest.approx((10 * 111 + 30 * 51 + 60 * 21) / 100)
    assert mean_sparse(macs, topology[:1], 7) == 111
    assert mean_sparse(macs, topology, 40) == pytest.approx((10 * 111 + 30 * 51) / 40)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "rigel"}, "unknown training rule 'rigel'; did you mean 'rigl'"),
        ({"sharpness": "ssam"}, "unknown sharpness 'ssam'"),
        ({"sparse": 101}, "0 <= sparse <= dense"),
        ({"sparse": -1}, "0 <= sparse <= dense"),
        ({"dense": float("nan")}, "0 <= sparse <= dense"),
        ({"rule": "rigl"}, "rule 'rigl' needs delta_t"),
        ({"delta_t": 10}, "no other rule takes it, got 'sparse' with delta_t=10"),
        ({"rule": "rigl", "delta_t": 0}, "delta_t must be a whole number"),
        ({"rule": "rigl", "delta_t": 2.5}, "delta_t must be a whole number"),
    ],
)
def test_bad_training_costs(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        training_flops(**({"sparse": 10, "dense": 100} | change))


@pytest.mark.parametrize("topology", [[], [(5, {})], [(0, {}), (9, {}), (4, {})], [(0, {}), (200, {})]])
def test_bad_topologies(topology: list) -> None:
    with pytest.raises(ValueError, match="topology must begin at step 0"):
        mean_sparse({"a": 1}, topology, 100)


LOOK_AT_ACTIVE_WEIGHTS = {"str", "chex"}  # STR sums over them; CHEX masks the gradients of pruned channels


@pytest.mark.parametrize("row", list_methods(), ids=lambda row: row.name)
def test_every_method_is_counted_by_the_rule_of_its_row(row):
    assert row.flops in TRAINING_RULES
    assert row.flops != "dense"
    dense = {"sparse": 0, "rigl": 90 / ((row.defaults.get("delta_t") or 0) + 1), "dense_gradient": 90}[row.flops]
    assert method_flops(row.name, 10, 100, sharpness="sam") == pytest.approx(2 * 30 + dense)
    cls = row.load()  # which grows by dense gradients: of a step that it takes for that, or that it looks at
    looks = cls.look is not Sparsifier.look and row.name not in LOOK_AT_ACTIVE_WEIGHTS
    assert (row.flops != "sparse") is (cls.placement == "replace" or looks)
    assert ("delta_t" in row.defaults) or row.flops != "rigl"


def test_rules_follow_the_options_and_names_are_checked():
    assert method_flops("rigl", 0, 100, options={"delta_t": 1, "t_end": 0.5}) == 50
    assert method_flops("dense", 0, 100, sharpness="s2sam") == 300
    with pytest.raises(ValueError, match="did you mean 'rigl'"):
        method_flops("rigel", 1, 2)
