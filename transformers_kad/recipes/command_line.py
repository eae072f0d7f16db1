"""The command line of a recipe: options from dataclasses, help with examples, errors in one line."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from transformers import HfArgumentParser


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the description, and shows the defaults of options that have one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def parse_arguments(
    dataclass_types: Sequence[type], description: str | None, argv: Sequence[str] | None = None
) -> Any:
    """Parse a command line into one instance of each dataclass.

    If an argument can't be parsed, or a dataclass raises a `ValueError` or `TypeError`, the process prints the usage
    and the error in one line, and exits with status 2.

    Args:
        dataclass_types: their fields are the options, with `help` in the metadata.
        description: the text above the options in `--help`, such as a recipe's docstring.
        argv: the arguments. Default: those of the process.

    Returns:
        A tuple with an instance of each dataclass.
    """
    parser = HfArgumentParser(dataclass_types, description=description, formatter_class=_HelpFormatter)
    try:
        return parser.parse_args_into_dataclasses(None if argv is None else list(argv))
    except (TypeError, ValueError) as error:
        parser.error(str(error))


def exit_status(run: Callable[[], int | None]) -> int:
    """Call a function that can be interrupted and started again, and print its errors in one line.

    Returns:
        What `run` returns, or 0 if that is None; 2 after an error, 130 after an interrupt.
    """
    try:
        return run() or 0
    except (ImportError, OSError, TypeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted. The same command continues the run.", file=sys.stderr)
        return 130
