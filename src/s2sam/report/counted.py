"""What a run cost, counted from its records and its network: bytes, and multiply-accumulates forward and in training.

The counting itself is :mod:`s2sam.analysis.flops`; no weights are read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from s2sam.analysis.flops import Flops, count_macs, mean_sparse, method_flops
from s2sam.models import create_model
from s2sam.report.read import Record, Run
from s2sam.train.finished import load_images, read_folder

WEIGHT_BYTES = 4  #: of a parameter in fp32


@dataclass(frozen=True)
class Network:
    """What the runs of a report share."""

    macs: dict[str, int]  #: of one image by weight, see :func:`s2sam.analysis.flops.count_macs`
    sizes: dict[str, int]  #: of all parameters, by name
    image: tuple[int, ...]  #: (C, H, W)


@dataclass(frozen=True)
class Counted:
    """What one run cost; multiply-accumulates are of one image, or of the whole training."""

    parameters: int
    active: int  #: that the masks of the prunable weights leave
    stored: float  #: bytes at the final mask: fp32 for each active parameter, one bit for each prunable weight
    dense: int  #: MACs of a forward pass with all weights
    final: float  #: the same at the final mask
    training: float  #: MACs of all steps, at the densities that they had
    dense_training: float  #: of one training of the dense network with one gradient a step

    @property
    def dense_bytes(self) -> int:
        """All parameters in fp32."""
        return WEIGHT_BYTES * self.parameters


def network_of(run: Run) -> Network:
    """The network of a run, built anew for images of its size.

    Raises:
        ValueError, OSError, ImportError: configuration, images or model are not to be had any more.
    """
    config, env = read_folder(run.folder)
    shape = load_images(config, env, None).image_shape
    model = create_model(
        config.model, num_classes=len(env["classes"]), in_channels=shape[0], image_size=shape[1:],
        generator=torch.Generator(), **config.model_options,
    )  # fmt: skip
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    return Network(count_macs(model, torch.zeros(1, *shape)), sizes, shape)


def count(run: Run, network: Network) -> Counted:
    """What the run cost.

    Densities are those of the topology records: each holds until the next one, the last one is that of the final mask.
    All trainings of LT count, against one dense training.

    Raises:
        ValueError: the records do not tell; says what is missing.
    """
    method, sharpness = str(run.config.get("method", "dense")), str(run.config.get("sharpness", "none"))
    topology = [(0, {})] if method == "dense" else [(int(r["step"]), dict(r["density"])) for r in run.topology]
    if not topology:
        raise ValueError("the run has no records of its masks; train it again")
    if strangers := [name for _, density in topology for name in density if name not in network.sizes]:
        raise ValueError(f"its records tell of a weight {strangers[0]!r} that the network does not have")
    steps = int(run.final["n_steps"] if "n_steps" in run.final else run.epochs[-1]["step"])
    macs, last = network.macs, topology[-1][1]
    dense = sum(macs.values())
    sparse = min(mean_sparse(macs, topology, steps), dense)  # of equal numbers the mean may end in another last bit
    options = (run.config.get("sparse") or {}).get("options") or {}
    each = method_flops(method, sparse, dense, options=options, sharpness=sharpness)
    parameters = sum(network.sizes.values())
    active = parameters - sum(round((1 - share) * network.sizes[name]) for name, share in last.items())
    return Counted(
        parameters=parameters,
        active=active,
        stored=WEIGHT_BYTES * active + sum(network.sizes[name] for name in last) / 8,
        dense=dense,
        final=Flops(macs, last).sparse,
        training=each * images([*run.levels, *run.epochs]),
        dense_training=method_flops("dense", dense, dense) * images(run.epochs),
    )


def images(epochs: Iterable[Record]) -> int:
    """Training images that passed the network in these epochs.

    Raises:
        ValueError: an old run did not record it.

    >>> images([{"seconds": 2.0, "images_per_second": 500.0}] * 3)
    3000
    """
    total = 0.0
    for epoch in epochs:
        seconds, rate = epoch.get("seconds"), epoch.get("images_per_second")
        if not isinstance(seconds, int | float) or not isinstance(rate, int | float):
            raise ValueError("its epochs do not tell how many images they took; train the run again")
        total += seconds * rate
    return round(total)
