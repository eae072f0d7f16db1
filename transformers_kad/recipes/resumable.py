"""Files of JSON Lines that a run appends to, and that a later run goes on with. Nothing twice, nothing lost."""

import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from ..utils.files import write_whole
from ..utils.strict_json import parse_json_object

try:
    import fcntl
except ImportError:  # Windows: two runs at once are not noticed there
    fcntl = None  # type: ignore[assignment]


class JsonLinesStore:
    """Results, one JSON object a line, written out as soon as they are there.

    Beside `results.jsonl` lies `results.jsonl.settings.json`: what the run was asked to do. A run that was stopped
    in the middle goes on when it is started with the same settings; with others it is refused. A last line that the
    stop tore apart is removed, and made again. A device or a pipe, which holds nothing to go on with, is only written
    to.

    Args:
        path: the file, or a link to it; its folder is made if it is missing.
        settings: what decides the results, as JSON values. One that is missing is None.

    Attributes:
        records: what the file held when it was opened.
        torn: the beginning of a torn last line, removed from the file; None if there was none.

    Raises:
        ValueError: the file was made with other settings (the message shows the difference), or without any, or holds
            a line in its middle that is no JSON object, or another process is writing to it.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = Path(folder.name) / "results.jsonl"
    >>> with JsonLinesStore(path, {"seed": 0}) as store:
    ...     store.append({"line": 1})
    >>> with JsonLinesStore(path, {"seed": 0}) as store:
    ...     store.records
    [{'line': 1}]
    >>> folder.cleanup()
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            raise ValueError(f"Results go into a file, got the folder {str(self.path)!r}.")
        self.records, self.torn = list[dict[str, Any]](), None
        if self.path.exists() and not self.path.is_file():
            self._file = self.path.open("a", encoding="utf-8")
            return
        self.path = Path(os.path.realpath(path))  # by whatever name it goes, its settings lie beside it
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a", encoding="utf-8")
        try:
            lock(self._file, self.path)
            self._claim(json.loads(json.dumps(settings)))
            self.records, self.torn = read_json_lines(self.path)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "JsonLinesStore":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def append(self, record: Mapping[str, Any]) -> None:
        """Write a result; when this returns, it is on the disk.

        Raises:
            OSError: it could not be written.
        """
        append_json_lines(self._file, [record])

    def _claim(self, settings: dict[str, Any]) -> None:
        """Write the settings beside the results, or check that they are those of the run that is there."""
        claim = self.path.with_name(self.path.name + ".settings.json")
        holds_results = self.path.stat().st_size > 0
        if claim.exists() and holds_results:
            try:
                found = parse_json_object(claim.read_bytes())
            except ValueError as error:
                raise ValueError(f"{str(claim)!r} is not JSON: {error}.") from error
            differences = describe_differences(found, settings)
            if differences:
                raise ValueError(
                    f"{str(self.path)!r} holds results of a run with other settings: {differences}. Choose another "
                    "file, or repeat the settings to go on."
                )
        elif holds_results:
            raise ValueError(
                f"{str(self.path)!r} holds results, but no {claim.name!r} lies beside it to say of which settings. "
                "Choose another file."
            )
        else:
            write_whole(claim, json.dumps(settings, indent=2) + "\n")


def append_json_lines(file: IO[str], records: Iterable[Mapping[str, Any]]) -> None:
    """Append records to an open file, one a line; when this returns, they are on the disk."""
    file.write("".join(map(json_line, records)))
    file.flush()
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        os.fsync(file.fileno())


def json_line(record: Mapping[str, Any], encoding: str = "utf-8") -> str:
    """A record as a line of JSON, with escapes where it holds what the encoding has no bytes for.

    UTF-8 has none for half a character (a lone surrogate), which JSON can hold.
    """
    line = json.dumps(record, ensure_ascii=False) + "\n"
    try:
        line.encode(encoding)
    except UnicodeEncodeError:
        return json.dumps(record) + "\n"
    return line


def read_json_lines(path: Path) -> tuple[list[dict[str, Any]], str | None]:
    """The records of a file, and the beginning of a torn last line, which is removed from the file.

    Raises:
        ValueError: a line that is no JSON object.
    """
    content, torn = path.read_bytes(), None
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        torn = content[whole : whole + 80].decode(errors="replace")
        with path.open("r+b") as file:
            file.truncate(whole)
    return list(_parse(path, content[:whole])), torn


def _parse(path: Path, content: bytes) -> Iterator[dict[str, Any]]:
    # Not splitlines(): text may hold other characters that end lines.
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            yield parse_json_object(line)
        except ValueError as error:
            start = line[:80].decode(errors="replace")
            raise ValueError(f"{str(path)!r}, line {number} is no JSON object: {start!r} ({error}).") from error


def lock(file: IO[str], path: Path) -> None:
    """Keep other runs from a file until it is closed, by the end of the process at the latest.

    Raises:
        ValueError: another run has it.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"Another run is writing to {str(path)!r}. Wait for it, or end it.") from error


def describe_differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Where two settings differ, for an error message."""
    keys = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
    return "; ".join(f"{key} is {found.get(key)!r} there and {wanted.get(key)!r} here" for key in keys)
