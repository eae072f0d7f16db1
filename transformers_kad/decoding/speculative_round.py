"""One round of speculative decoding: from the models' logits to the tokens that every row emits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitNormalization,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PrefixConstrainedLogitsProcessor,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from ..models.cached_model import UnusableLogitsError, is_unusable, unusable_logits_error
from ..models.text_reader import tempered
from ..rules.composition import Composition, compose, with_bans
from .candidate_generator import Draft, KADCandidateGenerator
from .verification import count_accepted, draw_next

# Of transformers' own processors, those that keep a state, or call a function of the user's.
_ONE_BY_ONE = (
    PrefixConstrainedLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

# Those made for all rows of a batch together.
_FOR_A_BATCH = (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

# Those that don't look at the text, so that all positions of all rows are one call.
_WITHOUT_TEXT = (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitNormalization,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)


class Processing:
    """The call's other processors, those before KAD and those after it.

    Attributes:
        before, after: the processors, each as a list with one for every row of the batch.
        together: one of them may tell the rows apart by their places in the batch, as one does that is not
            transformers' own and may keep a state of every row. All are then called as `generate` calls them: once a
            position, with the texts of all rows.
        at_once: all are functions of text and scores, so that a whole draft can be processed at once.
        reads_text: one of them looks at the text.
    """

    def __init__(self, before: LogitsProcessorList, after: LogitsProcessorList, rows: int) -> None:
        every = (*before, *after)
        self.together = rows > 1 and not all(map(_is_of_rows, every))
        self.before = [self._of_rows(processor, rows) for processor in before]
        self.after = [self._of_rows(processor, rows) for processor in after]
        self.at_once = not self.together and all(map(_is_stateless, every))
        self.reads_text = any(type(processor) not in _WITHOUT_TEXT for processor in every)

    def _of_rows(self, processor: LogitsProcessor, rows: int) -> list[LogitsProcessor]:
        if self.together:
            return [processor] * rows
        return [_for_row(processor, row, rows) for row in range(rows)]


def _for_row(processor: LogitsProcessor, row: int, rows: int) -> LogitsProcessor:
    """What a processor that was made for a batch is for one of its rows."""
    if rows > 1 and isinstance(processor, PrefixConstrainedLogitsProcessor):
        allowed = processor._prefix_allowed_tokens_fn
        return PrefixConstrainedLogitsProcessor(lambda _, text: allowed(row, text), num_beams=1)
    if isinstance(processor, RepetitionPenaltyLogitsProcessor) and torch.is_tensor(processor.prompt_ignore_length):
        return RepetitionPenaltyLogitsProcessor(processor.penalty, processor.prompt_ignore_length[row : row + 1])
    return processor


def _is_stateless(processor: LogitsProcessor) -> bool:
    """Whether a processor is known to be a function of text and scores."""
    return _is_own(processor) and not isinstance(processor, _ONE_BY_ONE)


def _is_of_rows(processor: LogitsProcessor) -> bool:
    """Whether what a processor does to one row of a batch is known to depend on that row alone, see `_for_row`."""
    return _is_own(processor) and not isinstance(processor, _FOR_A_BATCH)


def _is_own(processor: LogitsProcessor) -> bool:
    return type(processor).__module__ == LogitsProcessor.__module__


_BEHIND_KAD = "behind KAD"


@dataclass(frozen=True)
class _Part:
    """Some neighbouring positions of a round, of all rows, from `begin` on."""

    begin: int
    composition: Composition  # (B * n) rows
    log_target: torch.Tensor | None  # processed, (B, n, V); None where r was not processed
    target_probs: torch.Tensor  # (B, n, V); what is drawn from, or for greedy decoding log_target itself


class _Decided(NamedTuple):
    """What was read from the device of some neighbouring positions."""

    accepted: list[int]  # how many of their draft tokens, of every row
    next_tokens: list[int]  # behind these; it means something where not all were accepted
    faults: dict[int, tuple[int, UnusableLogitsError]]  # a row's first position without a distribution, if it has any


class Window:
    """One round's positions, of every row: from the models' logits to the tokens that are emitted.

    Attributes:
        base_logits: as the base gave them, `(B, γ + 1, V)`.
        lengths: how much each row drafted.
        accepted: how much of it was accepted.
        chances: at each position of a row that was looked at, Σ min(q, r), the chance that a token drafted there is
            accepted; empty unless `with_chances`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        kad: Any,
        processing: Processing,
        rows: list[int],
        texts: list[torch.Tensor],
        draft: Draft,
        base_logits: torch.Tensor,
        reference_logits: torch.Tensor | None,
        *,
        whole_batch: Callable[[], torch.Tensor],
        in_step: bool,
        do_sample: bool,
        with_chances: bool,
    ) -> None:
        device = base_logits.device
        self.model, self.kad, self.processing, self.rows = model, kad, processing, rows
        self.base_logits, self.reference_logits = base_logits, reference_logits
        self._whole_batch, self.in_step = whole_batch, in_step
        self.do_sample, self.with_chances = do_sample, with_chances
        self.draft_ids, self.draft_lengths = draft.ids.to(device), draft.lengths.to(device)
        self.draft_probs, self.proxy_logits = draft.probs.to(device), draft.proxy_logits.to(device)
        self.chances = [list[float]() for _ in rows]
        self._lengths = [text.shape[1] for text in texts]
        self._texts = texts
        if processing.reads_text:
            self._texts = [
                torch.cat([text, ids], dim=-1) for text, ids in zip(texts, self.draft_ids.split(1), strict=True)
            ]
        self._parts: list[_Part] = []
        self._alive: list[int] = []  # the rows whose round goes on

    def decide(self, generator: KADCandidateGenerator, emit: Callable[[dict[int, list[int]]], Sequence[int]]) -> None:
        """Settle which tokens each row emits: what is accepted of its draft, and one more.

        The bonus position, behind a draft that was accepted as a whole, may need one more forward of the proxy, which
        is run if a row gets there. With `in_step` every row's round ends where the first of them ends it.

        Args:
            generator: drafted the tokens.
            emit: takes the next tokens of some rows, as soon as they are known, and returns the rows that they do not
                end. With `in_step` it emits no more of each than all those rows have.

        Raises:
            UnusableLogitsError: a row came to a position that has no distribution.
        """
        drafted = self.draft_ids.shape[1]
        self.accepted = [0] * len(self.draft_ids)
        alive = list(range(len(self.draft_ids)))
        ready = self.proxy_logits.shape[1]
        ends = {ready, drafted + 1} - {0} if self.processing.at_once else range(1, drafted + 2)
        begin = 0
        for end in sorted(ends):
            if end > ready:
                bonus = generator.next_logits().to(self.proxy_logits.device)
                self.proxy_logits = torch.cat([self.proxy_logits, bonus[:, None]], dim=1)
            self._alive = alive
            decided = self._extend(begin, self.proxy_logits[:, begin:end])
            tokens = {}
            for row in alive:
                count = decided.accepted[row]
                self.accepted[row] += count
                tokens[row] = self._drafted[row][begin : begin + count]
                if begin + count < end:
                    tokens[row].append(decided.next_tokens[row])
                if row in decided.faults:
                    tokens[row] = tokens[row][: decided.faults[row][0]]
            alive = list(emit(tokens))
            emitted = {row: len(tokens[row]) for row in alive}
            if self.in_step:
                emitted = dict.fromkeys(alive, min(emitted.values(), default=0))
            for row in alive:
                if row in decided.faults and decided.faults[row][0] == emitted[row]:
                    raise decided.faults[row][1]
            whole = [row for row in alive if decided.accepted[row] == emitted[row] == end - begin]
            alive, begin = [] if self.in_step and len(whole) < len(alive) else whole, end
            if not alive:
                break

    def positions(self, row: int, count: int) -> list[Composition]:
        """What the rule made of the first `count` positions of a row, in pieces."""
        pieces = []
        for part in self._parts:
            length = part.target_probs.shape[1]
            own = min(count - part.begin, length)
            if own > 0:
                pieces.append(part.composition.rows(slice(row * length, row * length + own)))
        return pieces

    def scores(self, row: int, at: int) -> torch.Tensor:
        """The processed log r of one position of a row, `(V,)`."""
        part = self._part(at)
        if part.log_target is None:
            return part.target_probs[row, at - part.begin].log()
        return part.log_target[row, at - part.begin]

    def _part(self, at: int) -> _Part:
        return next(part for part in reversed(self._parts) if part.begin <= at)

    def _extend(self, begin: int, proxy_logits: torch.Tensor) -> _Decided:
        """Process the next n positions, given the proxy's logits there, `(B, n, V)`."""
        rows, count, _ = proxy_logits.shape
        part = slice(begin, begin + count)
        base_scores = self.base_logits[:, part]
        if self.processing.before:
            base_scores = self._process(self.processing.before, begin, base_scores.clone())
        composition = compose(
            self.kad.rule,
            tempered(with_bans(base_scores.flatten(0, 1)), self.kad.component_temperature),
            proxy_logits.flatten(0, 1),
            None if self.reference_logits is None else self.reference_logits[:, part].flatten(0, 1),
        )
        target_probs, log_target = composition.target_probs.view(rows, count, -1), None
        unusable = {"base": is_unusable(base_scores), "proxy": is_unusable(proxy_logits)}
        if self.reference_logits is not None:
            unusable["reference"] = is_unusable(self.reference_logits[:, part])
        if self.processing.after:
            log_target = self._process(self.processing.after, begin, target_probs.log())
            # Greedy decoding takes the largest score as it is: +inf forces a token there.
            target_probs = log_target.softmax(-1) if self.do_sample else log_target
            unusable[_BEHIND_KAD] = ~(target_probs.amax(-1) > -torch.inf)
        self._parts.append(_Part(begin, composition, log_target, target_probs))

        draft_probs, draft_ids = self.draft_probs[:, part], self.draft_ids[:, part]
        draft_lengths = (self.draft_lengths - begin).clamp(min=0, max=draft_ids.shape[1])
        accepted = count_accepted(target_probs, draft_probs, draft_ids, draft_lengths, do_sample=self.do_sample)
        next_tokens = draw_next(
            target_probs, draft_probs, accepted.clamp(max=count - 1), draft_lengths, do_sample=self.do_sample
        )
        chances = None
        if self.with_chances:
            proxy_probs = composition.proxy_probs.view_as(target_probs)
            if self.do_sample:
                chances = torch.minimum(proxy_probs, target_probs).sum(-1)
            else:
                chances = (proxy_probs.argmax(-1) == target_probs.argmax(-1)).float()
        return self._read(begin, accepted, next_tokens, unusable, chances)

    def _process(self, processors: list[list[LogitsProcessor]], begin: int, scores: torch.Tensor) -> torch.Tensor:
        """Run processors on scores `(B, n, V)` of the positions from `begin` on."""
        if self.processing.together:
            return self._process_whole_batch([of_rows[0] for of_rows in processors], scores)
        for of_rows in processors:
            if type(of_rows[0]) in _WITHOUT_TEXT:
                flat = scores.flatten(0, 1)
                scores = of_rows[0](flat.new_empty(len(flat), 0, dtype=torch.long), flat).view_as(scores)
                continue
            processed = list(scores)
            for row in self._alive:
                processor, text, length = of_rows[self.rows[row]], self._texts[row], self._lengths[row] + begin
                positions = [
                    processor(text[:, : length + at], position) for at, position in enumerate(scores[row].split(1))
                ]
                processed[row] = torch.cat(positions)
            scores = torch.stack(processed)
        return scores

    def _process_whole_batch(self, processors: list[LogitsProcessor], scores: torch.Tensor) -> torch.Tensor:
        """Run processors on scores `(B, 1, V)` of the position behind all texts, as `generate` does.

        They see the rows that have left the batch too, with all scores 0.
        """
        texts = self._whole_batch()
        of_all = scores.new_zeros(len(texts), scores.shape[-1])
        of_all[self.rows] = scores[:, 0]
        for processor in processors:
            of_all = processor(texts, of_all)
        return of_all[self.rows][:, None]

    def _read(
        self,
        begin: int,
        accepted: torch.Tensor,
        next_tokens: torch.Tensor,
        unusable: dict[str, torch.Tensor],
        chances: torch.Tensor | None,
    ) -> _Decided:
        """Fetch from the device, at once, all that is to be known of some positions."""
        rows, drafted = self.draft_ids.shape
        positions = unusable["base"].shape[1]
        asked = [accepted, next_tokens, *(flags.flatten() for flags in unusable.values())]
        if begin == 0:
            asked += [self.draft_lengths, self.draft_ids.flatten()]
        if chances is not None:
            asked.append(chances.flatten())
        values = iter(torch.cat([tensor.double() for tensor in asked]).tolist())

        def take(count: int) -> list[int]:
            return [int(next(values)) for _ in range(count)]

        counts, following = take(rows), take(rows)
        flags = {source: [take(positions) for _ in range(rows)] for source in unusable}
        if begin == 0:
            self.lengths, self._drafted = take(rows), [take(drafted) for _ in range(rows)]
        if chances is not None:
            for noted in self.chances:
                noted += [next(values) for _ in range(positions)]
        faults = {}
        for row in range(rows):
            # Where a draft token is refused, what comes behind it is of no text.
            reached = range(min(counts[row] + 1, positions))
            bad = ((at, source) for at in reached for source in flags if flags[source][row][at])
            for at, source in bad:
                faults[row] = at, self._fault(source, row, begin + at)
                break
        return _Decided(counts, following, faults)

    def _fault(self, source: str, row: int, at: int) -> UnusableLogitsError:
        """The error for a position of a row without a distribution: of a model, by its role, or behind KAD."""
        position, sequence = self._lengths[row] + at, self.rows[row]
        if source != _BEHIND_KAD:
            model = {"base": self.model, "proxy": self.kad.proxy, "reference": self.kad.reference}[source]
            return unusable_logits_error(source, model, position, sequence)
        return UnusableLogitsError(
            f"The scores for position {position} of sequence {sequence} are NaN, +inf or all -inf after the "
            "processors behind KAD in `logits_processor`, so that no token can be chosen: one of them may have banned "
            "every token that r leaves."
        )
