"""Drafts that cost no proxy step: what followed the last tokens earlier in the text."""

from collections.abc import Sequence

import torch
from transformers.generation import PromptLookupCandidateGenerator

from ..utils.transfers import send
from .candidate_generator import Draft, KADCandidateGenerator

# The longest run of last tokens that is looked for.
LONGEST_MATCH = 3


class PromptLookup(KADCandidateGenerator):
    """Drafts by n-grams of the text so far; base and proxy both verify the draft, in one forward each.

    The draft is certain, which is a one-hot q in the sense of speculative sampling: a token y is accepted with
    probability r(y). Where nothing is found, a round is one token of each model.

    Source: Saxena, "Prompt Lookup Decoding", 2023; the lookup itself is transformers' own.
    """

    def begin(self, input_ids: torch.Tensor) -> None:
        """See `KADCandidateGenerator.begin`."""
        super().begin(input_ids)
        self._texts = [row.cpu() for row in input_ids.split(1)]

    def draft(
        self, tokens: torch.Tensor | None, lengths: list[int], base_limits: Sequence[int | None] | None = None
    ) -> Draft:
        """See `KADCandidateGenerator.draft`."""
        if tokens is not None:
            self._texts = [
                torch.cat([text, token], dim=-1) for text, token in zip(self._texts, tokens.split(1), strict=True)
            ]
        limits = self._draft_limits(tokens, lengths, base_limits)
        found = [self._look_up(text, limit) for text, limit in zip(self._texts, limits, strict=True)]
        found = self.reader.cut_to_context(tokens, found)
        longest = max(map(len, found))
        self._found = torch.tensor([ids + [0] * (longest - len(ids)) for ids in found], dtype=torch.long, device="cpu")
        self._found = self._found.view(len(found), longest)
        ids, counts = send(self._found, self._device), send([len(own) for own in found], self._device)
        read = self._found if tokens is None else torch.cat([tokens, self._found], dim=-1)
        logits = self.reader.read(read, logits_to_keep=longest + 1)
        probs = torch.zeros_like(logits[:, :longest]).scatter(-1, ids[..., None], 1.0)
        return Draft(ids, probs, counts, logits, known_ids=self._found)

    def accept(self, accepted: list[int]) -> None:
        """See `KADCandidateGenerator.accept`."""
        super().accept(accepted)
        self._texts = [
            torch.cat([text, ids[None, :count]], dim=-1)
            for text, ids, count in zip(self._texts, self._found, accepted, strict=True)
        ]

    def select_rows(self, rows: list[int]) -> None:
        """See `KADCandidateGenerator.select_rows`."""
        super().select_rows(rows)
        self._texts = [self._texts[row] for row in rows]

    def _look_up(self, text: torch.Tensor, limit: int) -> list[int]:
        """What followed the longest match of the end of a text `(1, L)`: at most `limit` tokens, up to an end."""
        if limit == 0 or text.shape[1] < 2:
            return []
        lookup = PromptLookupCandidateGenerator(
            num_output_tokens=limit, max_matching_ngram_size=LONGEST_MATCH, max_length=text.shape[1] + limit + 1
        )
        candidates, _ = lookup.get_candidates(text)
        ids: list[int] = candidates[0, text.shape[1] :].tolist()
        ends = [at for at, token in enumerate(ids) if token in self.eos_token_ids]
        return ids[: ends[0] + 1] if ends else ids
