"""One round of speculative decoding: from the models' logits to the tokens that every row emits."""

from dataclasses import dataclass
from typing import Any

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

from .candidate_generator import Draft, KADCandidateGenerator
from .composition import Composition, compose
from .proxy import is_unusable, unusable_logits_error
from .reader import tempered
from .verification import count_accepted, draw_next

# Of transformers' own processors, those that keep a state, or call a function of the user's.
_ONE_BY_ONE = (
    PrefixConstrainedLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

# Those made for all rows of a batch together.
_ONE_SEQUENCE = (
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
    """The call's other processors, those before KAD and those after it; of each one for every row."""

    def __init__(self, before: LogitsProcessorList, after: LogitsProcessorList, rows: int) -> None:
        for processor in (*before, *after):
            if rows > 1 and isinstance(processor, _ONE_SEQUENCE):
                raise ValueError(
                    f"{type(processor).__name__} takes all rows of a batch together, which grow by different numbers "
                    "of tokens in speculative decoding. Leave out `assistant_model`, or generate one sequence at a "
                    "time."
                )
        self.before = [[_for_row(processor, row, rows) for row in range(rows)] for processor in before]
        self.after = [[_for_row(processor, row, rows) for row in range(rows)] for processor in after]
        self.at_once = all(map(_is_stateless, (*before, *after)))
        self.reads_text = any(type(processor) not in _WITHOUT_TEXT for processor in (*before, *after))


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
    own = type(processor).__module__ == LogitsProcessor.__module__
    return own and not isinstance(processor, _ONE_BY_ONE)


@dataclass(frozen=True)
class _Part:
    """Some neighbouring positions of a round, of all rows, from `begin` on."""

    begin: int
    composition: Composition  # (B * n) rows
    log_target: torch.Tensor | None  # processed, (B, n, V); None where r was not processed
    target_probs: torch.Tensor  # (B, n, V)


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
        do_sample: bool,
        with_chances: bool,
    ) -> None:
        device = base_logits.device
        self.model, self.kad, self.processing, self.rows = model, kad, processing, rows
        self.base_logits, self.reference_logits = base_logits, reference_logits
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

    def decide(self, generator: KADCandidateGenerator) -> list[list[int]]:
        """The tokens that each row emits: what is accepted of its draft, and unless that ends the text, one more.

        The bonus position, behind a draft that was accepted as a whole, may need one more forward of the proxy, which
        is run if a row gets there.
        """
        rows, drafted = self.draft_ids.shape
        tokens: list[list[int]] = [[] for _ in range(rows)]
        self.accepted = [0] * rows
        alive = list(range(rows))
        ready = self.proxy_logits.shape[1]
        ends = {ready, drafted + 1} - {0} if self.processing.at_once else range(1, drafted + 2)
        begin = 0
        for end in sorted(ends):
            if end > ready:
                bonus = generator.next_logits().to(self.proxy_logits.device)
                self.proxy_logits = torch.cat([self.proxy_logits, bonus[:, None]], dim=1)
            proxy_logits = self.proxy_logits[:, begin:end]
            accepted, next_tokens = self._extend(begin, proxy_logits, alive)
            still = []
            for row in alive:
                count = accepted[row]
                tokens[row] += self._drafted[row][begin : begin + count]
                self.accepted[row] += count
                if count and tokens[row][-1] in self.kad.open_call.eos_token_ids:
                    continue
                if begin + count == end:
                    still.append(row)
                else:
                    tokens[row].append(next_tokens[row])
            alive, begin = still, end
            if not alive:
                break
        return tokens

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

    def _extend(self, begin: int, proxy_logits: torch.Tensor, alive: list[int]) -> tuple[list[int], list[int]]:
        """Process the next n positions, given the proxy's logits there, `(B, n, V)`.

        Returns how many of their draft tokens each row accepts and the token after these, which means something
        where not all n are accepted.
        """
        rows, count, _ = proxy_logits.shape
        part = slice(begin, begin + count)
        base_scores = self.base_logits[:, part]
        if self.processing.before:
            base_scores = self._process(self.processing.before, begin, base_scores.clone(), alive)
        composition = compose(
            self.kad.rule,
            tempered(base_scores.flatten(0, 1), self.kad.component_temperature),
            proxy_logits.flatten(0, 1),
            None if self.reference_logits is None else self.reference_logits[:, part].flatten(0, 1),
        )
        target_probs, log_target = composition.target_probs.view(rows, count, -1), None
        if self.processing.after:
            log_target = self._process(self.processing.after, begin, target_probs.log(), alive)
            target_probs = log_target.softmax(-1)
        self._parts.append(_Part(begin, composition, log_target, target_probs))

        draft_probs, draft_ids = self.draft_probs[:, part], self.draft_ids[:, part]
        draft_lengths = (self.draft_lengths - begin).clamp(min=0, max=draft_ids.shape[1])
        accepted = count_accepted(target_probs, draft_probs, draft_ids, draft_lengths, do_sample=self.do_sample)
        next_tokens = draw_next(
            target_probs, draft_probs, accepted.clamp(max=count - 1), draft_lengths, do_sample=self.do_sample
        )
        unusable = torch.stack([is_unusable(base_scores), is_unusable(proxy_logits)])
        chances = None
        if self.with_chances:
            proxy_probs = composition.proxy_probs.view_as(target_probs)
            if self.do_sample:
                chances = torch.minimum(proxy_probs, target_probs).sum(-1)
            else:
                chances = (proxy_probs.argmax(-1) == target_probs.argmax(-1)).float()
        return self._read(begin, accepted, next_tokens, unusable, chances, alive)

    def _process(
        self, processors: list[list[LogitsProcessor]], begin: int, scores: torch.Tensor, alive: list[int]
    ) -> torch.Tensor:
        """Run processors on scores `(B, n, V)` of the positions from `begin` on; dead rows may stay as they are."""
        for of_row in processors:
            if type(of_row[0]) in _WITHOUT_TEXT:
                flat = scores.flatten(0, 1)
                scores = of_row[0](flat.new_empty(len(flat), 0, dtype=torch.long), flat).view_as(scores)
                continue
            processed = list(scores)
            for row in alive:
                processor, text, length = of_row[self.rows[row]], self._texts[row], self._lengths[row] + begin
                positions = [
                    processor(text[:, : length + at], position) for at, position in enumerate(scores[row].split(1))
                ]
                processed[row] = torch.cat(positions)
            scores = torch.stack(processed)
        return scores

    def _read(
        self,
        begin: int,
        accepted: torch.Tensor,
        next_tokens: torch.Tensor,
        unusable: torch.Tensor,
        chances: torch.Tensor | None,
        alive: list[int],
    ) -> tuple[list[int], list[int]]:
        """Fetch from the device, at once, all that is to be known of some positions."""
        rows, drafted = self.draft_ids.shape
        asked = [accepted, next_tokens, unusable.flatten()]
        if begin == 0:
            asked += [self.draft_lengths, self.draft_ids.flatten()]
        if chances is not None:
            asked.append(chances.flatten())
        values = iter(torch.cat([tensor.double() for tensor in asked]).tolist())

        def take(count: int) -> list[int]:
            return [int(next(values)) for _ in range(count)]

        counts, following = take(rows), take(rows)
        flags = [[take(unusable.shape[2]) for _ in range(rows)] for _ in range(2)]
        if begin == 0:
            self.lengths, self._drafted = take(rows), [take(drafted) for _ in range(rows)]
        if chances is not None:
            for noted in self.chances:
                noted += [next(values) for _ in range(unusable.shape[2])]
        for row in alive:
            for (role, model), bad in zip((("base", self.model), ("proxy", self.kad.proxy)), flags, strict=True):
                if any(bad[row][: counts[row] + 1]):
                    position = self._lengths[row] + begin + bad[row].index(1)
                    raise unusable_logits_error(role, model, position, self.rows[row])
        return counts, following
