"""Tokenizes chats, with the loss on the assistant's answers only."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
from jinja2.exceptions import TemplateError
from pyarrow import ArrowException
from transformers import PreTrainedTokenizerBase

from . import AlignmentError
from .chats import (
    Message,
    Settings,
    UnusableRow,
    answers_to_learn,
    as_chat,
    as_preference,
    template_settings,
    without_loss_fields,
)

Example = dict[str, Any]
IGNORED = -100  # the label of a token without loss
MARKERS = re.compile(r"\{%-?\s*generation\b")
PROBE = ({"role": "user", "content": "?"},)


@dataclass(frozen=True)
class ChatTokenizer:
    """Turns chats into token ids and labels.

    Args:
        tokenizer: a tokenizer with a chat template.
        vocabulary: the number of tokens of the proxy; larger ids are refused.
        limit: the maximum length of an example in tokens; None for no limit.
    """

    tokenizer: PreTrainedTokenizerBase
    vocabulary: int
    limit: int | None

    def examples(self, content: Mapping[str, Any]) -> list[Example]:
        """A row for fine-tuning as `input_ids` and `labels`, which are -100 except in the answers to train on.

        The result is one example. If the template renders an earlier answer differently from the last one, as those of
        reasoning models do, it is one example for each answer, so that each is trained in the form it is generated in.

        Raises:
            AlignmentError: the row is malformed, or the answer's tokens can't be determined from the chat template.
            UnusableRow: the row is too long, or a token belongs to both prompt and answer.
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
        """A row for preference training as messages, which `DPOTrainer` will tokenize. The tokens are checked here.

        Raises:
            AlignmentError: the row is malformed, or the template renders the prompt differently before an answer.
            UnusableRow: the row is too long, a token belongs to both prompt and answer, or the answers are the same.
        """
        row = as_preference(content)
        settings = template_settings(content)
        for answer in (row["chosen"], row["rejected"]):
            self._spans(row["prompt"] + answer, [len(row["prompt"])], settings)
        tools = settings.pop("tools", None)
        return [
            {name: without_loss_fields(chat) for name, chat in row.items()}
            | ({"tools": json.dumps(tools)} if tools else {})
            | ({"chat_template_kwargs": settings} if settings else {})
        ]

    def preference_texts(self, example: Example) -> list[str]:
        """The texts that `DPOTrainer` makes of an example of `preference`: the prompt alone, and with each answer."""
        settings = {**template_settings(example), **(example.get("chat_template_kwargs") or {})}
        prompt = example["prompt"]
        answers = (self._render(prompt + example[name], settings) for name in ("chosen", "rejected"))
        return [self._render(prompt, settings, add_generation_prompt=True), *answers]

    def preference_dataset(self, examples: list[Example]) -> datasets.Dataset:
        """Examples of `preference` as a data set for `DPOTrainer`, in which every row has the fields of all rows.

        Raises:
            AlignmentError: a field has values of different types, or the chat template renders an empty field
                differently from a missing one.
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
                    "The chat template renders an empty field differently from a missing one. Give "
                    f"all rows the same fields in `chat_template_kwargs` and in their messages; the first is {example}"
                )
        return table

    def end_of_answer(self, content: Mapping[str, Any]) -> int:
        """The id of the special token that ends the answer of a row and is trained on.

        Raises:
            AlignmentError: there is none, so the proxy would never learn to stop.
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
                f"{self.tokenizer.decode(learned[-5:])!r}), so the proxy would never learn to stop. Pass another "
                "one with --chat_template FILE; `{% endgeneration %}` must follow the end-of-turn token."
            )
        return learned[-1]

    def _marked(self, chat: list[Message], answers: list[int], settings: Settings) -> Example:
        """Find the answers by the template's `{% generation %}` markers."""
        row = self._template(chat, settings, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = row["input_ids"], row["assistant_masks"]
        whole = self._render(chat, settings)
        for last, following in zip([-1, *answers], [*answers, len(chat)], strict=True):
            context = [i for i in range(last + 1, following) if chat[i]["role"] == "assistant"]
            if context:  # answers without loss
                start = self._prefix(ids, whole, self._render(chat[: context[0]], settings)) if context[0] else 0
                stop = len(ids)
                if following < len(chat):
                    stop = self._prefix(ids, whole, self._render(chat[:following], settings))
                mask = mask[:start] + [0] * (stop - start) + mask[stop:]
        if not any(mask):
            raise AlignmentError("the chat template's {% generation %} markers cover nothing of it")
        return self._example(ids, mask)

    def _spans(self, chat: list[Message], answers: list[int], settings: Settings) -> Example:
        """Find the answers by rendering the chat up to their start and end, which must give prefixes of the whole."""
        whole = self._render(chat, settings)
        ids = self._tokens(whole)
        mask = [0] * len(ids)
        for index in answers:
            start = self._prefix(ids, whole, self._before(chat, index, settings))
            stop = self._prefix(ids, whole, self._render(chat[: index + 1], settings))
            mask[start:stop] = [1] * (stop - start)
        return self._example(ids, mask)

    def _before(self, chat: list[Message], index: int, settings: Settings) -> str:
        """The text of a chat before an answer, generation prompt included."""
        if index:
            return self._render(chat[:index], settings, add_generation_prompt=True)
        # A chat without messages can't be rendered, so the generation prompt is found in another chat.
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
        """The number of `ids` of a text that belong to its beginning."""
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
            return self.tokenizer.apply_chat_template(without_loss_fields(chat), **settings, **own)
        except (ArithmeticError, AttributeError, LookupError, TemplateError, TypeError, ValueError) as error:
            raise AlignmentError(f"the chat template refuses it: {error}") from error
