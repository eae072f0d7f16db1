"""What the supported versions of transformers and peft name differently, or do not all have.

Classes that stand in for missing ones have no instances in those versions.
"""

import inspect
from importlib.metadata import version

from transformers import Cache
from transformers.masking_utils import create_masks_for_generate

# Model types that say of themselves that they take prepared masks and static caches, and do not.
TAKING_NO_MASKS: frozenset[str] = frozenset()

try:
    from transformers.cache_utils import BaseQuantizedLayer
except ImportError:  # before transformers 5.21
    from transformers.cache_utils import QuantizedLayer as BaseQuantizedLayer

    TAKING_NO_MASKS = frozenset({"bloom"})

try:
    from transformers.cache_utils import DummyLayer
except ImportError:  # before transformers 5.23

    class DummyLayer:  # type: ignore[no-redef]
        """A layer that keeps nothing."""


try:
    from peft.tuners.shadow.layers import ShadowCache
except ImportError:  # before peft 0.21

    class ShadowCache(Cache):  # type: ignore[no-redef]
        """The caches of a model with a Shadow adapter and of the adapter."""


# The argument and the output of a model that is its cache; "cache" from transformers 5.24 on.
CACHE = "cache" if "cache" in inspect.signature(create_masks_for_generate).parameters else "past_key_values"

# peft before 0.22 looks for the cache under its older name, and an adapter that reads or fills it goes on without one.
PEFT_LOSES_CACHE = CACHE == "cache" and tuple(map(int, version("peft").split(".")[:2])) < (0, 22)

__all__ = ["CACHE", "PEFT_LOSES_CACHE", "TAKING_NO_MASKS", "BaseQuantizedLayer", "DummyLayer", "ShadowCache"]
