"""The wrapper of `generate`, which opens a call for the KAD processor in its list and closes it.

A logits processor is called before a token is chosen, on finished rows too, and can't tell a new call from the next
step. The wrapper knows: for calls with a KAD processor in `logits_processor` it describes the call, runs the original
`generate`, and reads the returned sequences. Every other call passes through. It is installed when the package is
imported.

`generate_batch`, the continuous batching of transformers, ignores processors of the user's. It is wrapped as well, to
refuse a KAD processor, without which the base would decode alone. So is `init_continuous_batching`, which takes none,
for bases that a processor is attached to.
"""

import functools
import inspect
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from transformers import (
    EosTokenCriteria,
    GenerationMixin,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.utils import logging

from ..models.adapters import remove_injections
from ..models.forward_inputs import PER_TOKEN
from ..models.model_errors import source_of
from ..models.model_settings import placeholder_ids
from ..records.recorders import BatchRecorder, StepRecorder
from ..rules.base import StatefulRule
from ..utils.sources import shown_name
from .attachment import attachment_for, unguided
from .call_arguments import CallArguments, as_id_list
from .call_warnings import warn_about_call
from .ended_rows import EndedRows
from .lazy import LazyStep
from .open_call import OpenCall
from .parallel import OneProcess, forwards_in_step, ranks_in_step
from .processor_state import ProcessorState
from .proxy_text import ProxyText, without_placeholders
from .refusals import is_kad_generate, is_speculative, refuse_call, refuse_continuous_batching
from .rule_memory import RuleMemory
from .speculative import kad_generate
from .token_by_token import EagerStep, TokenStep

logger = logging.get_logger(__name__)

_installing = threading.Lock()


def install() -> None:
    """Wrap `GenerationMixin.generate`, unless it is wrapped already. Done when the package is imported.

    Not later: in `base.generate(logits_processor=[KADLogitsProcessor(...)])` Python looks up `base.generate` before
    it builds the processor.
    """
    with _installing:
        for name, wrap in _WRAPPERS.items():
            original = getattr(GenerationMixin, name)
            if not hasattr(original, "__kad_original__"):
                wrapper: Any = wrap(original)
                wrapper.__kad_original__, wrapper.__kad_wrapper__ = original, wrapper
                setattr(GenerationMixin, name, wrapper)


def uninstall() -> None:
    """Undo `install`. Calls with a KAD processor then raise an error; those that are running end as they began.

    Raises:
        RuntimeError: something else has wrapped one of the methods since, and would be lost.
    """
    with _installing:
        for name in _WRAPPERS:
            wrapped = getattr(GenerationMixin, name)
            if not hasattr(wrapped, "__kad_original__"):
                continue
            if vars(wrapped).get("__kad_wrapper__") is not wrapped:
                raise RuntimeError(
                    f"`GenerationMixin.{name}` was wrapped again, by {wrapped.__module__!r}: undo that first."
                )
            setattr(GenerationMixin, name, wrapped.__kad_original__)


def _wrap_generate(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def generate(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        wanted = kwargs.pop("kad", None)
        # `logits_processor` is the third argument.
        processors: Any = kwargs.get("logits_processor") or (args[2] if len(args) > 2 else None) or []
        is_kad = getattr(processors, "is_kad_processor", False)
        found = [processors] if is_kad else [p for p in processors if getattr(p, "is_kad_processor", False)]
        if wanted is not None and found:
            raise ValueError(
                f"Got kad={wanted!r:.200} and a KAD processor in `logits_processor`: pass one of the two."
            )
        attachment = None if found else attachment_for(self, wanted)
        if not found and attachment is None:
            with unguided(self) if wanted is False else nullcontext():
                return original(self, *args, **kwargs)
        if found and isinstance(found[0], TokenStep):  # the decoding method of the open call calls generate in turn
            return original(self, *args, **kwargs)
        try:
            if is_kad:
                raise TypeError("`logits_processor` must be a list: pass `logits_processor=[kad]`.")
            if len(found) > 1:
                raise ValueError(f"Pass one KAD processor to a call of generate, got {len(found)}.")
            bound = signature.bind(self, *args, **kwargs).arguments
            bound.pop("self")
            extra = bound.pop("kwargs", {})
            given = CallArguments(self, {**bound, **extra})
            if attachment is None:
                return _generate_with_kad(original, found[0].state, given)
            return _generate_with_kad(original, attachment.processor.state, attachment.guide(given))
        except BaseException as error:
            remove_injections(self)
            if attachment is not None and isinstance(error, RuntimeError | TypeError | ValueError):
                error.add_note(
                    "The call is guided by the KAD processor that is attached to its model, or given as `kad`. With "
                    "`kad=False` it is decoded without one."
                )
            raise

    return generate


def _wrap_continuous_batching(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def run(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        wanted = kwargs.pop("kad", None)
        attachment = attachment_for(self, wanted)
        attached = None if attachment is None else attachment.processor
        refuse_continuous_batching(kwargs.get("logits_processor"), attached)
        with unguided(self) if wanted is False else nullcontext():
            return original(self, *args, **kwargs)

    return run


# The methods of `GenerationMixin` that are wrapped.
_WRAPPERS = {
    "generate": _wrap_generate,
    "generate_batch": _wrap_continuous_batching,
    "init_continuous_batching": _wrap_continuous_batching,
}


def _generate_with_kad(original: Callable[..., Any], state: ProcessorState, given: CallArguments) -> Any:
    """Run the original `generate` with an open call, in step with the processes that its models are sharded over."""
    models = [given.model, *(cached.model for cached in state.models)]
    with forwards_in_step(given), ranks_in_step(models, given) as ranks:
        return _open_and_run(original, state, given, ranks)


def _open_and_run(original: Callable[..., Any], state: ProcessorState, given: CallArguments, ranks: OneProcess) -> Any:
    """Run the original `generate` with an open call, and keep its statistics and trace."""
    speculative = is_speculative(state, given.arguments)
    refuse_call(state, given, speculative)
    call = _describe_call(state, given, speculative)
    call.ranks = ranks
    ranks.begin(given)
    warn_about_call(state, given, call)
    if speculative:
        arguments = _with_loop(given)
    else:
        arguments = _with_watched_rows(given, call) if call.beams == 1 else dict(given.arguments)
    step = (LazyStep if state.settings.lazy else EagerStep)(call)
    arguments["logits_processor"] = LogitsProcessorList(
        step if getattr(processor, "is_kad_processor", False) else processor
        for processor in arguments["logits_processor"]
    )
    try:  # the call is opened inside, so that no interrupt leaves it open
        state.open(call)
        if not speculative:
            ranks.meet_before_forwards()
        call.earlier_proxy_forwards = call.models.proxy_forwards
        result = original(given.model, **arguments)
        step.finish()
        ranks.end(result)
        _keep_records(state, call, given, result)
        call.finished = True
    finally:
        state.close(call)
    return result


def _keep_records(state: ProcessorState, call: OpenCall, given: CallArguments, result: Any) -> None:
    """Keep the statistics and the trace of a call.

    A decoding method of the user's may return what it likes: where the statistics of such a call can't be told, a
    warning says so, and they are None.
    """
    state.statistics = state.trace = None
    try:
        sequences = result if torch.is_tensor(result) else getattr(result, "sequences", None)
        if not torch.is_tensor(sequences) or sequences.dim() != 2:
            raise TypeError(f"a tensor of sequences (N, L) is needed, and the call returned {type(result).__name__}")
        statistics, trace = call.finish(sequences)
    except Exception as error:
        if isinstance(call.recorder, BatchRecorder) or given.get("custom_generate") is None:
            raise  # a fault of this library, or of the device
        logger.warning(
            f"`kad.statistics` and `kad.trace` are None: the statistics of this call can't be told ({error!r}). What "
            "the call returned is not affected. Decoding methods that emit one token a step and return the sequences "
            "(B, L) have statistics."
        )
        return
    state.statistics = statistics
    # Where rows change places, as beams do, the states of a text are not known afterwards.
    rows_stay = call.rows_stay or isinstance(call.recorder, BatchRecorder)
    if call.rule_memory is not None and rows_stay and given.input_ids is not None:
        emitted = [s.tokens for s in statistics.sequences]
        texts = [ids[call.prompt_length :][:n].tolist() for ids, n in zip(sequences, emitted, strict=True)]
        state.remembered = call.rule_memory.remember(texts)
    if trace is not None:
        state.trace = replace(trace, statistics=statistics, **_described(state, given.model))


def _described(state: ProcessorState, model: PreTrainedModel) -> dict[str, Any]:
    """What a trace says of the call: its tokenizer, both models and the rule."""
    settings = state.settings
    rule = repr(settings.rule)
    if settings.component_temperature != 1:
        rule += f", component temperature {settings.component_temperature:g}"

    def shown(model: PreTrainedModel) -> str:
        return f"{type(model).__name__} ({shown_name(source_of(model))})"

    proxy = state.models.proxy.model
    return {"tokenizer": settings.tokenizer, "base": shown(model), "proxy": shown(proxy), "rule": rule}


def _describe_call(state: ProcessorState, given: CallArguments, speculative: bool) -> OpenCall:
    """The call as its steps need to know it. The proxy's prompts are made here, in its own tokens."""
    settings, ids, embeds = state.settings, given.input_ids, given.arguments.get("inputs_embeds")
    batch_size = len(ids) if ids is not None else len(embeds) if embeds is not None else 1
    # Without any input `generate` starts from one begin-of-sequence token.
    prompt_length = ids.shape[1] if ids is not None else 0 if embeds is not None else 1
    prompt, prompt_inputs = _proxy_prompt(state, given, batch_size)
    proxy_text = ProxyText(prompt_length, given.attention_mask(), prompt, settings.vocabulary_alignment)
    return OpenCall(
        settings=settings,
        models=state.models,
        proxy_text=proxy_text,
        recorder=BatchRecorder(settings.trace) if speculative else StepRecorder(settings.trace),
        prompt_length=prompt_length,
        proxy_prompt_length=proxy_text.prompt_length,
        batch_size=batch_size,
        beams=given.beams,
        eos_token_ids=given.ending_ids,
        pad_token_id=given.pad_token_id,
        chunk_size=given.get("prefill_chunk_size"),
        rows_stay=given.beams == 1 and given.arguments.get("custom_generate") is None,
        prompt_inputs=prompt_inputs,
        prompt_mask=proxy_text.prompt_mask,
        rule_memory=_rule_memory(state, given, batch_size),
    )


def _rule_memory(state: ProcessorState, given: CallArguments, batch_size: int) -> RuleMemory | None:
    """The memory of a rule that has one, at the beginning of a call."""
    rule, ids = state.settings.rule, given.input_ids
    if not isinstance(rule, StatefulRule):
        return None
    if ids is None:
        return RuleMemory(rule, [[]] * batch_size, [], given.model.device)
    mask = given.attention_mask()
    is_token = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
    prompts = [text[own].tolist() for text, own in zip(ids, is_token, strict=True)]
    return RuleMemory(rule, prompts, state.remembered, ids.device)


def _proxy_prompt(
    state: ProcessorState, given: CallArguments, batch_size: int
) -> tuple[tuple[torch.Tensor, torch.Tensor | None] | None, dict[str, torch.Tensor]]:
    """The proxy's prompts and their mask, None where they are the base's, and what else it is told of them."""
    own, alignment = state.proxy_prompt, state.settings.vocabulary_alignment
    if own is not None:
        if len(own.input_ids) != batch_size:
            raise ValueError(
                f"`proxy_prompt` has {len(own.input_ids)} prompts, the call has {batch_size}: give one for each."
            )
        return (own.input_ids, own.attention_mask), own.further_inputs
    ids, mask = given.input_ids, given.attention_mask()
    text, text_mask = (ids, mask) if ids is None else without_placeholders(ids, mask, placeholder_ids(given.model))
    if alignment is not None:
        start = torch.as_tensor(as_id_list(given.get("bos_token_id")) if text is None else text, device="cpu")
        return alignment.retokenize(start.view(batch_size, -1), text_mask), {}
    if text is not None and text is not ids:
        return (text, text_mask), {}
    taken = frozenset().union(*(model.accepted_inputs for model in state.models))
    values = {name: given.arguments.get(name) for name in PER_TOKEN if name in taken}
    # Positions in several dimensions are those of images, for models that count so.
    return None, {name: value for name, value in values.items() if value is not None and value.dim() == 2}


def _with_loop(given: CallArguments) -> dict[str, Any]:
    """The arguments of the same call with the project's loop as its decoding method.

    A callable `custom_generate` loses the streamer and the tokenizer on the way: the streamer is bound to the loop,
    and the tokenizer is used up here, for the stop strings.
    """
    arguments = given.with_stop_strings_as_criterion()
    for name in ("assistant_model", "assistant_tokenizer", "tokenizer"):
        arguments.pop(name, None)
    custom, streamer = arguments.get("custom_generate"), arguments.get("streamer")
    loop: Any = custom if is_kad_generate(custom) else kad_generate
    arguments["custom_generate"] = loop if streamer is None else functools.partial(loop, streamer=streamer)
    return arguments


def _with_watched_rows(given: CallArguments, call: OpenCall) -> dict[str, Any]:
    """The arguments of the same call token by token, with criteria that tell the call which rows have ended."""
    arguments = given.with_stop_strings_as_criterion()
    criteria = list(arguments.get("stopping_criteria") or [])
    # These take the place of `generate`'s own of the same type; by them, or the ids, all rows end alike.
    kept = [c for c in criteria if isinstance(c, MaxLengthCriteria | MaxTimeCriteria) or type(c) is EosTokenCriteria]
    asked = [c for c in criteria if all(c is not other for other in kept)]
    fills_up = bool(call.eos_token_ids) or any(hasattr(criterion, "eos_token_id") for criterion in criteria)
    call.ended_rows = EndedRows(asked, call.eos_token_ids, fills_up=fills_up)
    arguments["stopping_criteria"] = StoppingCriteriaList([*kept, call.ended_rows])
    return arguments
