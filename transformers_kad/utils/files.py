"""write_whole: replace a file in one step."""

import os
import secrets
import shutil
import sys
from pathlib import Path
from typing import IO


def write_whole(path: Path, text: str) -> None:
    """Write a text file in one step: if the program is stopped, the file is either as before or complete.

    The text goes to a second file in the same folder, which then takes the place of the first. A link stays a link,
    and the file that it leads to is replaced. A device, a pipe and the file that standard output goes to can't be
    replaced, and are written into.

    Args:
        path: the file.
        text: what it is to hold, written as UTF-8.

    Raises:
        OSError: the file can't be written.
        UnicodeEncodeError: the text holds half a character (a lone surrogate).
    """
    content = text.encode()
    stream = _standard_stream(path)
    if stream is not None:
        stream.flush()
        with open(stream.fileno(), "wb", closefd=False) as file:
            file.write(content)
        return
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    given, path = path, Path(os.path.realpath(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{str(given)!r} can't be written: there is no folder {str(path.parent)!r}.")
    new = path.with_name(f".{secrets.token_hex(8)}.new")
    try:
        with new.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, new)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def _standard_stream(path: Path) -> IO[str] | None:
    """Standard output or standard error, whichever of them goes to this file; None for other files."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if os.path.samestat(path.stat(), os.fstat(stream.fileno())):
                return stream
        except (AttributeError, OSError, ValueError):  # there is no such file yet, or the stream is closed or replaced
            continue
    return None
