"""The command line: ``transferjax VERB ...``. Each verb parses, calls the library and prints."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from transferjax._errors import TransferError, nearest_hint
from transferjax.cli._wording import told

VERBS = (
    "demo", "inspect", "diff", "plan", "transplant", "finetune", "explain", "evaluate", "predict", "export", "probe",
    "score", "advise", "distill", "merge", "report",
)  # fmt: skip
EPILOG = """examples:
  transferjax demo                                   see it work on real weights and images
  transferjax inspect weights.pth                    what is in a file
  transferjax finetune --data folder:photos --tuning head --output runs/photos
  transferjax predict runs/photos new.jpg

Every verb explains itself: transferjax finetune --help"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      argv: the arguments after the program's name; default: those of the process.

    Returns:
      The exit code: 0 when it worked, 1 with one clear line on stderr when it could not, 2 when the arguments make no
      sense, 130 when interrupted, 141 when nobody reads the output any more.

    >>> main(["inspect", "/nowhere/weights.pth"])
    1
    """
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else 2
    try:
        code = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except TransferError as error:
        print(f"transferjax {arguments.verb}: {told(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"transferjax {arguments.verb}: interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # The reader has left, as `| head` does; what is still buffered goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


class _Parser(argparse.ArgumentParser):
    """Names the nearest verb when one is not known."""

    def error(self, message: str) -> NoReturn:
        found = re.match(r"argument VERB: invalid choice: '([^']*)'", message)
        super().error(message + (f".{nearest_hint(found[1], VERBS, 1)}" if found else ""))


class _Help(argparse.RawDescriptionHelpFormatter):
    """Room for the longest verb beside its line: argparse forgets that verbs are indented."""

    def __init__(self, prog: str):
        super().__init__(prog)
        self._action_max_length = 4 + max(map(len, VERBS))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="transferjax",
        description="Transfer learning in JAX: take a network that was trained on a lot, and teach it your task.",
        epilog=EPILOG,
        formatter_class=_Help,
    )
    parser.add_argument("--version", action="version", version=_version())
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name in VERBS:
        _verb(name).add(verbs)
    return parser


def _verb(name: str) -> ModuleType:
    return importlib.import_module(f"transferjax.cli._{name}")


def _version() -> str:
    import transferjax

    return f"transferjax {transferjax.__version__}"


__all__ = ["main"]
