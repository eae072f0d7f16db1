"""kad_generate: the one decoding loop that drafts with the proxy and verifies with the base."""

import functools
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    Cache,
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation import BaseStreamer, GenerateDecoderOnlyOutput

from ..models.base_model import BaseModel
from ..models.cached_model import CachedModel, context_length
from ..models.static_model import StaticCacheModel
from ..models.text_reader import TextReader
from ..records.statistics import RoundRecorder
from .candidate_generator import KADCandidateGenerator
from .draft_length import DraftLength
from .prompt_lookup import PromptLookup
from .speculative_round import Processing, Window


def kad_generate(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None = None,
    **model_kwargs: Any,
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    """Decode speculatively: the proxy drafts, the base verifies, the result is distributed as r.

    Not called directly, but by `generate`: `generate(..., logits_processor=[kad], assistant_model=proxy)` runs
    it, and so does `generate(..., logits_processor=[kad], custom_generate=kad_generate)`. The arguments are
    those that `generate` hands to every decoding method.

    A round forwards the base once, over the last token and the draft of every row, and the proxy at most
    `num_assistant_tokens + 1` times. Every row accepts its own number of tokens, and rows that are finished leave the
    batch. The device is waited for once a round, more often only for processors that must be called one by one.

    Processors before KAD in the list see the base's scores, those after it see log r, with the text that leads to the
    position. A processor of the user's, or one of transformers that keeps a state, is called once per emitted token,
    in order, and only after the stopping criteria let the text go on. The rest are functions of text and scores, and
    are called for the whole draft at once. Stopping criteria are asked after every token.

    In a batch, transformers' own processors and criteria are called for each row by itself. One of the user's may keep
    a state of every row, or count its calls. With one of those in the call the rows go *in step*: they all end a round
    where the first of them ends it, and the processor or criterion is called as `generate` calls it token by token,
    once a step, with all rows, those that are finished filled up with the padding token. That is exact as well, and
    takes more rounds.

    Returns:
        The sequences `(B, L)`, or with `return_dict_in_generate` a `GenerateDecoderOnlyOutput` whose `scores`
        are the processed log r and whose `logits` are the base's. Rows that ended before others are filled up with
        the padding token, and their scores say so: 0 for that token, -inf for the rest. `past_key_values` is that of
        a single sequence; None for a batch, whose rows left it one by one, and with `compile=True`, whose cache is
        written to by the next call.

    Raises:
        ValueError: no KAD processor in `logits_processor`, a cache that can't be rolled back, or for a batch
            not row by row, outputs that this loop does not collect, logits that are NaN, +inf or all -inf, or scores
            from which no token can be chosen after the processors behind KAD.
    """
    at = _place_of_kad(logits_processor)
    kad = logits_processor[at].kad
    call = kad.open_call
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(generation_config, name):
            raise ValueError(f"`{name}=True` is not available in speculative decoding; leave out `assistant_model`.")

    base, generator, reference = _readers(model, kad, input_ids, generation_config, stopping_criteria, model_kwargs)
    processing = Processing(
        LogitsProcessorList(logits_processor[:at]), LogitsProcessorList(logits_processor[at + 1 :]), len(input_ids)
    )
    criteria = _Criteria(stopping_criteria, call.eos_token_ids, len(input_ids))
    output = _Output(call.pad_token_id, generation_config, streamer)
    recorders = call.recorder.begin(len(input_ids))
    rows = [_Row(text, recorder) for text, recorder in zip(input_ids.split(1), recorders, strict=True)]
    texts_of = _InStep if processing.together or criteria.together else _RowByRow
    texts = texts_of(rows, criteria, output)
    automatic = DraftLength(bonus_at_once=not generator.is_synchronous) if kad.num_assistant_tokens == "auto" else None

    forwards_before = base.model.forwards
    active, last = list(range(len(rows))), None
    while active:
        began = time.perf_counter()
        if automatic is not None:
            generator.num_assistant_tokens = automatic.choose(len(active))

        # 1. The proxy drafts, the base reads the draft.
        before = [rows[row].text for row in active]
        draft = generator.draft(last, [text.shape[1] for text in before])
        new = draft.ids.to(input_ids.device)
        new = new if last is None else torch.cat([last, new], dim=-1)
        drafted = draft.ids.shape[1]
        base_logits = base.read(new, logits_to_keep=drafted + 1).to(input_ids.device)
        reference_logits = None if reference is None else reference.read(new, logits_to_keep=drafted + 1)
        window = Window(
            model,
            kad,
            processing,
            active,
            before,
            draft,
            base_logits,
            reference_logits,
            whole_batch=texts.whole_batch,
            in_step=texts.in_step,
            do_sample=generation_config.do_sample,
            with_chances=automatic is not None,
        )

        # 2. What is accepted, and the token after it, until a criterion ends the row in the middle of the round.
        window.decide(generator, functools.partial(texts.emit, window))
        emitted = [rows[row].end_round(place, window) for place, row in enumerate(active)]
        call.base_forwards = base.model.forwards - forwards_before

        # 3. All caches forget the refused tokens. The last token of each row is read in the next round.
        followers = [follower for follower in (base, generator, reference) if follower is not None]
        staying = [place for place, row in enumerate(active) if not rows[row].finished]
        for follower in followers:
            follower.accept([count - 1 for count in emitted])
            if 0 < len(staying) < len(active):
                follower.select_rows(staying)

        if automatic is not None:
            proxy_seconds, steps = generator.stopwatch.read()
            if last is not None:  # not with the prompt in it
                rest = time.perf_counter() - began - proxy_seconds
                automatic.timed(len(active), drafted, proxy_seconds / steps, rest)
            for row, chances, count in zip(active, window.chances, emitted, strict=True):
                automatic.accepted(row, chances[:count])
        active = [active[place] for place in staying]
        last = torch.cat([rows[row].text[:, -1:] for row in active]) if active else None

    return output.of(rows, base.model.cache if len(rows) == 1 and isinstance(base.model, BaseModel) else None)


kad_generate.is_kad_generate = True  # type: ignore[attr-defined]  # the wrapper of generate knows the loop by it


def _readers(
    model: PreTrainedModel,
    kad: Any,
    input_ids: torch.Tensor,
    generation_config: GenerationConfig,
    stopping_criteria: StoppingCriteriaList,
    model_kwargs: dict[str, Any],
) -> tuple[TextReader, KADCandidateGenerator, TextReader | None]:
    """Base, drafter and reference, at the beginning of the prompts."""
    call, mask = kad.open_call, model_kwargs.pop("attention_mask", None)
    mask = None if mask is None else (mask != 0).long()  # it may be of any type
    settings = {
        "vocabulary": model.config.get_text_config(decoder=True).vocab_size,
        "chunk_size": generation_config.prefill_chunk_size,
    }
    base_model: CachedModel
    proxy_model: CachedModel
    if kad.compile:
        base_model, proxy_model = _compiled_models(kad, model, input_ids, model_kwargs, stopping_criteria.max_length)
    else:
        base_model, proxy_model = BaseModel(model, input_ids, mask, model_kwargs), kad.cached_proxy
    base = TextReader(base_model, **settings)
    base.begin(input_ids, mask)
    generator = (PromptLookup if kad.drafter == "prompt_lookup" else KADCandidateGenerator)(
        proxy_model,
        num_assistant_tokens=kad.num_assistant_tokens,
        do_sample=generation_config.do_sample,
        component_temperature=kad.component_temperature,
        eos_token_ids=call.eos_token_ids,
        max_length=_longest_draft_end(stopping_criteria.max_length, model),
        proxy_text=call.proxy_text,
        vocabulary_alignment=kad.vocabulary_alignment,
        **settings,
    )
    generator.begin(input_ids)
    reference = kad.reference_reader(**settings)
    if reference is not None:
        reference.begin(*call.proxy_text(input_ids))
    return base, generator, reference


def _compiled_models(
    kad: Any, model: PreTrainedModel, input_ids: torch.Tensor, model_kwargs: dict[str, Any], max_length: int | None
) -> tuple[StaticCacheModel, StaticCacheModel]:
    """Base and proxy in static caches, with room for the text and one draft more."""
    held = model_kwargs.get("past_key_values")
    extra = sorted(set(model_kwargs) - _PREPARED)
    if extra or max_length is None or (isinstance(held, Cache) and held.get_seq_length()):
        raise ValueError(
            "`compile=True` decodes from `input_ids` alone up to a length limit, got "
            f"{extra or ('no limit' if max_length is None else 'a filled cache')}. Leave out `compile`."
        )
    width = kad.num_assistant_tokens + 1
    base = kad.compiled(model, "base", width)
    base.reserve(max_length)
    proxy = kad.compiled(kad.proxy, "proxy", width if kad.drafter == "prompt_lookup" else 1)
    proxy_ids, _ = kad.open_call.proxy_text(input_ids)
    # With a tokenizer of its own the proxy may need more room than this, and then makes it.
    proxy.reserve(proxy_ids.shape[1] + max_length - input_ids.shape[1])
    return base, proxy


# What `generate` prepares for every call, and a forward can do without.
_PREPARED = {"cache_position", "logits_to_keep", "past_key_values", "position_ids", "use_cache"}


@dataclass
class _Row:
    """One sequence: its text `(1, L)`, padding on the left included, and what is kept of it."""

    text: torch.Tensor
    recorder: RoundRecorder
    scores: list[torch.Tensor] = field(default_factory=list)  # (V,) each
    logits: list[torch.Tensor] = field(default_factory=list)  # (V,) each
    tokens: list[int] = field(default_factory=list)  # of the round
    finished: bool = False

    def end_round(self, place: int, window: Window) -> int:
        """Record the round, the row being at a place of the window. How many tokens it emitted."""
        tokens, self.tokens = self.tokens, []
        accepted = min(window.accepted[place], len(tokens))
        self.recorder.record(window.lengths[place], accepted, tokens, window.positions(place, len(tokens)))
        return len(tokens)


class _Texts:
    """The sequences of a call, as they grow."""

    in_step: bool

    def __init__(self, rows: list[_Row], criteria: "_Criteria", output: "_Output") -> None:
        self.rows, self.criteria, self.output = rows, criteria, output

    def emit(self, window: Window, tokens: dict[int, list[int]]) -> list[int]:
        """Emit tokens at places of the window until a criterion ends a row; the places of those that it does not."""
        raise NotImplementedError

    def whole_batch(self) -> torch.Tensor:
        """All texts `(B, L)`, where they go in step."""
        raise NotImplementedError

    def _note(self, window: Window, place: int, token: int) -> _Row:
        """A row emits a token."""
        row = self.rows[window.rows[place]]
        self.output.note(row, window, place, len(row.tokens), token)
        row.tokens.append(token)
        return row


class _RowByRow(_Texts):
    """Rows that grow by different numbers of tokens, each asked about by itself."""

    in_step = False

    def emit(self, window: Window, tokens: dict[int, list[int]]) -> list[int]:
        """See `_Texts.emit`."""
        for place, own in tokens.items():
            row = self.rows[window.rows[place]]
            length = row.text.shape[1]
            text = torch.cat([row.text, row.text.new_tensor([own], dtype=torch.long)], dim=-1)
            for token in own:
                self._note(window, place, token)
                length += 1
                row.finished = self.criteria.met(text[:, :length], row.scores, token)
                if row.finished:
                    break
            row.text = text[:, :length]
        return [place for place in tokens if not self.rows[window.rows[place]].finished]


class _InStep(_Texts):
    """Rows that all grow by the same number of tokens, and are asked about together, as `generate` does it.

    Finished rows are filled up with padding. A round emits no more tokens of a row than all rows that go on have.
    """

    in_step = True

    def __init__(self, rows: list[_Row], criteria: "_Criteria", output: "_Output") -> None:
        super().__init__(rows, criteria, output)
        self._batch = torch.cat([row.text for row in rows])  # (B, L)
        self._scores: list[torch.Tensor] = []  # (B, V) each

    def whole_batch(self) -> torch.Tensor:
        """See `_Texts.whole_batch`."""
        return self._batch

    def emit(self, window: Window, tokens: dict[int, list[int]]) -> list[int]:
        """See `_Texts.emit`."""
        going, at = list(tokens), 0
        while going and all(len(tokens[place]) > at for place in going):
            newest = self._batch.new_full((len(self.rows), 1), self.output.padding)
            for place in going:
                self._note(window, place, tokens[place][at])
                newest[window.rows[place]] = tokens[place][at]
            self._batch = torch.cat([self._batch, newest], dim=-1)
            emitting = [self.rows[window.rows[place]] for place in going]
            self._scores += self.output.step(self.rows, emitting)
            ended = self.criteria.met_by_row(self._batch, self._scores)
            for place, row in zip(going, emitting, strict=True):
                row.text = self._batch[window.rows[place]][None]
                row.finished = ended[window.rows[place]]
            going = [place for place in going if not self.rows[window.rows[place]].finished]
            at += 1
        return going


class _Output:
    """What `generate` returns, and shows while it runs."""

    def __init__(
        self, pad_token_id: int | None, generation_config: GenerationConfig, streamer: BaseStreamer | None
    ) -> None:
        self.padding, self._streamer = pad_token_id or 0, streamer
        self._dict = generation_config.return_dict_in_generate
        self._scores = self._dict and generation_config.output_scores
        self._logits = self._dict and generation_config.output_logits

    def note(self, row: _Row, window: Window, place: int, at: int, token: int) -> None:
        """A token that a row emits, at a position of the window."""
        if self._scores:
            row.scores.append(window.scores(place, at))
        if self._logits:
            row.logits.append(window.base_logits[place, at].clone())
        if self._streamer is not None:
            self._streamer.put(torch.tensor([token], device="cpu"))

    def of(self, rows: list[_Row], cache: Cache | None) -> torch.Tensor | GenerateDecoderOnlyOutput:
        """The finished rows, filled up on the right."""
        if self._streamer is not None:
            self._streamer.end()
        sequences = torch.nn.utils.rnn.pad_sequence(
            [row.text[0] for row in rows], batch_first=True, padding_value=self.padding
        )
        if not self._dict:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=self._steps([row.scores for row in rows]) if self._scores else None,
            logits=self._steps([row.logits for row in rows]) if self._logits else None,
            past_key_values=cache,
        )

    def step(self, rows: list[_Row], emitting: list[_Row]) -> list[torch.Tensor]:
        """The newest scores of all rows `(B, V)`, if scores are kept: nothing otherwise."""
        if not self._scores:
            return []
        padding = self._scores_of_padding(emitting[0].scores[-1])
        return [torch.stack([row.scores[-1] if any(row is e for e in emitting) else padding for row in rows])]

    def _steps(self, rows: list[list[torch.Tensor]]) -> tuple[torch.Tensor, ...]:
        """Step by step the scores of all rows, `(B, V)` each; those of a finished row put all on the padding."""
        padding = self._scores_of_padding(rows[0][0])
        steps = max(map(len, rows))
        return tuple(torch.stack([row[at] if at < len(row) else padding for row in rows]) for at in range(steps))

    def _scores_of_padding(self, like: torch.Tensor) -> torch.Tensor:
        scores = torch.full_like(like, -torch.inf)
        if 0 <= self.padding < len(scores):  # an id added to the tokenizer alone has no score
            scores[self.padding] = 0.0
        return scores


def _place_of_kad(logits_processor: LogitsProcessorList) -> int:
    for place, processor in enumerate(logits_processor):
        if getattr(processor, "is_kad_processor", False) and hasattr(processor, "kad"):
            return place
    raise ValueError(
        "`kad_generate` needs a `KADLogitsProcessor` in `logits_processor`, got none. It is called by "
        "`model.generate(..., custom_generate=kad_generate)`, looked up after transformers_kad was imported."
    )


def _longest_draft_end(max_length: int | None, model: PreTrainedModel) -> int | None:
    """The length that a text with a draft and one more token may reach: the call's limit, or the base's context."""
    context = context_length(model)
    if max_length is None or context is None:
        return max_length if context is None else context + 1
    return min(max_length, context + 1)


class _Criteria:
    """Stopping criteria, asked after every token.

    Attributes:
        together: one of them may tell the rows of a batch apart by their places in it, or count its calls.
    """

    def __init__(self, criteria: StoppingCriteriaList, eos_token_ids: frozenset[int], rows: int) -> None:
        self.together = rows > 1 and any(type(c).__module__ != StoppingCriteria.__module__ for c in criteria)
        self._all = criteria
        # The two that every call has are answered without a tensor.
        self._max_length = min((c.max_length for c in criteria if type(c) is MaxLengthCriteria), default=None)
        self._eos_token_ids = eos_token_ids if any(type(c) is EosTokenCriteria for c in criteria) else frozenset()
        self._rest = StoppingCriteriaList(c for c in criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria))

    def met(self, text: torch.Tensor, scores: list[torch.Tensor], token: int) -> bool:
        """Whether a text `(1, L)` ends with its last token; scores `(V,)` are those that are kept."""
        stops = [self._max_length is not None and text.shape[1] >= self._max_length, token in self._eos_token_ids]
        if self._rest:
            seen = tuple(step[None] for step in scores) or None
            stops.append(bool(self._rest(text, seen).all()))
        return any(stops)

    def met_by_row(self, texts: torch.Tensor, scores: list[torch.Tensor]) -> list[bool]:
        """Whether each of the texts `(B, L)` ends with its last token; scores `(B, V)` are those that are kept."""
        ended: list[bool] = self._all(texts, tuple(scores) or None).tolist()
        return ended
