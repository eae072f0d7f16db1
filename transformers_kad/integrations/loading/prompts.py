"""The inputs of `generate`: encoded prompts, settings for plain sampling, and the ids that end a text."""

import inspect
import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from ...models.adapters import model_below

# Sampling from the target as in the paper, without any change after KAD: `generate(**PLAIN_SAMPLING)`.
PLAIN_SAMPLING: Mapping[str, Any] = MappingProxyType(
    {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
)

Prompt = str | Sequence[Mapping[str, Any]]

# All errors that chat templates raise.
TEMPLATE_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError)

# Names that a chat template can't be given: `encode` and `apply_chat_template` have arguments with these names.
RESERVED = (
    *("tokenizer", "prompts", "device", "chat", "model", "self", "conversation", "messages", "tokenize", "padding"),
    *("truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
    *("tokenizer_kwargs", "add_generation_prompt", "continue_final_message"),
)


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    device: str = "cpu",
    *,
    chat: bool | None = None,
    model: PreTrainedModel | None = None,
    **template_arguments: Any,
) -> BatchEncoding:
    """Encode prompts as model inputs `(B, L)`, padded on the left if their lengths differ.

    The inputs are `input_ids` and `attention_mask`, whatever else the tokenizer's own configuration lists.

    Args:
        tokenizer: the tokenizer, which is not changed. Shorter texts are padded with its :func:`pad_token_id`.
        prompts: questions, or chats (lists of messages with `role` and `content`), as `normalize_prompt` takes them.
        device: the device of the tensors.
        chat: whether to apply the chat template; a question becomes the user's turn. Default: if there is a template.
        model: the model that gets the inputs. If its forward takes `token_type_ids` and the tokenizer makes them, they
            are part of the inputs.
        **template_arguments: further arguments of the chat template, for example `enable_thinking=False`.

    Raises:
        ValueError: a chat, or `chat=True`, without a chat template; a chat with `chat=False`; a prompt that is not
            text or that the chat template refuses; template arguments that `check_template_arguments` refuses; or
            prompts of different lengths with a tokenizer that has no token to pad with.
        TypeError: a single prompt instead of a sequence of prompts.
    """
    if isinstance(prompts, str) or any(isinstance(prompt, Mapping) for prompt in prompts):
        raise TypeError(f"`prompts` must be a sequence of prompts, got a single one: pass [{prompts!r}].")
    prompts = [normalize_prompt(prompt) for prompt in prompts]
    check_template_arguments(template_arguments)
    chats = [prompt for prompt in prompts if not isinstance(prompt, str)]
    if chat is None:
        chat = bool(chats) or tokenizer.chat_template is not None
    if chats and not chat:
        raise ValueError(f"A chat needs the chat template, but `chat=False` was given: {shorten(chats[0])}.")
    if not chat:
        return _tensors(tokenizer, tokenizer(list(prompts)), model).to(device)
    if tokenizer.chat_template is None:
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} has no chat template. Set `tokenizer.chat_template`, or use "
            "plain prompts."
        )
    messages = [
        [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt) for prompt in prompts
    ]
    try:
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, **template_arguments
        )
    except TEMPLATE_ERRORS as error:
        raise ValueError(
            f"The chat template of {tokenizer.name_or_path!r} refused the prompt: {error}. It was "
            f"{shorten(messages[0])}."
        ) from error
    return _tensors(tokenizer, encoded, model).to(device)


def _tensors(
    tokenizer: PreTrainedTokenizerBase, encoded: Mapping[str, list[list[int]]], model: PreTrainedModel | None
) -> BatchEncoding:
    """Lists of ids as tensors `(B, L)`: ids, mask, and token types if the model takes them."""
    rows = encoded["input_ids"]
    length = max(map(len, rows))
    pad = pad_token_id(tokenizer)
    if pad is None and any(len(row) < length for row in rows):
        raise no_padding_error(tokenizer)

    def pad_left(values: list[list[int]], filling: int | None) -> torch.Tensor:
        return torch.tensor([[filling] * (length - len(row)) + row for row in values], dtype=torch.long)

    inputs = {"input_ids": pad_left(rows, pad), "attention_mask": pad_left([[1] * len(row) for row in rows], 0)}
    if "token_type_ids" in encoded and model is not None and _takes(model, "token_type_ids"):
        inputs["token_type_ids"] = pad_left(encoded["token_type_ids"], tokenizer.pad_token_type_id)
    return BatchEncoding(inputs)


def _takes(model: PreTrainedModel, name: str) -> bool:
    """Whether a model's forward, or that of the model below an adapter, has an input with this name."""
    return name in inspect.signature(model_below(model).forward).parameters


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id that shorter texts of a batch are padded with: the padding token or the end of sequence, else None."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def no_padding_error(tokenizer: PreTrainedTokenizerBase) -> ValueError:
    """The error of a batch that needs padding, for a tokenizer whose :func:`pad_token_id` is None."""
    return ValueError(
        f"The tokenizer {tokenizer.name_or_path!r} has neither a padding nor an end-of-sequence token, so texts of "
        "different length can't share a batch. Name one of its tokens in its tokenizer_config.json, "
        '"pad_token": "...". '
        "To generate texts, --batch_size 1 works without one."
    )


def normalize_prompt(prompt: object) -> Prompt:
    """A question as it is, or a chat in which the `content` of every message is text.

    Args:
        prompt: text, or a list of messages with `role` and `content`. The content is as `message_text` takes it, or
            None in a message with `tool_calls`.

    Raises:
        ValueError: neither of the two, an empty list, or a lone surrogate anywhere in the prompt.
    """
    if isinstance(prompt, str):
        return message_text(prompt)
    if not isinstance(prompt, list | tuple) or not prompt:
        raise ValueError(f"A prompt must be text or a list of at least one message, got {shorten(prompt)}.")
    messages = []
    for number, message in enumerate(prompt, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise ValueError(f'Message {number} needs a "role" that is text, and "content", got {shorten(message)}.')
        content = message["content"]
        calls_tools = content is None and message.get("tool_calls")
        messages.append({**message, "content": content if calls_tools else message_text(content)})
    _check_characters(messages)
    return messages


def check_template_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise a `ValueError` unless a chat template can be given these arguments in addition to the messages.

    Refused are names that `apply_chat_template` uses for something else, such as `tokenize`; `tools` that are not a
    list of objects; and lone surrogates.
    """
    for name in arguments:
        if name in RESERVED:
            raise ValueError(f"{name!r} can't be an argument of a chat template: it is set by the library itself.")
    tools = arguments.get("tools")
    if tools is not None and not (isinstance(tools, list | tuple) and all(map(_is_tool, tools))):
        raise ValueError(f'"tools" must be a list of objects, got {shorten(tools)}.')
    _check_characters(dict(arguments))


def _is_tool(tool: object) -> bool:
    return isinstance(tool, Mapping) or callable(tool)


def message_text(content: object) -> str:
    """The text of a message's `content`.

    Args:
        content: text, or a list of parts, each of them text or `{"type": "text", "text": ...}`. Parts are joined
            without a separator, as the chat templates that support parts do.

    Raises:
        ValueError: content that is neither; a part that is not text, such as an image; or text with a lone surrogate
            (one half of a character that JSON writes as two escapes), which no tokenizer can encode.
    """
    if isinstance(content, list):
        for number, part in enumerate(content, start=1):
            if not isinstance(part, str) and not (
                isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
            ):
                raise ValueError(
                    f'Only text is supported, got {shorten(part)} as part {number} of a message\'s "content". A part '
                    'must be {"type": "text", "text": ...}.'
                )
        content = "".join(part if isinstance(part, str) else part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError(f'A message\'s "content" must be text or a list of parts of text, got {shorten(content)}.')
    _check_characters(content)
    return content


def _check_characters(value: object) -> None:
    """Raise a `ValueError` if any text in a value has a lone surrogate."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, skipkeys=True, default=str)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"There is a lone surrogate, half of a character, at position {error.start} of {shorten(value)}: no "
            "tokenizer can encode it. Remove it, or write both halves."
        ) from error


def shorten(value: object, length: int = 200) -> str:
    """The `repr` of a value, truncated to `length` characters, for an error message."""
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}..."


def eos_token_ids(*models: PreTrainedModel) -> list[int]:
    """All ids that end a turn of one of the models, for `generate(eos_token_id=...)`."""
    ids: set[int] = set()
    for model in models:
        eos = model.generation_config.eos_token_id
        ids |= set(eos if isinstance(eos, list) else [] if eos is None else [eos])
    return sorted(ids)
