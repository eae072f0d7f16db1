"""kad_generate: the one decoding loop that drafts with the proxy and verifies with the base."""

import functools
import time
from itertools import chain
from typing import Any, NamedTuple

import torch
from transformers import Cache, GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import BaseStreamer, GenerateDecoderOnlyOutput

from ..models.base_model import BaseModel
from ..models.by_version import CACHE
from ..models.cache_rollback import counts_tokens
from ..models.cached_model import CachedModel
from ..models.forward_inputs import further_inputs
from ..models.model_settings import context_length, vocabulary_size
from ..models.static_model import StaticCacheModel
from ..models.text_reader import TextReader
from ..records.recorders import BatchRecorder
from .candidate_generator import KADCandidateGenerator
from .draft_length import DraftLength
from .open_call import OpenCall
from .prompt_lookup import PromptLookup
from .speculative_round import RoundSettings, SpeculativeRound
from .speculative_rows import Criteria, InStep, Output, Row, RowByRow
from .text_buffer import TextBuffer
from .token_by_token import TokenStep


def kad_generate(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None = None,
    **model_kwargs: Any,
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    """Decode speculatively: the proxy drafts, the base verifies, and the result is distributed as r.

    Not called directly, but by `generate`: `generate(..., logits_processor=[kad], assistant_model=proxy)` runs
    it, and so does `generate(..., logits_processor=[kad], custom_generate=kad_generate)`. The arguments are
    those that `generate` hands to every decoding method.

    A round usually forwards the base once, over the last token and the draft of every row, and the proxy at most
    `num_assistant_tokens + 1` times. A base with recurrent states may need another forward, for accepted tokens that
    its restored states lack, and one that can't read several tokens behind its states reads them one by one. Every row
    accepts its own number of tokens, unless the rows go *in step* (see below), and rows that are finished leave the
    batch. The device is waited for once a round, and more often only for processors that must be called position by
    position, and for stopping criteria that look at the text, once a token.

    Processors before KAD in the list see the base's scores, those after it see log r, with the text that leads to the
    position. A processor of the user's, or one of transformers that keeps a state, is called once per emitted token,
    in order, and only after the stopping criteria let the text go on. Those that are known to be functions of text
    and scores are called for the whole draft at once. Stopping criteria are asked after every token.

    In a batch, transformers' own processors and criteria are called for each row by itself. One of the user's may keep
    a state of every row, or count its calls. With one of those in the call the rows go *in step*: they all end a round
    where the first of them ends it, and the processor or criterion is called as `generate` calls it token by token,
    once a step, with all rows, those that are finished filled up with the padding token. That is exact as well, and
    takes more rounds. Caches from which all rows can take back the same number of tokens only make the rows end their
    rounds together in the same way.

    Returns:
        The sequences `(B, L)`, or with `return_dict_in_generate` a `GenerateDecoderOnlyOutput` whose `scores`
        are the processed log r and whose `logits` are the base's. Rows that ended before others are filled up with
        the padding token, and their scores say so: 0 for that token, -inf for the rest. The cache is that of
        a single sequence; None for a batch, whose rows left it one by one, and with `compile=True`, whose cache is
        written to by the next call.

    Raises:
        ValueError: no KAD processor in `logits_processor`, a cache that can't be rolled back, or for a batch
            not row by row, logits that are NaN, +inf or all -inf, or scores from which no token can be chosen after
            the processors behind KAD.
    """
    # The one long function of the loop, so that the three steps of a round can be read in their order.
    at, call = _find_call(logits_processor)
    readers = _make_readers(model, call, input_ids, generation_config, stopping_criteria, model_kwargs)
    base, generator, reference = readers
    automatic, stopwatch = None, None
    if call.settings.num_assistant_tokens == "auto":
        automatic, stopwatch = DraftLength(bonus_at_once=generator.bonus_at_once), generator.time_steps()
    before, after = logits_processor[:at], logits_processor[at + 1 :]
    settings = RoundSettings(
        model,
        call,
        before,
        after,
        len(input_ids),
        do_sample=generation_config.do_sample,
        with_chances=automatic is not None,
    )
    assert isinstance(call.recorder, BatchRecorder)
    recorders = call.recorder.begin(len(input_ids))
    rows = [Row(number, recorder) for number, recorder in enumerate(recorders)]
    criteria = Criteria(stopping_criteria, call.eos_token_ids, len(input_ids))
    output = Output(call.pad_token_id, generation_config, streamer)
    texts = TextBuffer(input_ids, output.padding)
    growth = (InStep if settings.processors_in_step or criteria.need_step else RowByRow)(rows, texts, criteria, output)

    forwards_before = base.model.forwards
    active, last, in_step = list(range(len(rows))), None, growth.in_step
    length, decided = generator.num_assistant_tokens, list[int]()
    while active:
        began = time.perf_counter()
        if automatic is not None:
            length = automatic.choose(len(active), in_step=in_step)
        generator.num_assistant_tokens = call.ranks.begin_round(decided, length)

        # 1. The proxy drafts, and the base reads the draft.
        draft = generator.draft(last, [texts.lengths[row] for row in active], base.own_tokens_left(last))
        new, drafted = draft.behind(last), draft.ids.shape[1]
        base_logits = base.read(*new, logits_to_keep=drafted + 1).to(input_ids.device)
        reference_logits = None if reference is None else reference.read(*new, logits_to_keep=drafted + 1)
        call.ranks.end_forwards()

        in_step = growth.in_step or readers.need_rows_in_step

        # 2. The rows emit what is accepted and the token after it, until a criterion ends a row within the round.
        round_ = SpeculativeRound(settings, active, texts, draft, base_logits, reference_logits, in_step=in_step)
        round_.decide(generator, functools.partial(growth.emit, round_))
        emitted = [rows[row].end_round(place, round_) for place, row in enumerate(active)]
        call.base_forwards = base.model.forwards - forwards_before

        # 3. All caches forget the refused tokens. The last token of each row is read in the next round.
        staying = [place for place, row in enumerate(active) if not rows[row].finished]
        kept = [count - 1 for count in emitted]
        if in_step and staying:  # rows that leave are not read again, so that they may keep what the others keep
            kept = [kept[staying[0]]] * len(kept)
        readers.end_round(kept, staying)
        round_.keep_rule_states(emitted, staying)

        if automatic is not None and stopwatch is not None:
            proxy_seconds, steps = stopwatch.read()
            if last is not None:  # the first round reads the prompt as well
                rest = time.perf_counter() - began - proxy_seconds
                automatic.timed(len(active), drafted, proxy_seconds / steps, rest)
            for row, chances, ratios, count in zip(active, round_.chances, round_.ratios, emitted, strict=True):
                automatic.accepted(row, chances[:count], ratios[:count])
        decided = [*chain(*round_.drafted), *emitted, *(rows[row].last_token for row in active)]
        active = [active[place] for place in staying]
        last = torch.tensor([[rows[row].last_token] for row in active], device="cpu")

    return output.finish(
        rows, texts.all_texts(), base.model.cache if len(rows) == 1 and isinstance(base.model, BaseModel) else None
    )


kad_generate.is_kad_generate = True  # type: ignore[attr-defined]  # the wrapper of generate knows the loop by it


class _Readers(NamedTuple):
    """Who reads what the rows emit."""

    base: TextReader
    generator: KADCandidateGenerator
    reference: TextReader | None

    @property
    def need_rows_in_step(self) -> bool:
        """See `CachedModel.needs_rows_in_step`."""
        return any(reader.needs_rows_in_step for reader in self if reader is not None)

    def end_round(self, kept: list[int], staying: list[int]) -> None:
        """Keep so many draft tokens of each row, and go on with the rows that stay, if any."""
        for reader in self:
            if reader is not None:
                reader.accept(kept)
                if 0 < len(staying) < len(kept):
                    reader.select_rows(staying)


def _find_call(logits_processor: LogitsProcessorList) -> tuple[int, OpenCall]:
    """The place of KAD in the list of processors, and the call that it stands for."""
    for place, processor in enumerate(logits_processor):
        if isinstance(processor, TokenStep):
            return place, processor.call
    raise ValueError(
        "`kad_generate` needs a `KADLogitsProcessor` in `logits_processor`, got none. It is called by "
        "`model.generate(..., custom_generate=kad_generate)`, looked up after transformers_kad was imported."
    )


def _make_readers(
    model: PreTrainedModel,
    call: OpenCall,
    input_ids: torch.Tensor,
    generation_config: GenerationConfig,
    stopping_criteria: StoppingCriteriaList,
    model_kwargs: dict[str, Any],
) -> _Readers:
    """Base, drafter and reference, at the beginning of the prompts."""
    settings, mask = call.settings, model_kwargs.pop("attention_mask", None)
    length = settings.num_assistant_tokens
    mask = None if mask is None else (mask != 0).long()  # it may be of any type
    base_model: CachedModel
    proxy_model: CachedModel
    if settings.compile:
        base_model, proxy_model = _static_models(call, model, input_ids, model_kwargs, stopping_criteria.max_length)
    else:
        base_model, proxy_model = BaseModel(model, input_ids, mask, model_kwargs), call.models.proxy
    common: dict[str, Any] = {
        "vocabulary": vocabulary_size(model),
        "chunk_size": generation_config.prefill_chunk_size,
    }
    of_proxy: dict[str, Any] = {
        "component_temperature": settings.component_temperature,
        "vocabulary_alignment": settings.vocabulary_alignment,
    }
    in_one_piece = isinstance(base_model, BaseModel) and base_model.has_more_than_text
    base = TextReader(base_model, **common | ({"chunk_size": None} if in_one_piece else {}))
    base.begin(input_ids, mask)
    generator = (PromptLookup if settings.drafter == "prompt_lookup" else KADCandidateGenerator)(
        proxy_model,
        num_assistant_tokens=length if isinstance(length, int) else 0,  # "auto" is chosen before every round
        do_sample=generation_config.do_sample,
        eos_token_ids=call.eos_token_ids,
        max_length=_longest_draft_end(stopping_criteria.max_length, model),
        proxy_text=call.proxy_text,
        **common,
        **of_proxy,
    )
    generator.begin(input_ids)
    if call.models.reference is None:
        return _Readers(base, generator, None)
    reference = TextReader(call.models.reference, **common, **of_proxy)
    reference.begin(*call.proxy_text(input_ids))
    return _Readers(base, generator, reference)


def _static_models(
    call: OpenCall,
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    model_kwargs: dict[str, Any],
    max_length: int | None,
) -> tuple[StaticCacheModel, StaticCacheModel]:
    """Base and proxy in static caches, with room for the text and one more draft."""
    held = model_kwargs.get(CACHE)
    extra = further_inputs(model_kwargs)
    if extra or max_length is None or (isinstance(held, Cache) and counts_tokens(held) and held.get_seq_length()):
        raise ValueError(
            "`compile=True` decodes from `input_ids` alone up to a length limit, got "
            f"{extra or ('no limit' if max_length is None else 'a filled cache')}. Leave out `compile`."
        )
    assert isinstance(call.settings.num_assistant_tokens, int)
    width = call.settings.num_assistant_tokens + 1
    base = call.models.static_base(model, width)
    base.reserve(max_length, len(input_ids))
    proxy = call.models.static_proxy(width if call.settings.drafter == "prompt_lookup" else 1)
    proxy_ids, _ = call.proxy_text(input_ids)
    # With a tokenizer of its own the proxy may need more room than this, and then makes it.
    proxy.reserve(proxy_ids.shape[1] + max_length - input_ids.shape[1], len(input_ids))
    return base, proxy


def _longest_draft_end(max_length: int | None, model: PreTrainedModel) -> int | None:
    """The length that a text with a draft and one more token may reach: the call's limit, or the base's context."""
    context = context_length(model)
    if max_length is None or context is None:
        return max_length if context is None else context + 1
    return min(max_length, context + 1)
