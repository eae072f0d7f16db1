"""Around a call of `generate`: prompts as model inputs, plain sampling, the ids that end a text."""

import inspect
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
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
    model: PreTrainedModel | None = None,
    **template_arguments: Any,
) -> BatchEncoding:
    """Prompts as model inputs `(B, L)`, padded on the left where their lengths differ.

    The inputs are `input_ids` and `attention_mask`, whatever else the tokenizer's own configuration lists.

    Args:
        tokenizer: it stays as it is; texts are filled up with its :func:`pad_token_id`.
        prompts: questions, or chats (lists of messages with `role` and `content`).
        device: where the tensors go.
        chat: put the prompts into the chat template, questions as the user's turn. Default: where there is one.
        model: which model gets the inputs. Where its forward takes `token_type_ids`, they are among the inputs if the
            tokenizer makes them.
        **template_arguments: what the chat template understands beside messages, say `enable_thinking=False`.

    Raises:
        ValueError: a chat, or `chat=True`, without a chat template; a chat with `chat=False`; a prompt that the chat
            template refuses; prompts of different length, and a tokenizer with nothing to pad with.
        TypeError: one prompt instead of several.
    """
    if isinstance(prompts, str) or any(isinstance(prompt, Mapping) for prompt in prompts):
        raise TypeError(f"`prompts` must be a sequence of prompts, got a single one: pass [{prompts!r}].")
    chats = [prompt for prompt in prompts if not isinstance(prompt, str)]
    if chat is None:
        chat = bool(chats) or tokenizer.chat_template is not None
    if chats and not chat:
        raise ValueError(f"A chat needs the chat template, but `chat=False` was given: {chats[0]!r}.")
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
    except TemplateError as error:
        raise ValueError(
            f"The chat template of {tokenizer.name_or_path!r} refused the prompt: {error}. It was {messages[0]!r}."
        ) from error
    return _tensors(tokenizer, encoded, model).to(device)


def _tensors(
    tokenizer: PreTrainedTokenizerBase, encoded: Mapping[str, list[list[int]]], model: PreTrainedModel | None
) -> BatchEncoding:
    """Lists of ids as tensors `(B, L)`: ids, mask, and the token types that the model takes."""
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
    """Whether a model's forward has an input of that name; an adapter's model decides for the adapter."""
    below = getattr(model, "get_base_model", lambda: model)()
    return name in inspect.signature(below.forward).parameters


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """What shorter texts of a batch are filled up with: the padding token, else the end of sequence; None: neither."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def no_padding_error(tokenizer: PreTrainedTokenizerBase) -> ValueError:
    """The error of a batch that needs padding, for a tokenizer whose :func:`pad_token_id` is None."""
    return ValueError(
        f"The tokenizer {tokenizer.name_or_path!r} has neither a padding nor an end-of-sequence token, so texts of "
        "different length can't share a batch. Name one of its tokens in its tokenizer_config.json, "
        '"pad_token": "...". '
        "Where texts are generated, --batch_size 1 does without."
    )


def eos_token_ids(*models: PreTrainedModel) -> list[int]:
    """Every id that ends a turn of one of the models, for `generate(eos_token_id=...)`."""
    ids: set[int] = set()
    for model in models:
        eos = model.generation_config.eos_token_id
        ids |= set(eos if isinstance(eos, list) else [] if eos is None else [eos])
    return sorted(ids)
