"""Whole data sets: which rows are skipped, which errors are reported, and what is held out."""

import json
import re

import pytest
from alignment import BASE, REFERENCE, chats, preferences, write_lines
from transformers import AutoTokenizer

from transformers_kad.recipes.training import AlignmentError
from transformers_kad.recipes.training.arguments import AlignmentArguments
from transformers_kad.recipes.training.chats import UnusableRow, as_chat, as_preference
from transformers_kad.recipes.training.checks import check_pair
from transformers_kad.recipes.training.data import load_examples, make_examples
from transformers_kad.recipes.training.rows import read_rows
from transformers_kad.recipes.training.tokens import ChatTokenizer

USER, ASSISTANT = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


def arguments_for(data, **settings):
    return AlignmentArguments(proxy=REFERENCE, base=BASE, data=data, output_dir="unused", **settings)


@pytest.fixture(scope="module")
def pair():
    return check_pair(BASE, REFERENCE)


def test_long_rows_are_skipped_and_counted(tmp_path, capsys, pair):
    rows = chats(40)
    for number in (3, 17, 18):
        rows[number - 1]["messages"][0]["content"] = "Ada has 3 apples. " * 20
    data = write_lines(tmp_path / "rows.jsonl", rows)
    examples = load_examples(arguments_for(data, eval_share=0, max_length=100), pair)
    assert len(examples.train) == 37
    assert max(map(len, examples.train["input_ids"])) <= 100
    out = capsys.readouterr().out
    assert f"Skipped 3 of 40 lines of {data} longer than 100 tokens: 3, 17, 18\n" in out
    assert "37 training examples, 0 held out." in out


@pytest.mark.parametrize("settings", [{}, {"max_length": 4000}])
def test_the_proxys_own_limit_holds_whatever_is_asked_for(tmp_path, capsys, pair, settings):
    def row(digits):  # each is a token
        return {"prompt": "6" * digits, "completion": "So."}

    shortest = len(ChatTokenizer(pair.tokenizer, 640, None).examples(row(1))[0]["input_ids"])
    fits = 1 + 512 - shortest
    data = write_lines(tmp_path / "rows.jsonl", [row(fits), row(fits + 1)])
    examples = load_examples(arguments_for(data, eval_share=0, **settings), pair)
    assert list(map(len, examples.train["input_ids"])) == [512]
    assert f"Skipped 1 of 2 lines of {data} longer than 512 tokens: 2\n" in capsys.readouterr().out


def test_nothing_left_is_an_error(tmp_path, pair):
    data = write_lines(tmp_path / "rows.jsonl", chats(6))
    with pytest.raises(AlignmentError, match="all 6 lines were skipped"):
        load_examples(arguments_for(data, eval_share=0, max_length=10), pair)


def test_malformed_rows_are_named_with_their_lines(tmp_path, pair):
    rows = chats(9)
    rows[2] = {"question": "why"}
    rows[6]["messages"] = rows[6]["messages"][:1]
    data = write_lines(tmp_path / "rows.jsonl", rows)
    with pytest.raises(AlignmentError) as error:
        load_examples(arguments_for(data, eval_share=0), pair)
    lines = str(error.value).splitlines()
    assert lines[0] == f"{data} cannot be used, 2 lines are wrong:"
    assert lines[1].startswith("  line 3: the fields `messages`, or `prompt` and `completion`, are needed; it has")
    assert lines[1].endswith('`question`: {"question": "why"}')
    start = json.dumps(rows[6])[:60]
    assert lines[2] == f"  line 7: there is no assistant's turn to learn from: {start}..."


def test_what_nothing_is_done_with_is_named_once(tmp_path, capsys, pair):
    rows = chats(20)
    rows[4] |= {"id": 4, "source": "mine", "prompt": "unused beside messages", "score": None}
    rows[9] |= {"id": 9, "tools": [{"name": "add"}]}
    rows[11]["messages"][0] |= {"name": "Ada", "weight": 1, "extra": None}
    data = write_lines(tmp_path / "rows.jsonl", rows)
    load_examples(arguments_for(data), pair)
    out = capsys.readouterr().out
    assert out.count(f"Fields of {data} that are not used: id, source, prompt\n") == 1
    assert out.count(f"Fields of messages in {data} that the chat template does not use: name\n") == 1
    load_examples(arguments_for(write_lines(tmp_path / "plain.jsonl", chats(20))), pair)
    assert "not use" not in capsys.readouterr().out


def test_every_bad_row_is_in_one_error_with_its_line(tmp_path, pair):
    rows = chats(9)
    rows[1]["messages"][0]["content"] = "caf\ud83d"
    rows[3]["messages"][1]["content"] = [{"type": "image_url"}]
    rows[5]["messages"][1]["weight"] = 7
    rows[7]["chat_template_kwargs"] = {"messages": []}
    data = write_lines(tmp_path / "rows.jsonl", rows)
    with pytest.raises(AlignmentError) as error:
        load_examples(arguments_for(data, eval_share=0), pair)
    assert re.findall(r"line (\d):", str(error.value)) == ["2", "4", "6", "8"]
    str(error.value).encode()  # can be printed


def test_rows_that_json_can_hide_something_in_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1, "b": 2, "b": 3}\n' + '{"a": ' + "[" * 20000 + "\n")
    with pytest.raises(AlignmentError, match=r"line 1: an object has the key 'b' twice: .*\n  line 2: ") as error:
        read_rows(str(path))
    assert len(str(error.value)) < 500


def test_held_out_data_may_be_a_share_a_file_or_a_split(tmp_path, pair):
    train = write_lines(tmp_path / "train.jsonl", chats(20))
    other = write_lines(tmp_path / "validation.jsonl", chats(7, seed=1))

    def sizes(**settings):
        examples = load_examples(arguments_for(**settings), pair)
        return len(examples.train), len(examples.evaluation or ())

    assert sizes(data=train) == (19, 1)
    assert sizes(data=train, eval_share=0.25) == (15, 5)
    assert sizes(data=train, eval_data=other) == (20, 7)
    assert sizes(data=str(tmp_path), eval_split="validation") == (20, 7)
    assert sizes(data=train, eval_share=0) == (20, 0)


def test_preferences_keep_their_messages(tmp_path, capsys, pair):
    rows = preferences(10)
    rows[3]["rejected"] = rows[3]["chosen"]
    data = write_lines(tmp_path / "rows.jsonl", rows)
    examples = load_examples(arguments_for(data, eval_share=0), pair, preferences=True)
    assert f"Skipped 1 of 10 lines of {data} whose two answers are the same: 4\n" in capsys.readouterr().out
    assert len(examples.train) == 9
    assert examples.train[0] == as_preference(rows[0])
    assert examples.end_of_answer == pair.tokenizer.eos_token_id


def test_the_first_usable_row_is_given_back(tmp_path, tokenizer):
    rows = read_rows(write_lines(tmp_path / "rows.jsonl", [{"a": 1}, {"a": 2}, {"a": 3}]))

    def make(row):
        if row["a"] == 1:
            raise UnusableRow("too small")
        return [row, row]

    assert make_examples(rows, make) == ([{"a": 2}, {"a": 2}, {"a": 3}, {"a": 3}], {"a": 2}, {"too small": 1})


def test_rows_are_json_all_the_way(tmp_path):
    """What a message echoes is cut, and shows the text as it was written."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"texte": "é" * 200}, ensure_ascii=False), encoding="utf-8")
    with pytest.raises(AlignmentError, match=r'{"texte": "é{49}\.\.\.$'):
        make_examples(read_rows(str(path)), as_chat)
