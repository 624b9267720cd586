"""Finished runs that verbs measure."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest

from s2sam.train import TrainConfig, run
from s2sam.train.config import DataConfig


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A dense and a sparse run on the same 200 images, and one on others."""
    root = tmp_path_factory.mktemp("runs")
    config = TrainConfig(
        epochs=2, keep_every=1, sparsity=0.9, data_options=DataConfig(train_size=200), model_options={"width": 0.25}
    )
    run(dataclasses.replace(config, method="dense", out=str(root / "dense")))
    run(dataclasses.replace(config, out=str(root / "rigl")))
    shutil.copytree(root / "dense", root / "other")
    env = json.loads((root / "other" / "env.json").read_text())
    (root / "other" / "env.json").write_text(json.dumps({**env, "data_digest": "0" * 64}))
    return root
