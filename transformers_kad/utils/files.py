"""Writing whole files."""

import os
import secrets
import shutil
import sys
from pathlib import Path
from typing import IO


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is either as before or whole, whenever the run is stopped.

    A link stays one: the file that it leads to is written. What can't be replaced, such as a device, a pipe, or the
    file that standard output goes to, is written into.

    Raises:
        OSError: it could not be written.
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
    path = Path(os.path.realpath(path))
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
    """The one of standard output and standard error that goes to a file, if one does."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if os.path.samestat(path.stat(), os.fstat(stream.fileno())):
                return stream
        except (AttributeError, OSError, ValueError):  # no such file yet; a stream that is closed, or not the system's
            continue
    return None
