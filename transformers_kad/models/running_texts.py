"""A model that reads texts which join and leave at every step, as an engine with continuous batching does."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
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

    @property
    def columns(self) -> int:
        """How many columns the cache has, or will have when it is filled again."""
        return max(self.reader.cached_length, *self.lengths)


class RunningTexts:
    """The logits of a model for the next token of texts that grow by at most one token between two steps.

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
        self._row_bytes, self._token_bytes = self._measure()

    def _new_reader(self) -> CachedModel:
        reader = CachedModel(self.model, self.role, without_adapter=self._without_adapter)
        reader.refresh(state="running")  # the weights do not change, so that no fingerprint of them is taken
        return reader

    def _measure(self) -> tuple[int, int]:
        """The memory of a row without tokens, and of each token, in bytes; more than that for sliding windows."""
        sizes = []
        for length in (1, 2):
            reader = self._new_reader()
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

    def logits(self, texts: Mapping[Any, Sequence[int]]) -> torch.Tensor:
        """The logits for the next token of each text, `(texts, V)`, in the order of the texts.

        Args:
            texts: their tokens, by keys that belong to one text each. A text that was read in the step before has the
                same tokens as then, and perhaps one more; others are read from their beginning.

        Raises:
            ContextLengthError: a text is longer than the model's context.
        """
        for batch in self._batches:
            self._end_step(batch, texts)
        self._make_room()
        found: dict[Hashable, torch.Tensor] = {}
        for batch in self._batches:
            found |= self._grow(batch, texts)
        found |= self._join({key: text for key, text in texts.items() if key not in found})
        return torch.stack([found[key] for key in texts])

    def _end_step(self, batch: _Batch, texts: Mapping[Any, Sequence[int]]) -> None:
        """Keep the rows that can be read on, and take back the last token of texts that have not grown."""
        lengths = zip(batch.keys, batch.lengths, strict=True)
        grown = [len(texts[key]) - length if key in texts else -1 for key, length in lengths]
        staying = [row for row, more in enumerate(grown) if more in (0, 1)]
        steps = {grown[row] for row in staying}
        if len(steps) > 1 and batch.reader.needs_rows_in_step:
            staying = []
        if staying:  # a row that leaves takes back what suits the others
            batch.reader.take_back([1 - (more if more in steps else min(steps)) for more in grown])
        self._select(batch, staying)

    def _select(self, batch: _Batch, rows: Sequence[int]) -> None:
        if len(rows) == len(batch.keys):
            return
        batch.keys = [batch.keys[row] for row in rows]
        batch.lengths = [batch.lengths[row] for row in rows]
        if rows:
            batch.reader.select_rows(list(rows))

    def _make_room(self) -> None:
        """Leave out the rows, from the last on, that do not fit into the memory once all have grown by a token."""
        left = self.cache_bytes
        for batch in self._batches:
            if not batch.keys:
                continue
            columns, fitting = batch.columns + 1, len(batch.keys)
            while fitting and self._size(fitting, columns) > left:
                fitting -= 1
            self._select(batch, range(fitting))
            left -= self._size(fitting, columns)
        self._batches = [batch for batch in self._batches if batch.keys]

    def _grow(self, batch: _Batch, texts: Mapping[Any, Sequence[int]]) -> dict[Hashable, torch.Tensor]:
        """Read the last token of each row."""
        tokens = torch.tensor([[texts[key][-1]] for key in batch.keys], device=batch.reader.device)
        batch.lengths = [len(texts[key]) for key in batch.keys]
        batch.reader.check_length(max(batch.lengths))
        self.forwards += 1
        return dict(zip(batch.keys, batch.reader.extend(tokens)[:, -1], strict=True))

    def _join(self, texts: Mapping[Any, Sequence[int]]) -> dict[Hashable, torch.Tensor]:
        """Read texts from their beginning: as many as fit into the memory together, the others one by one."""
        left = self.cache_bytes - sum(self._size(len(batch.keys), batch.columns) for batch in self._batches)
        together, longest = list[Hashable](), 0
        for key, text in texts.items():
            columns = max(longest, len(text))
            if self._size(len(together) + 1, columns) <= left:
                together.append(key)
                longest = columns
        found = self._read_together({key: texts[key] for key in together}) if together else {}
        for key, text in texts.items():
            if key not in found:
                reader = self._new_reader()
                reader.has_cache = False
                found[key] = self._read(reader, [text])[0]
        return found

    def _read_together(self, texts: Mapping[Any, Sequence[int]]) -> dict[Hashable, torch.Tensor]:
        new = _Batch(self._new_reader(), list(texts), [len(text) for text in texts.values()])
        logits = self._read(new.reader, texts.values())
        for batch in self._batches:
            if self._can_join(batch, new) and batch.reader.join(new.reader):
                batch.keys += new.keys
                batch.lengths += new.lengths
                break
        else:
            self._batches.append(new)
        return dict(zip(texts, logits, strict=True))

    def _can_join(self, batch: _Batch, new: _Batch) -> bool:
        """Whether two batches fit into the memory as one, with the padding that this needs."""
        others = sum(self._size(len(other.keys), other.columns) for other in self._batches if other is not batch)
        columns = max(batch.columns, new.columns)
        return others + self._size(len(batch.keys) + len(new.keys), columns) <= self.cache_bytes

    def _read(self, reader: CachedModel, texts: Iterable[Sequence[int]]) -> torch.Tensor:
        """The logits behind whole texts, `(texts, V)`."""
        rows = [list(text) for text in texts]
        columns = max(map(len, rows))
        ids = torch.tensor([[0] * (columns - len(row)) + row for row in rows], device=reader.device)
        mask = torch.tensor([[0] * (columns - len(row)) + [1] * len(row) for row in rows], device=reader.device)
        self.forwards += 1
        # The last token counts as one behind the prompt, so that it can be taken back and read again.
        return reader.logits(ids, mask, chunk_size=PROMPT_CHUNK, prompt_length=columns - 1)[:, -1]
