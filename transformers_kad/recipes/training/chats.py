"""Checks the rows of a data set, and turns them into chats and preferences."""

import json
import re
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

from transformers import PreTrainedTokenizerBase

from ...integrations.loading.prompts import message_text
from ...utils.strict_json import parse_json
from . import AlignmentError
from .rows import Rows

Message = Mapping[str, Any]
Settings = dict[str, Any]  # the arguments of the chat template, besides messages, that a row has
TEMPLATE_FIELDS = ("tools", "chat_template_kwargs")  # fields of a row
LOSS_FIELDS = ("weight", "train")  # fields of a message
# Arguments of `apply_chat_template` itself, which a row can't set.
OWN_SETTINGS = frozenset(signature(PreTrainedTokenizerBase.apply_chat_template).parameters)


class UnusableRow(Exception):
    """Raised for a well-formed row that can't be trained on. Such rows are skipped, counted and reported."""


def as_chat(content: Mapping[str, Any]) -> tuple[list[Message], int]:
    """A row for fine-tuning as one chat, and the index of its first message that may be trained on.

    All answers in `messages` are trained on. A row with `prompt` and `completion`, strings or lists of messages, is
    trained on the answers of the completion. Strings are the user's question and the assistant's answer.

    Raises:
        AlignmentError: the row is malformed. The message does not name the row.
    """
    _check_text(content, ("messages", "prompt", "completion", *TEMPLATE_FIELDS))
    if content.get("messages") is not None:
        chat, first = _messages(content["messages"], "messages", "user"), 0
    elif content.get("prompt") is not None and content.get("completion") is not None:
        prompt = _messages(content["prompt"], "prompt", "user")
        chat = prompt + _messages(content["completion"], "completion", "assistant")
        first = len(prompt)
    else:
        raise AlignmentError(
            f"the fields `messages`, or `prompt` and `completion`, are needed; it has {_fields(content)}"
        )
    if not any(message["role"] == "assistant" for message in chat[first:]):
        raise AlignmentError("there is no assistant's turn to learn from")
    return chat, first


def answers_to_learn(chat: Sequence[Message], first: int) -> list[int]:
    """The indices of the messages with loss: assistant turns from `first` on without `weight` 0 or `train` false.

    Raises:
        UnusableRow: there are none.
    """
    answers = [
        index
        for index in range(first, len(chat))
        if chat[index]["role"] == "assistant" and not any(chat[index].get(name) in (0, False) for name in LOSS_FIELDS)
    ]
    if not answers:
        raise UnusableRow("whose answers all have `weight` 0 or `train` false")
    return answers


def template_settings(content: Mapping[str, Any]) -> Settings:
    """The arguments for the chat template in a row: `tools` and the entries of `chat_template_kwargs`.

    Raises:
        AlignmentError: they don't have the form that `apply_chat_template` takes.
    """
    tools, others = (content.get(name) for name in TEMPLATE_FIELDS)
    if isinstance(tools, str):  # the form that TRL takes, since schemas differ from tool to tool
        try:
            tools = parse_json(tools)
        except ValueError as error:
            raise AlignmentError(f"`tools` is text, but not JSON ({error})") from error
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise AlignmentError("`tools` must be a list of JSON objects, one for each tool")
    if others is not None and not isinstance(others, dict):
        raise AlignmentError("`chat_template_kwargs` must be a JSON object")
    own = sorted(OWN_SETTINGS.intersection(others or ()))
    if own:
        raise AlignmentError(f"`chat_template_kwargs` can't set {own}: the recipe does")
    given = {
        name: value for name, value in (others or {}).items() if value is not None
    }  # tables have None for missing values
    return {**({"tools": tools} if tools else {}), **given}


def as_preference(content: Mapping[str, Any]) -> dict[str, list[Message]]:
    """A row for preference training: `prompt` a chat, `chosen` and `rejected` one answer each, as message lists.

    `chosen` and `rejected` may also be whole chats that begin with the prompt and differ in their last message.

    Raises:
        AlignmentError: the row is malformed. The message does not name the row.
        UnusableRow: both answers are the same.
    """
    _check_text(content, ("prompt", "chosen", "rejected", *TEMPLATE_FIELDS))
    missing = [name for name in ("prompt", "chosen", "rejected") if content.get(name) is None]
    if missing:
        raise AlignmentError(f"the fields {missing} are missing; it has {_fields(content)}")
    prompt = _messages(content["prompt"], "prompt", "user")
    chosen, rejected = (_messages(content[name], name, "assistant") for name in ("chosen", "rejected"))
    if len(chosen) > 1 and chosen[:-1] == rejected[:-1] and chosen[: len(prompt)] == prompt:
        prompt, chosen, rejected = chosen[:-1], chosen[-1:], rejected[-1:]
    if any(len(answer) != 1 or answer[0]["role"] != "assistant" for answer in (chosen, rejected)):
        raise AlignmentError(
            "`chosen` and `rejected` must be one assistant's message each, or the same chat up to that message"
        )
    if any(answer[0].get(name) in (0, False) for answer in (chosen, rejected) for name in LOSS_FIELDS):
        raise AlignmentError("an answer of a preference can't have `weight` 0 or `train` false: leave out the row")
    if chosen == rejected:
        raise UnusableRow("whose two answers are the same")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _fields(content: Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}`" for name in content) or "none"


def _check_text(content: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise an `AlignmentError` if a field has a lone surrogate, which no tokenizer can encode."""
    for name in names:
        try:
            json.dumps(content.get(name), ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start].encode("unicode_escape").decode()
            raise AlignmentError(f"`{name}` holds {half}, half of a character (a lone surrogate)") from error


def _messages(value: object, name: str, role: str) -> list[Message]:
    """Check a list of messages, or turn a string into one message of `role`. Parts of text are joined."""
    messages = [{"role": role, "content": value}] if isinstance(value, str) else value
    if not isinstance(messages, list) or not messages:
        raise AlignmentError(f"`{name}` must be a string or a list of messages that is not empty")
    return [_message(message, f"message {number} of `{name}`") for number, message in enumerate(messages, start=1)]


def _message(message: object, place: str) -> Message:
    """Check a message, and join the parts of its content."""
    if not isinstance(message, dict):
        raise AlignmentError(f"{place} needs `role` and `content`, both strings")
    content = message.get("content")
    if isinstance(content, list):
        try:
            content = message_text(content)
        except ValueError as error:
            raise AlignmentError(f"{place}: {error}") from error
        message = {**message, "content": content}
    calls_tools = bool(message.get("tool_calls")) and content in (None, "")
    if not isinstance(message.get("role"), str) or not (isinstance(content, str) or calls_tools):
        raise AlignmentError(f"{place} needs `role` and `content`, both strings")
    if isinstance(content, str) and not calls_tools and not content.strip():
        raise AlignmentError(f"{place} has an empty `content`")
    weight, train = (message.get(field) for field in LOSS_FIELDS)
    if weight not in (None, 0, 1):
        raise AlignmentError(f"{place} has the `weight` {weight!r}: only 0 (no loss) and 1 are supported")
    if train is not None and not isinstance(train, bool):
        raise AlignmentError(f"{place} has `train` {train!r}: true or false is needed")
    return message


def without_loss_fields(chat: Sequence[Message]) -> list[Message]:
    """Messages without the fields that control the loss."""
    return [{name: value for name, value in message.items() if name not in LOSS_FIELDS} for message in chat]


def unused_fields(rows: Rows, template: str, *, preferences: bool) -> tuple[list[str], list[str]]:
    """The fields that are not used: fields of rows, and fields of messages.

    Args:
        rows: the rows, as they were read.
        template: the chat template. It uses a field of a message if it contains its name.
        preferences: whether the rows are for preference training.
    """
    of_rows: dict[str, None] = {}
    of_messages: dict[str, None] = {}
    for content in rows.contents:
        if preferences:
            chats: tuple[str, ...] = ("prompt", "chosen", "rejected")
        else:
            chats = ("prompt", "completion") if content.get("messages") is None else ("messages",)
        given = {name: value for name, value in content.items() if value is not None}
        of_rows |= dict.fromkeys(name for name in given if name not in (*chats, *TEMPLATE_FIELDS))
        messages = [m for name in chats if isinstance(given.get(name), list) for m in given[name]]
        for message in messages:
            if isinstance(message, dict):
                of_messages |= dict.fromkeys(name for name, value in message.items() if value is not None)
    known = ("role", "content", *LOSS_FIELDS)
    named = [n for n in of_messages if n not in known and not re.search(rf"\b{re.escape(n)}\b", template)]
    return list(of_rows), named
