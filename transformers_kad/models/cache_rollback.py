"""What a key-value cache can take back: tokens at its end, columns in its middle."""

from typing import Any

import torch
from peft.tuners.shadow.layers import ShadowCache
from transformers import Cache
from transformers.cache_utils import DynamicLayer


def layers_of(cache: Cache) -> list[Any]:
    """All layers of a cache; of both halves of the one that peft's Shadow adapter keeps, the model's and its own."""
    if isinstance(cache, ShadowCache):
        return [layer for half in (cache.base, cache.shadow) if half is not None for layer in layers_of(half)]
    return list(cache.layers)


def record_past(cache: Cache) -> None:
    """Keep what only taking back needs, as `Cache.activate_past_recording` does."""
    for layer in layers_of(cache):
        if hasattr(layer, "activate_past_recording"):
            layer.activate_past_recording()


def _is_croppable(cache: Cache) -> bool:
    """What a cache says of itself; some keep states beside their layers, which look croppable."""
    halves = (cache.base, cache.shadow) if isinstance(cache, ShadowCache) else (cache,)
    return all(half.is_croppable for half in halves if half is not None)


def can_crop(cache: Cache | None, tokens: int) -> bool:
    """Whether the last `tokens` tokens can be taken back from every layer of a cache."""
    if cache is None or not _is_croppable(cache):
        return False
    for layer in layers_of(cache):
        if not getattr(layer, "is_croppable", False):
            return False
        if getattr(layer, "is_sliding", False) and layer.is_initialized:
            left = layer.get_seq_length() - tokens
            if layer.keys.shape[-2] - tokens < min(left, layer.sliding_window - 1):
                return False
    return True


def trim(cache: Cache) -> None:
    """Let go of what only taking back would need. Unlike `cache.crop(0)`, for caches that can't take back as well."""
    for layer in layers_of(cache):
        if hasattr(layer, "crop"):
            layer.crop(0)


def can_have_holes(cache: Cache) -> bool:
    """Whether rows may take back different numbers of tokens: full attention alone doesn't count columns."""
    return _is_croppable(cache) and all(type(layer) is DynamicLayer for layer in layers_of(cache))


def gather_columns(cache: Cache, columns: torch.Tensor) -> None:
    """Rebuild a cache of full attention from some of its columns, `(B, n)` indices in the order of the text."""
    for layer in layers_of(cache):
        index = columns.to(layer.keys.device)[:, None, :, None]
        layer.keys = layer.keys.gather(2, index.expand(-1, layer.keys.shape[1], -1, layer.keys.shape[3]))
        layer.values = layer.values.gather(2, index.expand(-1, layer.values.shape[1], -1, layer.values.shape[3]))
