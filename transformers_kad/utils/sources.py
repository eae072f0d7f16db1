"""Names of models and data sets, which are local folders or Hub ids, and how a saved file refers to a folder."""

import os
from pathlib import Path


def looks_like_path(name: str) -> bool:
    """Whether a name can only be a local path, because a Hub id is "name" or "owner/name"."""
    starts = name.startswith((".", "~")) or Path(name).is_absolute()
    return starts or "\\" in name or name.count("/") > 1 or name.endswith("/")


def check_source(name: str | Path) -> str:
    """The name of a model as text, after a check that the folder exists if it can only be a local path.

    Without this check, a missing folder would be reported as a network error.

    Raises:
        FileNotFoundError: `name` can only be a local path, and there is no such folder.

    >>> check_source("owner/name")
    'owner/name'
    """
    text = str(name)
    if looks_like_path(text) and not Path(text).exists():
        raise FileNotFoundError(f"Folder not found: {text!r} (working directory: {os.getcwd()!r}).")
    return text


def shown_name(name: str) -> str:
    """A model's name for a page that others will see: of a folder only the last part of its path; Hub ids unchanged.

    >>> shown_name("owner/name")
    'owner/name'
    """
    return Path(name).resolve().name if looks_like_path(name) or Path(name).is_dir() else name


def portable_name(name: str, folder: str | Path) -> str:
    """The name by which a file in `folder` refers to a model, whatever the working directory will be.

    Hub ids and absolute paths stay as they are. A path relative to the working directory becomes relative to `folder`
    and begins with "." or "..", so that the model and the file can be moved together. `resolve_name` is the inverse.
    """
    if not Path(name).is_dir() or Path(name).is_absolute():
        return name
    relative = Path(os.path.relpath(Path(name).resolve(), Path(folder).resolve())).as_posix()
    return relative if relative.startswith(".") else f"./{relative}"


def resolve_name(name: str, folder: str | Path) -> str:
    """The absolute path of the folder that a file in `folder` calls `name`; `name` where there is no such folder."""
    beside = Path(folder) / name
    return str(beside.resolve()) if not Path(name).is_absolute() and beside.is_dir() else name
