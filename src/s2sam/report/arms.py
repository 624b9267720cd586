"""Which runs belong together: runs that differ only in seed are one arm, arms that differ only in sharpness pair up.

A report holds one *matched* design: besides the seed, runs may differ in the keys that make an arm (method, sparsity,
sharpness, rho and the options of these) and in nothing else. Anything else that differs is refused with its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from s2sam.report.read import Run
from s2sam.train.config import SamConfig

Key = tuple[tuple[str, Any], ...]
_BOOKKEEPING = frozenset(
    {"seed", "out", "name", "resume", "overwrite", "checkpoint_every", "keep_every", "evaluate_every"}
)
_SAM = {f"sam.{key}": value for key, value in asdict(SamConfig(scale="norm")).items()}  # runs that name none had this
_METHOD_NAMES = {"dense": "Dense", "rigl": "RigL", "set": "SET", "static": "Static", "magnitude": "Magnitude"}
_SHARPNESS_NAMES = {"s2sam": "S2-SAM", "echo": "Echo", "sam": "SAM"}
_OPTIMIZER_NAMES = {"sgd": "SGD", "adamw": "AdamW", "adam": "Adam"}


@dataclass(frozen=True, eq=False)
class Arm:
    """Runs that differ in their seed only."""

    base: str  #: what is trained: "Dense", "RigL 90 %"
    treatment: str  #: how it is optimised: "SGD", "S2-SAM", "SAM"
    base_key: Key
    treatment_key: Key
    runs: dict[int, Run]  #: by seed, ascending

    @property
    def name(self) -> str:
        """Base and treatment in one string; the treatment alone where all arms share a base without a name."""
        return f"{self.base}, {self.treatment}" if self.base else self.treatment

    @property
    def plain(self) -> bool:
        """True for the arm without sharpness: the one its base is compared with."""
        return dict(self.treatment_key)["sharpness"] == "none"

    @property
    def dense(self) -> bool:
        """True if nothing is pruned."""
        return dict(self.base_key)["method"] == "dense"

    def final(self, key: str) -> dict[int, float]:
        """Seed -> value of the final record."""
        return {seed: float(run.final[key]) for seed, run in self.runs.items()}


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as one with dotted keys.

    >>> flatten({"lr": 0.1, "sam": {"sign": 1}})
    {'lr': 0.1, 'sam.sign': 1}
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def group_runs(runs: Iterable[Run]) -> list[Arm]:
    """The arms of a matched design, in order of appearance: all arms of a base together, the plain one first.

    Raises:
        ValueError: runs differ in something that makes no arm, or two runs have the same arm and seed.
    """
    runs = list(runs)
    _check_matched(runs)
    found: dict[tuple[Key, Key], dict[int, Run]] = {}
    for run in runs:
        seeds = found.setdefault(_keys(run.config), {})
        if run.seed in seeds:
            raise ValueError(f"{seeds[run.seed].folder} and {run.folder} are the same arm and seed; name one of them")
        seeds[run.seed] = run
    bases = list(dict.fromkeys(base for base, _ in found))
    base_names = _distinct([_base_name(dict(b)) for b in bases], bases)
    treatments = list(dict.fromkeys(treatment for _, treatment in found))
    treatment_names = _distinct([_treatment_name(dict(t), runs[0]) for t in treatments], treatments)
    arms = [
        Arm(base_names[bases.index(b)], treatment_names[treatments.index(t)], b, t, dict(sorted(seeds.items())))
        for (b, t), seeds in found.items()
    ]
    return sorted(arms, key=lambda arm: (bases.index(arm.base_key), not arm.plain, treatments.index(arm.treatment_key)))


def reference_of(arm: Arm, arms: Sequence[Arm]) -> Arm | None:
    """The plain arm of the same base, or None if there is none or `arm` is it."""
    if arm.plain:
        return None
    return next((other for other in arms if other.plain and other.base_key == arm.base_key), None)


def _keys(config: Mapping[str, Any]) -> tuple[Key, Key]:
    """What is trained and how it is optimised, without the keys that have no effect there."""
    flat = flatten(config)
    method, sharpness = flat.get("method", "dense"), flat.get("sharpness", "none")
    base: dict[str, Any] = {"method": method}
    treatment: dict[str, Any] = {"sharpness": sharpness}
    if method != "dense":
        base["sparsity"] = flat.get("sparsity")
        base |= {k: v for k, v in flat.items() if k.startswith("sparse.")}
    if sharpness != "none":
        treatment["rho"] = flat.get("rho")
        treatment |= _sam_keys(flat, sharpness)
    return _frozen(base), _frozen(treatment)


def _sam_keys(flat: Mapping[str, Any], sharpness: str) -> dict[str, Any]:
    """The `sam.` keys that have an effect; one that a run does not name has its default."""
    keys = _SAM | {k: v for k, v in flat.items() if k.startswith("sam.")}
    if sharpness == "sam":
        return {"sam.scale": keys["sam.scale"]}
    without_effect = {"sam.stats_every"}
    without_effect |= {"sam.ema_beta"} if keys["sam.direction"] != "ema" else set()
    without_effect |= {"sam.rho_start"} if keys["sam.rho_schedule"] != "late" else set()
    return {k: v for k, v in keys.items() if k not in without_effect}


def _frozen(mapping: Mapping[str, Any]) -> Key:
    return tuple((k, _hashable(v) if not isinstance(v, Mapping) else None) for k, v in mapping.items())


def _hashable(value: Any) -> Any:
    return (
        tuple(map(_hashable, value))
        if isinstance(value, list)
        else value
        if not isinstance(value, Mapping)
        else str(value)
    )


def _check_matched(runs: Sequence[Run]) -> None:
    """Everything but seed, arm keys and bookkeeping must agree with the first run."""
    shared = [_shared(run) for run in runs]
    for run, mapping in zip(runs[1:], shared[1:], strict=True):
        for key in sorted(set(shared[0]) | set(mapping)):
            a, b = shared[0].get(key), mapping.get(key)
            if a != b:
                raise ValueError(
                    f"{runs[0].folder} and {run.folder} cannot stand in one report: {key} is {a!r} in the first and "
                    f"{b!r} "
                    "in the second; runs may differ in seed, method, sparsity, sharpness and rho only"
                )
    digests: dict[int, tuple[Any, Run]] = {}
    for run in runs:  # the split into training and validation images may depend on the seed
        digest = run.final.get("data_digest", run.env.get("data_digest"))
        first, example = digests.setdefault(run.seed, (digest, run))
        if digest != first:
            raise ValueError(
                f"{example.folder} and {run.folder} were trained on different data; train both on the same files"
            )


def _shared(run: Run) -> dict[str, Any]:
    arm_keys = ("method", "sparsity", "sharpness", "rho")
    flat = {
        key: value
        for key, value in flatten(run.config).items()
        if key not in arm_keys and key not in _BOOKKEEPING and not key.startswith(("sam.", "sparse."))
    }
    flat["the number of test images"] = run.final["test_images"]
    return flat


def _base_name(key: Mapping[str, Any]) -> str:
    method = str(key["method"])
    name = _METHOD_NAMES.get(method, method)
    if method == "dense":
        return name
    if method == "static":
        name += f" {str(key.get('sparse.distribution', '')).upper()}".rstrip()
    return f"{name} {100 * float(key['sparsity']):.4g} %"


def _treatment_name(key: Mapping[str, Any], run: Run) -> str:
    sharpness = str(key["sharpness"])
    if sharpness == "none":
        optimizer = str(flatten(run.config).get("optim.name", "sgd"))
        return _OPTIMIZER_NAMES.get(optimizer.lower(), optimizer)
    return _SHARPNESS_NAMES.get(sharpness, sharpness)


def _distinct(names: list[str], keys: Sequence[Key]) -> list[str]:
    """Names that occur for several keys get the settings in which those keys differ, defaults of `sam.` left out."""
    result = []
    for name, key in zip(names, keys, strict=True):
        rivals = [dict(k) for n, k in zip(names, keys, strict=True) if n == name]
        differ = [k for k in dict(key) if any(r.get(k) != dict(key)[k] for r in rivals)]
        settings = [k for k in differ if k not in _SAM or dict(key)[k] != _SAM[k]]
        suffix = ", ".join(f"{k.split('.')[-1]} {dict(key)[k]}" for k in settings)
        result.append(f"{name} ({suffix})" if suffix else name)
    return result
