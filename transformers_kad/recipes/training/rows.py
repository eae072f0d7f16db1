"""Reads the rows of a data set, from a JSON Lines file or from the Hub."""

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets

from ...utils.sources import looks_like_path
from ...utils.strict_json import parse_json
from . import AlignmentError

SHOWN = 5  # the number of lines that a message lists


@dataclass(frozen=True)
class Rows:
    """The rows of a data set, and the line or row number of each.

    Attributes:
        name: file or Hub id.
        unit: "line" of a file or "row" of a data set, counted from 1.
        numbers: the number of each row.
        contents: the fields of each row.
    """

    name: str
    unit: str
    numbers: Sequence[int]
    contents: Sequence[dict[str, Any]]

    def split(self, share: float, seed: int) -> tuple["Rows", "Rows"]:
        """Hold out a random share of the rows, at least one.

        Returns:
            The other rows, and the held-out ones.

        Raises:
            AlignmentError: there is only one row.
        """
        count = len(self.numbers)
        if count < 2:
            raise AlignmentError(f"{self.name} has only one row, so none can be held out. Use --eval_share 0.")
        drawn = set(random.Random(seed).sample(range(count), min(max(1, round(share * count)), count - 1)))
        return self._take([i for i in range(count) if i not in drawn]), self._take(sorted(drawn))

    def _take(self, indices: list[int]) -> "Rows":
        return Rows(self.name, self.unit, [self.numbers[i] for i in indices], [self.contents[i] for i in indices])


def read_rows(data: str, config: str | None = None, split: str = "train") -> Rows:
    """Read a JSON Lines file, or a data set of the Hub or of a local folder with the same layout.

    Args:
        data: path or Hub id.
        config: configuration of the Hub data set.
        split: split of the Hub data set.

    Raises:
        AlignmentError: the file or data set is missing or empty, or lines are not JSON objects (they are listed).
    """
    path = Path(data).expanduser()
    if path.is_file():
        rows = _read_lines(data, path)
    elif not path.is_dir() and (path.suffix in (".json", ".jsonl") or looks_like_path(data)):
        raise AlignmentError(f"There is no file {data!r}, and no folder either (working directory: {os.getcwd()!r}).")
    else:
        rows = _read_dataset(data, config, split)
    if not rows.numbers:
        raise AlignmentError(f"{data} is empty.")
    return rows


def _read_lines(name: str, path: Path) -> Rows:
    # `load_dataset` would return old rows from its cache after the file has changed.
    numbers, contents, errors = [], [], []
    for number, raw in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            content = parse_json(raw)
            if not isinstance(content, dict):
                raise ValueError(f"a JSON object is needed, not {type(content).__name__}")
        except ValueError as error:
            errors.append(f"line {number}: {error}: {excerpt(raw.decode('utf-8', 'replace'))}")
        numbers.append(number)
        contents.append(content if not errors else {})
    if errors:
        raise AlignmentError(
            list_errors(f"{name} is not a JSON Lines file (one JSON object in each line, UTF-8)", errors)
        )
    return Rows(name, "line", numbers, contents)


def _read_dataset(name: str, config: str | None, split: str) -> Rows:
    try:
        if Path(name).is_dir():
            with TemporaryDirectory() as cache:  # the default cache would hold old rows after a change
                contents = list(datasets.load_dataset(name, config, split=split, cache_dir=cache))
        else:
            contents = list(datasets.load_dataset(name, config, split=split))
    except Exception as error:  # the readers of datasets raise many kinds of errors on malformed files
        reason = next(iter(str(error).splitlines()), repr(error))
        raise AlignmentError(
            f"{name!r} is not a file, and could not be loaded as a data set of the Hub (split {split!r}): {reason}"
        ) from error
    return Rows(f"{name} ({split})", "row", range(1, len(contents) + 1), contents)


def excerpt(text: str, length: int = 60) -> str:
    readable = text.encode("utf-8", "backslashreplace").decode("utf-8")  # lone surrogates can't be printed
    return readable if len(readable) <= length else f"{readable[:length]}..."


def list_errors(heading: str, errors: list[str]) -> str:
    more = f"\n  ... and {len(errors) - SHOWN} more" if len(errors) > SHOWN else ""
    return f"{heading}:\n  " + "\n  ".join(errors[:SHOWN]) + more
