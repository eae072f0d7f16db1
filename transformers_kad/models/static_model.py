"""A model in a static cache, whose short forwards are compiled once for their shape."""

from collections import Counter
from collections.abc import Hashable
from typing import Any

import torch
from transformers import PreTrainedModel

from ..utils.transfers import send
from .activated_lora import invocation_tokens
from .adapters import VALUES_BY_ROW, adapter_configs, injected, model_below
from .attention_masks import is_made_for_static_caches
from .by_version import CACHE
from .cached_forwards import in_mode_of_cache
from .cached_model import CachedModel
from .compiled_steps import CompiledSteps
from .fingerprint import fingerprint
from .forward_inputs import ForwardInputs
from .model_errors import describe
from .offloading import is_offloaded
from .padding import PaddedTexts, match_rows
from .static_cache import RowCache, TextStore, has_attention_only, has_windows, static_layers
from .static_masks import ColumnMasks

# Capacities are multiples of this, so that texts of about the same length share a cache and the code compiled for it.
CAPACITY_STEP = 256


class StaticCacheModel(CachedModel):
    """`CachedModel` with compiled forwards of `width` tokens of each row behind the prompts.

    They are made for batches of 1, 2, 4, 8 and so on rows (buckets), and filled up with tokens that nobody reads: a
    row that has fewer new tokens than `width`, rows that have left the batch, and those that the bucket has beyond
    the batch. When a smaller bucket has room for the rows that are left, they move there. Prompts are not compiled.

    Every row has a length of its own, which is all that changes when tokens are taken back: what stands behind it is
    hidden by the attention mask, and written over by the next forward.

    Args:
        model: a causal LM whose layers all have attention, full or within a window.
        role: what error messages call it.
        width: tokens of a compiled forward.

    Attributes:
        compiled_forwards: how many forwards of each bucket were compiled ones.
    """

    def __init__(self, model: PreTrainedModel, role: str, *, width: int) -> None:
        super().__init__(model, role)
        if role == "base":
            self.context_length = None  # `generate` warns of a text that is too long
            self._stand_in = None  # an id that the base can't read is an error of the prompt
        self.width = width
        self.compiled_forwards = Counter[int]()
        self._store: TextStore | None = None
        self._caches: dict[int, RowCache] = {}  # by the number of rows, for compiled forwards
        self._forward_rows = _RowForward(
            model,
            takes_positions="position_ids" in self.accepted_inputs,
            last_position=self._inputs.last_position,
        )
        self._compiled = CompiledSteps(self._forward_rows, self.device)

    @property
    def capacity(self) -> int:
        """How many tokens of each text the cache has room for."""
        return 0 if self._store is None else self._store.capacity

    @property
    def cached_length(self) -> int:
        """How many tokens of the shortest text the cache holds."""
        return min((self._lengths[row] for row in self._rows), default=0)

    @property
    def reads_prompt_alone(self) -> bool:
        """See `CachedModel.reads_prompt_alone`."""
        return False

    @property
    def needs_rows_in_step(self) -> bool:
        """See `CachedModel.needs_rows_in_step`."""
        return False

    def reset(self) -> None:
        """Forget the texts. The memory of the cache stays."""
        super().reset()
        self._lengths: list[int] = []  # of the text in each row of the store
        self._rows: list[int] = []  # where the rows of the batch are in the store
        self._index: torch.Tensor | None = None  # the same on the device; None if they are the first ones, in order
        self._bucket = 0

    def free(self) -> None:
        """Forget the texts and free the memory of the cache. What was compiled stays, for a cache of the same size."""
        self.reset()
        self._store = None
        self._caches.clear()

    def refresh(self, state: Hashable = None) -> None:
        """See `CachedModel.refresh`."""
        super().refresh(state)
        if self._lengths and self.state != self._filled_by:
            self.reset()
        told = [name for name in (*VALUES_BY_ROW, "alora_offsets") if injected(self.model, name) is not None]
        if told or invocation_tokens(self.model) is not None:
            raise ValueError(
                f"The {self.role} {describe(self.model)} has adapters that are told `{(*told, 'alora_offsets')[0]}`, "
                "which compiled code would keep from the first call: leave out `compile`."
            )
        if any(config.peft_type == "SHADOW" for config in adapter_configs(self.model).values()):
            raise ValueError(
                f"The {self.role} {describe(self.model)} has an adapter of type SHADOW, which keeps a cache of its "
                "own: leave out `compile`."
            )

    def reserve(self, tokens: int, rows: int = 1) -> None:
        """Make room for a batch of texts of so many tokens. For more of either, forwards are compiled anew.

        Raises:
            ValueError: the model, or a batch of it, can't be compiled.
        """
        self._check_model(rows)
        if self.longrope_switch is not None and tokens + self.width > self.longrope_switch:
            raise ValueError(
                f"The {self.role} {describe(self.model)} reads texts of more than {self.longrope_switch} tokens in "
                "another way than shorter ones (LongRoPE), and `compile=True` can't change from one to the other, got "
                f"a limit of {tokens} tokens: leave out `compile`, or generate less."
            )
        self._make_room(tokens, rows)

    def _check_model(self, rows: int) -> None:
        if is_offloaded(self.model):
            raise ValueError(
                f"`compile=True` needs weights that stay where they are, and those of the {self.role} "
                f"{describe(self.model)} are offloaded: leave out `compile`."
            )
        takes_masks = self._forward_rows.takes_masks
        is_static = takes_masks or is_made_for_static_caches(model_below(self.model))
        if CACHE not in self.accepted_inputs or not is_static or not has_attention_only(self.model):
            raise ValueError(
                "`compile=True` needs attention in all layers, full or within sliding windows, that a static cache "
                f"can serve, and the {self.role} {describe(self.model)} has others. Leave out `compile`."
            )
        if not takes_masks and (rows > 1 or has_windows(self.model)):
            what = f"a batch of {rows} sequences" if rows > 1 else "sliding windows"
            raise ValueError(
                "`compile=True` needs attention of the implementation `sdpa` or `eager` that takes `position_ids` and "
                f"a mask of four dimensions, for {what}, and the {self.role} {describe(self.model)} has another. "
                "Leave out `compile`, or generate one sequence at a time."
            )

    def _make_room(self, tokens: int, rows: int) -> None:
        """Allocate a store, or a larger one with the same texts."""
        capacity = -(-(tokens + self.width) // CAPACITY_STEP) * CAPACITY_STEP
        rows, store = _bucket_of(rows), self._store
        if store is not None and store.rows >= rows and store.capacity >= capacity:
            return
        with torch.inference_mode(False):  # later calls write to it, in whatever mode
            if store is None:
                layers, device = len(static_layers(self.model)), self.device
                self._store = TextStore(layers, rows=rows, capacity=capacity, device=device)
            else:
                self._store = store.resized(max(rows, store.rows), max(capacity, store.capacity))
            self._forward_rows.count_positions(self._inputs, self._store.tokens[:1])
            if store is not None and capacity > store.capacity:  # smaller ones are not used again
                self._compiled.clear()
        self._caches.clear()

    def crop(self, length: int) -> None:
        """See `CachedModel.crop`; nothing is moved."""
        self._lengths = [min(own, length) for own in self._lengths]

    def take_back(self, tokens: list[int]) -> None:
        """See `CachedModel.take_back`; nothing is moved."""
        for row, count in zip(self._rows, tokens, strict=True):
            self._lengths[row] -= count

    @in_mode_of_cache
    def select_rows(self, rows: list[int]) -> None:
        """See `CachedModel.select_rows`. The rows are moved only where a smaller bucket has room for all of them."""
        self._rows = [self._rows[row] for row in rows]
        bucket = _bucket_of(len(rows))
        if bucket < self._bucket:
            free = iter(sorted(set(range(bucket)) - set(self._rows)))
            moved = {row: next(free) for row in self._rows if row >= bucket}
            # The rows that have ended go the other way: a later call may continue their texts.
            swapped = moved | {target: row for row, target in moved.items()}
            if swapped:
                assert self._store is not None
                lengths = list(self._lengths)
                columns = max(lengths[row] for row in swapped)
                self._store.move_rows(list(swapped), list(swapped.values()), columns)
                for source, target in swapped.items():
                    self._lengths[target] = lengths[source]
                self._rows = [moved.get(row, row) for row in self._rows]
            self._bucket = bucket
        self._place_rows()

    def _place_rows(self) -> None:
        first = list(range(len(self._rows)))
        self._index = None if self._rows == first else send(self._rows, self.device)

    @in_mode_of_cache
    def logits(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        logits_to_keep: int = 1,
        continues: bool = False,
        chunk_size: int | None = None,
        prompt_length: int | None = None,
        ended: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `CachedModel.logits`. What the cache has of the texts already is found by comparing them."""
        ids = self._readable(input_ids.to(self.device).clone())
        lengths = [ids.shape[1]] * len(ids)
        if attention_mask is not None:
            ids, lengths = _from_the_left(ids, attention_mask.to(ids.device) != 0)
        self.check_prompt(min(lengths))
        self.check_length(max(lengths))
        self._make_room(max(lengths), len(ids))
        try:
            begin = self._find_texts(ids, lengths, upto=min(lengths) - logits_to_keep)
            # Texts of several lengths end in several columns, so that their ends are read in a compiled forward.
            behind = logits_to_keep if max(lengths) > min(lengths) else 0
            end = max(lengths) - behind
            logits = self._prefill(ids[:, begin:end], begin, logits_to_keep, chunk_size) if begin < end else None
            if behind or logits is None:
                self._lengths[: len(ids)] = [length - behind for length in lengths]
                index = torch.tensor(self._lengths[: len(ids)], device=ids.device)[:, None]
                index = index + torch.arange(behind, device=ids.device)
                logits = self._read_compiled(ids.gather(1, index), [behind] * len(ids))
            self._lengths[: len(ids)] = lengths
        except BaseException:
            self.reset()
            raise
        self.forwards += 1
        return logits

    def _find_texts(self, ids: torch.Tensor, lengths: list[int], *, upto: int) -> int:
        """Find what the store has of texts `(B, n)`, and move it to their rows: so many columns of each."""
        assert self._store is not None
        common, rows, columns = 0, list(range(len(ids))), torch.arange(ids.shape[1], device=ids.device)
        if self._lengths and upto > 0:
            held, of_held = self._store.tokens[: len(self._lengths), : ids.shape[1]], self._lengths
            known, wanted = (
                PaddedTexts(texts, (columns < torch.tensor(ends, device=ids.device)[:, None]).to(texts))
                for texts, ends in ((held, of_held), (ids, lengths))
            )
            common, rows = match_rows(known, wanted)
            common = min(common, upto)
        if common == 0:
            self._filled_by = fingerprint(self.model) if self.state is None else self.state
        elif rows != list(range(len(ids))):
            self._store.move_rows(rows, range(len(ids)), common)
        self._bucket = _bucket_of(len(ids))
        self._lengths = [common] * len(ids) + [0] * (self._bucket - len(ids))
        self._rows = list(range(len(ids)))
        self._place_rows()
        return common

    def _prefill(
        self, ids: torch.Tensor, begin: int, logits_to_keep: int, chunk_size: int | None
    ) -> torch.Tensor | None:
        """Read the columns of prompts `(B, n)` from `begin` on, not compiled. The logits at the last positions."""
        assert self._store is not None
        length = ids.shape[1]
        self._store.tokens[: len(ids), begin : begin + length] = ids
        stops = range(chunk_size, length - logits_to_keep + 1, chunk_size) if chunk_size else ()
        start, logits = 0, None
        for stop in (*stops, length):
            inputs: dict[str, Any] = {"input_ids": ids[:, start:stop].contiguous()}
            columns = torch.arange(begin + start, begin + stop, device=ids.device).expand(len(ids), -1)
            if "position_ids" in self.accepted_inputs:
                inputs["position_ids"] = self._forward_rows.positions(columns)
            if "logits_to_keep" in self.accepted_inputs:
                inputs["logits_to_keep"] = logits_to_keep
            inputs[CACHE] = RowCache(self._store, len(ids), begin + start)
            logits = self.model(**inputs, use_cache=True).logits[:, -logits_to_keep:]
            start = stop
        return logits

    @in_mode_of_cache
    def extend(self, ids: torch.Tensor, mask: torch.Tensor | None = None, *, logits_to_keep: int = 1) -> torch.Tensor:
        """See `CachedModel.extend`."""
        ids = self._readable(send(ids, self.device))
        try:
            if mask is None:
                logits = self._read_compiled(ids, [ids.shape[1]] * len(ids))[:, -logits_to_keep:]
            else:
                mask = mask != 0  # on the CPU, so that its values are known
                at = send((mask.cumsum(-1) - 1).clamp(min=0)[:, -logits_to_keep:], ids.device)
                ids, counts = _from_the_left(ids, mask)
                logits = self._read_compiled(ids, counts)
                logits = logits.gather(1, at[..., None].expand(-1, -1, logits.shape[-1]))
        except BaseException:
            self.reset()
            raise
        self.forwards += 1
        return logits

    def _read_compiled(self, ids: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """Read more columns `(B, n)`, of which `counts[b]` are tokens of row b, in compiled forwards.

        Returns:
            Their logits `(B, n, V)`; those behind the tokens of a row are to be ignored.
        """
        columns = ids.shape[1]
        self._make_room(max(self._lengths[: self._bucket]) + columns, len(self._rows))
        parts = []
        for start in range(0, columns, self.width):
            begins = list(self._lengths)
            for row, count in zip(self._rows, counts, strict=True):
                begins[row] += min(start, count)
            parts.append(self._run(ids[:, start : start + self.width], begins[: self._bucket]))
        for row, count in zip(self._rows, counts, strict=True):
            self._lengths[row] += count
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _run(self, ids: torch.Tensor, begins: list[int]) -> torch.Tensor:
        """One compiled forward over `(B, n)` tokens, n at most `width`, behind so many of each row of the bucket."""
        assert self._store is not None
        (rows, new), bucket = ids.shape, self._bucket
        cache = self._caches.get(bucket)
        if cache is None:
            cache = self._caches[bucket] = RowCache(self._store, bucket)
        inputs = ids.new_zeros(bucket, self.width)
        inputs[slice(rows) if self._index is None else self._index, :new] = ids
        cache.starts.copy_(send(begins, cache.starts.device))
        logits = self._compiled.run((bucket, self._store.capacity), cache, inputs)
        self.compiled_forwards[bucket] += 1
        if self._index is not None:
            logits = logits[self._index]
        return logits[:rows, :new]


class _RowForward:
    """The forward that is compiled: new columns of each row, behind what the row has in a static cache.

    Attributes:
        model: the model.
    """

    def __init__(self, model: PreTrainedModel, *, takes_positions: bool, last_position: int | None) -> None:
        self.model, self._takes_positions, self._last_position = model, takes_positions, last_position
        self._masks = ColumnMasks(model)
        self._table: torch.Tensor | None = None

    @property
    def takes_masks(self) -> bool:
        """Whether the model is told what each row attends to; otherwise it finds out itself, for one row."""
        return self._takes_positions and self._masks.are_taken

    def count_positions(self, inputs: ForwardInputs, ids: torch.Tensor) -> None:
        """Ask how the model counts positions, for a text of one row `(1, capacity)`."""
        positions = inputs.positions(PaddedTexts(ids), ids.shape[1]) if self._takes_positions else None
        # Positions in several dimensions are those of images, of which compiled texts have none.
        self._table = None if positions is None or positions.dim() == 2 else positions[..., 0, :]

    def positions(self, columns: torch.Tensor) -> torch.Tensor:
        """The positions `(..., B, n)` of columns `(B, n)`."""
        return columns if self._table is None else self._table[..., columns]

    def __call__(self, cache: RowCache, ids: torch.Tensor) -> torch.Tensor:
        """The logits `(B, n, V)` of all new columns, whose tokens are `ids` `(B, n)`."""
        columns = cache.starts[:, None] + torch.arange(ids.shape[1], device=ids.device)
        cache.tokens.scatter_(1, columns, ids)
        inputs: dict[str, Any] = {"input_ids": ids}
        if self._takes_positions:
            within = columns
            if self._last_position is not None:  # what fills up the forward may lie behind the context
                within = torch.minimum(columns, cache.starts[:, None].clamp(min=self._last_position))
            inputs["position_ids"] = self.positions(within)
        if self.takes_masks:
            inputs["attention_mask"] = self._masks.build(columns, cache.tokens.shape[1], self.model.dtype)
        logits: torch.Tensor = self.model(**inputs, **{CACHE: cache}, use_cache=True).logits
        return logits


def _bucket_of(rows: int) -> int:
    """The smallest power of two that is not below a number of rows."""
    return 1 << (rows - 1).bit_length()


def _from_the_left(ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """Texts `(B, n)` moved to the left, past the columns that a boolean mask leaves out, and their lengths."""
    lengths: list[int] = mask.sum(dim=-1).tolist()
    index = (~mask).long().argsort(dim=-1, stable=True)[:, : max(lengths)]
    return ids.gather(1, send(index, ids.device)), lengths
