"""Configurations refuse what cannot be, in a sentence, and survive YAML."""

from __future__ import annotations

import dataclasses
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from s2sam import registry, sparsify
from s2sam.sparse.base import Sparsifier
from s2sam.sparse.names import DISTRIBUTIONS
from s2sam.train.config import (
    AUGMENTATIONS,
    DIRECTIONS,
    SAM_SCALES,
    SCALES,
    SCOPES,
    DataConfig,
    OptimConfig,
    SamConfig,
    ScheduleConfig,
    SparseConfig,
    TrainConfig,
)
from s2sam.train.config_files import dump, known_keys, load_config, parse, recipe_path, unused_options


@pytest.mark.parametrize("value", [1.5, 1.0, -0.1, math.nan, math.inf, "0.9", None, True])
def test_impossible_sparsity_is_refused(value):
    with pytest.raises(ValueError, match="sparsity must be a number at least 0 and below 1"):
        TrainConfig(sparsity=value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rho": math.nan}, "rho must be a number at least 0, got nan"),
        ({"rho": -0.1}, "rho must be"),
        ({"lr": -1.0}, "lr must be"),
        ({"lr": math.inf}, "lr must be"),
        ({"epochs": 0}, "epochs must be a whole number of at least 1"),
        ({"epochs": 1.5}, "epochs must be a whole number"),
        ({"batch_size": 1}, "batch_size must be a whole number of at least 2"),
        ({"seed": -1}, "seed must be"),
        ({"sharpness": "s2sma"}, "unknown sharpness 's2sma'; did you mean 's2sam'"),
        ({"method": "rigel"}, "unknown method 'rigel'; did you mean 'rigl'"),
        ({"model": "resnet23"}, "unknown model 'resnet23'; did you mean 'resnet"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
        ({"data": " "}, "data is empty"),
        ({"epochs": 2, "schedule": ScheduleConfig(warmup_epochs=3)}, "longer than the 2 epochs"),
    ],
)
def test_impossible_values_are_named(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        TrainConfig(**changes)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: SamConfig(direction="gradeint"), "did you mean 'gradient'"),
        (lambda: SamConfig(sign=2), "sam.sign must be 1 or -1"),
        (lambda: SamConfig(scale="absolute"), "unknown sam.scale"),
        (lambda: SamConfig(stats_every=-1), "sam.stats_every"),
        (lambda: SparseConfig(distribution="erkk"), "did you mean 'erk'"),
        (lambda: SparseConfig(options={"delta": 3}), "did you mean 'delta_t'"),
        (lambda: OptimConfig(name="sdg"), "did you mean 'sgd'"),
        (lambda: OptimConfig(momentum=1.0), "optim.momentum must be a number at least 0 and below 1"),
        (lambda: OptimConfig(nesterov=True, momentum=0), "optim.nesterov needs"),
        (lambda: OptimConfig(weight_decay=-1), "optim.weight_decay"),
        (lambda: ScheduleConfig(name="cosin"), "did you mean 'cosine'"),
        (lambda: ScheduleConfig(final=2), "between 0 and 1"),
        (lambda: DataConfig(train_size=0), "data_options.train_size"),
        (lambda: DataConfig(val_fraction=1.0), "data_options.val_fraction"),
        (lambda: DataConfig(augment="crp"), "did you mean 'crop'"),
    ],
)
def test_nested_values_are_named_with_their_dots(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_choices_agree_with_the_library():
    from s2sam.data import augment
    from s2sam.sam import directions, scales, scope, two_step

    assert AUGMENTATIONS == augment.AUGMENTATIONS
    assert DIRECTIONS == directions.DIRECTIONS
    assert ("auto", *scales.SCALES) == SCALES
    assert SCOPES == scope.SCOPES
    assert SAM_SCALES == two_step.SAM_SCALES


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_every_distribution_gives_masks(name):
    net = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 6), torch.nn.Linear(6, 4))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    config = SparseConfig(distribution=name)
    sparsifier = sparsify(net, optimizer, method="magnitude", sparsity=0.25, distribution=config.distribution)
    assert 0 < sparsifier.sparsity() <= 0.25


def test_defaults_are_the_recipe_digits():
    assert load_config("digits") == TrainConfig()


@pytest.mark.parametrize("row", registry.list_recipes(), ids=lambda row: row.name)
def test_every_recipe_loads_and_describes_itself(row):
    config = load_config(row.name)
    assert len(row.description) > 20
    assert config.method_options == config.sparse.options  # no option that its own method ignores


def test_paper_recipe_has_the_papers_numbers():
    config = load_config("cifar10-resnet32-rigl90-s2sam")
    assert (config.epochs, config.batch_size, config.lr, config.rho) == (160, 64, 0.1, 0.05)
    assert (config.optim.momentum, config.optim.weight_decay, config.sparsity) == (0.9, 5e-4, 0.9)
    assert (config.model, config.model_options["width"]) == ("resnet32", 2.0)


def test_paper_arms_differ_in_what_makes_an_arm_only():
    first, *others = [load_config(r.name).as_dict() for r in registry.list_recipes() if "resnet32" in r.name]
    assert len(others) >= 2
    for other in others:
        own = {"sparsity"} if other["method"] in ("nm", "nm-rigl", "sr-ste", "chex") else set()  # which mean another
        assert {k for k in first if first[k] != other[k]} <= {"method", "sharpness", "sparse"} | own


def test_recipes_with_the_papers_numbers_let_filters_run_empty():
    for row in registry.list_recipes():
        config = load_config(row.name)
        if "paper's hyper-parameters" in row.description and config.method != "dense":
            default = registry.find(registry.list_methods(), config.method, "method").defaults.get("min_per_filter")
            assert config.method_options.get("min_per_filter", default) in (0, None), row.name


def test_options_of_other_methods_are_left_aside():
    sparse = SparseConfig(options={"delta_t": 7, "t_end": 0.5})
    assert TrainConfig(method="rigl", sparse=sparse).method_options == {"delta_t": 7, "t_end": 0.5}
    assert TrainConfig(method="static", sparse=sparse).method_options == {}
    assert TrainConfig(method="dense", sparse=sparse).method_options == {}


def test_name_and_folder():
    config = TrainConfig(data="some/cifar10", model="resnet20", sparsity=0.98, sharpness="none", seed=3)
    assert config.name == "cifar10-resnet20-rigl98-none-seed3"
    assert config.folder.as_posix() == "runs/cifar10-resnet20-rigl98-none-seed3"
    assert dataclasses.replace(config, out="here").folder.as_posix() == "here"
    assert TrainConfig(method="dense").name == "digits-mlp-dense-s2sam-seed0"


@given(
    lr=st.floats(1e-9, 1e3),
    rho=st.floats(0, 10),
    sparsity=st.floats(0, 0.999),
    seed=st.integers(0, 2**31),
    sign=st.sampled_from([1, -1]),
    train_size=st.none() | st.integers(1, 10**6),
    include=st.none() | st.lists(st.sampled_from(["fc1", "fc2"]), min_size=1, max_size=2),
)
def test_yaml_gives_back_the_same_configuration(tmp_path_factory, lr, rho, sparsity, seed, sign, train_size, include):
    config = TrainConfig(
        lr=lr,
        rho=rho,
        sparsity=sparsity,
        seed=seed,
        out="runs/x",
        sam=SamConfig(sign=sign),
        data_options=DataConfig(train_size=train_size),
        sparse=SparseConfig(include=include, options={"delta_t": 3, "t_end": None}),
        model_options={"width": 0.5},
    )
    path = tmp_path_factory.mktemp("yaml") / "config.yaml"
    path.write_text(dump(config))
    assert load_config(path) == config


def test_dump_has_every_key():
    def flat(mapping, prefix=""):
        for key, value in mapping.items():
            yield prefix + key
            if isinstance(value, dict) and value:
                yield from flat(value, f"{prefix}{key}.")

    assert set(known_keys()) <= set(flat(yaml.safe_load(dump(TrainConfig()))))


def test_flags_win_over_files_wherever_they_stand(tmp_path):
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("lr: 5e-3\nrho: 0.2\nsam:\n  scale: relative\n  sign: -1\n")
    two.write_text("rho: 0.3\nsam:\n  scale: asam\n")
    config = parse(["--lr", "1e-4", "--config", str(one), "--config", str(two), "--sam.sign=1"])
    assert (config.lr, config.rho, config.sam.scale, config.sam.sign) == (1e-4, 0.3, "asam", 1)
    assert load_config(one).lr == 5e-3


@pytest.mark.parametrize(
    "argv",
    [
        [
            "--batch-size",
            "16",
            "--optim.weight-decay",
            "1e-3",
            "--data-options.train-size=9",
            "--sparse.options.delta-t=4",
        ],
        [
            "--batch_size=16",
            "--optim.weight_decay=1e-3",
            "--data_options.train_size",
            "9",
            "--sparse.options.delta_t",
            "4",
        ],
    ],
    ids=["dashes", "underscores"],
)
def test_dashes_and_underscores_are_the_same(argv):
    config = parse(argv)
    assert (config.batch_size, config.optim.weight_decay, config.data_options.train_size) == (16, 1e-3, 9)
    assert config.sparse.options == {"delta_t": 4}


def test_a_layer_map_is_a_distribution(tmp_path):
    path = tmp_path / "map.yaml"
    path.write_text("sparse: {distribution: {fc1: 0.5, fc2: 0.9}}\n")
    assert load_config(path).sparse.distribution == {"fc1": 0.5, "fc2": 0.9}


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--sparsty", "0.9"], "unknown key 'sparsty' among the flags; did you mean 'sparsity'?"),
        (["--overwrit"], "unknown key 'overwrit' among the flags; did you mean 'overwrite'?"),
        (["--confg", "digits"], "unknown key 'confg' among the flags; did you mean 'config'?"),
        (["--weight-decay", "0.9"], "did you mean 'optim.weight_decay'?"),
        (["--sam.scal", "norm"], "did you mean 'sam.scale'?"),
        (["--xyzzy", "1"], "`s2sam train --help` lists all"),
        (["--rho", "nan"], "rho must be a number, got nan"),
        (["--epochs", "2.5"], "epochs must be a whole number, got 2.5"),
        (["--optim.nesterov", "maybe"], "optim.nesterov must be true or false, got maybe"),
        (["--data-options.train-size", "many"], "data_options.train_size does not take the value many"),
        (["--sam", "relative"], "--sam is a group of settings, as in --sam.direction VALUE"),
        (["--lr"], "expected one argument"),
        (["stray"], "unrecognized arguments: stray"),
        (["--config"], "--config needs"),
        (["--config", "digitz"], "unknown recipe 'digitz'; did you mean 'digits'"),
        (["--config", "no/such.yaml"], "there is no configuration file at no/such.yaml"),
    ],
)
def test_wrong_flags_get_one_sentence(argv, sentence):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        parse(argv)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("learning_rate: 0.1\n", "unknown key 'learning_rate' in"),
        ("optim: {momentun: 0.9}\n", "did you mean 'optim.momentum'?"),
        ("sam: 3\n", "is a group of settings, as in sam: {direction: VALUE}"),
        ("overwrite: true\n", "unknown key 'overwrite'"),
        ("lr: fast\n", "lr must be a number, got fast"),
        ("lr: [\n", "is not valid YAML (line 2)"),
        ("lr: 0.1\nrho: 0.1\nlr: 0.2\n", "wrong.yaml gives 'lr' twice (lines 1 and 3); keep one of them"),
        ("optim: {momentum: 0.9, momentum: 0.8}\n", "gives 'optim.momentum' twice (lines 1 and 1)"),
        (
            "sparse:\n  options:\n    delta_t: 1\n    delta_t: 2\n",
            "gives 'sparse.options.delta_t' twice (lines 3 and 4)",
        ),
        ("schedule: {milestones: 0.5}\n", "schedule.milestones must be a list, as in '[0.5, 0.75]', got 0.5"),
        ("- 1\n", "holds no configuration"),
        ("", "holds no configuration"),
    ],
)
def test_wrong_files_get_one_sentence(tmp_path, text, sentence):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        load_config(path)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_one_key_in_two_groups_is_no_double(tmp_path):
    path = tmp_path / "fine.yaml"
    path.write_text("optim: {name: adamw}\nschedule: {name: constant}\n")
    assert load_config(path).schedule.name == "constant"


def test_milestones_are_a_list():
    with pytest.raises(ValueError, match=r"schedule.milestones must be a list such as \[0.5, 0.75\], got 0.5"):
        ScheduleConfig(milestones=0.5)


@pytest.mark.parametrize(
    ("argv", "method", "unused"),
    [
        ([], "static", []),  # delta_t is there by default
        (["--config", "digits"], "static", []),
        (["--sparse.options.delta_t", "5"], "rigl", []),
        (
            ["--sparse.options.delta_t", "5", "--sparse.options.drop-fraction=0.2"],
            "static",
            ["delta_t", "drop_fraction"],
        ),
        (["--sparse.options", "{rate: 0.3, delta_t: 5}"], "set", ["rate"]),
        (["--sparse.options={rate: 0.3}"], "dense", ["rate"]),
    ],
)
def test_options_that_the_method_does_not_have_are_found(argv, method, unused):
    argv = [*argv, "--method", method]
    assert unused_options(argv, parse(argv)) == unused


@pytest.mark.parametrize("text", ["config", "class", "page"])
def test_what_auto_means_is_told_as_it_is(text):
    told = {
        "config": lambda: SparseConfig.__doc__,
        "class": lambda: Sparsifier.__doc__,
        "page": lambda: (Path(__file__).parents[2] / "docs" / "methods" / "index.md").read_text(encoding="utf-8"),
    }[text]()
    names = re.search(r"auto.*?global[\"`]* for\s+([\w, -]+?),\s+(?:else|erk|as)", told, re.DOTALL)[1]
    means = {row.name for row in registry.list_methods() if row.load().default_distribution == "global"}
    assert set(re.findall(r"[\w-]+", names)) - {"and"} == means


def test_binary_file_is_no_configuration(tmp_path):
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_config(path)


def test_recipe_path_prefers_files_with_a_suffix(tmp_path):
    (tmp_path / "digits.yaml").write_text("lr: 0.3\n")
    assert load_config(tmp_path / "digits.yaml").lr == 0.3
    assert recipe_path("digits").parent.name == "recipes"


def test_configuration_needs_no_torch():
    code = (
        "import sys; from s2sam.train.config_files import parse; parse(['--config', 'digits', '--lr', '1e-2']); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
