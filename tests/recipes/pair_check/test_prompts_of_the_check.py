"""Prompts of files, folders and the built-in ones; what can't be used names its line."""

import json

import pytest

from transformers_kad.recipes.pair_check.prompts import NEUTRAL_PROMPTS, load_prompts

CHAT = [{"role": "user", "content": "How are you?"}]


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return str(path)


def test_the_built_in_prompts_are_enough_for_a_verdict():
    lines = load_prompts(None, 100)
    assert [line.prompt for line in lines] == list(NEUTRAL_PROMPTS)
    assert len({*NEUTRAL_PROMPTS}) >= 20
    assert len(load_prompts(None, 3)) == 3


def test_lines_of_text_prompts_and_messages(tmp_path):
    path = write(
        tmp_path / "p.txt", "plain", {"prompt": "as JSON"}, "", {"messages": CHAT, "chat_template_kwargs": {"a": 1}}
    )
    lines = load_prompts(path, 10)
    assert [(line.number, line.prompt) for line in lines] == [(1, "plain"), (2, "as JSON"), (4, CHAT)]
    assert lines[2].template == {"a": 1}
    assert [line.prompt for line in load_prompts(path, 1)] == ["plain"]


@pytest.mark.parametrize("form", ["jsonl", "json"])
def test_a_folder_is_read_as_a_data_set(form, tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / f"train.{form}", {"prompt": "one"}, {"prompt": "two"}, {"prompt": "three"})
    assert [line.prompt for line in load_prompts(str(tmp_path / "data"), 2)] == ["one", "two"]


@pytest.mark.parametrize(
    "lines, message",
    [
        ([""], "is empty: it needs at least one prompt"),
        ([{"prompt": "fine"}, '{"prompt": '], "line 2 can't be used: the line begins like JSON"),
        ([{"prompt": "fine"}, "", {"question": "x"}], 'line 3 can\'t be used: "prompt" or "messages" is needed'),
        ([{"messages": [{"role": "user"}]}], "line 1 can't be used"),
        (["[", {"prompt": "one"}, "]"], "line 1 can't be used: every line must be a JSON object"),
    ],
)
def test_what_can_t_be_used_names_the_line(lines, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_prompts(write(tmp_path / "p.jsonl", *lines), 10)


def test_a_row_of_a_data_set_that_can_t_be_used_is_named(tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train.jsonl", {"prompt": "one"}, {"prompt": ""}, {"prompt": None})
    with pytest.raises(ValueError, match="line 3 can't be used"):
        load_prompts(str(tmp_path / "data"), 10)


@pytest.mark.parametrize("source", ["nowhere.jsonl", "./nowhere", "/nowhere/p.txt"])
def test_a_missing_file_is_not_looked_for_on_the_hub(source):
    with pytest.raises(ValueError, match="There is no file --prompts"):
        load_prompts(source, 10)
