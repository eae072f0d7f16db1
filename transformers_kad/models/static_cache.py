"""A cache of fixed size in which the texts of a batch begin in the first column and have lengths of their own."""

from collections.abc import Sequence

import torch
from transformers import Cache, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from ..utils.transfers import send
from .by_version import DummyLayer


class TextStore:
    """The memory of static caches: the tokens of texts, and the keys and values of every layer.

    Text b is in the columns 0 to n_b - 1 of row b, whatever stands behind them. Caches of several sizes are views of
    the first rows, so that they need no memory of their own.

    Args:
        layers: how many layers the model's cache has.
        rows: the largest number of texts.
        capacity: the number of columns.
        device: where the tokens are. Keys and values are where their layers make them.

    Attributes:
        tokens: `(rows, capacity)`.
        starts: the column in which the next forward begins to write, `(rows,)`. All layers read this one tensor.
        keys: of each layer `(rows, heads, capacity, channels)`; None until the layer has made the first ones.
        values: the same of the values.
    """

    def __init__(self, layers: int, *, rows: int, capacity: int, device: torch.device) -> None:
        self.rows, self.capacity = rows, capacity
        self.tokens = torch.zeros(rows, capacity, dtype=torch.long, device=device)
        self.starts = torch.zeros(rows, dtype=torch.long, device=device)
        self.keys: list[torch.Tensor | None] = [None] * layers
        self.values: list[torch.Tensor | None] = [None] * layers

    def allocate(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Make the memory of a layer, whose keys and values `(B, heads, n, channels)` are like these."""
        self.keys[layer], self.values[layer] = (
            states.new_zeros(self.rows, states.shape[1], self.capacity, states.shape[3]) for states in (keys, values)
        )

    def move_rows(self, sources: Sequence[int], targets: Sequence[int], columns: int) -> None:
        """Copy the first columns of some rows to others."""
        for states in (self.tokens, *self.keys, *self.values):
            if states is not None:
                source, target = (send(list(rows), states.device) for rows in (sources, targets))
                along = states.narrow(-1 if states.dim() == 2 else -2, 0, columns)
                along.index_copy_(0, target, along.index_select(0, source))

    def resized(self, rows: int, capacity: int) -> "TextStore":
        """A larger store with the same texts. The memory of this one is freed layer by layer."""
        larger = TextStore(len(self.keys), rows=rows, capacity=capacity, device=self.tokens.device)
        larger.tokens[: self.rows, : self.capacity] = self.tokens
        for old, new in ((self.keys, larger.keys), (self.values, larger.values)):
            for layer, states in enumerate(old):
                if states is not None:
                    shape = (rows, states.shape[1], capacity, states.shape[3])
                    grown = new[layer] = states.new_zeros(shape)
                    grown[: self.rows, :, : self.capacity] = states
                    old[layer] = None
        return larger


class RowLayer(StaticLayer):
    """One layer of a static cache that writes the new columns of each row behind that row's own text.

    Layers with a sliding window keep all columns as well: what the window leaves out is hidden by the mask, so that
    tokens are taken back by their position alone.

    Args:
        store: the memory.
        index: the number of the layer.
        starts: see `TextStore`, of the rows that the cache has.
        begin: see `RowCache`.
    """

    def __init__(self, store: TextStore, index: int, starts: torch.Tensor, begin: int | None) -> None:
        super().__init__(max_cache_len=store.capacity)
        self.store, self.index, self.begin = store, index, begin
        self.cumulative_length = starts
        if store.keys[index] is not None:
            self._take_memory()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """See `StaticLayer.lazy_initialization`."""
        self.store.allocate(self.index, key_states, value_states)
        self._take_memory()

    def _take_memory(self) -> None:
        keys, values = self.store.keys[self.index], self.store.values[self.index]
        assert keys is not None and values is not None
        rows = len(self.cumulative_length)
        self.keys, self.values = keys[:rows], values[:rows]
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True
        if self.begin is None:
            torch._dynamo.mark_static_address(self.keys)
            torch._dynamo.mark_static_address(self.values)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write `(B, heads, n, channels)` of n new columns, and return all that the attention mask is made for."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[-2]
        if self.begin is not None:
            end = self.begin + new
            self.keys[:, :, self.begin : end] = key_states
            self.values[:, :, self.begin : end] = value_states
            return self.keys[:, :, :end], self.values[:, :, :end]
        starts = self.cumulative_length.to(self.device)
        columns = starts[:, None] + torch.arange(new, device=self.device)
        rows = torch.arange(len(starts), device=self.device)[:, None]
        self.keys[rows, :, columns] = key_states.transpose(1, 2)
        self.values[rows, :, columns] = value_states.transpose(1, 2)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """See `StaticLayer.get_mask_sizes`."""
        return (self.max_cache_len if self.begin is None else self.begin + query_length), 0

    def get_seq_length(self) -> int:
        """How many columns are before those of this forward; a tensor unless all rows begin in the same one."""
        return self.cumulative_length[0] if self.begin is None else self.begin  # type: ignore[return-value]


class RowCache(Cache):
    """The first rows of a store, as the cache of a forward.

    Args:
        store: the memory.
        rows: how many of its rows.
        begin: the column in which all rows begin to write, to read prompts. None for compiled forwards, in which each
            row begins where `starts` says.
    """

    def __init__(self, store: TextStore, rows: int, begin: int | None = None) -> None:
        self.starts, self.tokens = store.starts[:rows], store.tokens[:rows]
        if begin is None:
            torch._dynamo.mark_static_address(self.starts)
            torch._dynamo.mark_static_address(self.tokens)
        super().__init__(layers=[RowLayer(store, index, self.starts, begin) for index in range(len(store.keys))])


def static_layers(model: PreTrainedModel) -> list[type]:
    """The types of the layers of the static cache that transformers would make for a model; empty if it has none."""
    config = model.config.get_text_config(decoder=True)
    try:
        return [type(layer) for layer in StaticCache(config=config, max_cache_len=1).layers]
    except KeyError:  # a kind of layer of the model's own
        return []


def has_attention_only(model: PreTrainedModel) -> bool:
    """Whether all layers of a model have attention, full or within a window, so that a store can hold them."""
    layers = set(static_layers(model))
    return bool(layers) and layers <= {StaticLayer, StaticSlidingWindowLayer, DummyLayer}


def has_windows(model: PreTrainedModel) -> bool:
    """Whether a layer of a model attends to the end of a text only."""
    return StaticSlidingWindowLayer in static_layers(model)
