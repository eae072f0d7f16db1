"""What a key-value cache can take back, and how: columns at its end, row by row or from all rows alike.

The layers of transformers' caches differ in this. Layers of full attention can be cut anywhere. Sliding windows and
convolutions can be cut as far as they recorded what they would have dropped (`record_past`). Recurrent states can't be
cut at all; they are copied before a forward that may be taken back (`recurrent_states`).
"""

from collections.abc import Sequence
from enum import Enum, auto
from typing import Any

import torch
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from .by_version import DummyLayer, ShadowCache
from .padding import keep_ends


class Rollback(Enum):
    """How the tokens that the rows of a batch refuse are taken back from a cache."""

    BEHIND_MASK = auto()  # they stay as holes that the attention mask hides; only full attention allows it
    BY_ROW = auto()  # each row drops its own number of columns, and moves to the right
    IN_STEP = auto()  # all rows drop the same number of columns
    BY_STATE = auto()  # as BY_ROW, and recurrent states are restored from copies
    BY_COPY = auto()  # the whole cache is restored from a copy


# The kinds that need a copy from before each forward that may be taken back.
FROM_COPIES = frozenset({Rollback.BY_STATE, Rollback.BY_COPY})

# The layers whose tensors are known, so that columns can be dropped row by row.
_KNOWN_LAYERS = {
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
}


def rollback_of(cache: Cache) -> Rollback:
    """How a filled cache takes tokens back, as far as the cache decides it."""
    if _is_own_class(cache):
        return Rollback.IN_STEP if cache.is_croppable else Rollback.BY_COPY
    layers = layers_of(cache)
    if all(type(layer) in (DynamicLayer, DummyLayer) for layer in layers):
        return Rollback.BEHIND_MASK
    if all(type(layer) in _KNOWN_LAYERS for layer in layers):
        return Rollback.BY_STATE if any(map(has_recurrent_state, layers)) else Rollback.BY_ROW
    # Of a layer of a model's own only its own `crop` can be trusted: an inherited one does not know what it adds.
    known = all(type(layer) in _KNOWN_LAYERS or "crop" in vars(type(layer)) for layer in layers)
    return Rollback.IN_STEP if known and cache.is_croppable else Rollback.BY_COPY


def _is_own_class(cache: Cache) -> bool:
    """Whether a cache is of a class of a model's own, which may keep more than its layers do."""
    return type(cache) not in (DynamicCache, EncoderDecoderCache, ShadowCache)


def _caches_in(cache: Cache) -> list[Cache]:
    """The caches that one consists of: peft's Shadow adapter keeps one for the model and one of its own."""
    if isinstance(cache, EncoderDecoderCache):
        return [cache.self_attention_cache]
    if isinstance(cache, ShadowCache):
        return [part for part in (cache.base, cache.shadow) if part is not None]
    return [cache]


def layers_of(cache: Cache) -> list[Any]:
    """All layers of a cache."""
    return [layer for part in _caches_in(cache) for layer in part.layers]


def counts_tokens(cache: Cache) -> bool:
    """Whether a cache can be asked how many tokens it holds, which one of recurrent states alone can't."""
    return any(isinstance(layer, CacheLayerMixin) for layer in layers_of(cache))


def has_recurrent_state(layer: object) -> bool:
    """Whether a layer keeps a state that no column can be dropped from."""
    return isinstance(layer, LinearAttentionCacheLayerMixin) and any(layer.is_recurrent_states_initialized.values())


def may_be_recurrent(cache: Cache) -> bool:
    """Whether a cache, which may be empty, has layers that keep states instead of columns."""
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers_of(cache))


def record_past(cache: Cache) -> None:
    """From now on, keep the columns that are needed to take back tokens, until `drop_columns` or `forget_past`.

    Layers with recurrent states alone are left out, since copies of them are kept instead.
    """
    for layer in layers_of(cache):
        recurrent = has_recurrent_state(layer) or (
            isinstance(layer, LinearAttentionCacheLayerMixin) and not any(layer.is_conv_states_initialized.values())
        )
        if hasattr(layer, "activate_past_recording") and (_is_window(layer) or not recurrent):
            layer.activate_past_recording()


def trim_convolutions(cache: Cache) -> None:
    """Cut convolution states to what the next forward needs, in layers whose states are restored from copies.

    A layer with a window and a recurrent state records the past of both, and its model expects no more than that.
    """
    for layer in layers_of(cache):
        if has_recurrent_state(layer) and layer.record_past:
            _drop_from_convolutions(layer, [0])


def forget_past(cache: Cache) -> None:
    """Free what is needed only to take back tokens, also in a cache that can't take back any."""
    drop_columns(cache, [0])


def can_drop(cache: Cache, tokens: int) -> bool:
    """Whether the last `tokens` columns can be taken back from every layer of a cache that has no recurrent states."""
    if rollback_of(cache) in FROM_COPIES:
        return tokens == 0
    return has_columns(cache, tokens)


def has_columns(cache: Cache, tokens: int) -> bool:
    """Whether sliding windows and convolutions still have what they need without the last `tokens` columns."""
    for layer in layers_of(cache):
        if _is_window(layer) and layer.is_initialized:
            left = layer.get_seq_length() - tokens
            if layer.keys.shape[-2] - tokens < min(left, layer.sliding_window - 1):
                return False
        if isinstance(layer, LinearAttentionCacheLayerMixin) and not has_recurrent_state(layer):
            held = ((state, layer.conv_kernel_size[index]) for index, state in layer.conv_states.items())
            if any(state is not None and state.shape[-1] - tokens < kernel for state, kernel in held):
                return False
    return True


def drop_columns(cache: Cache, counts: Sequence[int], *, first: int = 0) -> None:
    """Take back the last `counts[b]` columns of each row b.

    Rows that take back more than others are moved to the right, so that all rows end in the same column. Then the
    `first` columns, which are padding in all rows, are left out. Recurrent states, and the convolutions beside them,
    are left as they are.
    """
    if _is_own_class(cache):
        if cache.is_croppable:
            cache.crop(-counts[0])
        return
    for layer in layers_of(cache):
        if type(layer) in _KNOWN_LAYERS:
            if isinstance(layer, DynamicLayer):
                _drop_from_attention(layer, counts, first)
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                _drop_from_convolutions(layer, [0] if has_recurrent_state(layer) else counts)
        elif "crop" in vars(type(layer)):
            layer.crop(-counts[0])


def _is_window(layer: object) -> bool:
    return bool(getattr(layer, "is_sliding", False))


def _drop_from_attention(layer: Any, counts: Sequence[int], first: int) -> None:
    if not layer.is_initialized or layer.keys is None or layer.keys.numel() == 0:
        return
    held = layer.keys.shape[-2]
    columns = held - min(counts) - first
    if _is_window(layer):
        layer.cumulative_length -= min(counts) + first
        if layer.cumulative_length >= layer.sliding_window:
            columns = layer.sliding_window - 1
        else:
            columns = layer.cumulative_length
    ends = [held - count for count in counts]
    layer.keys = keep_ends(layer.keys, ends, columns, dim=-2)
    layer.values = keep_ends(layer.values, ends, columns, dim=-2)
    if isinstance(layer, DynamicIndexedLayer) and layer.is_indexer_initialized:
        layer.indexer_keys = keep_ends(layer.indexer_keys, ends, columns, dim=-2)
        if getattr(layer, "indexer_position_ids", None) is not None:  # transformers 5.20 has none
            positions = layer.indexer_position_ids  # (dimensions, B, n)
            layer.indexer_position_ids = torch.stack([keep_ends(part, ends, columns, dim=-1) for part in positions])


def _drop_from_convolutions(layer: Any, counts: Sequence[int]) -> None:
    for index, state in layer.conv_states.items():
        if state is not None:
            ends = [state.shape[-1] - count for count in counts]
            columns = min(layer.conv_kernel_size[index], max(ends))
            layer.conv_states[index] = keep_ends(state, ends, columns, dim=-1)


def select_cached_rows(cache: Cache, rows: torch.Tensor) -> None:
    """Keep only some rows of a cache, `(B',)` indices, in this order."""
    for part in [cache] if isinstance(cache, EncoderDecoderCache) else _caches_in(cache):
        if type(part).reorder_cache is Cache.reorder_cache and _is_own_class(part):
            part.batch_select_indices(rows)
        else:  # `batch_select_indices` leaves out convolution and recurrent states
            part.reorder_cache(rows)


def gather_columns(cache: Cache, columns: torch.Tensor) -> None:
    """Rebuild a cache of full attention from some of its columns, `(B, n)` indices in the order of the text."""
    for layer in layers_of(cache):
        if isinstance(layer, DummyLayer) or layer.get_seq_length() == 0:  # such as one for images that there are not
            continue
        index = columns.to(layer.keys.device)[:, None, :, None]
        layer.keys = layer.keys.gather(2, index.expand(-1, layer.keys.shape[1], -1, layer.keys.shape[3]))
        layer.values = layer.values.gather(2, index.expand(-1, layer.values.shape[1], -1, layer.values.shape[3]))


def join_rows(cache: Cache, other: Cache, columns: int) -> None:
    """Put the rows of another cache of full attention behind those of the first, all padded to so many columns."""
    for layer, more in zip(layers_of(cache), layers_of(other), strict=True):
        if isinstance(layer, DummyLayer) or layer.get_seq_length() == 0:
            continue
        layer.keys = torch.cat([_padded(layer.keys, columns), _padded(more.keys, columns)])
        layer.values = torch.cat([_padded(layer.values, columns), _padded(more.values, columns)])


def _padded(states: torch.Tensor, columns: int) -> torch.Tensor:
    """States `(B, heads, n, size)` with zeros before them, `(B, heads, columns, size)`."""
    return torch.nn.functional.pad(states, (0, 0, columns - states.shape[-2], 0))


def bytes_of(cache: Cache) -> int:
    """The memory of all tensors in the layers of a cache, in bytes."""
    total, waiting = 0, [value for layer in layers_of(cache) for value in vars(layer).values()]
    while waiting:
        value = waiting.pop()
        if torch.is_tensor(value):
            total += value.nbytes
        elif isinstance(value, dict):
            waiting += value.values()
    return total
