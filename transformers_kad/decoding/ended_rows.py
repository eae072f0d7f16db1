"""Which rows of a call that decodes token by token have ended, and where."""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from transformers import StoppingCriteria


class EndedRows(StoppingCriteria):
    """A stopping criterion that asks others, answers for them, and notes which rows have ended.

    `generate` asks its criteria after every token, and fills the rows that have ended up with padding, which can't be
    told from their text: a text may end with the padding's id, and the padding may be an end of sequence. A logits
    processor is called on those rows all the same.

    Args:
        criteria: asked, once a step, and answered for.
        eos_token_ids: ids that end a text. `generate` has a criterion of its own for them.
        fills_up: whether `generate` fills up the rows that have ended. Otherwise they go on, and so they count here.

    Attributes:
        asks_criteria: whether there are any, so that a row may end at another id than those.
        flags: which rows have ended, `(rows,)` boolean; None before the first token.
        lengths: the lengths of the texts in tokens up to there, prompts included, `(rows,)`.
    """

    def __init__(
        self, criteria: Iterable[StoppingCriteria], eos_token_ids: Collection[int], *, fills_up: bool
    ) -> None:
        self._criteria = list(criteria)
        self.asks_criteria = bool(self._criteria)
        self._eos = torch.tensor(sorted(eos_token_ids), dtype=torch.long, device="cpu")
        self._fills_up = fills_up
        self.flags: torch.Tensor | None = None
        self.lengths: torch.Tensor | None = None
        for criterion in self._criteria:
            if hasattr(criterion, "eos_token_id"):  # by this `generate` knows that it is to fill rows up
                self.eos_token_id = criterion.eos_token_id

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Which of the texts `(rows, L)` the criteria end, `(rows,)` boolean."""
        ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for criterion in self._criteria:
            ended = ended | criterion(input_ids, scores, **kwargs)
        self._eos = self._eos.to(input_ids.device)
        self._note(input_ids.shape[1], ended | torch.isin(input_ids[:, -1], self._eos))
        return ended

    def _note(self, length: int, ended: torch.Tensor) -> None:
        if not self._fills_up:
            ended = torch.zeros_like(ended)
        if self.flags is None or self.lengths is None or len(self.flags) != len(ended):
            self.flags, self.lengths = torch.zeros_like(ended), torch.zeros_like(ended, dtype=torch.long)
        self.lengths = torch.where(self.flags, self.lengths, length)
        self.flags = self.flags | ended
