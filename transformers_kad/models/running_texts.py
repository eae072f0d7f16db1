"""A model that reads texts which join and leave at every step, as an engine with continuous batching does."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from .cached_model import CachedModel

# A prompt is read in forwards of at most so many tokens, which bounds the memory of their intermediate results.
PROMPT_CHUNK = 1024


@dataclass
class _Batch:
    """Texts that are read together, one in each row, and the model's cache of them."""

    reader: CachedModel
    keys: list[Hashable]
    lengths: list[int]  # of each text, in tokens
    drafts: list[list[int]]  # the tokens at the end of each text that the next step may refuse

    @property
    def columns(self) -> int:
        """How many columns the cache has, or will have when it is filled again."""
        return max(self.reader.cached_length, *self.lengths)


class RunningTexts:
    """The logits of a model for texts that grow by a token between two steps, or by some and a draft.

    The texts are the rows of a padded batch with one cache, which is read in one forward. Texts that join are read in
    one more forward, and become rows of the same batch where all layers have full attention. Texts of other models
    stay in a batch with those that joined in the same step.

    Args:
        model: a causal LM or a `PeftModel`.
        role: what error messages call it.
        without_adapter: read with the adapter of a `PeftModel` switched off.
        cache_bytes: the most memory that the caches may take together; None without a limit. Texts that do
            not fit are read as a whole at every step, one after the other and without a cache. While a cache grows,
            one of its layers is there twice.

    Attributes:
        forwards: how many forwards were made, where the chunks of a prompt count as one.

    Raises:
        ValueError: the model is in training mode, or its adapters can't serve.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        role: str = "proxy",
        *,
        without_adapter: bool = False,
        cache_bytes: int | None = None,
    ) -> None:
        self.model = model
        self.role = role
        self.cache_bytes = float("inf") if cache_bytes is None else cache_bytes
        self.forwards = 0
        self._without_adapter = without_adapter
        self._batches: list[_Batch] = []
        sample = self._new_reader()  # which refuses models that can't serve
        self._row_bytes, self._token_bytes = (0, 0) if cache_bytes is None else self._measure(sample)

    def _new_reader(self) -> CachedModel:
        reader = CachedModel(self.model, self.role, without_adapter=self._without_adapter)
        reader.refresh(state="running")  # the weights do not change, so that no fingerprint of them is taken
        return reader

    def _measure(self, reader: CachedModel) -> tuple[int, int]:
        """The memory of a row without tokens, and of each token, in bytes; more than that for sliding windows."""
        sizes = []
        for length in (1, 2):
            reader.reset()
            reader.logits(torch.zeros(1, length, dtype=torch.long, device=reader.device))
            sizes.append(reader.cache_bytes)
        per_token = sizes[1] - sizes[0]
        return max(sizes[0] - per_token, 0), per_token

    def _size(self, rows: int, columns: int) -> int:
        return rows * (self._row_bytes + columns * self._token_bytes)

    @property
    def cached_bytes(self) -> int:
        """The memory of the caches, in bytes."""
        return sum(batch.reader.cache_bytes for batch in self._batches)

    @property
    def cached_rows(self) -> int:
        """How many texts are in the caches."""
        return sum(len(batch.keys) for batch in self._batches)

    def logits(self, texts: Mapping[Any, Sequence[int]], positions: Mapping[Any, int] | None = None) -> torch.Tensor:
        """The logits at the last positions of each text, `(positions of all texts, V)`, in the order of the texts.

        Args:
            texts: their tokens, by keys that belong to one text each. A text that was read in the step before has the
                same tokens as then, apart from its draft, of which it may have kept the first tokens. Behind them it
                has at most one token more, and the draft of this step. Other texts are read from their beginning.
            positions: how many positions of each text are wanted: one more than the tokens of its draft, which stand
                at its end. By default there are no drafts, and the rows are `(texts, V)`.

        Raises:
            ContextLengthError: a text is longer than the model's context.
        """
        wanted = dict.fromkeys(texts, 1) if positions is None else positions
        for batch in self._batches:
            self._end_step(batch, texts, wanted)
        self._make_room(wanted)
        found: dict[Hashable, torch.Tensor] = {}
        for batch in self._batches:
            found |= self._grow(batch, texts, wanted)
        found |= self._join({key: text for key, text in texts.items() if key not in found}, wanted)
        return torch.cat([found[key] for key in texts])

    def _end_step(self, batch: _Batch, texts: Mapping[Any, Sequence[int]], wanted: Mapping[Any, int]) -> None:
        """Keep the rows that can be read on, and take back the refused tokens, or those that are read once more."""
        taken_back = [self._count_refused(batch, row, texts, wanted) for row in range(len(batch.keys))]
        staying = [row for row, count in enumerate(taken_back) if count is not None]
        counts = {count for count in taken_back if count is not None}
        sizes = {wanted[batch.keys[row]] for row in staying}
        if max(len(counts), len(sizes)) > 1 and batch.reader.needs_rows_in_step:
            staying = []
        if staying:  # a row that leaves takes back what suits the others
            batch.reader.take_back([min(counts) if count is None else count for count in taken_back])
        self._select(batch, staying)

    def _count_refused(
        self, batch: _Batch, row: int, texts: Mapping[Any, Sequence[int]], wanted: Mapping[Any, int]
    ) -> int | None:
        """How many tokens at its end a row takes back, None if it can't be read on."""
        key, length, draft = batch.keys[row], batch.lengths[row], batch.drafts[row]
        if key not in texts:
            return None
        text, begin = texts[key], length - len(draft)
        agreeing = 0
        while agreeing < len(draft) and begin + agreeing < len(text) and text[begin + agreeing] == draft[agreeing]:
            agreeing += 1
        kept = min(begin + agreeing, len(text) - wanted[key])
        is_next_step = begin - 1 <= kept == len(text) - wanted[key]
        return length - kept if is_next_step else None

    def _select(self, batch: _Batch, rows: Sequence[int]) -> None:
        if len(rows) == len(batch.keys):
            return
        batch.keys = [batch.keys[row] for row in rows]
        batch.lengths = [batch.lengths[row] for row in rows]
        batch.drafts = [batch.drafts[row] for row in rows]
        if rows:
            batch.reader.select_rows(list(rows))

    def _make_room(self, wanted: Mapping[Any, int]) -> None:
        """Leave out the rows, from the last on, that do not fit into the memory once all have grown."""
        left = self.cache_bytes
        for batch in self._batches:
            if not batch.keys:
                continue
            columns = batch.columns + max(wanted[key] for key in batch.keys)
            fitting = len(batch.keys)
            while fitting and self._size(fitting, columns) > left:
                fitting -= 1
            self._select(batch, range(fitting))
            left -= self._size(fitting, columns)
        self._batches = [batch for batch in self._batches if batch.keys]

    def _grow(
        self, batch: _Batch, texts: Mapping[Any, Sequence[int]], wanted: Mapping[Any, int]
    ) -> dict[Hashable, torch.Tensor]:
        """Read the last token of each row, and its draft."""
        sizes = [wanted[key] for key in batch.keys]
        rows = [[texts[key][at] for at in range(-size, 0)] for key, size in zip(batch.keys, sizes, strict=True)]
        batch.lengths = [len(texts[key]) for key in batch.keys]
        batch.drafts = [row[1:] for row in rows]
        batch.reader.check_length(max(batch.lengths))
        self.forwards += 1
        ids, mask = _padded(rows)
        ragged = None if min(sizes) == max(sizes) else mask
        logits = batch.reader.extend(ids.to(batch.reader.device), ragged, logits_to_keep=max(sizes))
        return _last_of_each(batch.keys, logits, sizes)

    def _join(self, texts: Mapping[Any, Sequence[int]], wanted: Mapping[Any, int]) -> dict[Hashable, torch.Tensor]:
        """Read texts from their beginning: as many as fit into the memory together, the others one by one."""
        left = self.cache_bytes - sum(self._size(len(batch.keys), batch.columns) for batch in self._batches)
        together, longest = list[Hashable](), 0
        for key, text in texts.items():
            columns = max(longest, len(text))
            if self._size(len(together) + 1, columns) <= left:
                together.append(key)
                longest = columns
        found = self._read_together({key: texts[key] for key in together}, wanted) if together else {}
        for key, text in texts.items():
            if key not in found:
                reader = self._new_reader()
                reader.has_cache = False
                found |= self._read(reader, {key: text}, wanted)
        return found

    def _read_together(
        self, texts: Mapping[Any, Sequence[int]], wanted: Mapping[Any, int]
    ) -> dict[Hashable, torch.Tensor]:
        drafts = [[text[at] for at in range(1 - wanted[key], 0)] for key, text in texts.items()]
        new = _Batch(self._new_reader(), list(texts), [len(text) for text in texts.values()], drafts)
        found = self._read(new.reader, texts, wanted)
        for batch in self._batches:
            if self._can_join(batch, new) and batch.reader.join(new.reader):
                batch.keys += new.keys
                batch.lengths += new.lengths
                batch.drafts += new.drafts
                break
        else:
            self._batches.append(new)
        return found

    def _can_join(self, batch: _Batch, new: _Batch) -> bool:
        """Whether two batches fit into the memory as one, with the padding that this needs."""
        others = sum(self._size(len(other.keys), other.columns) for other in self._batches if other is not batch)
        columns = max(batch.columns, new.columns)
        return others + self._size(len(batch.keys) + len(new.keys), columns) <= self.cache_bytes

    def _read(
        self, reader: CachedModel, texts: Mapping[Any, Sequence[int]], wanted: Mapping[Any, int]
    ) -> dict[Hashable, torch.Tensor]:
        """The logits at the last positions of texts that are read from their beginning."""
        ids, mask = (part.to(reader.device) for part in _padded([list(text) for text in texts.values()]))
        sizes = [wanted[key] for key in texts]
        self.forwards += 1
        # The last tokens count as those behind the prompt, so that they can be taken back and read again.
        logits = reader.logits(
            ids,
            mask,
            logits_to_keep=max(sizes),
            chunk_size=PROMPT_CHUNK,
            prompt_length=ids.shape[1] - max(sizes),
        )
        return _last_of_each(list(texts), logits, sizes)


def _padded(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of different length with padding before them, `(B, n)`, and their mask."""
    columns = max(map(len, rows))
    ids = torch.tensor([[0] * (columns - len(row)) + list(row) for row in rows])
    return ids, torch.tensor([[0] * (columns - len(row)) + [1] * len(row) for row in rows])


def _last_of_each(
    keys: Sequence[Hashable], logits: torch.Tensor, sizes: Sequence[int]
) -> dict[Hashable, torch.Tensor]:
    """For each row of logits `(B, n, V)` the last `sizes[b]` positions."""
    return {key: row[-size:] for key, row, size in zip(keys, logits, sizes, strict=True)}
