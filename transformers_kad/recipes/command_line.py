"""Parsing a command line: dataclasses as options, help with its examples, one-line errors."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from transformers import HfArgumentParser


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description, and names defaults where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def parse_arguments(
    dataclass_types: Sequence[type], description: str | None, argv: Sequence[str] | None = None
) -> Any:
    """The command line as one instance of each dataclass.

    Args:
        dataclass_types: their fields are the options, with `help` in the metadata.
        description: what `--help` shows first, line by line: a recipe's docstring.
        argv: the command line's words; those of the process by default.

    Words that can't be parsed, and a `ValueError` or `TypeError` of a dataclass, end the process with the usage, the
    error in one line, and status 2.
    """
    parser = HfArgumentParser(dataclass_types, description=description, formatter_class=_HelpFormatter)
    try:
        return parser.parse_args_into_dataclasses(None if argv is None else list(argv))
    except (TypeError, ValueError) as error:
        parser.error(str(error))


def exit_status(run: Callable[[], int | None]) -> int:
    """Run what a stop does no harm to, and say in one line what went wrong.

    Returns:
        What `run` returns, 0 for None; 2 for an error, 130 where it was interrupted.
    """
    try:
        return run() or 0
    except (ImportError, OSError, TypeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on where it was.", file=sys.stderr)
        return 130
