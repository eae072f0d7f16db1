"""What a key-value cache can take back: tokens at its end, and columns in its middle."""

from typing import Any

import torch
from peft.tuners.shadow.layers import ShadowCache
from transformers import Cache
from transformers.cache_utils import DynamicLayer


def _caches_in(cache: Cache) -> list[Cache]:
    """The caches that one consists of: peft's Shadow adapter keeps one for the model and one of its own."""
    if not isinstance(cache, ShadowCache):
        return [cache]
    return [part for part in (cache.base, cache.shadow) if part is not None]


def layers_of(cache: Cache) -> list[Any]:
    """All layers of a cache."""
    return [layer for part in _caches_in(cache) for layer in part.layers]


def record_past(cache: Cache) -> None:
    """From now on, keep the states that are needed to take back tokens, until the next `crop` or `forget_past`."""
    for part in _caches_in(cache):
        part.activate_past_recording()


def forget_past(cache: Cache) -> None:
    """Free the states that are needed only to take back tokens, also in a cache that can't take back any."""
    for layer in layers_of(cache):
        if hasattr(layer, "crop"):
            layer.crop(0)


def _is_croppable(cache: Cache) -> bool:
    """What a cache says of itself. It is asked since some keep states outside their layers, which look croppable."""
    return all(part.is_croppable for part in _caches_in(cache))


def can_crop(cache: Cache, tokens: int) -> bool:
    """Whether the last `tokens` tokens can be taken back from every layer of a cache."""
    if not _is_croppable(cache):
        return False
    for layer in layers_of(cache):
        if getattr(layer, "is_sliding", False) and layer.is_initialized:
            left = layer.get_seq_length() - tokens
            if layer.keys.shape[-2] - tokens < min(left, layer.sliding_window - 1):
                return False
    return True


def can_have_holes(cache: Cache) -> bool:
    """Whether rows may take back different numbers of tokens, which needs full attention: it counts no columns."""
    return _is_croppable(cache) and all(type(layer) is DynamicLayer for layer in layers_of(cache))


def shortest_window(cache: Cache) -> int | None:
    """The shortest sliding window of a cache's layers, in columns; None without one."""
    windows = [layer.sliding_window for layer in layers_of(cache) if getattr(layer, "is_sliding", False)]
    return min(windows, default=None)


def gather_columns(cache: Cache, columns: torch.Tensor) -> None:
    """Rebuild a cache of full attention from some of its columns, `(B, n)` indices in the order of the text."""
    for layer in layers_of(cache):
        index = columns.to(layer.keys.device)[:, None, :, None]
        layer.keys = layer.keys.gather(2, index.expand(-1, layer.keys.shape[1], -1, layer.keys.shape[3]))
        layer.values = layer.values.gather(2, index.expand(-1, layer.values.shape[1], -1, layer.values.shape[3]))
