"""`attach`: every call of a base's `generate` is guided, for libraries that leave no room for processors."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from ..models.adapters import model_below
from ..models.model_errors import describe
from .call_arguments import CallArguments, as_id_list
from .processor_state import ProcessorState
from .refusals import can_be_drafted, refuse_base

# Copies and pickles of the base take this attribute with them, so that they are guided too.
_NAME = "_kad_attachment"


@dataclass(frozen=True)
class Attachment:
    """A processor that is attached to a base.

    Attributes:
        processor: the `KADLogitsProcessor`.
        speculative: whether calls are decoded with drafts wherever that is possible.
    """

    processor: Any
    speculative: bool

    def guide(self, given: CallArguments) -> CallArguments:
        """A call with what is attached: the processor behind the call's own, drafts, and the ids that end a text."""
        state, arguments = self.processor.state, dict(given.arguments)
        arguments["logits_processor"] = LogitsProcessorList(
            [*(arguments.get("logits_processor") or []), self.processor]
        )
        ends = ends_of_both(state, given)
        if "eos_token_id" not in arguments and ends != as_id_list(given.get("eos_token_id")):
            if given.config is None:
                arguments["eos_token_id"] = ends
            else:  # `generate` deprecates settings beside a configuration
                arguments["generation_config"] = copy.deepcopy(given.config)
                arguments["generation_config"].eos_token_id = ends
        guided = CallArguments(given.model, arguments)
        if self.speculative and arguments.get("assistant_model") is None and can_be_drafted(state, guided):
            arguments["assistant_model"] = self.processor.proxy
        return guided


def ends_of_both(state: ProcessorState, given: CallArguments) -> list[int]:
    """The ids that end a text of a call, and those that end the proxy's turns.

    The call's own come first, since finished rows may be filled with the first of all.
    """
    own = as_id_list(given.get("eos_token_id"))
    return [*own, *sorted({end for end in state.proxy_ends.values() if end is not None} - {*own})]


def attach(base: PreTrainedModel, kad: LogitsProcessor, *, speculative: bool = True) -> None:
    """Guide every call of `base.generate` from now on.

    This is for pipelines, chat loops and other libraries that call `generate` and leave no room for a processor. The
    processor stands behind those that a call brings. A text ends at the end-of-sequence ids of the base and of the
    proxy, unless the call names an `eos_token_id`. A call with `kad=False` is not guided. A call with `kad=other` is
    guided by another processor in the same way, whether or not one is attached; one with a KAD processor in
    `logits_processor` is decoded as it says.

    Calls that drafts can't serve, such as beams, static caches or a streamer for several sequences, are decoded token
    by token. Continuous batching (`generate_batch`) would decode without the proxy, and is refused.

    The processor's `repr` names the bases that it is attached to, and `attached_processor(base)` returns it.

    A deep copy or a pickle of the base holds a copy of the processor and its proxy, and is guided by that one. What is
    attached is no part of the saved weights or of the configuration.

    Args:
        base: a causal LM or a `PeftModel`, whose `generate` is that of `GenerationMixin`, or calls it.
        kad: a `KADLogitsProcessor`. Attaching the same one again does nothing but set `speculative`.
        speculative: decode with drafts of the proxy wherever that is possible.

    Raises:
        TypeError: `base` is no model that generates, or `kad` no KAD processor.
        ValueError: another processor is attached, or no call of this base could be guided by this one.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from transformers_kad import KADLogitsProcessor
    >>> sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> base, proxy = (LlamaForCausalLM(LlamaConfig(**sizes)).eval() for _ in range(2))
    >>> kad = KADLogitsProcessor(proxy, "dual", threshold=0.4)
    >>> attach(base, kad)
    >>> ids = base.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, eos_token_id=None, pad_token_id=0)
    >>> kad.statistics.tokens
    4
    >>> detach(base)
    """
    if not isinstance(model_below(base), GenerationMixin):
        raise TypeError(f"`base` must be a causal LM, which has `generate`, got {type(base).__name__}.")
    if not _is_processor(kad):
        raise TypeError(f"`kad` must be a KADLogitsProcessor, got {type(kad).__name__}.")
    attached = attached_processor(base)
    if attached is not None and attached is not kad:
        raise ValueError(
            f"{describe(base)} has a KAD processor attached already, {attached!r}: `detach(base)` takes it off."
        )
    refuse_base(kad.state, model_below(base))
    vars(model_below(base))[_NAME] = Attachment(kad, speculative)
    kad.state.attached_to.add(model_below(base))


def detach(base: PreTrainedModel) -> None:
    """Undo `attach`: calls of `base.generate` are not guided any more. Without a processor it does nothing."""
    attachment = vars(model_below(base)).pop(_NAME, None)
    if attachment is not None:
        attachment.processor.state.attached_to.discard(model_below(base))


def attached_processor(base: PreTrainedModel) -> LogitsProcessor | None:
    """The `KADLogitsProcessor` that is attached to a base; None if there is none."""
    attachment = vars(model_below(base)).get(_NAME)
    return None if attachment is None else attachment.processor


def attachment_for(model: PreTrainedModel, wanted: object) -> Attachment | None:
    """What guides a call of a model's `generate` that has no KAD processor in its list; None for the base alone.

    Args:
        model: the model.
        wanted: the call's argument `kad`: False, a processor, or None for what is attached.

    Raises:
        TypeError: `wanted` is something else.
    """
    attached: Attachment | None = vars(model).get(_NAME)
    if _is_processor(wanted):
        return Attachment(wanted, attached is None or attached.speculative)
    if wanted is not None and wanted is not False:
        raise TypeError(
            f"`kad` must be a KADLogitsProcessor, or False for a call without the attached one, got {wanted!r:.200}."
        )
    if attached is not None:
        attached.processor.state.attached_to.add(model)  # it may be a copy of the base
    return None if wanted is False or any(other is model for other in _UNGUIDED.get()) else attached


def _is_processor(value: object) -> bool:
    return getattr(value, "is_kad_processor", False) and hasattr(value, "state")


@contextmanager
def unguided(model: PreTrainedModel) -> Iterator[None]:
    """What is attached to a model is left out of the calls inside, in this thread and task alone.

    A decoding method may call `generate` in turn, and that call is to be as unguided as the one that it belongs to.
    """
    token = _UNGUIDED.set((*_UNGUIDED.get(), model))
    try:
        yield
    finally:
        _UNGUIDED.reset(token)


# Models within a call that said `kad=False`.
_UNGUIDED: ContextVar[tuple[PreTrainedModel, ...]] = ContextVar("unguided", default=())
