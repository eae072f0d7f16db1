"""Warnings about calls of `generate` that are answered, though perhaps not as the caller means. Each is given once."""

import torch
from transformers.utils import logging

from .call_arguments import CallArguments
from .open_call import OpenCall
from .processor_state import ProcessorState

logger = logging.get_logger(__name__)

# Inputs that the proxy gets, or that are the base's alone by their meaning.
_KNOWN_INPUTS = {"input_ids", "inputs", "attention_mask", "inputs_embeds", "cache", "past_key_values", "labels"}


def warn_about_call(state: ProcessorState, given: CallArguments, call: OpenCall) -> None:
    """Warn of whatever about the call deserves it."""
    _warn_about_eos(state, call)
    if state.proxy_prompt is None:
        _warn_about_inputs(state, given, call)
    if state.has_proxy_prompt_elsewhere and state.first_time("proxy_prompt of another thread"):
        logger.warning(
            "A block `with kad.proxy_prompt(...):` is open in another thread or task. It does not reach this call, "
            "whose proxy reads the base's prompt: enter the block in the thread that calls `generate`."
        )


def _warn_about_inputs(state: ProcessorState, given: CallArguments, call: OpenCall) -> None:
    """Warn of inputs that the call gives the base, and that the proxy would take and does not get."""
    unseen = sorted(
        name
        for name, value in given.arguments.items()
        if torch.is_tensor(value)
        and name in state.models.proxy.accepted_inputs
        and name not in _KNOWN_INPUTS
        and name not in call.prompt_inputs
    )
    if unseen and state.first_time(("inputs", *unseen)):
        logger.warning(
            f"The call passes {unseen} to the base, which the proxy could take as well and does not get: it "
            "reads the tokens of the prompt alone. Give it a prompt of its own if they mean something else to it: "
            "`with kad.proxy_prompt(inputs):`."
        )


def _warn_about_eos(state: ProcessorState, call: OpenCall) -> None:
    """Warn of ids that end the proxy's turns and not this call."""
    ends = state.proxy_ends
    unsayable = sorted(end for end, base_id in ends.items() if base_id is None)
    if unsayable and state.first_time(("unsayable", *unsayable)):
        logger.warning(
            f"The proxy ends its turns with its token ids {unsayable}, which have no counterpart among "
            "the base's tokens: the text may run on. Name one: `align_vocabularies(..., same={proxy's: base's})`."
        )
    missing = sorted({base_id for base_id in ends.values() if base_id is not None} - call.eos_token_ids)
    if missing and state.first_time(("missing", *missing)):
        logger.warning(
            f"The proxy ends its turns with token ids {missing}, which do not end this call: the text will "
            f"run on. Pass eos_token_id={sorted(call.eos_token_ids | set(missing))} to generate."
        )
