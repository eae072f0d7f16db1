"""Calls of `generate` that can be seen to go wrong are refused here, before they begin.

A new refusal is one more `if` in the function of its kind: it echoes the value and says what to pass instead.
"""

import functools
import sys
from types import FrameType
from typing import Any

import torch
from peft import PeftModel
from transformers import Cache, GenerationMixin, MaxTimeCriteria, PreTrainedModel

from ..models.adapters import check_speculative_base
from ..models.base_model import has_cross_attention, reads_both_directions, takes_tokens_back
from ..models.forward_inputs import PER_TOKEN
from ..models.model_errors import how_to_compile
from ..models.offloading import check_weights
from .call_arguments import CallArguments
from .parallel import is_pipelined, is_sharded, sharing_group
from .processor_state import ProcessorState

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

# The values of `cache_implementation` from whose caches refused draft tokens can be taken back. "hybrid", which
# configurations on the Hub have, is a dynamic cache today.
CACHES_FOR_DRAFTS = (None, "dynamic", "hybrid", "offloaded")


def is_speculative(state: ProcessorState, arguments: dict[str, Any]) -> bool:
    """Whether a call asks for drafts.

    Raises:
        ValueError: drafts of another model than the proxy, or two ways of decoding at once.
    """
    assistant, custom = arguments.get("assistant_model"), arguments.get("custom_generate")
    is_loop = is_kad_generate(custom)
    proxy = state.models.proxy.model
    if assistant is not None and assistant is not proxy:
        raise ValueError(
            "`assistant_model` must be the model that the KAD processor was built with (`kad.proxy`), got another "
            f"{type(assistant).__name__}: drafts of a third model are not supported"
            f"{how_to_compile('proxy', assistant)}."
        )
    if assistant is not None and custom is not None and not is_loop:
        raise ValueError(f"Pass either `assistant_model` or `custom_generate`, got both ({custom!r}).")
    return assistant is not None or is_loop


def is_kad_generate(method: object) -> bool:
    """Whether a decoding method is `kad_generate`, perhaps with some of its arguments bound by `functools.partial`."""
    while isinstance(method, functools.partial):
        method = method.func
    return getattr(method, "is_kad_generate", False)


def refuse_call(state: ProcessorState, given: CallArguments, speculative: bool) -> None:
    """Raise `ValueError` or `TypeError` for a call that can't be answered rightly."""
    _refuse_models(state, given)
    if state.settings.lazy:
        _refuse_lazy(given, speculative)
    if given.beams > 1 and state.settings.trace:
        raise ValueError(f"`trace=True` is not available with beams, got num_beams={given.beams}.")
    _refuse_inputs(state, given, speculative)
    if speculative:
        _refuse_speculative(state, given)


def can_be_drafted(state: ProcessorState, given: CallArguments) -> bool:
    """Whether a call that does not ask for drafts can be decoded with them. `given` holds the processor already."""
    arguments, model = given.arguments, given.model
    cache = given.cache
    texts = ("inputs", "input_ids", "attention_mask")
    has_more_than_text = any(torch.is_tensor(value) for name, value in arguments.items() if name not in texts)
    if (
        state.settings.lazy
        or arguments.get("custom_generate") is not None
        or arguments.get("inputs_embeds") is not None
        or given.get("cache_implementation") not in CACHES_FOR_DRAFTS
        or reads_both_directions(model)
        or (has_more_than_text and (has_cross_attention(model) or state.settings.compile))
    ):
        return False
    if cache is not None:
        rows = 1 if given.input_ids is None else len(given.input_ids)
        # The cache is the caller's, and rows that end their texts leave it.
        if state.settings.compile or rows > 1 or not isinstance(cache, Cache) or not takes_tokens_back(cache):
            return False
    try:
        _refuse_speculative(state, given)
    except ValueError:
        return False
    return True


def refuse_base(state: ProcessorState, base: PreTrainedModel) -> None:
    """Raise `ValueError` for a base that no call can guide with this processor."""
    _refuse_models(state, CallArguments(base, {}))


def refuse_continuous_batching(processors: object, attached: object) -> None:
    """Raise `ValueError` if continuous batching, which takes no processors, is to be guided.

    Args:
        processors: `logits_processor` of a call of `generate_batch`, which ignores it.
        attached: the processor that is attached to the model, None for a call without it.
    """
    given = processors if isinstance(processors, list | tuple) else [processors]
    found = [processor for processor in given if getattr(processor, "is_kad_processor", False)]
    if found:
        raise ValueError(
            "`generate_batch` (continuous batching) ignores `logits_processor`, so that the base would decode without "
            f"the proxy, got {found[0]!r:.200}: pass the prompts to `generate`, as one batch padded on the left, or "
            "take `transformers_kad.integrations.continuous_batching`."
        )
    if attached is not None:
        raise ValueError(
            "Continuous batching takes no processor, so that the base would decode without the proxy, and this model "
            f"has {attached!r:.200} attached: pass the prompts to `generate`, as one batch padded on the left, take "
            "`transformers_kad.integrations.continuous_batching`, or pass `kad=False` to decode without it."
        )


def _refuse_models(state: ProcessorState, given: CallArguments) -> None:
    """Raise for models, or ways of running them, with which no processor can work."""
    model, proxy = given.model, state.models.proxy.model
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"KAD needs a decoder-only base, got the encoder-decoder model {type(model).__name__}.")
    check_weights(model, "base")
    if given.get("cache_implementation") == "paged":
        raise ValueError('`cache_implementation="paged"` would drop the KAD processor; leave it out.')
    for name in ("prompt_lookup_num_tokens", "assistant_early_exit"):
        if given.get(name):
            raise ValueError(
                f"`{name}={given.get(name)!r}` can't be combined with a KAD processor; pass "
                "`assistant_model=kad.proxy` for speculative decoding."
            )
    if isinstance(proxy, PeftModel) and proxy.get_base_model() is model:
        raise ValueError(
            "The proxy's adapter was put into the base model itself, so that the two are one: load the model that the "
            "adapter belongs to a second time."
        )
    for cached in state.models:
        if is_sharded(cached.model):
            raise ValueError(
                f"The {cached.role} is sharded over processes (FSDP or DeepSpeed ZeRO-3), which do not all ask it at "
                "the same time; give every process a whole one."
            )
        if is_pipelined(cached.model):
            raise ValueError(
                f"The {cached.role} is spread over processes by pipeline parallelism (`pp_size` above 1): load it "
                "whole, or with tensor parallelism (`tp_size`)."
            )
    if any(sharing_group(shared) is not None for shared in (model, *(cached.model for cached in state.models))):
        _refuse_time_limits(given)


def _refuse_time_limits(given: CallArguments) -> None:
    """Raise for limits that processes which share a model would reach at different tokens."""
    limits = [given.get("max_time"), *(c.max_time for c in given.stopping_criteria if isinstance(c, MaxTimeCriteria))]
    for limit in limits:
        if limit is not None:
            raise ValueError(
                f"`max_time={limit!r}` is not available where processes share a model, since each goes by its own "
                "clock and would end at another token: limit the text with `max_new_tokens`."
            )


def _refuse_inputs(state: ProcessorState, given: CallArguments, speculative: bool) -> None:
    """Raise for inputs that the proxy can't follow."""
    ids, mask = given.input_ids, given.arguments.get("attention_mask")
    has_own_prompt = state.proxy_prompt is not None
    for name, value in (("input_ids", ids), ("attention_mask", mask)):
        if value is not None and not torch.is_tensor(value):
            raise TypeError(
                f"`{name}` must be a tensor, got {type(value).__name__}: tokenize with `return_tensors='pt'`, and "
                "pass what the tokenizer returns as `generate(**inputs, ...)`."
            )
    if ids is not None and ids.dim() != 2:
        raise ValueError(f"`input_ids` must have the shape (B, L), one row a prompt, got {tuple(ids.shape)}.")
    if ids is None and given.arguments.get("inputs_embeds") is not None and not has_own_prompt:
        raise ValueError(
            "`inputs_embeds` without `input_ids`: the proxy needs a prompt of tokens. Pass its own with "
            "`with kad.proxy_prompt(inputs):`."
        )
    if mask is not None and ids is not None and mask.shape != ids.shape and not has_own_prompt:
        raise ValueError(
            f"`attention_mask` {tuple(mask.shape)} and `input_ids` {tuple(ids.shape)} must have the same shape: "
            "the proxy needs the whole text, also where a cache for its beginning is passed."
        )
    for name in PER_TOKEN:
        value = given.arguments.get(name)
        if value is None or ids is None or (has_own_prompt and not speculative):
            continue
        if value.dim() < 2 or value.shape[-1] != ids.shape[1]:
            raise ValueError(
                f"`{name}` {tuple(value.shape)} must have one value for each token of `input_ids` {tuple(ids.shape)}, "
                "also where a cache for the beginning of the text is passed."
            )


def _refuse_speculative(state: ProcessorState, given: CallArguments) -> None:
    """Raise for what drafts can't be combined with."""
    if state.settings.compile:
        _refuse_compiled(state, given)
    if given.beams > 1:
        raise ValueError(f"Beams and `assistant_model` can't be combined, got num_beams={given.beams}.")
    for name in NOT_SPECULATIVE:
        if given.get(name) is not None:
            raise ValueError(
                f"`{name}={given.get(name)!r}` asks for another way of decoding, which drafts of a proxy can't be "
                f"combined with: leave out `{name}`, or `assistant_model` (or `custom_generate`)."
            )
    for name in ("output_attentions", "output_hidden_states"):
        if given.get(name):
            raise ValueError(f"`{name}=True` is not available in speculative decoding; leave out `assistant_model`.")
    if is_pipelined(given.model):
        raise ValueError(
            "Drafts are not available for a base that is spread over processes by pipeline parallelism (`pp_size` "
            "above 1): leave out `assistant_model`, or load the base with tensor parallelism (`tp_size`)."
        )
    ids = given.input_ids
    sequences = (1 if ids is None else ids.shape[0]) * given.get("num_return_sequences", 1)
    check_speculative_base(given.model, sequences)
    if sequences > 1 and given.arguments.get("streamer") is not None:
        raise ValueError(f"A streamer shows one sequence, got {sequences}. Leave out `streamer`.")
    if given.get("synced_gpus"):
        raise ValueError("`synced_gpus=True` is not available in speculative decoding; leave out `assistant_model`.")


def _refuse_compiled(state: ProcessorState, given: CallArguments) -> None:
    """Raise for inputs of the prompts that compiled forwards would not read, and for sharded weights."""
    if is_sharded(given.model):
        raise ValueError(
            "`compile=True` is not available for a base that is sharded by FSDP or DeepSpeed ZeRO-3: leave out "
            "`compile`."
        )
    if given.arguments.get("position_ids") is not None:
        raise ValueError("`compile=True` counts positions itself, got `position_ids`: leave out one of them.")
    further = {} if state.proxy_prompt is None else state.proxy_prompt.further_inputs
    read = [name for name in PER_TOKEN if name in further and name in state.models.proxy.accepted_inputs]
    if read:
        raise ValueError(
            f"`compile=True` decodes from `input_ids` alone, got `{read[0]}` in `proxy_prompt`: leave out one of them."
        )


def _refuse_lazy(given: CallArguments, speculative: bool) -> None:
    """Raise for calls in which a token drawn before `generate` chooses one would not be a draw from its r."""
    if speculative:
        raise ValueError(
            "`lazy=True` is for decoding token by token, where drafts save nothing: leave out `assistant_model` (or "
            "`custom_generate`), or `lazy`."
        )
    for name in ("custom_generate", "use_mtp", "dola_layers"):
        value = given.get(name)
        if value:
            raise ValueError(
                f"`lazy=True` needs generate's own sampling, got {name}={value!r}, which may not sample from the "
                f"scores it gets: leave out `{name}`, or `lazy`."
            )
    if given.get("do_sample") is not True:
        raise ValueError(
            f"`lazy=True` draws its tokens, got do_sample={given.get('do_sample')!r}: pass do_sample=True, or "
            "leave out `lazy`."
        )
    if given.beams > 1:
        raise ValueError(
            f"`lazy=True` draws one token for each row, got num_beams={given.beams}: pass num_beams=1, or leave out "
            "`lazy`."
        )
    for name, off in WARPERS.items():
        unset = DEFAULT_TOP_K if name == "top_k" and name not in given.arguments else off
        value = given.get(name, unset)
        if value is not None and value != off:
            raise ValueError(
                f"`lazy=True` draws a token before generate could warp r, got {name}={value!r} from the call, the "
                f"model's generation_config or generate's defaults: pass {name}={off!r}, or leave out `lazy`."
            )
    processors = list(given.arguments["logits_processor"])
    behind = processors[[getattr(p, "is_kad_processor", False) for p in processors].index(True) + 1 :]
    if behind:
        raise ValueError(
            f"`lazy=True` draws a token before a processor behind KAD could change r, got {behind!r} there: put them "
            "before KAD in `logits_processor`, where they change p, or leave out `lazy`."
        )


def refuse_by_hand(processor: object, input_ids: torch.Tensor) -> None:
    """Raise if a processor that is asked by hand about texts `(rows, L)` would take padding for text.

    Raises:
        RuntimeError: a `generate` that the wrapper knows nothing of has the processor in its list and is running it,
            or a running `generate` has padded texts of this shape, as where another processor asks this one.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "generate" and isinstance(frame.f_locals.get("self"), GenerationMixin):
            processors = frame.f_locals.get("logits_processor")
            if isinstance(processors, list | tuple) and any(other is processor for other in processors):
                raise RuntimeError(
                    "This KAD processor is in the list of a `generate` that was looked up before transformers_kad was "
                    "imported, or that a model defines without calling `super().generate`. Such a call would take "
                    "padding for text and know nothing of drafts: import transformers_kad first, and call "
                    "`model.generate` of `GenerationMixin`."
                )
            if _may_be_padded(input_ids, (frame.f_locals.get("model_kwargs") or {}).get("attention_mask")):
                raise RuntimeError(
                    f"This KAD processor was asked by hand about texts {tuple(input_ids.shape)} within a `generate` "
                    "whose prompts are padded, and would take the padding for text. Put the processor itself into "
                    "`logits_processor`, or ask it about texts without padding."
                )
        frame = frame.f_back


def _may_be_padded(input_ids: torch.Tensor, mask: object) -> bool:
    """Whether texts `(rows, L)` may be those of prompts with this mask `(B, P)`, and it has padding."""
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or not len(mask):
        return False
    fits = len(input_ids) % len(mask) == 0 and input_ids.shape[1] >= mask.shape[1]
    return fits and not bool((mask != 0).all())
