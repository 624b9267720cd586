"""The benchmarks of compact layers: both arms do the same work, the JSON is complete. No timings."""

import argparse
import json

import pytest
import torch
from torch import nn

import compact_inference
import compact_training
from s2sam.compact import SparseLinear


@pytest.fixture
def options():
    return argparse.Namespace(batch=8, inputs=48, steps=1, rounds=2, quick=False)


def test_masked_and_compact_train_the_same_weights(options):
    found = compact_training.contestants(32, 0.9, options)
    assert set(found) >= {"masked", "compact", "masked+s2sam", "compact+s2sam", "dense"}
    for suffix in ("", "+s2sam"):
        losses = [[float(found[name + suffix].step()) for _ in range(3)] for name in ("masked", "compact")]
        assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)
        if not suffix:
            assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    net, masks = found["compact"].net, compact_training.random_masks(compact_training.network(32, 48), 0.9)
    for layer, dense, mask in zip(net[::2], found["masked"].net[::2], masks.values(), strict=True):
        assert isinstance(layer, SparseLinear)
        torch.testing.assert_close(layer.dense_weight(), dense.weight)
        assert int((dense.weight != 0).sum()) == layer.values.numel() == int(mask.sum())


def test_bytes_are_counted(options):
    found = compact_training.contestants(32, 0.9, options)
    for one in found.values():
        one.step()
    weights, biases = 48 * 32 + 32 * 32 + 320, 32 + 32 + 10
    assert found["dense"].bytes() == 12 * (weights + biases)
    assert found["masked"].bytes() == 12 * (weights + biases) + weights
    assert found["masked+s2sam"].bytes() == 16 * (weights + biases) + weights
    layers = found["compact"].net[::2]
    active = sum(layer.values.numel() for layer in layers)
    pattern = sum(t.numel() * t.element_size() for layer in layers for t in layer.buffers())
    assert found["compact"].bytes() == 12 * (active + biases) + pattern
    assert 4 * active < pattern < 12 * active + 8 * (48 + 2 * 32 + 2 * 32 + 10 + 6) + 48


def test_quick_training_writes_a_complete_result(tmp_path, capsys):
    out = tmp_path / "result.json"
    assert compact_training.main(["--quick", "--out", str(out)]) == out
    result = json.loads(out.read_text())
    assert {"question", "command", "versions", "hardware", "settings", "networks", "bars"} <= set(result)
    assert [row["sparsity"] for row in result["networks"]] == [0.9, 0.98]
    for row in result["networks"]:
        assert row["masked_to_compact"]["value"] > 0 and row["masked_to_compact_s2sam"]["n"] == 2
        assert row["largest_loss_difference"] < 1e-4
    assert any(bar["bar"].startswith("bytes with S2SAM") for bar in result["bars"])
    assert {bar["holds"] for bar in result["bars"]} == {None}  # tiny networks are not judged
    assert "masked / compact, 32 units at 90%" in capsys.readouterr().out


@pytest.mark.parametrize(("threads", "limits"), [(1, [2.5, 17.0]), (2, [1.75, 11.9]), (8, [None, None])])
def test_the_bars_depend_on_the_threads(threads, limits, options, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    options.batch = 128
    ratio = {"value": 2.0, "interval": [1.9, 2.1], "n": 2}
    keys = ("masked_to_compact", "masked_to_compact_s2sam", "sparselab_to_compact")
    rows = [{"hidden": 4096, "sparsity": s, **dict.fromkeys(keys, ratio)} for s in (0.9, 0.99)]
    bars = [bar for bar in compact_training.judge(rows, options) if bar["bar"].startswith("step, masked")]
    assert [bar["limit"] for bar in bars] == pytest.approx(limits)
    assert [bar["holds"] for bar in bars] == [None if at is None else at <= 2 for at in limits]


def test_quick_inference_writes_a_complete_result(tmp_path, capsys):
    out = tmp_path / "result.json"
    assert compact_inference.main(["--quick", "--out", str(out)]) == out
    result = json.loads(out.read_text())
    assert {(row["layer"], row["mask"]) for row in result["layers"]} == {
        (layer, mask) for layer in compact_inference.QUICK for mask in ("random weights", "random 4x4 blocks")
    }
    for row in result["layers"]:
        assert row["times_as_fast_as_dense"]["dense"]["value"] == 1
        assert max(row["max_error"].values()) < 1e-5
    assert [row["network"] for row in result["networks"]] == ["mlp", "resnet20"]
    for row in result["networks"]:
        assert row["max_error"] < 1e-4 and len(row["report"]) == sum(row["chosen"].values()) + 1
    assert "dense / accelerated, mlp at 95%" in capsys.readouterr().out


def test_block_masks_are_exact():
    layer = nn.Conv2d(8, 16, 3)
    mask = compact_inference.block_mask(layer.weight.shape, 0.75, 4, torch.Generator().manual_seed(0))
    assert mask.shape == layer.weight.shape and int(mask.sum()) == 288
