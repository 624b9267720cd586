"""`s2sam train [--config RECIPE|FILE] [--KEY VALUE ...]`: one run into one folder."""

from __future__ import annotations

import sys

HELP = "train one network into a run folder"


def run(argv: list[str]) -> int:
    """Parse the flags (see `s2sam.train.config`), train or go on training, and name the folder.

    Returns:
        0; a run that SIGTERM ended exits with 143 after saving.
    """
    from s2sam.train.config_files import dump, parse_flags, unused_options

    config, switches = parse_flags(argv)
    if switches["print_config"]:
        print(dump(config), end="")
        return 0

    unused = unused_options(argv, config)
    if unused:
        print(
            f"s2sam: warning: method {config.method} has no option {' and no '.join(unused)}; left aside, see "
            "`s2sam list methods`",
            file=sys.stderr,
        )

    from rich.console import Console

    from s2sam.train.loop import run as train
    from s2sam.train.signals import Preempted

    try:
        train(config, console=Console(), overwrite=switches["overwrite"], resume=switches["resume"])
    except Preempted:
        print(f"s2sam: saved and ended by a signal; the same command goes on in {config.folder}", file=sys.stderr)
        raise
    print(config.folder)
    return 0
