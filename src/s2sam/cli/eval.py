"""`s2sam eval RUN [--data DATA]`: measure a finished run again."""

from __future__ import annotations

import json

from s2sam.cli.arguments import Parser

HELP = "loss and accuracy of a finished run, on its own or other images"


def run(argv: list[str]) -> int:
    """Measure and print one line, or one JSON object."""
    parser = Parser(prog="s2sam eval", description=HELP, allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="a folder that `s2sam train` has finished")
    parser.add_argument("--data", help="other images with the same classes (default: those it was trained on)")
    parser.add_argument("--split", choices=("test", "val", "train"), default="test", help="default: %(default)s")
    parser.add_argument("--weights", choices=("final", "ema"), default="final", help="default: %(default)s")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    args = parser.parse_args(argv)

    from s2sam.train.finished import evaluate_run

    found = evaluate_run(args.run, data=args.data, split=args.split, weights=args.weights, device=args.device)
    if args.json:
        print(json.dumps(found))
    else:
        print(
            f"{found['run']}: loss {found['loss']:.4f}, top-1 {100 * found['top1']:.2f} % of {found['images']:,} "
            f"{found['split']} images of {found['data']} ({found['weights']} weights)"
        )
    return 0
