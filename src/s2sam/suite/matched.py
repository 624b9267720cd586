"""What a matched comparison is: in a row of the table the columns differ in sharpness and in nothing else."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from s2sam.report.arms import flatten
from s2sam.train.config import TrainConfig

TREATMENT = ("sharpness", "rho")  #: and every key below `sam.`
VARIANT = "optim.nesterov"  #: only in a column that is declared as a baseline


def check_matched(configs: Mapping[str, TrainConfig], reference: str, baselines: Collection[str] = ()) -> None:
    """Raise ValueError unless the columns of a row differ from the reference in sharpness, rho and sam.* only.

    So they share seed, initial weights, order of the data, learning rate, weight decay and epochs. A column in
    `baselines` may set optim.nesterov as well.

    >>> plain, other = TrainConfig(sharpness="none"), TrainConfig(sharpness="s2sam", lr=0.2)
    >>> check_matched({"SGD": plain, "S2-SAM": other}, "SGD")
    Traceback (most recent call last):
    ValueError: unmatched columns: lr is 0.1 in SGD and 0.2 in S2-SAM; in mode matched columns may differ in sharpness,
    rho and sam.* only (optim.nesterov in a column of `baselines`); use --mode tuned to give each its own
    """
    first = flatten(configs[reference].as_dict())
    for column, config in configs.items():
        other = flatten(config.as_dict())
        for key in sorted(first.keys() | other.keys()):
            free = key in TREATMENT or key.startswith("sam.") or key == "out"
            free = free or (key == VARIANT and column in baselines)
            if not free and first.get(key) != other.get(key):
                raise ValueError(
                    f"unmatched columns: {key} is {first.get(key)!r} in {reference} and {other.get(key)!r} in "
                    f"{column}; in mode matched columns may differ in sharpness, rho and sam.* only ({VARIANT} in a "
                    "column of `baselines`); use --mode tuned to give each its own"
                )
