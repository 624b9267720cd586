"""`s2sam VERB ...`: finds the verb and turns errors that a user can mend into one sentence.

A verb is a module in this package, named in VERBS, with

    HELP: str                        one line for `s2sam --help`
    run(argv: list[str]) -> int      does it and returns the exit code; `argv` is what follows the verb

and imports nothing heavy at its top, so that `s2sam --help` and `s2sam list` load no torch. A verb says what is wrong
by raising ValueError, TypeError or RuntimeError with one sentence, and never catches it. main() prints such a sentence
as `s2sam: error: ...` and returns 2 if it was raised in this package or is about a file; anything else is a fault of
the program and keeps its traceback. `S2SAM_DEBUG=1` shows all tracebacks.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

from s2sam import __version__
from s2sam.sparse.names import unknown

#: errors of a disk that takes no more: full, over its quota, or a file of more than the size that is allowed
FULL = tuple(getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG") if hasattr(errno, name))
VERBS = (
    "train", "eval", "list", "data", "config", "report", "surface", "sharpness", "robust", "bound", "theory", "demo",
    "table", "doctor",
)  # fmt: skip
USAGE = """usage: s2sam VERB [options]

Single-step sharpness-aware minimization (S2-SAM) and sparse training for PyTorch.

verbs:
{verbs}

`s2sam VERB --help` tells more; `s2sam --version` the version.
Start with: s2sam demo, or s2sam train --out runs/first"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0 done, 2 wrong use, 130 interrupted."""
    args = list(sys.argv[1:] if argv is None else argv)
    if argv is None:  # as a program
        warnings.formatwarning = _warning
    try:
        return dispatch(args)
    except KeyboardInterrupt:
        print("s2sam: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away, as in `s2sam list | head -1`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 1
    except ModuleNotFoundError as error:
        if os.environ.get("S2SAM_DEBUG") or str(error.name).partition(".")[0] == "s2sam":
            raise
        print(f"s2sam: error: this needs the package {error.name}; pip install 's2sam[cli]'", file=sys.stderr)
        return 2
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        if os.environ.get("S2SAM_DEBUG") or not meant_for_user(error):
            raise
        print("s2sam: error: " + " ".join(sentence(error).split()), file=sys.stderr)
        return 2


def _warning(message: Warning | str, *_: object, **__: object) -> str:
    return f"s2sam: warning: {message}\n"


def dispatch(args: list[str]) -> int:
    """Run the verb that `args` begins with."""
    if not args or args[0] in ("-h", "--help", "help"):
        lines = [f"  {verb:<11}{load(verb).HELP}" for verb in VERBS]
        print(USAGE.format(verbs="\n".join(lines)))
        return 0
    if args[0] in ("-V", "--version"):
        print(f"s2sam {__version__}")
        return 0
    if args[0] not in VERBS:
        raise unknown("verb", args[0], VERBS)
    code: int = load(args[0]).run(args[1:])
    return code


def load(verb: str) -> ModuleType:
    """The module of a verb."""
    return importlib.import_module(f"s2sam.cli.{verb}")


def meant_for_user(error: BaseException) -> bool:
    """True if the error was raised in this package on purpose, or is about a file or folder."""
    if isinstance(error, OSError):
        return True
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and str(frame.tb_frame.f_globals.get("__name__", "")).partition(".")[0] == "s2sam"


def sentence(error: BaseException) -> str:
    """What to tell the user."""
    if isinstance(error, OSError) and error.strerror:
        said = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        return said + ("; make room and run the same command again" if error.errno in FULL else "")
    return str(error) or type(error).__name__
