"""A model over texts that grow token by token while others join and leave: the proxy beside an engine's batch."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from .cached_model import CachedModel
from .padding import PaddedTexts

# The padding before all texts is dropped when there is more of it than this share of the longest text.
LARGEST_SHARE_OF_PADDING = 0.25


class RunningTexts:
    """A model over the texts of running requests, which are the rows of one padded batch.

    A step takes one forward over all texts that were there in the step before, and one more over those that join. With
    full attention the cache of the latter is put to that of the others. With other layers, all texts are read again in
    the step that follows.

    Args:
        model: the proxy or the reference.
        role: what error messages call it.
        without_adapter: see `CachedModel`.

    Attributes:
        forwards: how many forwards were made.

    Raises:
        ValueError: the model is in training mode, or its adapters can't serve.
    """

    def __init__(self, model: PreTrainedModel, role: str, *, without_adapter: bool = False) -> None:
        self.model = model
        self.role = role
        self.forwards = 0
        self._without_adapter = without_adapter
        self._reader = self._new_reader()
        self._rows: list[Hashable] = []
        self._lengths: list[int] = []  # of the text of each row, in tokens
        self._texts: PaddedTexts | None = None

    def _new_reader(self) -> CachedModel:
        reader = CachedModel(self.model, self.role, without_adapter=self._without_adapter)
        reader.refresh(state="running")  # the weights are those of the session: no fingerprint is taken of them
        return reader

    def logits(self, texts: Mapping[Any, Sequence[int]]) -> torch.Tensor:
        """The model's logits for the next token of each text, `(texts, V)`, in their order.

        Args:
            texts: the tokens of each running request, by its name. One that was there in the step before and has one
                more token now continues its text. One that is missing leaves.
        """
        grown = [
            len(texts.get(name, ())) == length + 1 for name, length in zip(self._rows, self._lengths, strict=True)
        ]
        self._leave([row for row, has_grown in enumerate(grown) if has_grown])
        joining = [name for name in texts if name not in {*self._rows}]
        parts = []
        if self._rows:
            parts.append(self._grow([texts[name][-1] for name in self._rows]))
        if joining:
            parts.append(self._join(joining, [texts[name] for name in joining]))
        row_of = {name: row for row, name in enumerate(self._rows)}
        return torch.cat(parts)[[row_of[name] for name in texts]]

    def _leave(self, staying: list[int]) -> None:
        """Go on with some of the rows."""
        if len(staying) == len(self._rows):
            return
        self._rows = [self._rows[row] for row in staying]
        self._lengths = [self._lengths[row] for row in staying]
        if not staying:
            self._texts = None
            return
        assert self._texts is not None
        self._reader.select_rows(staying)
        self._texts = self._texts.select_rows(staying)
        longest = max(self._lengths)
        if self._texts.columns > longest * (1 + LARGEST_SHARE_OF_PADDING):
            self._reader.drop_padding(longest)
            self._texts = self._texts.without_first(self._texts.columns - longest)

    def _grow(self, tokens: list[int]) -> torch.Tensor:
        """Read one more token of each row: logits `(rows, V)`."""
        assert self._texts is not None
        self._texts = self._texts.extend(torch.tensor(tokens, device=self._reader.device)[:, None], None)
        self._lengths = [length + 1 for length in self._lengths]
        self.forwards += 1
        return self._reader.logits(self._texts.ids, self._texts.mask, continues=True)[:, -1]

    def _join(self, names: list[Hashable], texts: list[Sequence[int]]) -> torch.Tensor:
        """Read texts that join: logits `(names, V)`."""
        lengths = [len(text) for text in texts]
        longest = max(lengths)
        ids = torch.tensor([[0] * (longest - len(text)) + [*text] for text in texts], device=self._reader.device)
        before = longest - torch.tensor(lengths, device=self._reader.device)
        mask = (torch.arange(longest, device=self._reader.device) >= before[:, None]).long()
        reader, new = self._new_reader(), PaddedTexts(ids, mask)
        logits = reader.logits(ids, mask)[:, -1]
        self.forwards += 1
        if self._texts is None:
            self._reader, self._texts = reader, new
        else:
            columns = max(self._texts.columns, longest)
            if not self._reader.join(reader):
                self._reader.reset()
            self._texts = self._texts.padded_to(columns).join(new.padded_to(columns))
        self._rows += names
        self._lengths += lengths
        return logits
