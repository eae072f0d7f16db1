"""What a key-value cache can take back: tokens at its end, columns in its middle."""

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer


def can_crop(cache: Cache | None, tokens: int) -> bool:
    """Whether the last `tokens` tokens can be taken back from every layer of a cache."""
    if cache is None or not cache.is_croppable:
        return False
    for layer in cache.layers:
        if not getattr(layer, "is_croppable", False):
            return False
        if getattr(layer, "is_sliding", False) and layer.is_initialized:
            left = layer.get_seq_length() - tokens
            if layer.keys.shape[-2] - tokens < min(left, layer.sliding_window - 1):
                return False
    return True


def trim(cache: Cache) -> None:
    """Let go of what only taking back would need. Unlike `cache.crop(0)`, for caches that can't take back as well."""
    for layer in cache.layers:
        if hasattr(layer, "crop"):
            layer.crop(0)


def can_have_holes(cache: Cache) -> bool:
    """Whether rows may take back different numbers of tokens: full attention alone doesn't count columns."""
    return cache.is_croppable and all(type(layer) is DynamicLayer for layer in cache.layers)


def gather_columns(cache: Cache, columns: torch.Tensor) -> None:
    """Rebuild a cache of full attention from some of its columns, `(B, n)` indices in the order of the text."""
    for layer in cache.layers:
        index = columns.to(layer.keys.device)[:, None, :, None]
        layer.keys = layer.keys.gather(2, index.expand(-1, layer.keys.shape[1], -1, layer.keys.shape[3]))
        layer.values = layer.values.gather(2, index.expand(-1, layer.values.shape[1], -1, layer.values.shape[3]))
