"""The cost benchmark: counters give known numbers, statistics are right, the JSON is complete. No timings."""

import json
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import step_overhead
from _arms import RHO, make_arm
from _counters import OpCounter, count_passes, live_bytes
from _timing import abba, bootstrap, interleaved, median
from _vit import TOKENS, ViTTiny
from s2sam.sam.single_step import ECHO_RHO
from step_overhead import KINDS, HundredTensors


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 32, 32, generator=generator), torch.tensor([0, 1, 2, 3])


def counted(work) -> OpCounter:
    with OpCounter() as counter:
        work()
    return counter


@pytest.mark.parametrize(
    ("work", "moved"),
    [
        (lambda a, b: a + b, 120),
        (lambda a, b: a.mul_(b), 120),
        (lambda a, b: a.copy_(b), 80),
        (lambda a, b: a.zero_(), 40),
        (lambda a, b: a.view(2, 5), 0),
        (lambda a, b: torch.empty_like(a), 0),
        (lambda a, b: torch._foreach_add_([a, b], [b, a]), 240),
        (lambda a, b: torch._foreach_copy_([a], [b]), 80),
    ],
)
def test_bytes_are_what_is_read_and_what_is_written(work, moved):
    a, b = torch.ones(10), torch.ones(10)
    counter = counted(lambda: work(a, b))
    assert (counter.calls, counter.bytes) == (1, moved)


def test_host_syncs_are_seen():
    a = torch.ones(3)
    assert counted(lambda: bool(a[0] > 0)).syncs == 1
    assert counted(lambda: a + 1).syncs == 0


@pytest.mark.parametrize(("base", "calls", "moved"), [("default", 402, 44), ("foreach", 6, 44), ("fused", 3, 20)])
def test_plain_sgd_costs_what_is_known(base, calls, moved, batch):
    """44 and 20 bytes per parameter for SGD with momentum and weight decay: the unfused sum and the floor."""
    arm = make_arm("sgd", HundredTensors, batch, base=base)
    arm.refresh()
    counter = counted(arm.optimizer_step)
    parameters = sum(p.numel() for p in arm.model.parameters())
    assert counter.calls == calls
    assert counter.bytes / parameters == pytest.approx(moved, abs=0.01)


def test_live_bytes_sees_each_storage_once():
    before = live_bytes()
    kept = torch.ones(1000)
    views = [kept[:10], kept.view(10, 100)]
    assert live_bytes() - before == 4000
    del kept, views
    assert live_bytes() == before


def test_passes_are_counted_at_the_module():
    model = nn.Linear(2, 1)
    x = torch.ones(1, 2)

    def step() -> None:
        model(x).sum().backward()
        with torch.no_grad():
            model(x)

    assert count_passes(model, step) == (2, 1)


def test_abba_cancels_linear_drift():
    def ticking() -> Iterator[int]:
        yield from range(1000)

    drift = ticking()
    a, b = abba(lambda: 100 + next(drift), lambda: 200 + next(drift), rounds=4)
    assert [y - x for x, y in zip(a, b, strict=True)] == [100] * 4


def test_interleaved_alternates_the_order():
    order: list[str] = []
    works = {name: lambda n=name: order.append(n) or 1.0 for name in "abc"}
    assert interleaved(works, 2) == {name: [1.0, 1.0] for name in "abc"}
    assert "".join(order) == "abccba"


def test_bootstrap_is_repeatable_and_holds_the_value():
    sample = [1.0, 2.0, 3.0, 4.0, 50.0]
    result = bootstrap(median, sample)
    assert result["value"] == 3.0
    assert result["n"] == 5
    low, high = result["interval"]
    assert 1.0 <= low < 3.0 < high <= 50.0
    assert bootstrap(median, sample) == result


def test_vit_has_the_shape_it_claims():
    model = ViTTiny(generator=torch.Generator().manual_seed(0))
    assert TOKENS == 64
    assert 5.3e6 < sum(p.numel() for p in model.parameters()) < 5.5e6
    assert (model.embed.out_channels, len(model.blocks), model.blocks[0].heads) == (192, 12, 3)
    assert model.blocks[0].fc1.out_features == 4 * 192


@pytest.mark.parametrize("kind", ["sgd", *KINDS])
def test_arms_do_what_they_are_named_for(kind, batch):
    arm = make_arm(kind, HundredTensors, batch, delta_t=2)
    before = [p.detach().clone() for p in arm.model.parameters()]
    arm.refresh()
    arm.optimizer_step()
    if arm.sparsifier is None:
        assert any(not torch.equal(p, old) for p, old in zip(arm.model.parameters(), before, strict=True))
    else:
        assert arm.sparsifier.updates > 0
        assert arm.sparsifier.sparsity() == pytest.approx(0.9, abs=1e-3)
    if kind == "echo":  # four steps are over in make_arm, so that the one above was a first visit, and here is a second
        clean = [p.detach().clone() for p in arm.model.parameters()]
        arm.sam.displace()
        for p, w in zip(arm.model.parameters(), clean, strict=True):
            radii = ECHO_RHO * w.norm(dim=1) * (torch.arange(64) < 10)  # the other outputs have no gradient
            torch.testing.assert_close((p.detach() - w).norm(dim=1), radii, rtol=1e-3, atol=0)
        arm.refresh()
        arm.optimizer_step()
        clean = [p.detach().clone() for p in arm.model.parameters()]
        arm.sam.displace()  # a first visit
        assert all(torch.equal(p, w) for p, w in zip(arm.model.parameters(), clean, strict=True))
    if "s2sam" in kind:
        clean = [p.detach().clone() for p in arm.model.parameters()]
        arm.sam.displace()
        moved = torch.stack([(p.detach() - w).norm() for p, w in zip(arm.model.parameters(), clean, strict=True)])
        assert float(moved.norm()) == pytest.approx(RHO, rel=1e-3)
        arm.sam.restore()


def test_quick_run_writes_a_complete_result(tmp_path, capsys):
    out = tmp_path / "result.json"
    assert step_overhead.main(["--quick", "--out", str(out)]) == out
    result = json.loads(out.read_text())
    assert result["quick"] is True
    assert {"command", "versions", "hardware", "settings", "networks", "counters", "passes", "bars"} <= set(result)
    assert result["hardware"]["torch_threads"] == torch.get_num_threads()
    assert result["passes"]["sam"] == {"forwards": 2, "backwards": 2}
    for kind in ("sgd", "s2sam-gradient", "s2sam-momentum", "echo", "rigl", "rigl+s2sam"):
        assert result["passes"][kind] == {"forwards": 1, "backwards": 1}
    for network in result["networks"].values():
        assert network["parameters"] > 0
        for way in ("alone", "paired"):
            for kind in KINDS:
                ratio = network[way]["contestants"][kind]["ratio"]
                assert ratio["interval"][0] <= ratio["value"] <= ratio["interval"][1]
                assert ratio["n"] == network[way]["rounds"] == 2
    added = result["counters"]["bases"]["default"]["s2sam-gradient"]
    assert added["added_calls"] <= 20
    assert added["added_bytes_per_parameter"] <= 64
    assert added["added_buffers"] == pytest.approx(1, abs=0.01)
    assert len(result["bars"]) == 2 * 4 + 3 * 3 + 3 * 2
    (echo,) = (bar for bar in result["bars"] if bar["bar"] == "(i) echo / s2sam-gradient on resnet32")
    ratios = {k: row["ratio"]["value"] for k, row in result["networks"]["resnet32"]["alone"]["contestants"].items()}
    assert echo["value"] == pytest.approx(ratios["echo"] / ratios["s2sam-gradient"], rel=1e-4)
    assert "sam's forwards a step" in capsys.readouterr().out
