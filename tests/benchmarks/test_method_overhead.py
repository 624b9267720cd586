"""The cost benchmark of the methods: every row takes part, steps are of the kind they are timed as. No timings."""

import json

import pytest
import torch

import method_overhead
from method_overhead import BAR, START, TOTAL, MethodArm, by_definition, judge, main
from s2sam import sparsify
from s2sam.models import create_model
from s2sam.registry import find, list_methods
from s2sam.sparse.base import Sparsifier

NAMES = [row.name for row in list_methods()]
#: steps between changes at START: the methods' defaults; DSR has stretched its own by then
INTERVALS = {"set": 100, "rigl": 100, "set-itop": 1500, "rigl-itop": 4000, "deepr": 1, "dsr": 200, "snfs": 100,
             "top-kast": 1, "granet": 1000, "gmp": 100, "mest": 100}  # fmt: skip


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 16, 16, generator=generator), torch.tensor([0, 1, 2, 3])


def build() -> torch.nn.Module:
    return create_model("resnet8", num_classes=10, generator=torch.Generator().manual_seed(0), width=0.5)


def method_arm(name: str) -> MethodArm:
    try:
        return MethodArm(find(list_methods(), name, "method"), build, batch(), 0.9)
    except ValueError as error:
        pytest.skip(f"{name} refuses 90 % here: {error}")


@pytest.mark.parametrize("name", NAMES)
def test_ordinary_steps_keep_the_topology_and_updates_change_it(name):
    its = method_arm(name)
    sparsifier, ordinary = its.sparsifier, 0
    for _ in range(2):
        changes = sparsifier.updates
        if its.to_update():
            its.step()
            assert (sparsifier.updates, its.part.step) == (changes + 1, its.t)
        else:
            assert changes == its.trainings - 1
        before, changes = {n: m.clone() for n, m in sparsifier.masks.items()}, sparsifier.updates
        if its.to_ordinary():
            its.step()
            ordinary += 1
            assert sparsifier.updates == changes
            assert all(torch.equal(m, before[n]) for n, m in sparsifier.masks.items())
            assert START < its.t == its.part.step < TOTAL
    assert ordinary == (0 if its.interval == 1 else 2)
    if name in INTERVALS:
        assert its.interval == INTERVALS[name]
    if find(list_methods(), name, "method").kind == "static":
        assert its.interval is None


@pytest.mark.parametrize("name", NAMES)
def test_an_update_brings_numbers_to_the_host_but_no_weights(name, monkeypatch):
    """A number for each layer, or channel, at a time: nothing is ranked or sorted there, however many weights."""
    its = method_arm(name)
    if not its.to_update():
        return
    sizes = []
    for method in ("tolist", "numpy", "cpu", "item", "__bool__", "__int__", "__float__"):
        real = getattr(torch.Tensor, method)

        def seen(tensor, *args, real=real):
            sizes.append(tensor.numel())
            return real(tensor, *args)

        monkeypatch.setattr(torch.Tensor, method, seen)
    its.step()
    assert sizes, "an update reads at least how many weights it has dropped"
    masks = list(its.sparsifier.masks.values())
    few = max(2 * len(masks), *(mask.shape[0] for mask in masks))
    assert max(sizes) <= few < min(mask.numel() for mask in masks)


class Twice(Sparsifier):
    """Needs a second forward and backward in each step, as no method of the registry does so far."""

    method = "twice"

    def look(self, part):
        if not hasattr(self, "again"):
            self.again = True
            self.loss()
            del self.again


def test_a_second_pass_is_counted_and_named(monkeypatch):
    arm = method_overhead.make_arm("sgd", build, batch())
    arm.sparsifier = sparsify(arm.model, arm.optimizer, method=Twice, sparsity=0.5)
    arm.sparsifier.loss = torch.enable_grad()(arm.loss)
    its = method_arm("static")
    its.arm = arm
    passes = method_overhead._passes(its)
    assert passes == {"ordinary": [2, 2]}
    assert by_definition({"passes": passes, "trainings": 1}) == "2 backward passes in a step"
    assert by_definition({"passes": {"ordinary": [1, 1]}, "trainings": 3}) == "3 trainings"
    assert by_definition({"passes": {"ordinary": [1, 1]}, "trainings": 1}) is None


def test_the_cost_of_an_update_is_spread_over_its_interval():
    cost = method_overhead._cost(4)
    assert cost([1.0, 1.0], [9.0], [0.0], [10.0]) == pytest.approx(1 + (3 * 1.0 + 9.0) / 4 / 10)
    assert cost([1.0, 1.0], [9.0], [2.0], [10.0]) == pytest.approx(1 + ((3 * 1.0 + 9.0) / 4 + 2) / 10)
    assert method_overhead._cost(None)([1.0], [9.0], [0.0], [10.0]) == pytest.approx(1.1)
    assert method_overhead._cost(1)([1.0], [9.0], [0.0], [10.0]) == pytest.approx(1.9)


def test_a_cost_is_set_against_steps_of_larger_images():
    row = {
        "rounds": {"added": [1.0, 1.0], "update_added": [9.0, 9.0], "passes": []},
        "steps_between_updates": 4,
        "ratio": {"value": 1.3},
    }
    full = method_overhead.against(row, [100.0, 100.0, 100.0])
    assert full["ratio"]["value"] == pytest.approx(1 + 3 / 100)
    assert full["small_ratio"] == {"value": 1.3}
    row["rounds"]["passes"] = [0.5, 0.5]
    with pytest.raises(ValueError, match="measure with these images"):
        method_overhead.against(row, [100.0])


def test_the_bar_judges_the_value_and_leaves_out_what_refused():
    row = {"passes": {"ordinary": [1, 1]}, "trainings": 1}
    ratios = {"a": {"value": 1.04, "interval": [1.0, 1.06]}, "b": {"value": 1.06, "interval": [1.05, 1.07]}}
    methods = {name: {**row, "ratio": {**ratio, "n": 2}} for name, ratio in ratios.items()}
    methods |= {"c": {**methods["b"], "trainings": 2}, "d": {"refused": "no"}}
    bars = judge({"net": {"methods": methods}})
    assert [bar["holds"] for bar in bars] == [True, False, None]
    assert [bar["interval_below"] for bar in bars] == [False, False, False]
    assert {bar["limit"] for bar in bars} == {BAR}


def test_forward_and_backward_are_timed_only_if_they_differ(monkeypatch, tmp_path):
    real = method_overhead.sparsify

    def hooked(model, *args, **options):
        if options["method"] == "set":
            model.stem.register_forward_hook(lambda _m, _i, y: y * 1.0)
        return real(model, *args, **options)

    monkeypatch.setattr(method_overhead, "sparsify", hooked)
    path = main(["--quick", "--networks", "resnet32", "--methods", "static", "set", "--out", str(tmp_path / "r.json")])
    methods = json.loads(path.read_text())["networks"]["resnet32"]["methods"]
    assert methods["static"]["added_pass_calls"] == 0
    assert methods["static"]["added_pass_seconds"] is None
    assert methods["set"]["added_pass_calls"] >= 2, "forward and backward of the multiplication"
    assert methods["set"]["added_pass_seconds"]["n"] == 2


def test_a_quick_run_writes_a_complete_result(tmp_path, capsys):
    names = ["static", "rigl", "top-kast", "lt", "snip"]
    out = tmp_path / "new" / "result.json"
    assert main(["--quick", "--networks", "resnet50", "--methods", *names, "--out", str(out)]) == out
    result = json.loads(out.read_text())
    assert {"question", "command", "commit", "versions", "hardware", "settings", "networks", "bars"} <= set(result)
    assert result["quick"] is True
    assert result["settings"]["total_steps"] == TOTAL
    methods = result["networks"]["resnet50"]["methods"]
    assert sorted(methods) == sorted(names)
    for row in methods.values():
        low, high = row["ratio"]["interval"]
        assert low <= row["ratio"]["value"] <= high
        assert all(passes == [1, 1] for passes in row["passes"].values())
        assert row["start_seconds"] > 0
    assert methods["rigl"]["steps_between_updates"] == 100
    assert set(methods["rigl"]["passes"]) == {"ordinary", "update"}
    assert methods["static"]["update_seconds"] is None
    assert set(methods["top-kast"]["passes"]) == {"update"}
    assert methods["lt"]["trainings"] > 1
    assert len(result["bars"]) == 5
    assert {bar["bar"]: bar["by_definition"] for bar in result["bars"]}["lt on resnet50"].endswith("trainings")
    assert "rigl on resnet50" in capsys.readouterr().out


def test_the_networks_of_a_real_run():
    options = method_overhead.parse([])
    assert (options.image, options.batch, options.methods) == (64, 64, NAMES)
    assert method_overhead.parse(["--device", "cuda"]).image == 224
    with torch.device("meta"):
        found = list(method_overhead.networks(options, torch.device("meta")))
    made = {name: (x.shape, make) for name, make, (x, _), _ in found}
    steps = {name: full and full[0].shape for name, _, _, full in found}
    assert made["resnet32"][0] == (128, 3, 32, 32)
    assert made["resnet50"][0] == (64, 3, 64, 64)
    assert steps == {"resnet32": None, "resnet50": (64, 3, 224, 224)}
    assert sum(p.numel() for p in made["resnet50"][1]().parameters()) == 25_557_032
