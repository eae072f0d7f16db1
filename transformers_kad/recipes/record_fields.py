"""check_fields: whether a stored record has the fields that a program reads, with values of the right types."""

import math
from collections.abc import Mapping
from typing import Any

ADVICE = "It was not written by this program, or was changed: correct it, or choose another --output."

# What a value must be: one of some types; a list with values of one shape, `[shape]`; an object with some fields,
# `{"name": shape}`; or an object whose values all have one shape, `{str: shape}`.
Shape = tuple[type, ...] | list[Any] | Mapping[Any, Any]


def check_fields(found: object, fields: Mapping[str, Shape], where: str) -> None:
    """Check that a record is an object with certain fields, each of the right shape. It may have more fields.

    Numbers must be finite and not negative, since records hold counts, times and shares. True and False are not
    numbers here, although Python calls them integers.

    Args:
        found: the record, a JSON value.
        fields: the name and the shape of every field that is needed.
        where: the file and the line of the record, for the error message.

    Raises:
        ValueError: the first field that is missing or has another shape, with its place.

    >>> check_fields({"line": 1, "masses": [0.5]}, {"line": (int,), "masses": [(int, float)]}, "'a.jsonl', line 7")
    """
    if not isinstance(found, dict):
        raise ValueError(f"{where} must be an object, got {found!r:.80}. {ADVICE}")
    for name, shape in fields.items():
        if name not in found:
            raise ValueError(f"{where} has no {name!r}. {ADVICE}")
        _check_value(found[name], shape, where, repr(name))


def _check_value(value: Any, shape: Shape, where: str, name: str) -> None:
    if isinstance(shape, Mapping):
        if isinstance(value, dict) and str in shape:
            for key, inner in value.items():
                _check_value(inner, shape[str], f"{where}, {name}", f"{key!r:.80}")
        else:
            check_fields(value, shape, f"{where}, {name}")
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise ValueError(f"{where}: {name} is {value!r:.80}, not a list. {ADVICE}")
        for at, inner in enumerate(value):
            _check_value(inner, shape[0], where, f"{name}[{at}]")
    elif not isinstance(value, shape) or (isinstance(value, bool) and bool not in shape):
        kinds = " or ".join("null" if kind is type(None) else kind.__name__ for kind in shape)
        raise ValueError(f"{where}: {name} is {value!r:.80}, not of type {kinds}. {ADVICE}")
    elif isinstance(value, int | float) and not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{where}: {name} is {value!r:.80}, not a finite number from 0 on. {ADVICE}")
