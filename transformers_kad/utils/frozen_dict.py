"""FrozenDict: a dictionary that can't be changed, and can therefore be hashed."""

from typing import Any, NoReturn


class FrozenDict(dict[str, Any]):
    """A dictionary that can't be changed. Its hash is that of its items, which must be hashable.

    It is written to JSON, copied, pickled and compared as a dictionary is.

    >>> FrozenDict(threshold=0.4) == {"threshold": 0.4}
    True
    """

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[type, tuple[dict[str, Any]]]:
        return type(self), (dict(self),)

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(f"{dict(self)!r} can't be changed: make a new dictionary of it with `dict(...)`.")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse
