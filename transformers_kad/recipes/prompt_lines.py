"""The lines of a file of prompts: as plain text, or as JSON objects with a prompt or messages."""

import json
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..integrations.loading.prompts import Prompt, check_template_arguments, normalize_prompt, shorten
from ..utils.strict_json import parse_json_object

UNREADABLE = "surrogateescape"  # turns invalid UTF-8 into lone surrogates, which `read_prompts` reports


@dataclass(frozen=True)
class Line:
    """One line of the input.

    Attributes:
        number: from 1.
        prompt: text or messages; None if the line has no usable prompt.
        row: the JSON object, or the text of a malformed line; None for plain text.
        template: arguments of the chat template in the row.
        error: why the line can't be used; None if it can.
    """

    number: int
    prompt: Prompt | None
    row: dict[str, Any] | str | None = None
    template: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    def record(self) -> dict[str, Any]:
        """The fields of the output record that describe the line."""
        row = {} if self.row is None else {"row": self.row}
        return {"line": self.number, "prompt": self.prompt, **row}


def read_prompts(lines: Iterable[str]) -> Iterator[Line]:
    """Parse the lines of a file, except empty ones. A line that can't be used has an `error`."""
    for number, line in enumerate(lines, start=1):
        text = line.removeprefix("\ufeff").rstrip("\r\n")
        if not text.strip():
            continue
        row: dict[str, Any] | str | None = text
        try:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"the line is not UTF-8 from character {error.start} on: {text[:80]!r}") from error
            if "\0" in text:
                raise ValueError(f"the line has the character NUL, as in a file that is not UTF-8: {text[:80]!r}")
            if text.lstrip().startswith("{"):
                try:
                    row = parse_json_object(text)
                except ValueError as error:
                    raise ValueError(
                        f"the line begins like JSON, but is not a JSON object: {text[:80]!r} ({error})"
                    ) from error
                yield Line(number, prompt_of(row), row, template_of(row))
            else:
                yield Line(number, text)
        except ValueError as error:
            yield Line(number, None, row, error=str(error))


def prompt_of(row: Mapping[str, Any]) -> Prompt:
    """The prompt of a JSON object: its `messages`, or else its `prompt`, which is text or messages.

    Raises:
        ValueError: it has neither, or the prompt is malformed.
    """
    name = "prompt" if row.get("messages") is None else "messages"
    if row.get(name) is None:
        raise ValueError(
            f'"prompt" or "messages" is needed, got the fields {", ".join(map(repr, row)) or "none":.200}'
        )
    if name == "messages" and isinstance(row[name], str):
        raise ValueError(f'"messages" must be a list of messages, got {row[name][:80]!r}')
    try:
        return normalize_prompt(row[name])
    except ValueError as error:
        raise ValueError(f'"{name}" can\'t be used: {error}') from error


def template_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the chat template in a JSON object: its `tools` and its `chat_template_kwargs`.

    Raises:
        ValueError: they are malformed.
    """
    more = {} if row.get("chat_template_kwargs") is None else row["chat_template_kwargs"]
    if not isinstance(more, dict):
        raise ValueError(f'"chat_template_kwargs" must be an object, got {more!r:.80}')
    template = {**({} if row.get("tools") is None else {"tools": row["tools"]}), **more}
    check_template_arguments(template)
    return template


def seed_of(seed: int, line: int) -> int:
    """The seed of a line, so that its texts do not depend on earlier ones."""
    return random.Random(f"{seed} {line}").getrandbits(32)


def read_file(path: str, option: str = "--input") -> list[str]:
    """The lines of the file that an option names.

    Raises:
        ValueError: the file can't be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8", errors=UNREADABLE).split("\n")
    except OSError as error:
        raise ValueError(f"{option} {path!r} can't be read: {error}") from error


def check_usable(lines: list[Line], path: str, *, shown: bool = True) -> list[Line]:
    """Return the lines, and print how many can't be used, unless that is not to be `shown`.

    Raises:
        ValueError: none of them can be used.
    """
    bad = [line for line in lines if line.error is not None]
    if bad and len(bad) == len(lines):
        raise ValueError(f"No line of --input {path!r} can be used. Line {bad[0].number}: {bad[0].error}.")
    if bad and shown:
        print(
            f"{len(bad)} of {len(lines)} lines can't be used, and are recorded as failed. Line {bad[0].number}: "
            f"{bad[0].error}.",
            file=sys.stderr,
        )
    return lines


def check_answered(lines: Iterable[Line], done: dict[int, dict[str, Any]], path: Path) -> Iterator[Line]:
    """Yield the lines, after comparing answered ones with their records, which are from the file `path`.

    Raises:
        ValueError: a line has changed since it was answered, or is not there any more.
    """
    left = done.copy()
    changed = f"The input was changed since it was answered, or {str(path)!r} was: line"
    for line in lines:
        if line.number in left:
            record = left.pop(line.number)
            name = "row" if "row" in record else "prompt"
            before, now = record.get(name), line.record().get(name)
            if json.dumps(before) != json.dumps(now):  # as JSON, since NaN is not equal to itself
                raise ValueError(
                    f"{changed} {line.number} was {shorten(before)} and is {shorten(now)}. Choose another --output."
                )
        yield line
    if left:
        raise ValueError(
            f"{changed} {min(left)}, which has an answer, is not there any more. Choose another --output."
        )
