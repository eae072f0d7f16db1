"""Rows of a data set: read, checked, and made into tokens. Nothing is cut or dropped without a word."""

import json
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
from jinja2.exceptions import TemplateError
from pyarrow import ArrowException
from transformers import PreTrainedTokenizerBase

from ...integrations.loading.prompts import message_text
from ...utils.sources import looks_like_path
from ...utils.strict_json import parse_json
from . import AlignmentError
from .arguments import AlignmentArguments, say
from .checks import Pair

Message = Mapping[str, Any]
Example = dict[str, Any]
Settings = dict[str, Any]  # what a row gives the chat template beside messages
SHOWN = 5  # how many lines a message names
IGNORED = -100  # the label of a token without loss
MARKERS = re.compile(r"\{%-?\s*generation\b")
TEMPLATE_FIELDS = ("tools", "chat_template_kwargs")  # of a row
LOSS_FIELDS = ("weight", "train")  # of a message
# Arguments of the rendering itself, which a row can't choose.
OWN_SETTINGS = frozenset(signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
PROBE = ({"role": "user", "content": "?"},)


class UnusableRow(Exception):
    """A row that is well formed but cannot be learned from; it is counted and reported."""


# --- Reading ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Rows of a data set and where each of them stands.

    Attributes:
        name: file or Hub id.
        unit: "line" of a file or "row" of a data set, counted from 1.
        numbers: the line or row of each.
        contents: their fields.
    """

    name: str
    unit: str
    numbers: Sequence[int]
    contents: Sequence[dict[str, Any]]

    def split(self, share: float, seed: int) -> tuple["Rows", "Rows"]:
        """Hold out a share of the rows, at least one, drawn with a seed: (the others, the held-out ones).

        Raises:
            AlignmentError: there is only one row.
        """
        count = len(self.numbers)
        if count < 2:
            raise AlignmentError(f"{self.name} has one row, so none can be held out. Use --eval_share 0.")
        drawn = set(random.Random(seed).sample(range(count), min(max(1, round(share * count)), count - 1)))
        return self._take([i for i in range(count) if i not in drawn]), self._take(sorted(drawn))

    def _take(self, indices: list[int]) -> "Rows":
        return Rows(self.name, self.unit, [self.numbers[i] for i in indices], [self.contents[i] for i in indices])


def read_rows(data: str, config: str | None = None, split: str = "train") -> Rows:
    """A JSON Lines file, or a data set of the Hub (or of a local folder laid out like one).

    Args:
        data: path or Hub id.
        config: configuration of the Hub data set.
        split: split of the Hub data set.

    Raises:
        AlignmentError: nothing there, nothing in it, or lines that are no JSON objects (they are named).
    """
    path = Path(data).expanduser()
    if path.is_file():
        rows = _read_lines(data, path)
    elif not path.is_dir() and (path.suffix in (".json", ".jsonl") or looks_like_path(data)):
        raise AlignmentError(f"There is no file {data!r}, and no folder either (working directory: {os.getcwd()!r}).")
    else:
        rows = _read_dataset(data, config, split)
    if not rows.numbers:
        raise AlignmentError(f"{data} is empty.")
    return rows


def _read_lines(name: str, path: Path) -> Rows:
    # Not by `load_dataset`, which serves stale rows from its cache after a file has changed.
    numbers, contents, errors = [], [], []
    for number, raw in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            content = parse_json(raw)
            if not isinstance(content, dict):
                raise ValueError(f"a JSON object is needed, not {type(content).__name__}")
        except ValueError as error:
            errors.append(f"line {number}: {error}: {_start(raw.decode('utf-8', 'replace'))}")
        numbers.append(number)
        contents.append(content if not errors else {})
    if errors:
        raise AlignmentError(_listed(f"{name} is no JSON Lines file (one JSON object a line, UTF-8)", errors))
    return Rows(name, "line", numbers, contents)


def _read_dataset(name: str, config: str | None, split: str) -> Rows:
    try:
        if Path(name).is_dir():
            with TemporaryDirectory() as cache:  # a folder's own cache would be stale after a change
                contents = list(datasets.load_dataset(name, config, split=split, cache_dir=cache))
        else:
            contents = list(datasets.load_dataset(name, config, split=split))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise AlignmentError(
            f"{name!r} is no file, and could not be loaded as a data set of the Hub (split {split!r}): "
            f"{str(error).splitlines()[0]}"
        ) from error
    return Rows(f"{name} ({split})", "row", range(1, len(contents) + 1), contents)


def _start(text: str, length: int = 60) -> str:
    readable = text.encode("utf-8", "backslashreplace").decode("utf-8")  # halves of characters can't be printed
    return readable if len(readable) <= length else f"{readable[:length]}..."


def _listed(heading: str, errors: list[str]) -> str:
    more = f"\n  ... and {len(errors) - SHOWN} more" if len(errors) > SHOWN else ""
    return f"{heading}:\n  " + "\n  ".join(errors[:SHOWN]) + more


# --- Checking -----------------------------------------------------------------------------------------------


def as_chat(content: Mapping[str, Any]) -> tuple[list[Message], int]:
    """A row for fine-tuning as one chat, and the index of the first message that may be learned from.

    `messages`: every answer in it is learned. `prompt` and `completion`, strings or lists of messages: the answers
    of the completion are. Strings are the user's question and the assistant's answer.

    Raises:
        AlignmentError: says what is wrong with the row, without its place.
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
    """The indices of the messages with loss: assistants' turns from `first` on without `weight` 0 or `train` false.

    Raises:
        UnusableRow: none is left.
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
    """What a row gives the chat template beside its messages: `tools` and the entries of `chat_template_kwargs`.

    Raises:
        AlignmentError: not of the form that `apply_chat_template` takes.
    """
    tools, others = (content.get(name) for name in TEMPLATE_FIELDS)
    if isinstance(tools, str):  # as TRL takes them, since their schemas differ from tool to tool
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise AlignmentError(f"`tools` is text, but no JSON ({error})") from error
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise AlignmentError("`tools` must be a list of JSON objects, one for each tool")
    if others is not None and not isinstance(others, dict):
        raise AlignmentError("`chat_template_kwargs` must be a JSON object")
    own = sorted(OWN_SETTINGS.intersection(others or ()))
    if own:
        raise AlignmentError(f"`chat_template_kwargs` can't set {own}: the recipe does")
    given = {name: value for name, value in (others or {}).items() if value is not None}  # tables fill up with None
    return {**({"tools": tools} if tools else {}), **given}


def as_preference(content: Mapping[str, Any]) -> dict[str, list[Message]]:
    """A row for preference training: `prompt` a chat, `chosen` and `rejected` one answer each, as message lists.

    `chosen` and `rejected` may also be whole chats that begin with the prompt and differ in their last message.

    Raises:
        AlignmentError: says what is wrong with the row, without its place.
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
    """Raise if a field holds half of a character, which no tokenizer takes."""
    for name in names:
        try:
            json.dumps(content.get(name), ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start].encode("unicode_escape").decode()
            raise AlignmentError(f"`{name}` holds {half}, half of a character (a lone surrogate)") from error


def _messages(value: object, name: str, role: str) -> list[Message]:
    """A string as one message of `role`, or a list of messages, checked. Parts of text are joined."""
    messages = [{"role": role, "content": value}] if isinstance(value, str) else value
    if not isinstance(messages, list) or not messages:
        raise AlignmentError(f"`{name}` must be a string or a list of messages that is not empty")
    return [_message(message, f"message {number} of `{name}`") for number, message in enumerate(messages, start=1)]


def _message(message: object, place: str) -> Message:
    """A message whose content is text, checked."""
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
        raise AlignmentError(f"{place} has the `weight` {weight!r}: only 0 (no loss) and 1 can be had")
    if train is not None and not isinstance(train, bool):
        raise AlignmentError(f"{place} has `train` {train!r}: true or false is needed")
    return message


def _for_template(chat: Sequence[Message]) -> list[Message]:
    """Messages without the fields that speak of the loss."""
    return [{name: value for name, value in message.items() if name not in LOSS_FIELDS} for message in chat]


def unused_fields(rows: Rows, template: str, *, preferences: bool) -> tuple[list[str], list[str]]:
    """The fields that nothing is done with: those of the rows, and those of their messages.

    Args:
        rows: as they were read.
        template: the chat template. A field of a message is used where the template names it.
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


# --- Tokens -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChatTokenizer:
    """Chats as token ids, with the places to learn from.

    Args:
        tokenizer: with a chat template.
        vocabulary: ids from here on are refused.
        limit: longest example, in tokens; None for no limit.
    """

    tokenizer: PreTrainedTokenizerBase
    vocabulary: int
    limit: int | None

    def examples(self, content: Mapping[str, Any]) -> list[Example]:
        """A row for fine-tuning as `input_ids` and `labels`, which are -100 outside the answers to learn.

        One example, or one for each answer where the template renders a past answer differently from the last one
        (as those of reasoning models do), so that each is learned in the form in which it is to be given.

        Raises:
            AlignmentError: the row is malformed, or the chat template does not tell which tokens are the answer.
            UnusableRow: too long, or prompt and answer share a token.
        """
        chat, first = as_chat(content)
        settings = template_settings(content)
        answers = answers_to_learn(chat, first)
        if MARKERS.search(self.tokenizer.get_chat_template()):
            return [self._marked(chat, answers, settings)]
        whole = self._render(chat, settings)
        if all(whole.startswith(self._render(chat[: index + 1], settings)) for index in answers):
            return [self._spans(chat, answers, settings)]
        return [self._spans(chat[: index + 1], [index], settings) for index in answers]

    def preference(self, content: Mapping[str, Any]) -> list[Example]:
        """A row for preference training, as messages: `DPOTrainer` makes the tokens. It is checked that it can.

        Raises:
            AlignmentError: the row is malformed, or the template renders the prompt differently with an answer.
            UnusableRow: too long, prompt and answer share a token, or the answers are the same.
        """
        row = as_preference(content)
        settings = template_settings(content)
        for answer in (row["chosen"], row["rejected"]):
            self._spans(row["prompt"] + answer, [len(row["prompt"])], settings)
        tools = settings.pop("tools", None)
        return [
            {name: _for_template(chat) for name, chat in row.items()}
            | ({"tools": json.dumps(tools)} if tools else {})
            | ({"chat_template_kwargs": settings} if settings else {})
        ]

    def preference_texts(self, example: Example) -> list[str]:
        """The texts that `DPOTrainer` makes of an example of `preference`: the prompt, then it with either answer."""
        settings = {**template_settings(example), **(example.get("chat_template_kwargs") or {})}
        prompt = example["prompt"]
        answers = (self._render(prompt + example[name], settings) for name in ("chosen", "rejected"))
        return [self._render(prompt, settings, add_generation_prompt=True), *answers]

    def preference_dataset(self, examples: list[Example]) -> datasets.Dataset:
        """Examples of `preference` for `DPOTrainer`, in whose table every row has the fields of all.

        Raises:
            AlignmentError: a field has values of different types, or the chat template writes something else where a
                field is there and empty.
        """
        names = dict.fromkeys(name for example in examples for name in example)
        empty: Example = {name: {} if name == "chat_template_kwargs" else None for name in names}
        try:
            table = datasets.Dataset.from_list(
                [empty | example for example in examples]
            )  # it takes the first's fields
        except (ArrowException, TypeError, ValueError) as error:
            raise AlignmentError(f"A field has values of different types in different rows: {error}") from error
        for example, stored in zip(examples, table, strict=True):
            if stored != example and self.preference_texts(stored) != self.preference_texts(example):
                raise AlignmentError(
                    "The chat template writes something else where a field is empty than where it is missing. Give "
                    f"all rows the same fields in `chat_template_kwargs` and in their messages; the first is {example}"
                )
        return table

    def end_of_answer(self, content: Mapping[str, Any]) -> int:
        """The id of the special token that ends the answer of a row, and that the loss covers.

        Raises:
            AlignmentError: there is none, so that the proxy would never learn to stop.
        """
        if "chosen" in content:
            row = as_preference(content)
            example = self._spans(row["prompt"] + row["chosen"], [len(row["prompt"])], template_settings(content))
        else:
            example = self.examples(content)[-1]
        learned = [index for index in example["labels"] if index != IGNORED]
        while learned and not self.tokenizer.decode(learned[-1:]).strip():
            learned.pop()
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        if not learned or learned[-1] not in special:
            raise AlignmentError(
                "The chat template ends the assistant's turn without a special token that the loss covers (it ends in "
                f"{self.tokenizer.decode(learned[-5:])!r}), so the proxy would never learn to stop. Give another with "
                "--chat_template FILE; `{% endgeneration %}` belongs behind the end-of-turn token."
            )
        return learned[-1]

    def _marked(self, chat: list[Message], answers: list[int], settings: Settings) -> Example:
        """By the template's own `{% generation %}` markers."""
        row = self._template(chat, settings, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = row["input_ids"], row["assistant_masks"]
        whole = self._render(chat, settings)
        for last, following in zip([-1, *answers], [*answers, len(chat)], strict=True):
            context = [i for i in range(last + 1, following) if chat[i]["role"] == "assistant"]
            if context:  # answers that are not learned
                start = self._prefix(ids, whole, self._render(chat[: context[0]], settings)) if context[0] else 0
                stop = len(ids)
                if following < len(chat):
                    stop = self._prefix(ids, whole, self._render(chat[:following], settings))
                mask = mask[:start] + [0] * (stop - start) + mask[stop:]
        if not any(mask):
            raise AlignmentError("the chat template's {% generation %} markers cover nothing of it")
        return self._example(ids, mask)

    def _spans(self, chat: list[Message], answers: list[int], settings: Settings) -> Example:
        """By rendering the chat up to each answer and behind it, which must give beginnings of the whole."""
        whole = self._render(chat, settings)
        ids = self._tokens(whole)
        mask = [0] * len(ids)
        for index in answers:
            start = self._prefix(ids, whole, self._before(chat, index, settings))
            stop = self._prefix(ids, whole, self._render(chat[: index + 1], settings))
            mask[start:stop] = [1] * (stop - start)
        return self._example(ids, mask)

    def _before(self, chat: list[Message], index: int, settings: Settings) -> str:
        """The text of a chat before an answer, up to where the model is to go on."""
        if index:
            return self._render(chat[:index], settings, add_generation_prompt=True)
        # A chat without messages can't be rendered: the first answer begins behind what asks for one elsewhere.
        asked = self._render(PROBE, settings, add_generation_prompt=True)
        header = asked.removeprefix(self._render(PROBE, settings))
        beginning = self._render(chat[:1], settings)
        if not header or header not in beginning:
            raise AlignmentError(
                "it begins with an assistant's turn, and the chat template does not tell where that begins; give a "
                "template with {% generation %} markers by --chat_template FILE"
            )
        return beginning.partition(header)[0] + header

    def _prefix(self, ids: list[int], whole: str, beginning: str) -> int:
        """How many of the `ids` of a text are those of its beginning."""
        if not whole.startswith(beginning):
            pairs = enumerate(zip(whole, beginning, strict=False))
            at = max(next((i for i, (one, two) in pairs if one != two), len(whole)) - 20, 0)
            raise AlignmentError(
                f"the chat template writes {beginning[at : at + 40]!r} before the answer, but {whole[at : at + 40]!r} "
                "once it is there, so the answer cannot be told from the prompt; give a template with "
                "{% generation %} markers by --chat_template FILE"
            )
        own = self._tokens(beginning)
        if ids[: len(own)] != own:
            raise UnusableRow("whose prompt and answer share a token")
        return len(own)

    def _example(self, ids: list[int], mask: Sequence[int]) -> Example:
        beyond = next((index for index in ids if index >= self.vocabulary), None)
        if beyond is not None:
            raise AlignmentError(
                f"the token {self.tokenizer.convert_ids_to_tokens(beyond)!r} ({beyond}) is beyond the proxy's "
                f"{self.vocabulary} embeddings"
            )
        if self.limit is not None and len(ids) > self.limit:
            raise UnusableRow(f"longer than {self.limit} tokens")
        labels = [index if learned else IGNORED for index, learned in zip(ids, mask, strict=True)]
        return {"input_ids": ids, "labels": labels}

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _render(self, chat: Sequence[Message], settings: Settings, **own: Any) -> str:
        return self._template(chat, settings, tokenize=False, **own)

    def _template(self, chat: Sequence[Message], settings: Settings, **own: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(_for_template(chat), **settings, **own)
        except (ArithmeticError, AttributeError, LookupError, TemplateError, TypeError, ValueError) as error:
            raise AlignmentError(f"the chat template refuses it: {error}") from error


@dataclass(frozen=True)
class Examples:
    """What a run learns from and is measured on.

    Attributes:
        train: for TRL's trainer.
        evaluation: the same of the held-out rows; None to measure nothing.
        end_of_answer: the id that ends every answer.
        skipped: how many rows of both were skipped, by reason.
    """

    train: datasets.Dataset
    evaluation: datasets.Dataset | None
    end_of_answer: int
    skipped: Mapping[str, int]


def load_examples(arguments: AlignmentArguments, pair: Pair, *, preferences: bool = False) -> Examples:
    """The data that the arguments name, for `SFTTrainer` or, with `preferences`, for `DPOTrainer`.

    Prints how many examples there are, which rows were skipped and why, and which fields nothing is done with.

    Raises:
        AlignmentError: names the file and the lines that are wrong; or nothing usable is left.
    """
    limits = [limit for limit in (arguments.max_length, pair.context_length) if limit is not None]
    chats = ChatTokenizer(pair.tokenizer, pair.vocabulary, min(limits, default=None))

    def read(*source: str | None) -> Rows:
        found = read_rows(*source)  # type: ignore[arg-type]
        report_unused_fields(found, pair.tokenizer.get_chat_template(), preferences=preferences)
        return found

    rows = read(arguments.data, arguments.data_config, arguments.data_split)
    held_out = None
    if arguments.eval_data is not None or arguments.eval_split is not None:
        data, split = arguments.eval_data or arguments.data, arguments.eval_split or arguments.data_split
        held_out = read(data, arguments.data_config if arguments.eval_data is None else None, split)
    elif arguments.eval_share:
        rows, held_out = rows.split(arguments.eval_share, arguments.seed)
    make = chats.preference if preferences else chats.examples
    store = chats.preference_dataset if preferences else datasets.Dataset.from_list
    train, row, skipped = make_examples(rows, make)
    evaluation = None
    if held_out is not None:
        measured, _, also_skipped = make_examples(held_out, make)
        evaluation, skipped = store(measured), skipped + also_skipped
    say(f"{len(train)} examples to learn from, {len(evaluation or ())} held out.")
    return Examples(store(train), evaluation, chats.end_of_answer(row), skipped)


def report_unused_fields(rows: Rows, template: str, *, preferences: bool) -> None:
    """Print the fields that nothing is done with, see `unused_fields`."""
    of_rows, of_messages = unused_fields(rows, template, preferences=preferences)
    if of_rows:
        say(f"Fields of {rows.name} that are not used: {', '.join(of_rows)}")
    if of_messages:
        say(f"Fields of messages in {rows.name} that the chat template does not use: {', '.join(of_messages)}")


def make_examples(
    rows: Rows, make: Callable[[Mapping[str, Any]], list[Example]]
) -> tuple[list[Example], Mapping[str, Any], Counter[str]]:
    """The examples of all rows, the first row that gave any, and how many were skipped, by reason.

    Rows that were skipped are counted and printed.

    Raises:
        AlignmentError: names the rows that are malformed; or every row was skipped.
    """
    examples: list[Example] = []
    errors: list[str] = []
    skipped: dict[str, list[int]] = defaultdict(list)
    first = None
    for number, content in zip(rows.numbers, rows.contents, strict=True):
        try:
            examples += make(content)
            first = first or content
        except UnusableRow as unusable:
            skipped[str(unusable)].append(number)
        except AlignmentError as error:
            start = _start(json.dumps(content, ensure_ascii=False, default=str))
            errors.append(f"{rows.unit} {number}: {error}: {start}")
    if errors:
        raise AlignmentError(_listed(f"{rows.name} cannot be used, {len(errors)} {rows.unit}s are wrong", errors))
    for reason, numbers in skipped.items():
        shown = ", ".join(map(str, numbers[:SHOWN])) + (", ..." if len(numbers) > SHOWN else "")
        say(f"Skipped {len(numbers)} of {len(rows.numbers)} {rows.unit}s of {rows.name} {reason}: {shown}")
    if first is None:
        raise AlignmentError(f"Nothing is left of {rows.name}: all {len(rows.numbers)} {rows.unit}s were skipped.")
    return examples, first, Counter({reason: len(numbers) for reason, numbers in skipped.items()})
