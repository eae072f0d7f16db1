"""JSON from files and command lines that people write. Everything that is wrong with it raises a `ValueError`."""

import json
from typing import Any

DEEPEST = 100  # levels of objects and lists; Python can neither write nor compare values that are much deeper


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Args:
        text: JSON. Bytes are UTF-8, with or without a byte order mark.

    Raises:
        ValueError: the text is not UTF-8 or not JSON, an object has a key twice (JSON does not define which of the
            two values counts), objects and lists are nested more than 100 levels deep, or an integer has more digits
            than Python reads.

    >>> parse_json('{"threshold": 0.4}')
    {'threshold': 0.4}
    >>> parse_json('{"threshold": 0.4, "threshold": 0.6}')
    Traceback (most recent call last):
        ...
    ValueError: an object has the key 'threshold' twice
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError(f"it is nested more than {DEEPEST} levels deep") from error
    inner = [value]
    for _ in range(DEEPEST + 1):
        inner = [child for parent in inner for child in _children(parent)]
    if inner:
        raise ValueError(f"it is nested more than {DEEPEST} levels deep")
    return value


def parse_json_object(text: str | bytes) -> dict[str, Any]:
    """The value of a JSON text that must be an object. Raises as `parse_json`, and for any other value."""
    value = parse_json(text)
    if not isinstance(value, dict):
        raise ValueError(f"a JSON object is needed, got {value!r:.80}")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"an object has the key {key!r:.80} twice")
        found[key] = value
    return found


def _children(value: Any) -> list[Any]:
    """The values in an object or a list; none for other values."""
    return [*value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
