"""The benchmark of the surface: both sides make the same forwards, the JSON is complete. No timings."""

import json

import torch

import surface_cost


def test_a_quick_run_counts_the_same_forwards_on_both_sides(tmp_path, monkeypatch):
    batches = []
    create = surface_cost.create_model

    def counting(*args, **kwargs):
        model = create(*args, **kwargs)
        model.register_forward_pre_hook(lambda module, args: batches.append((len(args[0]), torch.is_grad_enabled())))
        return model

    monkeypatch.setattr(surface_cost, "create_model", counting)
    path = surface_cost.main(["--quick", "--out", str(tmp_path / "new" / "cost.json")])
    assert batches == [(8, False)] * (2 + 25 + 25)  # warm-up, surface, pure
    result = json.loads(path.read_text())
    assert result["quick"] and result["points_measured"] == 25
    assert set(result) >= {"question", "command", "commit", "versions", "hardware", "settings", "seconds"}
    (bar,) = result["bars"]
    assert bar["n"] == 5 and bar["limit"] == 1.15 and bar["holds"] is None
    assert bar["value"] == result["seconds"]["surface"] / result["seconds"]["pure"]
