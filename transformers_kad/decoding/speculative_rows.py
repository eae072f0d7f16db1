"""The sequences of a speculative call: how they grow, when they end, and what `generate` returns of them."""

from dataclasses import dataclass, field

import torch
from transformers import (
    Cache,
    EosTokenCriteria,
    GenerationConfig,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation import BaseStreamer, GenerateDecoderOnlyOutput

from ..models.by_version import CACHE
from ..records.recorders import RoundRecorder
from .speculative_round import SpeculativeRound
from .text_buffer import TextBuffer


@dataclass
class Row:
    """One sequence, and what is kept of it."""

    number: int  # in the batch of the call
    recorder: RoundRecorder
    scores: list[torch.Tensor] = field(default_factory=list)  # (V,) each
    logits: list[torch.Tensor] = field(default_factory=list)  # (V,) each
    tokens: list[int] = field(default_factory=list)  # of the round
    finished: bool = False

    @property
    def last_token(self) -> int:
        """The newest token, of this round or of those before."""
        return (self.tokens or self.recorder.tokens)[-1]

    def end_round(self, place: int, round_: SpeculativeRound) -> int:
        """Record the round, in which the row has this place, and return the number of tokens emitted in it."""
        tokens, self.tokens = self.tokens, []
        accepted = min(round_.accepted[place], len(tokens))
        self.recorder.record(round_.lengths[place], accepted, tokens, round_.positions(place, len(tokens)))
        return len(tokens)


class Criteria:
    """The stopping criteria of a call, which are asked after every token.

    Attributes:
        need_step: whether one of them may tell the rows of a batch apart by their places in it, or count its calls.
    """

    def __init__(self, criteria: StoppingCriteriaList, eos_token_ids: frozenset[int], rows: int) -> None:
        self.need_step = rows > 1 and any(type(c).__module__ != StoppingCriteria.__module__ for c in criteria)
        self._all = criteria
        # What the two that every call has say is known without a tensor.
        self._max_length = min((c.max_length for c in criteria if type(c) is MaxLengthCriteria), default=None)
        self._eos_token_ids = eos_token_ids if any(type(c) is EosTokenCriteria for c in criteria) else frozenset()
        self._rest = StoppingCriteriaList(c for c in criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria))

    def end_rows(self, rows: list[Row], texts: TextBuffer) -> list[bool]:
        """Whether each of some rows ends with its last token, asked about each of them by itself."""
        ended = self._known_ends(rows, texts)
        if self._rest:
            seen = [tuple(step[None] for step in row.scores) or None for row in rows]
            stops = [self._rest(texts.text(row.number), scores) for row, scores in zip(rows, seen, strict=True)]
            ended = [any(both) for both in zip(ended, torch.cat(stops).tolist(), strict=True)]
        return ended

    def end_rows_together(self, rows: list[Row], texts: TextBuffer, scores: list[torch.Tensor]) -> list[bool]:
        """The same, asked about all texts of the call together; scores `(B, V)` are those that are kept."""
        if not self._rest:
            return self._known_ends(rows, texts)
        ended = self._all(texts.all_texts(), tuple(scores) or None).tolist()
        return [ended[row.number] for row in rows]

    def _known_ends(self, rows: list[Row], texts: TextBuffer) -> list[bool]:
        """Which rows end by their length or an end of sequence, which the host knows."""
        longest = float("inf") if self._max_length is None else self._max_length
        return [texts.lengths[row.number] >= longest or row.last_token in self._eos_token_ids for row in rows]


class Output:
    """What `generate` returns, and shows while it runs."""

    def __init__(
        self, pad_token_id: int | None, generation_config: GenerationConfig, streamer: BaseStreamer | None
    ) -> None:
        self.padding, self._streamer = pad_token_id or 0, streamer
        self._as_dict = generation_config.return_dict_in_generate
        self._keeps_scores = self._as_dict and generation_config.output_scores
        self._keeps_logits = self._as_dict and generation_config.output_logits

    def add_token(self, row: Row, round_: SpeculativeRound, place: int, token: int) -> None:
        """Add a token to a row that has this place in the round."""
        at = len(row.tokens)
        if self._keeps_scores:
            row.scores.append(round_.scores(place, at))
        if self._keeps_logits:
            row.logits.append(round_.base_logits[place, at].clone())
        if self._streamer is not None:
            self._streamer.put(torch.tensor([token], device="cpu"))
        row.tokens.append(token)

    def newest_scores(self, rows: list[Row], emitting: list[Row]) -> list[torch.Tensor]:
        """The scores `(B, V)` of the newest token of all rows, as a list of one; an empty one if none are kept."""
        if not self._keeps_scores:
            return []
        padding = self._scores_of_padding(emitting[0].scores[-1])
        return [torch.stack([row.scores[-1] if any(row is e for e in emitting) else padding for row in rows])]

    def finish(
        self, rows: list[Row], sequences: torch.Tensor, cache: Cache | None
    ) -> torch.Tensor | GenerateDecoderOnlyOutput:
        """The finished rows, and their texts `(B, L)`, filled up on the right."""
        if self._streamer is not None:
            self._streamer.end()
        if not self._as_dict:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=self._by_step([row.scores for row in rows]) if self._keeps_scores else None,
            logits=self._by_step([row.logits for row in rows]) if self._keeps_logits else None,
            **{CACHE: cache},
        )

    def _by_step(self, rows: list[list[torch.Tensor]]) -> tuple[torch.Tensor, ...]:
        """Step by step the scores of all rows, `(B, V)` each; those of a finished row are all on the padding."""
        padding = self._scores_of_padding(rows[0][0])
        steps = max(map(len, rows))
        return tuple(torch.stack([row[at] if at < len(row) else padding for row in rows]) for at in range(steps))

    def _scores_of_padding(self, like: torch.Tensor) -> torch.Tensor:
        scores = torch.full_like(like, -torch.inf)
        if 0 <= self.padding < len(scores):  # an id that was added to the tokenizer alone has no score
            scores[self.padding] = 0.0
        return scores


class RowByRow:
    """Rows whose criteria are asked about each of them by itself.

    They grow by different numbers of tokens, unless the round ends for all of them together.
    """

    in_step = False

    def __init__(self, rows: list[Row], texts: TextBuffer, criteria: Criteria, output: Output) -> None:
        self.rows, self.texts, self.criteria, self.output = rows, texts, criteria, output

    def emit(self, round_: SpeculativeRound, tokens: dict[int, list[int]]) -> list[int]:
        """Emit tokens at places of a round until a criterion ends the row, or, in step, until one has no more.

        Returns the places of the rows that no criterion ended.
        """
        going_on, at, together = list(tokens), 0, self.in_step or round_.in_step
        while emitting := self._places_with_more(tokens, going_on, at, together=together):
            rows = [self.rows[round_.rows[place]] for place in emitting]
            for place, row in zip(emitting, rows, strict=True):
                self.output.add_token(row, round_, place, tokens[place][at])
            self._grow(rows)
            for row, ended in zip(rows, self._ends(rows), strict=True):
                row.finished = ended
            going_on = [place for place in going_on if not self.rows[round_.rows[place]].finished]
            at += 1
        return going_on

    def _grow(self, rows: list[Row]) -> None:
        """Append the newest tokens of some rows to the texts."""
        for row in rows:
            self.texts.append(row.number, row.last_token)

    def _ends(self, rows: list[Row]) -> list[bool]:
        """Whether each of some rows ends with its newest token."""
        return self.criteria.end_rows(rows, self.texts)

    @staticmethod
    def _places_with_more(tokens: dict[int, list[int]], going_on: list[int], at: int, *, together: bool) -> list[int]:
        """The rows that go on and have a token at a position. Where they go together, all of them have or none."""
        places = [place for place in going_on if len(tokens[place]) > at]
        return places if len(places) == len(going_on) or not together else []


class InStep(RowByRow):
    """Rows that all grow by the same number of tokens, and are asked about together, as `generate` does it.

    Finished rows are filled up with padding. A round emits no more tokens of a row than all rows that go on have.
    """

    in_step = True

    def __init__(self, rows: list[Row], texts: TextBuffer, criteria: Criteria, output: Output) -> None:
        super().__init__(rows, texts, criteria, output)
        self._scores: list[torch.Tensor] = []  # (B, V) each

    def _grow(self, rows: list[Row]) -> None:
        newest = {row.number: row.last_token for row in rows}
        for row in self.rows:
            self.texts.append(row.number, newest.get(row.number, self.output.padding))
        self._scores += self.output.newest_scores(self.rows, rows)

    def _ends(self, rows: list[Row]) -> list[bool]:
        return self.criteria.end_rows_together(rows, self.texts, self._scores)
