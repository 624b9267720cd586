"""The throughput benchmark: contestants do the same work, the JSON is complete. No timings."""

import argparse
import json

import numpy as np
import pytest
import torch

import throughput
from _timing import Clock


@pytest.fixture
def options():
    return argparse.Namespace(
        batch=4, steps=3, workers=0, precision="fp32", channels_last=False, quick=True, device="cpu"
    )


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    return {"train_x": rng.integers(0, 256, (12, 3, 32, 32), dtype=np.uint8), "train_y": np.arange(12) % 10}


def test_plain_images_are_crops_of_the_padded_image(data):
    torch.random.default_generator.manual_seed(0)
    images = throughput.Crops(data["train_x"], data["train_y"])
    seen = set()
    for _ in range(40):
        x, label = images[3]
        assert label == 3
        raw = (x * throughput.STD + throughput.MEAN).mul(255).round().to(torch.uint8)
        padded = torch.nn.functional.pad(torch.from_numpy(data["train_x"][3]), (4, 4, 4, 4))
        windows = {
            (i, j, m): w
            for i in range(9)
            for j in range(9)
            for m in (0, 1)
            for w in [padded[:, i : i + 32, j : j + 32].flip(2) if m else padded[:, i : i + 32, j : j + 32]]
        }
        seen |= {key for key, w in windows.items() if torch.equal(w, raw)}
    assert len(seen) > 20
    assert {m for _, _, m in seen} == {0, 1}


@pytest.mark.parametrize("kind", ["plain", "pure"])
def test_contestants_take_as_many_steps(kind, options, data, monkeypatch):
    backwards = []
    backward = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: (backwards.append(float(loss.detach())), backward(loss)))
    device = torch.device("cpu")
    make = {"plain": throughput.plain_epoch, "pure": throughput.pure_epoch}[kind]
    assert make("resnet20", data, options, device, Clock(device, 4))() > 0
    assert len(backwards) == 3
    assert all(loss > 0 for loss in backwards)


def test_quick_run_writes_a_complete_result(tmp_path, capsys):
    out = tmp_path / "result.json"
    assert throughput.main(["--quick", "--out", str(out)]) == out
    result = json.loads(out.read_text())
    assert {"question", "command", "versions", "hardware", "settings", "networks", "bars"} <= set(result)
    rows = result["networks"]["resnet20"]["contestants"]
    assert set(rows) == {"pure", "plain", *throughput.TRAINERS}
    for row in rows.values():
        assert row["images_per_second"]["value"] > 0
        low, high = row["ratio_to_pure"]["interval"]
        assert low <= row["ratio_to_pure"]["value"] <= high
    assert rows["pure"]["ratio_to_pure"]["value"] == 1
    assert result["bars"][0]["limit"] == 0.9
    assert "trainer / pure, resnet20" in capsys.readouterr().out


def test_the_bar_is_for_cpus():
    ratio = {"value": 0.95, "interval": [0.94, 0.96], "n": 2}
    measured = {"net": {"contestants": {"trainer": {"ratio_to_pure": ratio}}}}
    assert throughput.judge(measured, torch.device("cpu"))[0]["holds"] is True
    assert throughput.judge(measured, torch.device("cuda"))[0]["holds"] is None
