"""Layers of settings: keys checked, later layers win, options merge, and the configuration holds them all."""

from __future__ import annotations

import re

import pytest

from s2sam.suite.settings import make_config, merged, settings
from s2sam.train.config import TrainConfig


def test_nested_and_dotted_keys_are_the_same():
    nested = settings({"sam": {"sign": -1}, "sparse": {"options": {"delta_t": 5}}}, "in base")
    dotted = settings({"sam.sign": -1, "sparse.options.delta_t": 5}, "in base")
    assert nested == dotted == {"sam.sign": -1, "sparse.options": {"delta_t": 5}}


@pytest.mark.parametrize(
    ("mapping", "sentence"),
    [
        ({"epoch": 3}, "unknown key 'epoch' in base; did you mean 'epochs'?"),
        ({"optim": {"weigth_decay": 1}}, "did you mean 'optim.weight_decay'"),
        ({"seed": 3}, "seed cannot stand in base: it comes from seeds"),
        ({"sparsity": 0.9}, "comes from sparsities"),
        ({"out": "x"}, "comes from the command's --out"),
        ({"sam": 3}, "sam in base is a group of settings"),
        ([1], "must be `key: value` pairs"),
    ],
)
def test_wrong_settings_are_a_sentence(mapping, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        settings(mapping, "in base")


def test_later_layers_win_and_only_method_options_merge():
    first = {"lr": 0.1, "model_options": {"width": 2.0, "shortcut": "B"}, "sparse.options": {"delta_t": 100, "rate": 1}}
    second = {"lr": 0.2, "model_options": {"width": 1.0}, "sparse.options": {"delta_t": 5}}
    assert merged(first, second) == {
        "lr": 0.2, "model_options": {"width": 1.0}, "sparse.options": {"delta_t": 5, "rate": 1},
    }  # fmt: skip
    assert first["sparse.options"] == {"delta_t": 100, "rate": 1}


@pytest.mark.parametrize("more", [{}, {"sam.stats_every": 100}, {"sam.scale": "auto"}])
def test_echo_has_its_own_scale_in_a_table(more):
    assert make_config({"sharpness": "echo", **more}).sam.scale == "filter"
    assert (
        make_config({"sharpness": "s2sam", **more}).sam.scale == make_config({"sharpness": "sam"}).sam.scale == "norm"
    )
    assert make_config({"sharpness": "echo", **more, "sam.scale": "rms"}).sam.scale == "rms"


def test_the_configuration_holds_every_layer_and_the_defaults():
    config = make_config({"epochs": 3, "optim.nesterov": True, "sparse.options": {"delta_t": 7}}, seed=4, out="x")
    assert (config.epochs, config.optim.nesterov, config.seed, config.out) == (3, True, 4, "x")
    assert config.sparse.options == {"delta_t": 7}
    assert config.optim.momentum == TrainConfig().optim.momentum
