"""A file of JSON Lines that a run appends to, and that a later run goes on with. Nothing twice, nothing lost."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: two runs at once are not noticed there
    fcntl = None  # type: ignore[assignment]


class JsonLinesStore:
    """Results, one JSON object a line, written out as soon as they are there.

    Beside `results.jsonl` lies `results.jsonl.settings.json`: what the run was asked to do. A run that was stopped
    in the middle goes on when it is started with the same settings; with others it is refused. A last line that the
    stop tore apart is removed, and made again.

    Args:
        path: the file; its folder is made if it is missing.
        settings: what decides the results, as JSON values.

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
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.torn: str | None = None
        self._claim(json.loads(json.dumps(settings)))
        self._file = self.path.open("a", encoding="utf-8")
        try:
            self._lock()
            self.records = list(self._read())
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "JsonLinesStore":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def append(self, record: Mapping[str, Any]) -> None:
        """Write a result; when this returns, it is on the disk."""
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _lock(self) -> None:
        """Until the file is closed, by the end of the process at the latest."""
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"Another run is writing to {str(self.path)!r}. Wait for it, or end it.") from error

    def _read(self) -> Iterator[dict[str, Any]]:
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            self.torn = content[whole : whole + 80].decode(errors="replace")
            with self.path.open("r+b") as file:
                file.truncate(whole)
        # Not splitlines(): text may hold other characters that end lines.
        for number, line in enumerate(content[:whole].decode().split("\n")[:-1], start=1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{str(self.path)!r}, line {number} is not JSON: {line[:80]!r} ({error}).") from error
            if not isinstance(record, dict):
                raise ValueError(f"{str(self.path)!r}, line {number} must hold an object, got {line[:80]!r}.")
            yield record

    def _claim(self, settings: dict[str, Any]) -> None:
        """Write the settings beside the results, or check that they are those of the run that is there."""
        claim = self.path.with_name(self.path.name + ".settings.json")
        if claim.exists():
            try:
                found = json.loads(claim.read_text(encoding="utf-8"))
            except json.JSONDecodeError as error:
                raise ValueError(f"{str(claim)!r} is not JSON: {error}.") from error
            keys = [key for key in {**found, **settings} if found.get(key) != settings.get(key)]
            if keys:
                listed = "; ".join(f"{key} is {found.get(key)!r} there and {settings.get(key)!r} here" for key in keys)
                raise ValueError(
                    f"{str(self.path)!r} holds results of a run with other settings: {listed}. Choose another file, "
                    "or repeat the settings to go on."
                )
        elif self.path.exists() and self.path.stat().st_size:
            raise ValueError(
                f"{str(self.path)!r} holds results, but no {claim.name!r} lies beside it to say of which settings. "
                "Choose another file."
            )
        else:
            new = claim.with_name(claim.name + ".new")
            new.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            new.replace(claim)
