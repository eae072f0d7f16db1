"""Around a call of `generate`: prompts as model inputs, plain sampling, the ids that end a text."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from jinja2 import TemplateError
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

# The law of the paper: nothing warps the target after KAD. For `generate(**PLAIN_SAMPLING)`.
PLAIN_SAMPLING: Mapping[str, Any] = MappingProxyType(
    {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
)

Prompt = str | Sequence[Mapping[str, str]]


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    device: str = "cpu",
    *,
    chat: bool | None = None,
    **template_arguments: Any,
) -> BatchEncoding:
    """Prompts as model inputs `(B, L)`, padded on the left where there are several.

    Args:
        tokenizer: with `padding_side="left"`.
        prompts: questions, or chats (lists of messages with `role` and `content`).
        device: where the tensors go.
        chat: put the prompts into the chat template, questions as the user's turn. Default: where there is one.
        **template_arguments: what the chat template understands beside messages, say `enable_thinking=False`.

    Raises:
        ValueError: a chat, or `chat=True`, without a chat template; a chat with `chat=False`; a prompt that the chat
            template refuses.
        TypeError: one prompt instead of several.
    """
    if isinstance(prompts, str) or any(isinstance(prompt, Mapping) for prompt in prompts):
        raise TypeError(f"`prompts` must be a sequence of prompts, got a single one: pass [{prompts!r}].")
    chats = [prompt for prompt in prompts if not isinstance(prompt, str)]
    if chat is None:
        chat = bool(chats) or tokenizer.chat_template is not None
    if chats and not chat:
        raise ValueError(f"A chat needs the chat template, but `chat=False` was given: {chats[0]!r}.")
    padding = len(prompts) > 1
    if not chat:
        return tokenizer(list(prompts), padding=padding, return_tensors="pt").to(device)
    if tokenizer.chat_template is None:
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} has no chat template. Set `tokenizer.chat_template`, or use "
            "plain prompts."
        )
    messages = [
        [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt) for prompt in prompts
    ]
    try:
        inputs = tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=True,
            padding=padding,
            return_dict=True,
            return_tensors="pt",
            **template_arguments,
        )
    except TemplateError as error:
        raise ValueError(
            f"The chat template of {tokenizer.name_or_path!r} refused the prompt: {error}. It was {messages[0]!r}."
        ) from error
    return inputs.to(device)


def eos_token_ids(*models: PreTrainedModel) -> list[int]:
    """Every id that ends a turn of one of the models, for `generate(eos_token_id=...)`."""
    ids: set[int] = set()
    for model in models:
        eos = model.generation_config.eos_token_id
        ids |= set(eos if isinstance(eos, list) else [] if eos is None else [eos])
    return sorted(ids)
