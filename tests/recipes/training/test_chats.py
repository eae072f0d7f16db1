"""Rows as chats and preferences: which are accepted, and what is wrong with the others."""

import re

import pytest

from transformers_kad.recipes.training import AlignmentError
from transformers_kad.recipes.training.chats import UnusableRow, as_chat, as_preference, template_settings

USER, ASSISTANT = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "hi", "id": 3}, "`messages`, or `prompt` and `completion`, are needed; it has `text`, `id`"),
        ({"prompt": "hi"}, "are needed; it has `prompt`"),
        ({"messages": None, "prompt": "hi", "completion": None}, "are needed"),
        ({}, "it has none"),
        ({"messages": []}, "`messages` must be a string or a list of messages that is not empty"),
        ({"messages": {"role": "user"}}, "`messages` must be a string or a list"),
        ({"messages": [USER]}, "no assistant's turn"),
        ({"messages": [USER, {"role": "assistant"}]}, "message 2 of `messages` needs `role` and `content`"),
        ({"messages": [USER, {"role": "assistant", "content": {"a": 1}}]}, "message 2 of `messages` needs"),
        ({"messages": [{"role": "user", "content": " \n"}, ASSISTANT]}, "message 1 of `messages` has an empty"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "message 2 of `messages` has an empty"),
        ({"prompt": "hi", "completion": ""}, "message 1 of `completion` has an empty"),
        ({"prompt": [USER, ASSISTANT, USER], "completion": [USER]}, "no assistant's turn"),
        ({"prompt": "caf\ud83d", "completion": "So."}, "`prompt` holds \\ud83d, half of a character"),
        ({"messages": [USER, {**ASSISTANT, "content": "\udc00"}]}, "`messages` holds \\udc00, half of a character"),
        ({"prompt": "hi", "completion": "So.", "tools": [{"name": "\ud83d"}]}, "`tools` holds \\ud83d"),
        (
            {"messages": [{**USER, "content": [{"type": "image"}]}, ASSISTANT]},
            "message 1 of `messages`: Only text is supported, got {'type': 'image'}",
        ),
        ({"messages": [{**USER, "content": []}, ASSISTANT]}, "message 1 of `messages` has an empty `content`"),
        ({"messages": [{**USER, "content": [{"type": "text", "text": " "}]}, ASSISTANT]}, "has an empty `content`"),
        ({"messages": [USER, {**ASSISTANT, "weight": 0.5}]}, "message 2 of `messages` has the `weight` 0.5: only 0"),
        (
            {"messages": [USER, {**ASSISTANT, "train": "no"}]},
            "message 2 of `messages` has `train` 'no': true or false",
        ),
    ],
)
def test_rows_that_cannot_be_learned(row, message):
    with pytest.raises(AlignmentError, match=re.escape(message)):
        as_chat(row)


def test_both_forms_of_a_row_are_one_chat():
    chat = [USER, ASSISTANT]
    assert as_chat({"messages": chat}) == (chat, 0)
    assert as_chat({"prompt": "Why?", "completion": "So."}) == (chat, 1)
    assert as_chat({"prompt": [USER], "completion": [ASSISTANT]}) == (chat, 1)
    assert as_chat({"prompt": [USER], "completion": "So."}) == (chat, 1)
    assert as_chat({"messages": chat, "prompt": "other", "completion": None}) == (chat, 0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "the fields ['rejected'] are missing; it has `prompt`, `chosen`"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "message 1 of `rejected` has an empty `content`"),
        ({"prompt": "a", "chosen": [USER], "rejected": "b"}, "must be one assistant's message each"),
        ({"prompt": "a", "chosen": [ASSISTANT, USER, ASSISTANT], "rejected": "b"}, "one assistant's message each"),
        ({"prompt": "a", "chosen": [USER, ASSISTANT], "rejected": [USER, USER]}, "one assistant's message each"),
        ({"prompt": "a", "chosen": "caf\ud83d", "rejected": "b"}, "`chosen` holds \\ud83d, half of a character"),
        ({"prompt": "a", "chosen": [{**ASSISTANT, "weight": 0}], "rejected": "b"}, "can't have `weight` 0"),
    ],
)
def test_preferences_that_cannot_be_learned(row, message):
    with pytest.raises(AlignmentError, match=re.escape(message)):
        as_preference(row)


def test_forms_of_a_preference():
    other = {"role": "assistant", "content": "No."}
    wanted = {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [other]}
    assert as_preference({"prompt": "Why?", "chosen": "So.", "rejected": "No."}) == wanted
    assert as_preference(wanted) == wanted
    whole = {"prompt": "Why?", "chosen": [USER, ASSISTANT], "rejected": [USER, other]}  # as many Hub data sets are
    assert as_preference(whole) == wanted


def test_parts_of_text_are_joined():
    parts = [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?", "image": None}]
    assert as_chat({"messages": [{"role": "user", "content": parts}, ASSISTANT]}) == ([USER, ASSISTANT], 0)
    row = {"prompt": [{"role": "user", "content": parts}], "chosen": "So.", "rejected": "No."}
    assert as_preference(row)["prompt"] == [USER]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tools": "[{"}, "`tools` is text, but not JSON"),
        ({"tools": {"name": "add"}}, "`tools` must be a list of JSON objects"),
        ({"chat_template_kwargs": [1]}, "`chat_template_kwargs` must be a JSON object"),
        ({"chat_template_kwargs": {"tokenize": True, "x": 1}}, "`chat_template_kwargs` can't set ['tokenize']"),
    ],
)
def test_what_no_chat_template_takes(row, message):
    with pytest.raises(AlignmentError, match=re.escape(message)):
        template_settings(row)


def test_equal_answers_teach_nothing():
    with pytest.raises(UnusableRow, match="the same"):
        as_preference({"prompt": "a", "chosen": "b", "rejected": "b"})
