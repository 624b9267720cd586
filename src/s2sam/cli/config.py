"""`s2sam config list|show|cp`: whole-run configurations to read, to copy and to change."""

from __future__ import annotations

from pathlib import Path

from s2sam import registry
from s2sam.cli.arguments import Parser
from s2sam.sparse.names import unknown

HELP = "show or copy the recipes, as whole-run YAML"
ACTIONS = ("list", "show", "cp")


def run(argv: list[str]) -> int:
    """List the recipes, print one, or copy one to a file."""
    parser = Parser(prog="s2sam config", description=HELP)
    parser.add_argument("action", metavar="|".join(ACTIONS))
    parser.add_argument("recipe", nargs="?", help="a name from `s2sam config list`, or a YAML file to complete")
    parser.add_argument("file", nargs="?", type=Path, help="where cp writes; never over an existing file")
    args = parser.parse_args(argv)
    if args.action not in ACTIONS:
        raise unknown("config action", args.action, ACTIONS)
    if (args.action == "list") != (args.recipe is None) or (args.action == "cp") != (args.file is not None):
        raise ValueError("use `s2sam config list`, `s2sam config show RECIPE` or `s2sam config cp RECIPE FILE`")
    if args.action == "list":
        from s2sam.cli.list import TABLES, show

        show("recipes", *TABLES["recipes"]())
    elif args.action == "show":
        print(whole(args.recipe), end="")
    else:
        target = args.file / f"{args.recipe}.yaml" if args.file.is_dir() else args.file
        if target.exists():
            raise ValueError(f"{target} exists; give another file name")
        from s2sam.train.atomic import write_text

        write_text(target, whole(args.recipe))
        print(target)
    return 0


def whole(name: str) -> str:
    """Every key of the configuration `name`, under its description."""
    from s2sam.train.config_files import dump, load_config

    described = {row.name: row.description for row in registry.list_recipes()}
    head = f"# {described[name]}\n" if described.get(name) else ""
    return head + dump(load_config(name))
