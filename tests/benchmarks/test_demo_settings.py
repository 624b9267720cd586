"""The tuning of the demonstration's settings: equal trials, validation accuracy decides, the JSON is complete."""

import json

import demo_settings
from s2sam.cli import demo


def test_every_arm_that_chooses_has_equally_many_trials():
    found = {name: demo_settings.trials(axes) for name, axes in demo_settings.FLAT.items()}
    assert {len(trials) for trials in found.values()} == {12}
    assert len(demo_settings.trials(demo_settings.CLEAN)) == 9
    for name, axes in demo_settings.FLAT.items():
        arm = demo.FLATNESS[name]
        radius = {"rho"} if arm.sharpness != "none" else set()
        assert set(axes) == radius | ({"lr", "weight_decay"} if name.endswith("-tuned") else set())
    assert not set(demo_settings.SEEDS) & set(demo.SEEDS)


def test_a_quick_run_chooses_by_validation_accuracy(tmp_path, monkeypatch):
    trained = []
    train = demo_settings.train_all

    def spy(configs, jobs, console, **options):
        outcomes = train(configs, jobs, console, **options)
        trained.extend((configs[name], final) for name, final, _ in outcomes)
        return outcomes

    monkeypatch.setattr(demo_settings, "train_all", spy)
    monkeypatch.setattr(demo, "SPARSITY", {"rigl90": demo.SPARSITY["rigl90"]})
    monkeypatch.setattr(demo_settings, "FLAT", {"echo": {"rho": (0.01, 3.0, 9.0)}})
    path = demo_settings.main(["--quick", "--out", str(tmp_path / "new" / "settings.json")])
    result = json.loads(path.read_text())
    assert set(result) >= {"command", "commit", "versions", "hardware", "seeds", "epochs", "sparsity", "flatness"}
    assert result["quick"] and result["failed"] == {}
    assert len(trained) == 4 and {config.seed for config, _ in trained} == {100}
    echo = {config.rho: final for config, final in trained if config.sharpness == "echo"}
    rows = {row["rho"]: row["mean_val_top1"] for row in result["flatness"]["echo"]["rows"]}
    assert rows.keys() == echo.keys() == {0.01, 3.0}
    assert all(abs(rows[rho] - final["val_top1"]) < 1e-4 for rho, final in echo.items())
    best = max(rows, key=rows.get)
    assert result["flatness"]["echo"]["choice"] == {"rho": best}
    assert result["flatness"]["echo"]["at_end_of_axis"] == (["rho"] if best == 0.01 else [])
    assert result["sparsity"]["trials"] == result["flatness"]["echo"]["trials"] == 2
