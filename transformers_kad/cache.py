"""What a key-value cache can take back: tokens at its end, columns in its middle."""

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer


def can_crop(cache: Cache | None, tokens: int) -> bool:
    """Whether the last `tokens` tokens can be taken back from every layer of a cache."""
    if cache is None:
        return False
    for layer in cache.layers:
        if not getattr(layer, "is_croppable", False):
            return False
        if getattr(layer, "is_sliding", False) and layer.is_initialized:
            left = layer.get_seq_length() - tokens
            if layer.keys.shape[-2] - tokens < min(left, layer.sliding_window - 1):
                return False
    return True


def can_have_holes(cache: Cache) -> bool:
    """Whether rows may take back different numbers of tokens: full attention alone doesn't count columns."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def gather_columns(cache: Cache, columns: torch.Tensor) -> None:
    """Rebuild a cache of full attention from some of its columns, `(B, n)` indices in the order of the text."""
    for layer in cache.layers:
        index = columns.to(layer.keys.device)[:, None, :, None]
        layer.keys = layer.keys.gather(2, index.expand(-1, layer.keys.shape[1], -1, layer.keys.shape[3]))
        layer.values = layer.values.gather(2, index.expand(-1, layer.values.shape[1], -1, layer.values.shape[3]))
