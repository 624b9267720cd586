"""What a run is: frozen dataclasses that refuse impossible values. Standard library only, so that `--help` is quick.

A key of a YAML file or a flag is a field here; nested ones have dots (`--sam.scale relative`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from s2sam import registry
from s2sam.sparse.names import DISTRIBUTIONS, unknown

SHARPNESS = ("none", "s2sam", "echo", "sam")
DIRECTIONS = ("gradient", "momentum", "ema", "random")
SCALES = ("auto", "norm", "step", "relative", "filter", "asam", "rms")
SAM_SCALES = ("norm", "relative", "asam", "filter", "rms")
ECHO_SCALE = "filter"  #: what "auto" means for sharpness echo; for the others it is "norm"
SCOPES = ("all", "weights", "norm")
RHO_SCHEDULES = ("constant", "late", "rising", "lr")
OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("cosine", "constant", "step", "onecycle")
PRECISIONS = ("fp32", "bf16", "fp16")
COMPILE = ("none", "default", "reduce-overhead", "max-autotune")
CUDA_GRAPHS = ("reduce-overhead", "max-autotune")
LARGEST = 1e38  #: numbers beyond it are none in fp32
AUGMENTATIONS = ("auto", "none", "crop", "flip", "crop+flip")


@dataclass(frozen=True, kw_only=True)
class SamConfig:
    """How the weights are displaced.

    Args:
        direction: gradient (the paper), momentum, ema (a mean of the gradients) or random (a control); s2sam only.
        sign: 1 (the paper) or -1 (the lookahead side); s2sam only.
        scale: norm (|e| = rho), relative (|e| = rho |w|), asam, filter (|e| = rho |w| for each filter), rms (rho is the
            root mean square of e over active weights), or step (e = rho lr d; not for sam); auto is filter for echo,
            norm for the others.
        scope: all, weights (tensors with at least 2 dims) or norm (normalisation layers); s2sam only.
        ema_beta: decay of the mean of direction ema.
        rho_schedule: constant, late (0 before rho_start), rising (linearly from 0) or lr (as the learning rate); s2sam
            only. With LT it begins anew in each training.
        rho_start: the share of the training after which rho_schedule late begins.
        clean_growth: whether rho is 0 in steps whose gradient chooses where weights grow (RigL and kin); s2sam only.
        stats_every: a step record every so many steps, with what s2sam measures about itself; 0 = none.
    """

    direction: str = "gradient"
    sign: int = 1
    scale: str = "auto"
    scope: str = "all"
    ema_beta: float = 0.9
    rho_schedule: str = "constant"
    rho_start: float = 0.75
    clean_growth: bool = False
    stats_every: int = 10

    def __post_init__(self) -> None:
        kinds(self, "sam.")
        choice("sam.direction", self.direction, DIRECTIONS)
        choice("sam.scale", self.scale, SCALES)
        choice("sam.scope", self.scope, SCOPES)
        choice("sam.rho_schedule", self.rho_schedule, RHO_SCHEDULES)
        number("sam.ema_beta", self.ema_beta, 0.0, below=1.0)
        number("sam.rho_start", self.rho_start, 0.0, 1.0)
        if self.sign not in (1, -1):
            raise ValueError(f"sam.sign must be 1 or -1, got {self.sign!r}")
        whole("sam.stats_every", self.stats_every, 0)
        if self.scale == "filter" and self.scope == "norm":
            raise ValueError("sam.scale filter displaces tensors with at least 2 dims, and sam.scope norm has none")

    def check_for(self, sharpness: str) -> None:
        """Raise ValueError if something is set that sam, the two-gradient method, or echo does not have."""
        if sharpness == "sam" and self.scale not in SAM_SCALES:
            raise ValueError(f"sam.scale {self.scale} is for sharpness s2sam; sam has {', '.join(SAM_SCALES)}")
        own = {"sam": ("direction", "sign", "scope", "rho_schedule", "clean_growth")}
        for key in own.get(sharpness, ("direction", "sign", "rho_schedule", "clean_growth")):
            value, only = getattr(self, key), getattr(SamConfig, key)
            if value != only:
                raise ValueError(f"sam.{key} {value} is for sharpness s2sam; with {sharpness} leave it at {only}")


@dataclass(frozen=True, kw_only=True)
class SparseConfig:
    """How the sparsity is laid out.

    Args:
        distribution: how the sparsity is shared among the layers: erk, er, uniform, uniform-first-dense,
            uniform-first-last-dense, global (by score), a mapping from layers to their sparsities, or auto: global for
            snip, grasp, synflow, lt, ac-dc and str, erk for the others.
        include: weights with these names or of these module classes are pruned too, as in '[stem, LayerNorm]'.
        exclude: weights with these names or of these module classes are never pruned.
        options: options of the method, such as delta_t and drop_fraction; those of other methods are left aside.
    """

    distribution: str | dict[str, float] = "auto"
    include: list[str] | str | None = None
    exclude: list[str] | str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kinds(self, "sparse.")
        if isinstance(self.distribution, str):
            choice("sparse.distribution", self.distribution, DISTRIBUTIONS)
        rows = registry.list_methods()
        known = sorted({option for row in rows for option in row.defaults})
        for option in self.options:
            if option not in known:
                raise unknown("method option", option, known)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The base optimizer.

    Args:
        name: sgd or adamw.
        momentum: of sgd.
        nesterov: of sgd.
        weight_decay: of all parameters, the same in every arm.
        accumulate: parts in which a batch passes the network, to save memory; the step is that of the whole batch.
        clip_norm: largest norm of the gradient, over the active weights; 0 = no limit.
        ema: decay of a moving average of the weights, measured besides them, such as 0.999; 0 = none.
        fused: torch's fused kernel for the step. On a GPU s2sam then never waits for the device; without it the host
            reads one number a step, whether the gradient is finite.
    """

    name: str = "sgd"
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    accumulate: int = 1
    clip_norm: float = 0.0
    ema: float = 0.0
    fused: bool = False

    def __post_init__(self) -> None:
        kinds(self, "optim.")
        choice("optim.name", self.name, OPTIMIZERS)
        whole("optim.accumulate", self.accumulate, 1)
        number("optim.clip_norm", self.clip_norm, 0.0)
        number("optim.ema", self.ema, 0.0, below=1.0)
        number("optim.momentum", self.momentum, 0.0, below=1.0)
        number("optim.weight_decay", self.weight_decay, 0.0)
        if self.nesterov and (self.name != "sgd" or self.momentum == 0):
            raise ValueError("optim.nesterov needs optim.name sgd and an optim.momentum above 0")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over time, step by step.

    Args:
        name: cosine (to final x lr), constant, step (times gamma at each milestone) or onecycle (up and down again).
        warmup_epochs: epochs of linear warm-up before it; onecycle has its own.
        final: the last learning rate as a share of lr; cosine only.
        milestones: when step lowers the learning rate, as shares of the run; step only.
        gamma: by which factor; step only.
        rise: share of the run in which onecycle rises from lr / 25 to lr; then it falls to lr / 250000.
    """

    name: str = "cosine"
    warmup_epochs: float = 0.0
    final: float = 0.0
    milestones: list[float] = field(default_factory=lambda: [0.5, 0.75])
    gamma: float = 0.1
    rise: float = 0.3

    def __post_init__(self) -> None:
        kinds(self, "schedule.")
        choice("schedule.name", self.name, SCHEDULES)
        number("schedule.warmup_epochs", self.warmup_epochs, 0.0)
        number("schedule.final", self.final, 0.0, 1.0)
        if not isinstance(self.milestones, (list, tuple)):
            raise ValueError(f"schedule.milestones must be a list such as [0.5, 0.75], got {self.milestones!r}")
        for milestone in self.milestones:
            number("each of schedule.milestones", milestone, 0.0, 1.0)
        number("schedule.gamma", self.gamma, 0.0, 1.0)
        number("schedule.rise", self.rise, 0.0, below=1.0)
        if self.name == "onecycle" and self.warmup_epochs > 0:
            raise ValueError("schedule.warmup_epochs must be 0 with onecycle, which warms up by schedule.rise")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on.

    Args:
        train_size: number of training images, equally many a class; null = all.
        val_fraction: share of the training images that choose the best epoch and are not trained on.
        split_seed: decides which; not the run's seed, so that all runs share their images.
        augment: auto, none, crop, flip or crop+flip.
        cutout: side of the square that is blanked in each training image, in pixels; 0 = none.
        mixup: alpha of the Beta distribution by which images and labels of a batch are mixed; 0 = not.
        label_smoothing: share of the target spread evenly over all classes.
        label_noise: share of the training labels that are replaced by a wrong one, drawn by `split_seed`.
        options: options of the kind of data, such as resize (image folders) and labels (CIFAR-100).
    """

    train_size: int | None = None
    val_fraction: float = 0.1
    split_seed: int = 0
    augment: str = "auto"
    cutout: int = 0
    mixup: float = 0.0
    label_smoothing: float = 0.0
    label_noise: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kinds(self, "data_options.")
        whole("data_options.cutout", self.cutout, 0)
        number("data_options.mixup", self.mixup, 0.0)
        number("data_options.label_smoothing", self.label_smoothing, 0.0, below=1.0)
        number("data_options.label_noise", self.label_noise, 0.0, below=1.0)
        if self.train_size is not None:
            whole("data_options.train_size", self.train_size, 1)
        number("data_options.val_fraction", self.val_fraction, 0.0, below=1.0)
        whole("data_options.split_seed", self.split_seed, 0)
        choice("data_options.augment", self.augment, AUGMENTATIONS)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole run. The defaults are the recipe "digits".

    Args:
        data: digits, or a path: a folder of CIFAR files (binary or Python version), of images (train/CLASS/*.png), or
            with train.parquet and test.parquet; or an .npz file with train_x, train_y, test_x, test_y.
        model: see `s2sam list models`.
        method: dense, or a sparse training method: see `s2sam list methods`.
        sparsity: share of the prunable weights that are 0, at least 0 and below 1; without effect for dense.
        sharpness: none, s2sam (one gradient a step), echo (one; each batch twice in a row, so that the second visit is
            displaced by its own gradient) or sam (two).
        rho: radius of the displacement.
        epochs: passes over the training images; with echo half a pass each, for the same number of steps.
        batch_size: images a step.
        lr: largest learning rate.
        seed: decides initial weights, order of the images, augmentation and random masks.
        out: the run's folder; null = runs/ and a name made of the settings.
        device: auto, cpu or cuda.
        precision: of forward and backward: fp32, bf16 or fp16; weights and optimizer state are fp32 always.
        channels_last: keep images and convolutions in this memory format, which is faster on some devices.
        compile: torch.compile of the network in training: none, default, reduce-overhead (with CUDA graphs, meant for
            small networks on a GPU) or max-autotune (these, and kernels tried out one by one; minutes to compile).
        evaluate_every: epochs between evaluations on validation and test images; the last epoch is always evaluated.
        checkpoint_every: steps between checkpoints; 0 = one at the end of every epoch only.
        keep_every: epochs between checkpoints that stay, as checkpoints/step-NUMBER.pt; 0 = only the last and the best.
        sam: how the weights are displaced.
        sparse: how the sparsity is laid out.
        optim: the base optimizer.
        schedule: the learning rate over time.
        data_options: what is trained on.
        model_options: options of the model, such as width.

    Raises:
        ValueError: an impossible value; the sentence names the key, what it takes and the nearest valid name.

    Example:
        >>> TrainConfig(method="static", sparsity=0.95, seed=1).name
        'digits-mlp-static95-s2sam-seed1'
        >>> TrainConfig(sharpness="s3sam")
        Traceback (most recent call last):
        ValueError: unknown sharpness 's3sam'; did you mean 's2sam'? (one of: none, s2sam, echo, sam)
    """

    data: str = "digits"
    model: str = "mlp"
    method: str = "rigl"
    sparsity: float = 0.9
    sharpness: str = "s2sam"
    rho: float = 0.05
    epochs: int = 20
    batch_size: int = 64
    lr: float = 0.1
    seed: int = 0
    out: str | None = None
    device: str = "auto"
    precision: str = "fp32"
    channels_last: bool = False
    compile: str = "none"
    evaluate_every: int = 1
    checkpoint_every: int = 0
    keep_every: int = 0
    sam: SamConfig = field(default_factory=SamConfig)
    sparse: SparseConfig = field(default_factory=lambda: SparseConfig(options={"delta_t": 20}))
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    data_options: DataConfig = field(default_factory=DataConfig)
    model_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kinds(self, "")
        choice("model", self.model, [row.name for row in registry.list_models()])
        choice("method", self.method, ["dense", *(row.name for row in registry.list_methods())])
        choice("sharpness", self.sharpness, SHARPNESS)
        choice("device", self.device, ("auto", "cpu", "cuda"))
        choice("precision", self.precision, PRECISIONS)
        choice("compile", self.compile, COMPILE)
        whole("checkpoint_every", self.checkpoint_every, 0)
        whole("keep_every", self.keep_every, 0)
        whole("evaluate_every", self.evaluate_every, 1)
        number("sparsity", self.sparsity, 0.0, below=1.0)
        number("rho", self.rho, 0.0)
        number("lr", self.lr, 0.0)
        whole("epochs", self.epochs, 1)
        whole("batch_size", self.batch_size, 2)
        whole("seed", self.seed, 0)
        if self.schedule.warmup_epochs > self.epochs:
            raise ValueError(
                f"schedule.warmup_epochs {self.schedule.warmup_epochs:g} is longer than the {self.epochs} epochs"
            )
        if self.sharpness == "sam" and self.precision == "fp16":
            raise ValueError("sharpness sam needs two gradients a step, which fp16 cannot scale; use --precision bf16")
        if self.sam.scale == "auto":
            scale = ECHO_SCALE if self.sharpness == "echo" else "norm"
            object.__setattr__(self, "sam", replace(self.sam, scale=scale))
        if self.sharpness in ("sam", "echo"):
            self.sam.check_for(self.sharpness)
        without_momentum = self.optim.name == "sgd" and self.optim.momentum == 0
        if self.sharpness == "s2sam" and self.sam.direction == "momentum" and without_momentum:
            raise ValueError("sam.direction momentum needs an optim.momentum above 0")
        if 2 * self.optim.accumulate > self.batch_size:
            raise ValueError(
                f"optim.accumulate {self.optim.accumulate} leaves less than 2 images a part; "
                f"it can be {self.batch_size // 2} at most with batch_size {self.batch_size}"
            )
        if self.optim.accumulate > 1 and self.compile in CUDA_GRAPHS:
            raise ValueError(
                f"compile {self.compile} uses CUDA graphs, which lose gradients that are added up over "
                "optim.accumulate parts (pytorch/pytorch#169545); use compile default, or optim.accumulate 1"
            )
        if not str(self.data).strip():
            raise ValueError("data is empty; give 'digits' or the path of a data set")

    @property
    def name(self) -> str:
        """A name made of the settings, for the run's folder."""
        sparse = self.method if self.method == "dense" else f"{self.method}{100 * self.sparsity:g}"
        return f"{Path(self.data).stem}-{self.model}-{sparse}-{self.sharpness}-seed{self.seed}"

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path("runs", self.name) if self.out is None else Path(self.out)

    @property
    def visits(self) -> int:
        """Steps in a row that are taken on the same batch: 2 with echo, else 1."""
        return 2 if self.sharpness == "echo" else 1

    @property
    def method_options(self) -> dict[str, Any]:
        """The entries of `sparse.options` that the method knows."""
        if self.method == "dense":
            return {}
        defaults = registry.find(registry.list_methods(), self.method, "method").defaults
        return {option: value for option, value in self.sparse.options.items() if option in defaults}

    def as_dict(self) -> dict[str, Any]:
        """The configuration as nested plain values."""
        return dataclasses.asdict(self)


_KINDS: dict[str, tuple[Any, str]] = {
    "bool": (bool, "true or false"), "str": (str, "a text"), "dict[str, Any]": (Mapping, "`name: value` pairs"),
    "str | None": ((str, type(None)), "a text or null"),
}  # fmt: skip


def kinds(config: Any, prefix: str) -> None:
    """Raise ValueError unless switches, texts and mappings of a configuration are that, and groups are groups."""
    for f in dataclasses.fields(config):
        value, (kind, words) = getattr(config, f.name), _KINDS.get(str(f.type), (object, ""))
        if str(f.type).endswith("Config"):
            kind, words = globals()[str(f.type)], "a group of settings"
        if not isinstance(value, kind):
            raise ValueError(f"{prefix}{f.name} must be {words}, got {value!r}")


def choice(name: str, value: Any, allowed: Iterable[str]) -> None:
    """Raise ValueError, with the nearest valid name, unless `value` is one of `allowed`."""
    allowed = list(allowed)
    if value not in allowed:
        raise unknown(name, str(value), allowed)


def number(name: str, value: Any, low: float, high: float = math.inf, *, below: float | None = None) -> None:
    """Raise ValueError unless `value` is a number of fp32 in [low, high], or in [low, below)."""
    valid = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST
    if not valid or not low <= value <= high or (below is not None and value >= below):
        limit = f"at least {low:g}"
        if below is not None:
            limit += f" and below {below:g}"
        elif math.isfinite(high):
            limit = f"between {low:g} and {high:g}"
        elif isinstance(value, (int, float)) and LARGEST < value < math.inf:
            limit += f" and at most {LARGEST:g}"
        raise ValueError(f"{name} must be a number {limit}, got {value!r}")


def whole(name: str, value: Any, low: int) -> None:
    """Raise ValueError unless `value` is a whole number of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} must be a whole number of at least {low}, got {value!r}")
    if value >= 1 << 63:
        raise ValueError(f"{name} must be a whole number below 2 to the power of 63, got {value!r}")
