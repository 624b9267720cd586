"""A finished run measured again: its final weights on its own images, or on others."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from s2sam.data import load_data
from s2sam.data.augment import Augment
from s2sam.data.images import ImageData
from s2sam.models import create_model
from s2sam.outside import NUMBER, DamagedError, Number, fit, misfit, parse_json, reading
from s2sam.train.config import TrainConfig
from s2sam.train.config_files import load_config
from s2sam.train.evaluate import evaluate_split
from s2sam.train.folder import check_sealed
from s2sam.train.state import choose_device, training_images

_ENV = {"mean": [NUMBER], "std": [Number(1e-12)], "classes": [str], "data_digest": str}
WEIGHTS = {"final": "model.safetensors", "ema": "ema.safetensors"}


def evaluate_run(
    folder: str | Path, *, data: str | None = None, split: str = "test", weights: str = "final", device: str = "auto"
) -> dict[str, Any]:
    """Loss and top-1 accuracy of a finished run, as a record of plain values.

    Images are normalised with the mean and deviation that the network was trained with, also if `data` names others.

    Args:
        folder: the run folder.
        data: what to measure on; None = what it was trained on, which must not have changed.
        split: "test", "val" or "train".
        weights: "final", or "ema" for the averaged ones.
        device: "auto", "cpu" or "cuda".

    Raises:
        ValueError: no finished run of this trainer, images of another size or other classes, changed or no images.
    """
    folder = Path(folder)
    config, env = read_folder(folder)
    there = choose_device(device)
    images = load_images(config, env, data)
    model = load_model(folder, config, env, images, weights).to(there)
    prepare = Augment(torch.tensor(env["mean"]).to(there), torch.tensor(env["std"]).to(there), "none")
    loss, top1 = evaluate_split(model, images, split, prepare)
    if top1 is None:
        raise ValueError(f"{folder} was trained without {split} images; choose another --split")
    count = len(images.split(split)[1])
    return {
        "run": str(folder), "data": data or config.data, "split": split, "weights": weights, "images": count,
        "loss": loss, "top1": top1,
    }  # fmt: skip


def read_folder(folder: Path) -> tuple[TrainConfig, dict[str, Any]]:
    """Configuration and env.json of a finished run.

    Raises:
        ValueError: it is none.
    """
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} is not a run folder (no config.yaml); give a folder that `s2sam train --out` wrote")
    if not (folder / "DONE").exists():
        raise ValueError(f"{folder} is not a finished run (no DONE file); let `s2sam train` finish it first")
    config = load_config(folder / "config.yaml")
    said = f"{folder}/env.json does not tell how images are normalised; train the run again"
    try:
        with reading(folder / "env.json", "damaged", "put that file back, or train the run again"):
            env = parse_json((folder / "env.json").read_bytes())
            wrong = misfit(env, _ENV)
            if wrong.startswith("it "):
                raise DamagedError(said)
            fit(env, _ENV)
            if len(env["mean"]) != len(env["std"]):
                raise ValueError(f"it has {len(env['mean'])} means and {len(env['std'])} standard deviations")
    except FileNotFoundError as error:
        raise ValueError(said) from error
    return config, env


def weights_digest(folder: Path, weights: str = "final") -> str:
    """The SHA-256 of the weights in a run folder, "final" or "ema": what a measurement of them is known by."""
    return hashlib.sha256((folder / WEIGHTS[weights]).read_bytes()).hexdigest()


def load_images(config: TrainConfig, env: dict[str, Any], data: str | None) -> ImageData:
    """The images of the run, or others with the same classes.

    Raises:
        ValueError: they changed since the run, or have other classes.
    """
    options = config.data_options
    if data is None:
        images = training_images(config)
        if images.digest != env["data_digest"]:
            raise ValueError(
                f"the images in {config.data} are not those the run was trained on; give --data to measure on them all "
                "the same"
            )
        return images
    images = load_data(data, val_fraction=options.val_fraction, seed=options.split_seed)
    if len(images.classes) != len(env["classes"]):
        raise ValueError(
            f"{data} has {len(images.classes)} classes, the network knows {len(env['classes'])}; give images of the "
            "same classes"
        )
    return images


def load_model(
    folder: Path, config: TrainConfig, env: dict[str, Any], images: ImageData, weights: str = "final"
) -> nn.Module:
    """The network with the run's weights.

    Raises:
        ValueError: there is no such file of weights, it is torn or of another network, or the images do not fit it.
    """
    path = folder / WEIGHTS[weights]
    if not path.is_file():
        hint = "the run kept no average (optim.ema 0); use --weights final" if weights == "ema" else "train it again"
        raise ValueError(f"{path} is not there; {hint}")
    channels, height, width = images.image_shape
    if channels != len(env["mean"]):
        raise ValueError(f"the images have {channels} channels, the network takes {len(env['mean'])}; give others")
    model = create_model(
        config.model, num_classes=len(env["classes"]), in_channels=channels, image_size=(height, width),
        generator=torch.Generator(), **config.model_options,
    )  # fmt: skip
    tensors = read_tensors(folder, path.name)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(
            f"{path} does not fit the network or the size of the images; give images of {config.data}'s size, or train "
            "the run again"
        ) from error
    return model


def read_tensors(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """The tensors in a safetensors file of a finished run.

    Raises:
        ValueError: it is torn, or not what the run wrote.
        FileNotFoundError: it is not there.
    """
    from safetensors.torch import load

    path = folder / name
    content = path.read_bytes()
    try:
        tensors = load(content)
    except Exception as error:  # whatever the reader stumbles over in damaged bytes
        raise ValueError(f"{path} is torn; train the run again") from error
    check_sealed(path, content)
    return tensors
