"""Reads the rows of tasks whose prompts are in a file of JSON Lines: `chat` and `instructions`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..prompt_lines import Line, read_file, read_prompts
from .instructions import check_constraint
from .task_data import Row

INSTRUCTIONS = Path(__file__).with_name("instructions.jsonl")


def read_chats(path: str | None) -> list[Row]:
    """The rows of the task `chat`: the turns of a prompt as `chat`, and its `reference`, "" if it has none.

    Args:
        path: a file with one prompt in each line: plain text, or a JSON object with `prompt` or `messages`, and
            optionally a `reference`, an answer to compare with.

    Raises:
        ValueError: no path, the file can't be read, it has no prompts, or a line is malformed (the message has its
            number).
    """
    if path is None:
        raise ValueError(
            'The task \'chat\' needs --prompts, a JSON Lines file with a "prompt" or "messages" in each line.'
        )
    rows: list[Row] = []
    for line, row in _lines(path):
        reference = "" if row.get("reference") is None else row["reference"]
        if not isinstance(reference, str):
            raise _line_error(path, line, f'"reference" must be text, got {reference!r:.80}')
        chat = [{"role": "user", "content": line.prompt}] if isinstance(line.prompt, str) else line.prompt
        rows.append({"chat": chat, "reference": reference})
    return rows


def read_instructions(path: str | None) -> list[Row]:
    """The rows of the task `instructions`: a `prompt` and its `constraints`.

    Args:
        path: a file of JSON objects with `prompt` (text) and `constraints`; None for the 30 prompts of this package.

    Raises:
        ValueError: as for `read_chats`; a constraint is unknown, or has other arguments than it takes.
    """
    path = str(INSTRUCTIONS) if path is None else path
    rows: list[Row] = []
    for line, row in _lines(path):
        constraints = row.get("constraints")
        if not isinstance(line.prompt, str):
            raise _line_error(path, line, 'instructions are given as "prompt", which must be text')
        if not isinstance(constraints, list) or not constraints:
            raise _line_error(path, line, f'"constraints" must be a list of at least one, got {constraints!r:.80}')
        for constraint in constraints:
            try:
                check_constraint(constraint)
            except ValueError as error:
                raise _line_error(path, line, str(error)) from error
        rows.append({**row, "prompt": line.prompt})
    return rows


def _lines(path: str) -> Iterator[tuple[Line, dict[str, Any]]]:
    """The lines of a file, all of them usable, with their JSON objects (empty for plain text)."""
    empty = True
    for line in read_prompts(read_file(path, "--prompts")):
        if line.error is not None:
            raise _line_error(path, line, line.error)
        if line.template:
            names = ", ".join(map(repr, line.template))
            raise _line_error(path, line, f"{names} can't differ between prompts here: use --template_arguments")
        empty = False
        yield line, line.row if isinstance(line.row, dict) else {}
    if empty:
        raise ValueError(f"--prompts {path!r} has no prompts.")


def _line_error(path: str, line: Line, reason: str) -> ValueError:
    return ValueError(f"--prompts {path!r}, line {line.number}: {reason.removesuffix('.')}.")
