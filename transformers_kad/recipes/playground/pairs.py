"""Pairs of models that are loaded once and shared by all visitors of a page."""

import os
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from ...utils.sources import looks_like_path
from ..arguments import ModelArguments
from ..pair import Pair


@dataclass(frozen=True)
class PairNames:
    """The Hub ids or folders of a pair. `reference` is the proxy before alignment, for the rule that needs it."""

    base: str = ""
    proxy: str = ""
    reference: str = ""


class LoadedPairs:
    """Loads pairs when they are first asked for, and keeps those that were used last.

    Args:
        offered: the pair that the page names at the beginning; empty names if there is none.
        is_fixed: whether visitors may use no other pair.
        allow_folders: whether visitors may name folders of this machine, beside those of the pair that is offered.
        kept: how many pairs are kept in memory.
    """

    def __init__(
        self, offered: PairNames, *, is_fixed: bool = False, allow_folders: bool = True, kept: int = 2
    ) -> None:
        self.offered, self.is_fixed, self.allow_folders, self.kept = offered, is_fixed, allow_folders, kept
        self._pairs: OrderedDict[PairNames, Pair] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._pairs)

    def get(self, base: str, proxy: str) -> Pair:
        """The pair with these names. One call loads at a time; the others wait.

        Raises:
            ValueError: a name is missing or may not be used here, or the tokenizers differ.
            OSError: a model was not found.
        """
        names = self._check(base.strip(), proxy.strip())
        with self._lock:
            if names not in self._pairs:
                while len(self._pairs) >= self.kept:  # before the new one is loaded, so that memory is free for it
                    self._pairs.popitem(last=False)
                self._pairs[names] = Pair(ModelArguments(names.base, names.proxy, names.reference or None))
            self._pairs.move_to_end(names)
            return self._pairs[names]

    def _check(self, base: str, proxy: str) -> PairNames:
        if (base, proxy) == (self.offered.base, self.offered.proxy) and base and proxy:
            return self.offered
        if self.is_fixed:
            raise ValueError(
                f"This page has the base {self.offered.base!r} and the proxy {self.offered.proxy!r} alone, got "
                f"{base!r} and {proxy!r}."
            )
        for role, name in (("base", base), ("proxy", proxy)):
            if not name:
                raise ValueError(f"Name the {role}: a Hub id such as owner/name.")
            is_folder = looks_like_path(name) or os.path.isdir(name)
            if is_folder and not self.allow_folders and name not in (self.offered.base, self.offered.proxy):
                raise ValueError(f"The {role} must be a Hub id such as owner/name, got {name!r}.")
        return PairNames(base, proxy)


def pairs_from_environment(environment: Mapping[str, str], pair_here: str | os.PathLike[str]) -> LoadedPairs:
    """The pairs of a page, by the environment that it runs in.

    `KAD_BASE` and `KAD_PROXY` name the pair, and `KAD_REFERENCE` the proxy before alignment. Other pairs may then be
    used only with `KAD_OTHER_MODELS=1`. Without them the pair is that of the folder `pair_here`, if there is one, or
    the visitor's, and any other may be used. On the Hub, where `SPACE_ID` is set, visitors may not name folders.

    Args:
        environment: the variables of the process.
        pair_here: a folder that holds `base` and `proxy`.

    Raises:
        ValueError: one of `KAD_BASE` and `KAD_PROXY` is set without the other.
    """
    named = PairNames(*(environment.get(f"KAD_{role}", "") for role in ("BASE", "PROXY", "REFERENCE")))
    if bool(named.base) != bool(named.proxy):
        raise ValueError(f"Set KAD_BASE and KAD_PROXY together, got {named.base!r} and {named.proxy!r}.")
    is_fixed = bool(named.base) and environment.get("KAD_OTHER_MODELS", "") not in ("1", "true")
    base, proxy = (os.path.join(pair_here, role) for role in ("base", "proxy"))
    if not named.base and os.path.isdir(base) and os.path.isdir(proxy):
        named = PairNames(base, proxy)
    return LoadedPairs(named, is_fixed=is_fixed, allow_folders="SPACE_ID" not in environment)
