"""JSON Lines files that a run appends its results to, and that a later run continues."""

import glob
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

from ..utils.files import write_whole
from ..utils.strict_json import parse_json_object
from .record_fields import Shape, check_fields

try:
    import fcntl
except ImportError:  # Windows, where two runs that write to one file are not detected
    fcntl = None  # type: ignore[assignment]


CHECK = "check"


class JsonLinesStore:
    """A file of results, one JSON object in each line, each written to the disk immediately.

    The settings of the run are stored beside `results.jsonl` as `results.jsonl.settings.json`. An interrupted run
    continues when it is started with the same settings, and is refused with other settings. If the interrupt left an
    incomplete last line, that line is removed and its result is computed again. A device or a pipe holds no earlier
    results and is only written to.

    If several processes share the work, the main process has this store, and every other one appends to a part file
    beside it (`JsonLinesPart`). The store takes over the records of part files when it is opened and in `complete`.

    Args:
        path: the file, or a link to it; its folder is created if it is missing.
        settings: the settings that determine the results, as JSON values. A missing setting counts as None.
        order: the field that tells records apart, and by which `complete` sorts them. It is an integer,
            unless `fields` has it with another type.
        fields: fields that every record has, for `check_fields`.
        checked: whether every line gets a field "check", a hash of the others, by which a line that was changed or
            is there twice is found. For files whose records have too many fields to check each of them.

    Attributes:
        records: the records that the file held when it was opened.
        torn: the beginning of an incomplete last line that was removed from a file; None if there was none.

    Raises:
        ValueError: the file was made with other settings (the message shows the difference) or has no settings file,
            it has a complete line that is not a record, or another process is writing to it.

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

    def __init__(
        self,
        path: str | Path,
        settings: Mapping[str, Any],
        *,
        order: str = "line",
        fields: Mapping[str, Shape] = MappingProxyType({}),
        checked: bool = False,
    ) -> None:
        self.path, self.order, self.fields, self._checked = Path(path), order, fields, checked
        if self.path.is_dir():
            raise ValueError(f"Results go into a file, got the folder {str(self.path)!r}.")
        self.records, self.torn = list[dict[str, Any]](), None
        self._file: IO[str]
        if self.path.exists() and not self.path.is_file():
            self._file = self.path.open("a", encoding="utf-8")
            return
        self.path = Path(os.path.realpath(path))  # the settings are beside the file itself, not beside a link
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open_locked(self.path)
        try:
            self._check_settings(json.loads(json.dumps(settings)))
            self.records, self.torn = read_json_lines(self.path, self.fields)
            if self._checked:
                self._verify_checks()
            self._take_over_parts()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "JsonLinesStore":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, and with it the lock on it."""
        self._file.close()

    def append(self, record: Mapping[str, Any]) -> None:
        """Write a result to the disk before returning.

        Raises:
            OSError: it could not be written.
        """
        append_json_lines(self._file, [{**record, CHECK: _hash(record)} if self._checked else record])

    def _verify_checks(self) -> None:
        """Verify and remove the field "check" of all records."""
        lines: dict[str, int] = {}
        for number, record in enumerate(self.records, start=1):
            where = f"{str(self.path)!r}, line {number}"
            if record.pop(CHECK, None) != _hash(record):
                raise ValueError(f"{where} is not as it was written. Remove the line, and it is measured again.")
            first = lines.setdefault(_hash(record), number)
            if first != number:
                raise ValueError(f"{where} is a copy of line {first}. Remove one of the two.")

    def complete(self) -> None:
        """At the end of a run, take over the records of all part files, and sort the file if it is not in order.

        Raises:
            OSError: the file could not be written.
        """
        if not self.path.is_file():
            return
        self.records, _ = read_json_lines(self.path, {self.order: (int,), **self.fields})
        self._take_over_parts()
        in_order = sorted(self.records, key=lambda record: record[self.order])
        if in_order != self.records:
            write_whole(self.path, "".join(map(json_line, in_order)))
            self.records = in_order

    def _take_over_parts(self) -> None:
        """Append the records of all part files, and remove these files."""
        fields = {self.order: (int,), **self.fields}
        for part in self._parts():
            for number, record in enumerate(self.records, start=1):
                check_fields(record, fields, f"{str(self.path)!r}, line {number}")
            records, torn = read_json_lines(part, fields)
            self.torn = torn or self.torn
            known = {record[self.order]: record for record in self.records}
            new = []
            for number, record in enumerate(records, start=1):
                before = known.setdefault(record[self.order], record)
                if before is record:
                    new.append(record)
                elif json.dumps(before) != json.dumps(record):  # a stop before the part is removed leaves equal ones
                    raise ValueError(
                        f"{str(part)!r}, line {number} is not equal to an earlier record with {self.order} "
                        f"{record[self.order]}. Remove one of the two, or choose another file."
                    )
            append_json_lines(self._file, new)
            self.records += new
            part.unlink()

    def _parts(self) -> list[Path]:
        """The part files of all processes."""
        return sorted(self.path.parent.glob(f"{glob.escape(self.path.name)}.part[0-9]*"))

    def _check_settings(self, settings: dict[str, Any]) -> None:
        """Write the settings beside the results, or compare them with those of the results that are there."""
        settings_file = self.path.with_name(self.path.name + ".settings.json")
        holds_results = self.path.stat().st_size > 0 or bool(self._parts())
        if settings_file.exists() and holds_results:
            try:
                found = parse_json_object(settings_file.read_bytes())
            except ValueError as error:
                raise ValueError(f"{str(settings_file)!r} is not a JSON object: {error}.") from error
            differences = describe_differences(found, settings)
            if differences:
                raise ValueError(
                    f"{str(self.path)!r} holds results of a run with other settings: {differences}. Choose another "
                    "file, or use the same settings to continue that run."
                )
        elif holds_results:
            raise ValueError(
                f"{str(self.path)!r} holds results, but there is no {settings_file.name!r} with their settings beside "
                "it. Choose another file."
            )
        else:
            write_whole(settings_file, json.dumps(settings, indent=2) + "\n")


class JsonLinesPart:
    """The file that a process other than the main one appends its results to, beside the file of a `JsonLinesStore`.

    Args:
        path: the file of the store, which the main process has opened before.
        process: the index of this process.
    """

    def __init__(self, path: str | Path, process: int) -> None:
        self.path = Path(f"{os.path.realpath(path)}.part{process}")
        self._file = self.path.open("a", encoding="utf-8")

    def __enter__(self) -> "JsonLinesPart":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def append(self, record: Mapping[str, Any]) -> None:
        """See `JsonLinesStore.append`."""
        append_json_lines(self._file, [record])

    def close(self) -> None:
        """Close the file, so that the store can take over its records."""
        self._file.close()


def append_json_lines(file: IO[str], records: Iterable[Mapping[str, Any]]) -> None:
    """Append records to an open file, one in each line, and write them to the disk before returning."""
    file.write("".join(map(json_line, records)))
    file.flush()
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        os.fsync(file.fileno())


def _hash(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()[:12]


def json_line(record: Mapping[str, Any], encoding: str = "utf-8") -> str:
    """A record as a line of JSON. Characters that can't be encoded are escaped.

    In UTF-8 these are lone surrogates (one half of a surrogate pair), which JSON allows.
    """
    line = json.dumps(record, ensure_ascii=False) + "\n"
    try:
        line.encode(encoding)
    except UnicodeEncodeError:
        return json.dumps(record) + "\n"
    return line


def read_json_lines(
    path: Path, fields: Mapping[str, Shape] = MappingProxyType({})
) -> tuple[list[dict[str, Any]], str | None]:
    """Read the records of a file, and remove an incomplete last line from it.

    Nothing is removed if the rest of the file can't be read.

    Args:
        path: the file.
        fields: fields that every record has, for `check_fields`.

    Returns:
        The records, and the beginning of the incomplete line; None if there was none.

    Raises:
        ValueError: a line is not a JSON object, or has not these fields.
    """
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if b"\r" in content[whole:].rstrip(b"\r"):
        raise ValueError(
            f"The lines of {str(path)!r} end with a carriage return alone. Convert them to line feeds, as on Linux."
        )
    records = list(_parse(path, content[:whole], fields))
    if whole == len(content):
        return records, None
    with path.open("r+b") as file:
        file.truncate(whole)
    return records, content[whole : whole + 80].decode(errors="replace")


def _parse(path: Path, content: bytes, fields: Mapping[str, Shape]) -> Iterator[dict[str, Any]]:
    # `splitlines` would also split at other line separators, which texts may contain.
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        where = f"{str(path)!r}, line {number}"
        try:
            record = parse_json_object(line)
        except ValueError as error:
            start = line[:80].decode(errors="replace")
            raise ValueError(f"{where} is not a JSON object: {start!r} ({error}).") from error
        check_fields(record, fields, where)
        yield record


def open_locked(path: Path, *, shown: Path | None = None) -> IO[str]:
    """Open a file for appending, under an exclusive lock that ends when it is closed or the process exits.

    Args:
        path: the file.
        shown: what the error message calls the place that another process writes to; by default the file.

    Raises:
        ValueError: another process holds the lock.
    """
    while True:
        file = path.open("a", encoding="utf-8")
        try:
            lock(file, shown or path)
            # Another run may have replaced the file (`JsonLinesStore.complete`) between `open` and `lock`. What is
            # appended to the file that was replaced would be lost.
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def lock(file: IO[str], path: Path) -> None:
    """Take an exclusive lock on a file. It ends when the file is closed or the process exits.

    Raises:
        ValueError: another process holds the lock.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(
            f"Another run is writing to {str(path)!r}. Wait until it has finished, or stop it."
        ) from error


def describe_differences(
    found: Mapping[str, Any], wanted: Mapping[str, Any], there: str = "there", here: str = "here"
) -> str:
    """The differences between two settings, for an error message that calls their places `there` and `here`."""
    keys = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
    return "; ".join(
        f"{key if key.isprintable() else repr(key):.80} is {found.get(key)!r:.200} {there} and "
        f"{wanted.get(key)!r:.200} {here}"
        for key in keys
    )
