"""Names of models and data sets: folders here or Hub ids, and how a file names a folder so that it is found again."""

import os
from pathlib import Path


def looks_like_path(name: str) -> bool:
    """Whether a name can only be a path on this machine, not a Hub id ("name" or "owner/name")."""
    starts = name.startswith((".", "~")) or Path(name).is_absolute()
    return starts or "\\" in name or name.count("/") > 1 or name.endswith("/")


def check_source(name: str | Path) -> str:
    """The name of a model, as text; refused if it can only be a folder and there is none.

    Without this check, a missing folder reads like a network error.

    Raises:
        FileNotFoundError: `name` looks like a path, and there is no such folder.

    >>> check_source("owner/name")
    'owner/name'
    """
    text = str(name)
    if looks_like_path(text) and not Path(text).exists():
        raise FileNotFoundError(f"Folder not found: {text!r} (working directory: {os.getcwd()!r}).")
    return text


def shown_name(name: str) -> str:
    """A model's name on a page that is passed on: a folder's own name, not where it lies; a Hub id as it is.

    >>> shown_name("owner/name")
    'owner/name'
    """
    return Path(name).resolve().name if looks_like_path(name) or Path(name).is_dir() else name


def portable_name(name: str, folder: str | Path) -> str:
    """How a file in `folder` is to name a model, so that it is found from every working directory.

    Hub ids and absolute paths stay as they are. The path of a folder that is relative to the working directory becomes
    relative to `folder`, with "." or ".." in front, so that both can be moved together. `resolve_name` is the way
    back.
    """
    if not Path(name).is_dir() or Path(name).is_absolute():
        return name
    relative = Path(os.path.relpath(Path(name).resolve(), Path(folder).resolve())).as_posix()
    return relative if relative.startswith(".") else f"./{relative}"


def resolve_name(name: str, folder: str | Path) -> str:
    """The folder that a file in `folder` names relative to its own place; `name` itself if there is no such folder."""
    beside = Path(folder) / name
    return str(beside.resolve()) if not Path(name).is_absolute() and beside.is_dir() else name
