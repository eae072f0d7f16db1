"""The wrapper of `generate`, and the open call that it hands to the processor.

A logits processor is called before a token is chosen, on finished rows too, and can't tell a new call from the
next step. The wrapper tells it: for calls with a KAD processor in `logits_processor` it opens a call, runs the
original `generate`, reads the returned sequences, and closes the call. Every other call passes through. It is
installed when the package is imported.
"""

import copy
import functools
import inspect
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    EosTokenCriteria,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module
from transformers.utils import logging

from ..models.adapters import check_speculative_base, remove_injections
from ..models.cached_model import PER_TOKEN, repeat_rows, source_of
from ..models.vocabulary import VocabularyAlignment
from ..records.statistics import BatchRecorder, KADStatistics, KADTrace, StepRecorder, add_up
from ..utils.sources import shown_name
from .ended_rows import EndedRows
from .speculative import kad_generate

logger = logging.get_logger(__name__)


@dataclass(eq=False)
class OpenCall:
    """One running call of `generate` as a processor needs to know it.

    Attributes:
        recorder: collects the statistics and the trace.
        prompt_length: length of the ids that `generate` starts from.
        batch_size: number of prompts.
        beams: beams a prompt; 1 without beam search.
        attention_mask: of the prompts, `(B, prompt_length)`; None without padding.
        proxy_prompt: the proxy's own prompts and their mask, if they differ from the base's.
        vocabulary_alignment: how the proxy reads generated tokens, if it has a tokenizer of its own.
        eos_token_ids: ids that end a text.
        pad_token_id: what finished rows are filled up with.
        chunk_size: prompts are forwarded at most so many tokens at a time.
        rows_stay: every step continues the texts of the step before, row by row.
        prompt_inputs: what the call passes for every token of the prompts besides, for the proxy too: `position_ids`
            and `token_type_ids`, `(..., B, P)` each.
        thread: the thread that runs the call.
        base_forwards: forwards of the base so far.
        finished: the call returned, so that the caches are as it left them.
        closed: the processor is free for another call.
        ended_rows: knows which rows have ended, token by token; None where that is not told row by row, as with beams.
    """

    recorder: StepRecorder | BatchRecorder
    prompt_length: int = 0
    batch_size: int = 1
    beams: int = 1
    attention_mask: torch.Tensor | None = None
    proxy_prompt: tuple[torch.Tensor, torch.Tensor | None] | None = None
    vocabulary_alignment: VocabularyAlignment | None = None
    eos_token_ids: frozenset[int] = frozenset()
    pad_token_id: int | None = None
    chunk_size: int | None = None
    rows_stay: bool = True
    prompt_inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    thread: int = field(default_factory=threading.get_ident)
    base_forwards: int = 0
    finished: bool = False
    closed: bool = False
    ended_rows: EndedRows | None = None
    _spelled: tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int]] | None = None
    _texts_before: torch.Tensor | None = None  # (rows, L): of the step before, where rows do not stay

    def parents(self, input_ids: torch.Tensor) -> list[int] | None:
        """The row of the step before that each of the texts `(rows, L)` continues; None where row i continues row i.

        Of several equal texts it is the first among the beams of the same prompt. A text that continues none stands
        for the row of its own number.
        """
        if self.rows_stay:
            return None
        before, self._texts_before = self._texts_before, input_ids
        if before is None or before.shape[1] > input_ids.shape[1]:
            return list(range(len(input_ids)))
        same = torch.stack([(text[: before.shape[1]] == before).all(-1) for text in input_ids])
        rows = torch.arange(len(input_ids), device=input_ids.device)
        if self.beams > 1:
            prompts = rows // self.beams
            same &= prompts[:, None] == prompts
        return torch.where(same.any(-1), same.int().argmax(-1), rows).tolist()

    def proxy_text(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The proxy's text `(rows, L')` and its mask for the base's text `(rows, L)`.

        Rows are the prompts, each repeated for its beams or return sequences.
        """
        prompt, prompt_mask = self.proxy_prompt or (input_ids[:, : self.prompt_length], self.attention_mask)
        generated, mask = input_ids[:, self.prompt_length :], None
        if self.vocabulary_alignment is not None:
            generated, mask = self._spell(generated)
        ids = torch.cat([repeat_rows(prompt, len(generated)).to(generated), generated], dim=-1)
        if prompt_mask is None and mask is None:
            return ids, None
        prompt_mask = torch.ones_like(prompt) if prompt_mask is None else prompt_mask
        mask = torch.ones_like(generated) if mask is None else mask
        return ids, torch.cat([repeat_rows(prompt_mask, len(mask)).to(mask), mask], dim=-1)

    def _spell(self, generated: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Generated tokens as the proxy reads them, and their mask. Only what is new since last time is spelled."""
        assert self.vocabulary_alignment is not None
        before, ids, mask, widths = self._spelled or (generated[:, :0], generated[:, :0], generated[:, :0], [])
        shorter = min(before.shape[1], generated.shape[1])
        same = 0
        if len(before) == len(generated):
            same = int((before[:, :shorter] == generated[:, :shorter]).all(dim=0).long().cumprod(0).sum())
        kept = sum(widths[:same])
        new_ids, new_mask, new_widths = self.vocabulary_alignment.spell(generated[:, same:])
        ids = torch.cat([ids[: len(generated), :kept], new_ids], dim=-1) if kept else new_ids
        mask = torch.cat([mask[: len(generated), :kept], new_mask], dim=-1) if kept else new_mask
        self._spelled = generated, ids, mask, widths[:same] + new_widths
        return ids, mask

    def finish(self, sequences: torch.Tensor, proxy_forwards: int) -> tuple[KADStatistics, KADTrace | None]:
        """Statistics and trace of the call, given what it returned, `(N, L)`."""
        if isinstance(self.recorder, BatchRecorder):
            statistics, trace = self.recorder.finish()
        else:
            rows = list(range(len(sequences)))
            if self.beams > 1:  # all beams of a prompt start alike: its first stands for them
                per_prompt = len(sequences) // self.batch_size
                rows = [row // per_prompt * self.beams for row in rows]
                lengths = self.recorder.beam_lengths(sequences, self.prompt_length, rows)
            else:
                lengths = self._lengths(sequences)
            statistics, trace = self.recorder.finish(sequences, self.prompt_length, lengths, rows)
        totals = add_up(statistics, base_forwards=self.base_forwards, proxy_forwards=proxy_forwards)
        return totals, trace

    def _lengths(self, sequences: torch.Tensor) -> list[int]:
        """How many tokens each row emitted, of sequences `(B, L)`."""
        longest = sequences.shape[1] - self.prompt_length
        if len(sequences) == 1:
            return [longest]
        known = None if self.ended_rows is None else self.ended_rows.lengths
        if known is not None and len(known) == len(sequences):
            return [min(length - self.prompt_length, longest) for length in known.tolist()]
        # A decoding method of the user's that does not ask the criteria as `generate` does.
        return [self._emitted(ids) for ids in sequences[:, self.prompt_length :].tolist()]

    def _emitted(self, ids: list[int]) -> int:
        """How many tokens of a generated row seem to count: up to its end of sequence, or without the padding."""
        length = len(ids)
        for index, token in enumerate(ids):
            if token in self.eos_token_ids:
                return index + 1
        while self.eos_token_ids and length and ids[length - 1] == self.pad_token_id:
            length -= 1
        return length


_installing = threading.Lock()


def install() -> None:
    """Wrap `GenerationMixin.generate`, once. Done when the package is imported.

    Not later: in `base.generate(logits_processor=[KADLogitsProcessor(...)])` Python looks up `base.generate` before
    it builds the processor.
    """
    with _installing:
        if not hasattr(GenerationMixin.generate, "__kad_original__"):
            GenerationMixin.generate = _wrap(GenerationMixin.generate)


class StepProcessor(LogitsProcessor):
    """Stands in for a KAD processor in the list of one call, so that only the call itself continues its texts.

    The processor is asked by hand as well, by a stopping criterion say. Were it in the list itself, it could not tell
    such a question from the call's next step.
    """

    is_kad_processor = True

    def __init__(self, kad: Any) -> None:
        self.kad = kad

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """See `KADLogitsProcessor.__call__`."""
        return self.kad.step(input_ids, scores)


def refuse_by_hand(kad: Any, input_ids: torch.Tensor) -> None:
    """Raise if a processor that is asked by hand about texts `(rows, L)` would take padding for text.

    Raises:
        RuntimeError: a `generate` that the wrapper knows nothing of has the processor in its list and is running it,
            or a running `generate` has padded texts of this shape, as where another processor asks this one.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "generate" and isinstance(frame.f_locals.get("self"), GenerationMixin):
            processors = frame.f_locals.get("logits_processor")
            if isinstance(processors, list | tuple) and any(processor is kad for processor in processors):
                raise RuntimeError(
                    "This KAD processor is in the list of a `generate` that was looked up before transformers_kad was "
                    "imported, or that a model defines without calling `super().generate`. Such a call would take "
                    "padding for text and know nothing of drafts: import transformers_kad first, and call "
                    "`model.generate` of `GenerationMixin`."
                )
            if _is_padded(input_ids, (frame.f_locals.get("model_kwargs") or {}).get("attention_mask")):
                raise RuntimeError(
                    f"This KAD processor was asked by hand about texts {tuple(input_ids.shape)} within a `generate` "
                    "whose prompts are padded, and would take the padding for text. Put the processor itself into "
                    "`logits_processor`, or ask it about texts without padding."
                )
        frame = frame.f_back


def _is_padded(input_ids: torch.Tensor, mask: object) -> bool:
    """Whether texts `(rows, L)` may be those of prompts with this mask `(B, P)`, and it has padding."""
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or not len(mask):
        return False
    fits = len(input_ids) % len(mask) == 0 and input_ids.shape[1] >= mask.shape[1]
    return fits and not bool((mask != 0).all())


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def generate(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        # `logits_processor` is the third argument.
        processors = kwargs.get("logits_processor") or (args[2] if len(args) > 2 else None) or []
        is_kad = getattr(processors, "is_kad_processor", False)
        found = [processors] if is_kad else [p for p in processors if getattr(p, "is_kad_processor", False)]
        if not found:
            return original(self, *args, **kwargs)
        if isinstance(found[0], StepProcessor):  # a decoding method of the call that is open calls generate in turn
            return original(self, *args, **kwargs)
        try:
            if is_kad:
                raise TypeError("`logits_processor` must be a list: pass `logits_processor=[kad]`.")
            if len(found) > 1:
                raise ValueError(f"Pass one KAD processor to a call of generate, got {len(found)}.")
            bound = signature.bind(self, *args, **kwargs).arguments
            bound.pop("self")
            extra = bound.pop("kwargs", {})
            return _generate_with_kad(original, self, found[0], {**bound, **extra})
        except BaseException:
            remove_injections(self)
            raise

    generate.__kad_original__ = original  # type: ignore[attr-defined]
    return generate


def _generate_with_kad(
    original: Callable[..., Any], model: PreTrainedModel, kad: Any, arguments: dict[str, Any]
) -> Any:
    settings = _Settings(model, arguments)
    speculative = _is_speculative(kad, arguments)
    _refuse(model, kad, settings, speculative)
    call = _describe_call(kad, settings, speculative)
    _warn_about_eos(kad, call)
    _warn_about_inputs(kad, settings, call)
    if speculative:
        arguments = _bind_loop(settings)
    else:
        arguments = _watch_rows(settings, call) if call.beams == 1 else dict(arguments)
    arguments["logits_processor"] = LogitsProcessorList(
        StepProcessor(kad) if processor is kad else processor for processor in arguments["logits_processor"]
    )
    try:  # the call is opened inside, so that no interrupt leaves it open
        kad.open(call)
        forwards = kad.proxy_forwards
        result = original(model, **arguments)
        sequences = result if torch.is_tensor(result) else result.sequences
        kad.statistics, trace = call.finish(sequences, kad.proxy_forwards - forwards)
        kad.trace = None if trace is None else replace(trace, statistics=kad.statistics, **_described(kad, model))
        call.finished = True
    finally:
        kad.close(call)
    return result


def _described(kad: Any, model: PreTrainedModel) -> dict[str, Any]:
    """What a trace says of the call: its tokenizer, both models and the rule."""
    rule = repr(kad.rule)
    if kad.component_temperature != 1:
        rule += f", component temperature {kad.component_temperature:g}"

    def shown(model: PreTrainedModel) -> str:
        return f"{type(model).__name__} ({shown_name(source_of(model))})"

    return {"tokenizer": kad.tokenizer, "base": shown(model), "proxy": shown(kad.proxy), "rule": rule}


class _Settings:
    """The arguments of a call, with the precedence that `generate` gives them."""

    def __init__(self, model: PreTrainedModel, arguments: dict[str, Any]) -> None:
        self.model, self.arguments = model, arguments
        self.config = arguments.get("generation_config")

    def get(self, name: str, default: Any = None) -> Any:
        """A setting: from the arguments, the `generation_config` passed, or the model's own."""
        if name in self.arguments:
            value = self.arguments[name]
        else:
            value = getattr(self.config, name, None)
            if value is None:
                value = getattr(self.model.generation_config, name, None)
        return default if value is None else value

    @property
    def input_ids(self) -> torch.Tensor | None:
        ids = self.arguments.get("inputs")
        return self.arguments.get("input_ids") if ids is None else ids

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return frozenset(_as_list(self.get("eos_token_id")))

    @property
    def ending_ids(self) -> frozenset[int]:
        """The ids that end a text: an `EosTokenCriteria` of the user's takes the place of `generate`'s own."""
        own = [criterion for criterion in self.stopping_criteria if type(criterion) is EosTokenCriteria]
        return frozenset(end for criterion in own for end in _as_list(criterion.eos_token_id)) or self.eos_token_ids

    @property
    def stopping_criteria(self) -> list[StoppingCriteria]:
        return list(self.arguments.get("stopping_criteria") or [])

    @property
    def pad_token_id(self) -> int | None:
        """As `generate` sees it: without one, the first end-of-sequence id fills finished rows."""
        pad = self.get("pad_token_id")
        candidates = _as_list(self.get("eos_token_id") if pad is None else pad)
        return candidates[0] if candidates else None

    def attention_mask(self) -> torch.Tensor | None:
        """The mask passed, or what `generate` infers from padding in the prompt; None for no padding."""
        mask, ids = self.arguments.get("attention_mask"), self.input_ids
        if mask is None and ids is not None:
            pad = self.get("pad_token_id")
            if pad is not None and int(pad) not in self.eos_token_ids:
                mask = ids.ne(int(pad)).long()
        return None if mask is None or bool((mask != 0).all()) else (mask != 0).long()


def _as_list(value: Any) -> list[int]:
    """Token ids given as nothing, a number, a sequence or a tensor."""
    if value is None:
        return []
    if torch.is_tensor(value):
        return value.reshape(-1).tolist()
    return list(value) if isinstance(value, list | tuple) else [value]


def _is_speculative(kad: Any, arguments: dict[str, Any]) -> bool:
    assistant, custom = arguments.get("assistant_model"), arguments.get("custom_generate")
    is_loop = getattr(custom, "is_kad_generate", False)
    if assistant is not None and assistant is not kad.proxy:
        raise ValueError(
            "`assistant_model` must be the model that the KAD processor was built with (`kad.proxy`), got another "
            f"{type(assistant).__name__}: drafts of a third model are not supported."
        )
    if assistant is not None and custom is not None and not is_loop:
        raise ValueError(f"Pass either `assistant_model` or `custom_generate`, got both ({custom!r}).")
    return assistant is not None or is_loop


def _refuse(model: PreTrainedModel, kad: Any, settings: _Settings, speculative: bool) -> None:
    """Raise for every call that could not be answered rightly."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"KAD needs a decoder-only base, got the encoder-decoder model {type(model).__name__}.")
    if settings.get("cache_implementation") == "paged":
        raise ValueError('`cache_implementation="paged"` would drop the KAD processor; leave it out.')
    for name in ("prompt_lookup_num_tokens", "assistant_early_exit"):
        if settings.get(name):
            raise ValueError(
                f"`{name}={settings.get(name)!r}` can't be combined with a KAD processor; pass "
                "`assistant_model=kad.proxy` for speculative decoding."
            )
    if isinstance(kad.proxy, PeftModel) and kad.proxy.get_base_model() is model:
        raise ValueError(
            "The proxy's adapter was put into the base model itself, so that the two are one: load the model that the "
            "adapter belongs to a second time."
        )
    if kad.lazy:
        _refuse_lazy(settings, speculative)
    if _is_sharded(kad.proxy):
        raise ValueError(
            "The proxy is sharded over processes (FSDP or DeepSpeed ZeRO-3), whose finished ranks skip the "
            "processors; give every process a whole proxy."
        )
    beams = settings.get("num_beams", 1)
    if beams > 1 and kad.record_trace:
        raise ValueError(f"`trace=True` is not available with beams, got num_beams={beams}.")
    ids = settings.input_ids
    mask = settings.arguments.get("attention_mask")
    for name, given in (("input_ids", ids), ("attention_mask", mask)):
        if given is not None and not torch.is_tensor(given):
            raise TypeError(
                f"`{name}` must be a tensor, got {type(given).__name__}: tokenize with `return_tensors='pt'`, and "
                "pass what the tokenizer returns as `generate(**inputs, ...)`."
            )
    if ids is not None and ids.dim() != 2:
        raise ValueError(f"`input_ids` must have the shape (B, L), one row a prompt, got {tuple(ids.shape)}.")
    if ids is None and settings.arguments.get("inputs_embeds") is not None and kad.proxy_inputs is None:
        raise ValueError(
            "`inputs_embeds` without `input_ids`: the proxy needs a prompt of tokens. Pass its own with "
            "`with kad.proxy_prompt(inputs):`."
        )
    if mask is not None and ids is not None and mask.shape != ids.shape and kad.proxy_inputs is None:
        raise ValueError(
            f"`attention_mask` {tuple(mask.shape)} and `input_ids` {tuple(ids.shape)} must have the same shape: "
            "the proxy needs the whole text, also where a cache for its beginning is passed."
        )
    for name in PER_TOKEN:
        value = settings.arguments.get(name)
        is_read = speculative or kad.proxy_inputs is None
        if is_read and value is not None and ids is not None and (value.dim() < 2 or value.shape[-1] != ids.shape[1]):
            raise ValueError(
                f"`{name}` {tuple(value.shape)} must have one value for each token of `input_ids` {tuple(ids.shape)}, "
                "also where a cache for the beginning of the text is passed."
            )
    if not speculative:
        return
    if kad.compile and settings.arguments.get("position_ids") is not None:
        raise ValueError("`compile=True` counts positions itself, got `position_ids`: leave out one of them.")
    if beams > 1:
        raise ValueError(f"Beams and `assistant_model` can't be combined, got num_beams={beams}.")
    for name in NOT_SPECULATIVE:
        if settings.get(name) is not None:
            raise ValueError(
                f"`{name}={settings.get(name)!r}` asks for another way of decoding, which drafts of a proxy can't be "
                f"combined with: leave out `{name}`, or `assistant_model` (or `custom_generate`)."
            )
    sequences = (1 if ids is None else ids.shape[0]) * settings.get("num_return_sequences", 1)
    check_speculative_base(model, sequences)
    if sequences > 1 and settings.arguments.get("streamer") is not None:
        raise ValueError(f"A streamer shows one sequence, got {sequences}. Leave out `streamer`.")
    if settings.get("synced_gpus"):
        raise ValueError("`synced_gpus=True` is not available in speculative decoding; leave out `assistant_model`.")


# Settings that ask for another way of decoding than sampling or taking the likeliest token, or for another target.
NOT_SPECULATIVE = (
    "assistant_ensemble_weight",
    "constraints",
    "dola_layers",
    "force_words_ids",
    "penalty_alpha",
    "use_mtp",
)

# What `generate` itself puts behind the processors, and the value that switches it off. `renormalize_logits` is not
# among them: it leaves the scores of a single possible token as they are.
WARPERS: dict[str, Any] = {
    "temperature": 1.0,
    "top_h": None,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "watermarking_config": None,
}
DEFAULT_TOP_K = 50  # of `generate`, where nobody names another


def _refuse_lazy(settings: _Settings, speculative: bool) -> None:
    """Raise for every call in which a token drawn before `generate` chooses one would not be a draw from its r."""
    if speculative:
        raise ValueError(
            "`lazy=True` is for decoding token by token, where drafts save nothing: leave out `assistant_model` (or "
            "`custom_generate`), or `lazy`."
        )
    for name in ("custom_generate", "use_mtp", "dola_layers"):
        value = settings.get(name)
        if value:
            raise ValueError(
                f"`lazy=True` needs generate's own sampling, got {name}={value!r}, which may not sample from the "
                f"scores it gets: leave out `{name}`, or `lazy`."
            )
    if settings.get("do_sample") is not True:
        raise ValueError(
            f"`lazy=True` draws its tokens, got do_sample={settings.get('do_sample')!r}: pass do_sample=True, or "
            "leave out `lazy`."
        )
    beams = settings.get("num_beams", 1)
    if beams > 1:
        raise ValueError(
            f"`lazy=True` draws one token for each row, got num_beams={beams}: pass num_beams=1, or leave out `lazy`."
        )
    for name, off in WARPERS.items():
        unset = DEFAULT_TOP_K if name == "top_k" and name not in settings.arguments else off
        value = settings.get(name, unset)
        if value is not None and value != off:
            raise ValueError(
                f"`lazy=True` draws a token before generate could warp r, got {name}={value!r} from the call, the "
                f"model's generation_config or generate's defaults: pass {name}={off!r}, or leave out `lazy`."
            )
    processors = list(settings.arguments["logits_processor"])
    behind = processors[[getattr(p, "is_kad_processor", False) for p in processors].index(True) + 1 :]
    if behind:
        raise ValueError(
            f"`lazy=True` draws a token before a processor behind KAD could change r, got {behind!r} there: put them "
            "before KAD in `logits_processor`, where they change p, or leave out `lazy`."
        )


def _is_sharded(model: PreTrainedModel) -> bool:
    return bool(is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model))


def _describe_call(kad: Any, settings: _Settings, speculative: bool) -> OpenCall:
    ids = settings.input_ids
    embeds = settings.arguments.get("inputs_embeds")
    beams = settings.get("num_beams", 1)
    call = OpenCall(
        recorder=BatchRecorder(kad.record_trace) if speculative else StepRecorder(kad.record_trace),
        # Without any input `generate` starts from one begin-of-sequence token.
        prompt_length=ids.shape[1] if ids is not None else 0 if embeds is not None else 1,
        batch_size=len(ids) if ids is not None else len(embeds) if embeds is not None else 1,
        beams=beams,
        attention_mask=settings.attention_mask(),
        eos_token_ids=settings.ending_ids,
        pad_token_id=settings.pad_token_id,
        chunk_size=settings.get("prefill_chunk_size"),
        rows_stay=beams == 1 and settings.arguments.get("custom_generate") is None,
        vocabulary_alignment=kad.vocabulary_alignment,
    )
    if kad.proxy_inputs is not None:
        prompt, mask, call.prompt_inputs = kad.proxy_inputs
        if len(prompt) != call.batch_size:
            raise ValueError(
                f"`proxy_prompt` has {len(prompt)} prompts, the call has {call.batch_size}: give one for each."
            )
        call.proxy_prompt, call.attention_mask = (prompt, mask), None
    elif kad.vocabulary_alignment is not None:
        start = _as_list(settings.get("bos_token_id")) if ids is None else ids
        call.proxy_prompt = kad.vocabulary_alignment.retokenize(
            torch.as_tensor(start, device="cpu").view(call.batch_size, -1), call.attention_mask
        )
        call.attention_mask = None
    else:
        given = settings.arguments
        call.prompt_inputs = {name: given[name] for name in PER_TOKEN if given.get(name) is not None}
    return call


def _warn_about_inputs(kad: Any, settings: _Settings, call: OpenCall) -> None:
    """Warn once of inputs that the call gives the base, and that the proxy would take and does not get."""
    if kad.proxy_inputs is not None:
        return
    handled = {"input_ids", "inputs", "attention_mask", "inputs_embeds", "past_key_values", "labels"}
    unseen = frozenset(
        name
        for name, value in settings.arguments.items()
        if torch.is_tensor(value)
        and name in kad.cached_proxy.accepted_inputs
        and name not in handled
        and name not in call.prompt_inputs
    )
    if unseen and unseen not in kad.inputs_warned:
        kad.inputs_warned.add(unseen)
        logger.warning(
            f"The call passes {sorted(unseen)} to the base, which the proxy could take as well and does not get: it "
            "reads the tokens of the prompt alone. Give it a prompt of its own if they mean something else to it: "
            "`with kad.proxy_prompt(inputs):`."
        )


def _warn_about_eos(kad: Any, call: OpenCall) -> None:
    ends = _as_list(kad.proxy.generation_config.eos_token_id)
    if call.vocabulary_alignment is not None:
        own = {end: call.vocabulary_alignment.base_id(end) for end in ends}
        unsayable = frozenset(end for end, base_id in own.items() if base_id is None)
        if unsayable and unsayable not in kad.eos_warned:
            kad.eos_warned.add(unsayable)
            logger.warning(
                f"The proxy ends its turns with its token ids {sorted(unsayable)}, which have no counterpart among "
                "the base's tokens: the text may run on. Name one: `align_vocabularies(..., same={proxy's: base's})`."
            )
        ends = [base_id for base_id in own.values() if base_id is not None]
    missing = frozenset(ends) - call.eos_token_ids
    if missing and missing not in kad.eos_warned:
        kad.eos_warned.add(missing)
        logger.warning(
            f"The proxy ends its turns with token ids {sorted(missing)}, which do not end this call: the text will "
            f"run on. Pass eos_token_id={sorted(call.eos_token_ids | missing)} to generate."
        )


def _bind_loop(settings: _Settings) -> dict[str, Any]:
    """The arguments of the same call with the project's loop as decoding method.

    A callable `custom_generate` loses the streamer and the tokenizer on the way: the first is bound to the loop,
    the second is used up here, for the stop strings.
    """
    arguments = _with_stop_strings_as_criterion(settings)
    for name in ("assistant_model", "assistant_tokenizer", "tokenizer"):
        arguments.pop(name, None)
    arguments["custom_generate"] = functools.partial(kad_generate, streamer=arguments.get("streamer"))
    return arguments


def _watch_rows(settings: _Settings, call: OpenCall) -> dict[str, Any]:
    """The arguments of the same call token by token, with criteria by which the call learns which rows have ended."""
    arguments = _with_stop_strings_as_criterion(settings)
    criteria = list(arguments.get("stopping_criteria") or [])
    # These take the place of `generate`'s own of the same type; by them, or the ids, all rows end alike.
    kept = [c for c in criteria if isinstance(c, MaxLengthCriteria | MaxTimeCriteria) or type(c) is EosTokenCriteria]
    asked = [c for c in criteria if all(c is not other for other in kept)]
    fills_up = bool(call.eos_token_ids) or any(hasattr(criterion, "eos_token_id") for criterion in criteria)
    call.ended_rows = EndedRows(asked, call.eos_token_ids, fills_up=fills_up)
    arguments["stopping_criteria"] = StoppingCriteriaList([*kept, call.ended_rows])
    return arguments


def _with_stop_strings_as_criterion(settings: _Settings) -> dict[str, Any]:
    """The arguments of the same call with its stop strings, if it has any, as one of the stopping criteria."""
    arguments = dict(settings.arguments)
    stop_strings, tokenizer = settings.get("stop_strings"), arguments.get("tokenizer")
    if stop_strings is None:
        return arguments
    if tokenizer is None:
        raise ValueError(f"`stop_strings={stop_strings!r}` needs the `tokenizer` argument of generate as well.")
    criteria = settings.stopping_criteria
    if not any(type(criterion) is StopStringCriteria for criterion in criteria):  # the user's would take its place
        criteria = [StopStringCriteria(stop_strings=stop_strings, tokenizer=tokenizer), *criteria]
    arguments["stopping_criteria"] = StoppingCriteriaList(criteria)
    if settings.config is not None:
        arguments["generation_config"] = copy.deepcopy(settings.config)
        arguments["generation_config"].stop_strings = None
    own = settings.model.generation_config.stop_strings  # counts where the config passed names none
    if settings.config is None or "stop_strings" in arguments or own is not None:
        arguments["stop_strings"] = None
    return arguments
