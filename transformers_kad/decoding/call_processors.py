"""The other processors of a call, as a round of speculative decoding runs them on a whole draft."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import LogitsProcessor
from transformers.generation import logits_process as theirs

from ..models.model_errors import is_unusable
from ..utils.transfers import send

# Functions of the scores alone, so that all positions of all rows are one call.
_OF_SCORES = (
    theirs.EpsilonLogitsWarper,
    theirs.EtaLogitsWarper,
    theirs.LogitNormalization,
    theirs.MinPLogitsWarper,
    theirs.SuppressTokensLogitsProcessor,
    theirs.TemperatureLogitsWarper,
    theirs.TopKLogitsWarper,
    theirs.TopPLogitsWarper,
    theirs.TypicalLogitsWarper,
)

# Functions of a row's text and its scores, which keep no state: positions can be processed before they are reached.
_OF_TEXT_AND_SCORES = (
    theirs.ExponentialDecayLengthPenalty,
    theirs.ForcedBOSTokenLogitsProcessor,
    theirs.ForcedEOSTokenLogitsProcessor,
    theirs.InfNanRemoveLogitsProcessor,
    theirs.MinLengthLogitsProcessor,
    theirs.MinNewTokensLengthLogitsProcessor,
    theirs.NoBadWordsLogitsProcessor,
    theirs.NoRepeatNGramLogitsProcessor,
    theirs.RepetitionPenaltyLogitsProcessor,
    theirs.SequenceBiasLogitsProcessor,
    theirs.SuppressTokensAtBeginLogitsProcessor,
    theirs.TopHLogitsWarper,
    theirs.WatermarkLogitsProcessor,
)

# The same, but made for the prompts of all rows of a batch together.
_OF_BATCHES = (theirs.EncoderNoRepeatNGramLogitsProcessor, theirs.EncoderRepetitionPenaltyLogitsProcessor)

_PURE = {*_OF_SCORES, *_OF_TEXT_AND_SCORES, *_OF_BATCHES}
_OF_SINGLE_ROWS = {*_OF_SCORES, *_OF_TEXT_AND_SCORES, theirs.PrefixConstrainedLogitsProcessor}  # see `_for_row`


@dataclass(frozen=True)
class RowTexts:
    """The texts of a round, for processors that look at them.

    Attributes:
        rows: the numbers of the rows in the batch of the call.
        texts: of each row the text with its draft, `(1, L)`; empty where no processor looks at texts.
        lengths: of each row the length of the text without its draft.
        whole_batch: returns the texts of all rows of the call, `(B, L)`, where they go in step.
    """

    rows: list[int]
    texts: list[torch.Tensor]
    lengths: list[int]
    whole_batch: Callable[[], torch.Tensor]


class CallProcessors:
    """The processors of a call that stand before KAD in its list, or those that stand behind it.

    Only processors that are known to keep no state are called for positions that a text may never reach. All others,
    one of the user's or one that a later transformers adds, are called as `generate` calls them: once for each token
    that is emitted, in order.

    Args:
        processors: in the order of the list.
        rows: number of rows of the batch.
        in_step: whether the rows of the batch go in step, see `must_go_in_step`.
    """

    def __init__(self, processors: Sequence[LogitsProcessor], rows: int, *, in_step: bool) -> None:
        self._in_step = in_step
        self._of_rows = [
            [processor if in_step else _for_row(processor, row, rows) for row in range(rows)]
            for processor in processors
        ]

    def __bool__(self) -> bool:
        return bool(self._of_rows)

    def __call__(self, begin: int, scores: torch.Tensor, texts: RowTexts, going_on: Sequence[int]) -> torch.Tensor:
        """Process scores `(B, n, V)` of the positions of a round from `begin` on.

        `going_on` are the places of the rows whose round goes on. Nobody reads the scores of the others.
        """
        if self._in_step:
            return self._process_whole_batch(scores, texts)
        for of_rows in self._of_rows:
            if type(of_rows[0]) in _OF_SCORES:
                flat = scores.flatten(0, 1)
                scores = _process(of_rows[0], flat.new_empty(len(flat), 0, dtype=torch.long), flat).view_as(scores)
                continue
            processed = list(scores)
            for place in going_on:
                processor, text = of_rows[texts.rows[place]], texts.texts[place]
                positions = enumerate(scores[place].split(1), texts.lengths[place] + begin)
                processed[place] = torch.cat([processor(text[:, :length], position) for length, position in positions])
            scores = torch.stack(processed)
        return scores

    def _process_whole_batch(self, scores: torch.Tensor, texts: RowTexts) -> torch.Tensor:
        """Process scores `(B, 1, V)` of the position behind all texts, as `generate` does.

        The processors see the rows that have left the batch too, with all scores 0.
        """
        ids = texts.whole_batch()
        of_all = scores.new_zeros(len(ids), scores.shape[-1])
        rows = send(texts.rows, scores.device)
        of_all[rows] = scores[:, 0]
        for processor in self._of_rows:
            of_all = _process(processor[0], ids, of_all)
        return of_all[rows][:, None]


def _process(processor: LogitsProcessor, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Process scores `(B, V)`, some of which nobody will read.

    An `EtaLogitsWarper` raises where a row has no likeliest token. Such rows stay as they are: they are an error of a
    call only where a text comes to them.
    """
    if type(processor) is theirs.EtaLogitsWarper:
        unusable = is_unusable(scores)[:, None]
        return scores.where(unusable, processor(input_ids, scores.masked_fill(unusable, 0.0)))
    processed: torch.Tensor = processor(input_ids, scores)
    return processed


def must_go_in_step(processors: Sequence[LogitsProcessor], rows: int) -> bool:
    """Whether one of them may tell the rows of a batch apart by their places in it.

    All are then called as `generate` calls them: once for each position, with the texts of all rows.
    """
    return rows > 1 and any(type(processor) not in _OF_SINGLE_ROWS for processor in processors)


def can_run_ahead(processors: Sequence[LogitsProcessor]) -> bool:
    """Whether all are known to be functions of text and scores, so that a whole draft can be processed at once."""
    return all(type(processor) in _PURE for processor in processors)


def look_at_text(processors: Sequence[LogitsProcessor]) -> bool:
    """Whether one of them may look at the text."""
    return any(type(processor) not in _OF_SCORES for processor in processors)


def _for_row(processor: LogitsProcessor, row: int, rows: int) -> LogitsProcessor:
    """What a processor that was made for a batch is for one of its rows."""
    if rows > 1 and isinstance(processor, theirs.PrefixConstrainedLogitsProcessor):
        allowed = processor._prefix_allowed_tokens_fn
        return theirs.PrefixConstrainedLogitsProcessor(lambda _, text: allowed(row, text), num_beams=1)
    if isinstance(processor, theirs.RepetitionPenaltyLogitsProcessor) and torch.is_tensor(
        processor.prompt_ignore_length
    ):
        return theirs.RepetitionPenaltyLogitsProcessor(
            processor.penalty, processor.prompt_ignore_length[row : row + 1]
        )
    return processor
