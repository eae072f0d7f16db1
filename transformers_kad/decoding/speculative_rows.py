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

from ..records.recorders import RoundRecorder
from .speculative_round import SpeculativeRound


@dataclass
class Row:
    """One sequence: its text `(1, L)`, padding on the left included, and what is kept of it."""

    text: torch.Tensor
    recorder: RoundRecorder
    scores: list[torch.Tensor] = field(default_factory=list)  # (V,) each
    logits: list[torch.Tensor] = field(default_factory=list)  # (V,) each
    tokens: list[int] = field(default_factory=list)  # of the round
    finished: bool = False

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
        # The two that every call has are answered without a tensor.
        self._max_length = min((c.max_length for c in criteria if type(c) is MaxLengthCriteria), default=None)
        self._eos_token_ids = eos_token_ids if any(type(c) is EosTokenCriteria for c in criteria) else frozenset()
        self._rest = StoppingCriteriaList(c for c in criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria))

    def end_row(self, text: torch.Tensor, scores: list[torch.Tensor], token: int) -> bool:
        """Whether a text `(1, L)` ends with its last token; scores `(V,)` are those that are kept."""
        stops = [self._max_length is not None and text.shape[1] >= self._max_length, token in self._eos_token_ids]
        if self._rest:
            seen = tuple(step[None] for step in scores) or None
            stops.append(bool(self._rest(text, seen).all()))
        return any(stops)

    def end_rows(self, texts: torch.Tensor, scores: list[torch.Tensor]) -> list[bool]:
        """Whether each of the texts `(B, L)` ends with its last token; scores `(B, V)` are those that are kept."""
        ended: list[bool] = self._all(texts, tuple(scores) or None).tolist()
        return ended


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

    def finish(self, rows: list[Row], cache: Cache | None) -> torch.Tensor | GenerateDecoderOnlyOutput:
        """The finished rows, filled up on the right."""
        if self._streamer is not None:
            self._streamer.end()
        sequences = torch.nn.utils.rnn.pad_sequence(
            [row.text[0] for row in rows], batch_first=True, padding_value=self.padding
        )
        if not self._as_dict:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=self._by_step([row.scores for row in rows]) if self._keeps_scores else None,
            logits=self._by_step([row.logits for row in rows]) if self._keeps_logits else None,
            past_key_values=cache,
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

    def __init__(self, rows: list[Row], criteria: Criteria, output: Output) -> None:
        self.rows, self.criteria, self.output = rows, criteria, output

    def emit(self, round_: SpeculativeRound, tokens: dict[int, list[int]]) -> list[int]:
        """Emit tokens at places of a round until a criterion ends the row, or, in step, until one has no more.

        Returns the places of the rows that no criterion ended.
        """
        texts = {
            place: torch.cat([row.text, row.text.new_tensor([own], dtype=torch.long)], dim=-1)
            for place, own, row in ((place, own, self.rows[round_.rows[place]]) for place, own in tokens.items())
        }
        going_on, at = list(tokens), 0
        while emitting := self._places_with_more(tokens, going_on, at, together=round_.in_step):
            for place in emitting:
                row, token = self.rows[round_.rows[place]], tokens[place][at]
                self.output.add_token(row, round_, place, token)
                row.text = texts[place][:, : row.text.shape[1] + 1]
                row.finished = self.criteria.end_row(row.text, row.scores, token)
            going_on = [place for place in going_on if not self.rows[round_.rows[place]].finished]
            at += 1
        return going_on

    @staticmethod
    def _places_with_more(tokens: dict[int, list[int]], going_on: list[int], at: int, *, together: bool) -> list[int]:
        """The rows that go on and have a token at a position. Where they go together, all of them have or none."""
        places = [place for place in going_on if len(tokens[place]) > at]
        return places if len(places) == len(going_on) or not together else []

    def whole_batch(self) -> torch.Tensor:
        """All texts `(B, L)`, where they go in step."""
        raise NotImplementedError


class InStep(RowByRow):
    """Rows that all grow by the same number of tokens, and are asked about together, as `generate` does it.

    Finished rows are filled up with padding. A round emits no more tokens of a row than all rows that go on have.
    """

    in_step = True

    def __init__(self, rows: list[Row], criteria: Criteria, output: Output) -> None:
        super().__init__(rows, criteria, output)
        self._batch = torch.cat([row.text for row in rows])  # (B, L)
        self._scores: list[torch.Tensor] = []  # (B, V) each

    def whole_batch(self) -> torch.Tensor:
        """See `RowByRow.whole_batch`."""
        return self._batch

    def emit(self, round_: SpeculativeRound, tokens: dict[int, list[int]]) -> list[int]:
        """See `RowByRow.emit`."""
        going_on, at = list(tokens), 0
        while self._places_with_more(tokens, going_on, at, together=True):
            newest = self._batch.new_full((len(self.rows), 1), self.output.padding)
            emitting = [self.rows[round_.rows[place]] for place in going_on]
            for place, row in zip(going_on, emitting, strict=True):
                self.output.add_token(row, round_, place, tokens[place][at])
                newest[round_.rows[place]] = tokens[place][at]
            self._batch = torch.cat([self._batch, newest], dim=-1)
            self._scores += self.output.newest_scores(self.rows, emitting)
            ended = self.criteria.end_rows(self._batch, self._scores)
            for place, row in zip(going_on, emitting, strict=True):
                row.text = self._batch[round_.rows[place]][None]
                row.finished = ended[round_.rows[place]]
            going_on = [place for place in going_on if not self.rows[round_.rows[place]].finished]
            at += 1
        return going_on
