"""`s2sam train [--config RECIPE|FILE] [--KEY VALUE ...]`: one run into one folder."""

from __future__ import annotations

HELP = "train one network into a run folder"


def run(argv: list[str]) -> int:
    """Parse the flags (see `s2sam.train.config`), train, and name the folder."""
    from s2sam.train.config_files import dump, parse

    config, switches = parse(argv), {token.replace("_", "-") for token in argv}
    if "--print-config" in switches:
        print(dump(config), end="")
        return 0

    from rich.console import Console

    from s2sam.train.loop import run as train

    train(config, console=Console(), overwrite="--overwrite" in switches)
    print(config.folder)
    return 0
