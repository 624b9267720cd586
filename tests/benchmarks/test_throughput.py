"""The throughput benchmark: contestants do the same work, the JSON is complete. No timings."""

import argparse
import json
import os

import numpy as np
import pytest
import torch

import _packed
import throughput
from _timing import Clock
from s2sam.train.config import TrainConfig


@pytest.fixture
def options():
    return argparse.Namespace(
        batch=4, steps=3, workers=0, precision="fp32", channels_last=False, quick=True, device="cpu", width=1,
        compile="none", packed=None,
    )  # fmt: skip


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


@pytest.mark.parametrize(
    ("device", "network", "batch", "bars"),
    [
        ("cpu", "resnet32", 128, {"pure": (0.9, False)}),
        ("cuda", "resnet32", 128, {"pure": (0.85, True), "plain": (5.0, False)}),
        ("cuda", "resnet20", 128, {"pure": (0.85, True)}),
        ("cuda", "resnet32", 64, {"pure": (0.85, True)}),
        ("mps", "resnet32", 128, {"pure": (None, None)}),
    ],
)
def test_the_bars_depend_on_the_device(options, device, network, batch, bars):
    options.batch = batch
    ratios = {"ratio_to_pure": {"value": 0.87, "interval": [0.86, 0.88], "n": 2}, "ratio_to_plain": {"value": 4.9}}
    found = throughput.judge({network: {"contestants": {"trainer": ratios}}}, torch.device(device), options)
    assert {bar["bar"]: (bar["limit"], bar["holds"]) for bar in found} == {
        f"trainer / {other}, {network}": expected for other, expected in bars.items()
    }


def test_the_goal_of_a_packed_run_is_for_a_gpu_and_the_wide_network():
    found = {"gain": {"value": 0.99, "interval": [0.9, 1.1], "n": 2}, "full_run": _packed.full_run(80_000.0, 4)}
    found["machine_was_alone"] = True
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert [bar["holds"] for bar in _packed.judge_packed("resnet32", 2, found, cuda)] == [False, True]
    assert [bar["holds"] for bar in _packed.judge_packed("resnet32", 1, found, cuda)] == [False]
    assert [bar["holds"] for bar in _packed.judge_packed("resnet32", 2, found, cpu)] == [False]
    found["machine_was_alone"] = False
    assert [bar["holds"] for bar in _packed.judge_packed("resnet32", 2, found, cuda)] == [None, True]


def test_packed_trainers_are_processes_that_train_at_the_same_time(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)  # that of this process
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    out = tmp_path / "result.json"
    throughput.main(["--quick", "--packed", "2", "--fused", "--out", str(out)])
    result = json.loads(out.read_text())
    row = result["networks"]["resnet20"]
    assert (row["processes"], row["threads_of_each"], row["threads_of_single"]) == (2, 1, 1)
    one, both = (row["images_per_second"][key]["value"] for key in ("single", "packed"))
    assert one > 0 and both > 0 and row["gain"]["n"] == 2
    assert row["full_run"]["seconds_of_all"] == pytest.approx(2 * row["full_run"]["seconds_per_run"], rel=1e-3)
    assert row["full_run"]["seconds_per_run"] == pytest.approx(160 * 50_000 / both, rel=1e-3)
    assert result["settings"]["packed"] == 2
    assert isinstance(row["machine_was_alone"], bool) or not hasattr(os, "getloadavg")
    assert "packed / single, resnet20" in capsys.readouterr().out


def test_packed_trainers_share_the_threads(monkeypatch, tmp_path):
    made, closed = [], []

    class Noted(_packed.Team):
        def __init__(self, config, count, threads, folder):
            made.append((count, threads))
            self.members = []

        def close(self):
            closed.append(self)

    monkeypatch.setattr(_packed, "Team", Noted)
    with pytest.raises(KeyError), _packed.teams(TrainConfig(), 3, 8, tmp_path) as both:
        assert list(both) == ["single", "packed"]
        raise KeyError
    assert made == [(1, 8), (3, 2)]
    assert len(closed) == 2


def test_a_packed_trainer_that_ends_is_an_error(tmp_path):
    config = TrainConfig(data=str(tmp_path / "absent.npz"), device="cpu")
    with pytest.raises(RuntimeError, match="a packed trainer has ended"):
        _packed.Team(config, 1, 1, tmp_path)
