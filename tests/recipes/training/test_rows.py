"""Rows: which files and data sets are read, and how errors name their lines."""

import re

import datasets
import pytest
from alignment import chats, write_lines

from transformers_kad.recipes.training import AlignmentError
from transformers_kad.recipes.training.chats import as_chat
from transformers_kad.recipes.training.rows import read_rows

USER, ASSISTANT = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}


def test_lines_keep_their_numbers_across_blank_ones(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n  \n{"a": "\xc3\xa9"}\r\n')
    rows = read_rows(str(path))
    assert (rows.unit, list(rows.numbers), list(rows.contents)) == ("line", [1, 4], [{"a": 1}, {"a": "é"}])


def test_malformed_lines_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": \n[1]\n\xff\xfe{}\n')
    with pytest.raises(AlignmentError) as error:
        read_rows(str(path))
    message = str(error.value)
    assert str(path) in message
    assert re.findall(r"line (\d):", message) == ["2", "3", "4"]
    assert '{"a": ' in message
    assert "a JSON object is needed, not list: [1]" in message


def test_only_the_first_of_many_errors_are_shown(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("oops\n" * 40)
    with pytest.raises(AlignmentError, match="and 35 more") as error:
        read_rows(str(path))
    assert str(error.value).count("oops") == 5


@pytest.mark.parametrize("name", ["missing.jsonl", "some/deep/path/file", "/no/such/thing", "./thing"])
def test_a_missing_file_is_told_from_a_hub_id(name):
    with pytest.raises(AlignmentError, match=f"There is no file '{name}'"):
        read_rows(name)


def test_a_data_set_that_the_hub_does_not_give(monkeypatch):
    with pytest.raises(AlignmentError, match=r"'nobody/nothing' is not a file, .*split 'test'"):
        read_rows("nobody/nothing", split="test")


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n\n")
    with pytest.raises(AlignmentError, match=r"rows\.jsonl is empty"):
        read_rows(str(tmp_path / "rows.jsonl"))


def test_a_changed_file_is_read_anew(tmp_path):
    for rows in ([{"a": 1}], [{"a": 2}, {"a": 3}]):
        assert read_rows(write_lines(tmp_path / "rows.jsonl", rows)).contents == rows


def test_a_data_set_with_splits_is_read_and_read_anew(tmp_path):
    for count in (3, 5):  # `load_dataset` alone would still give 3 the second time
        write_lines(tmp_path / "train.jsonl", chats(count))
        write_lines(tmp_path / "test.jsonl", chats(2))
        rows = read_rows(str(tmp_path), split="train")
        assert (rows.unit, list(rows.numbers)) == ("row", list(range(1, count + 1)))
        assert rows.contents == chats(count)
        assert len(read_rows(str(tmp_path), split="test").contents) == 2


def test_hub_ids_go_to_load_dataset(monkeypatch):
    seen = []

    def load_dataset(*arguments, **settings):
        seen.append((arguments, settings))
        return datasets.Dataset.from_list(chats(2))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read_rows("owner/name", "subset", "validation")
    assert seen == [(("owner/name", "subset"), {"split": "validation"})]
    assert rows.name == "owner/name (validation)"
    assert as_chat(rows.contents[1])[0] == chats(2)[1]["messages"]


def test_held_out_rows_keep_their_numbers_and_depend_on_the_seed_only(tmp_path):
    rows = read_rows(write_lines(tmp_path / "rows.jsonl", [{"a": i} for i in range(1, 41)]))
    train, held_out = rows.split(0.1, seed=3)
    assert len(held_out.numbers) == 4
    assert sorted([*train.numbers, *held_out.numbers]) == list(range(1, 41))
    assert [row["a"] for row in held_out.contents] == list(held_out.numbers)
    assert rows.split(0.1, seed=3) == (train, held_out)
    assert rows.split(0.1, seed=4)[1].numbers != held_out.numbers
    assert len(rows.split(0.001, seed=0)[1].numbers) == 1
    assert len(train.split(0.999, seed=0)[0].numbers) == 1


def test_one_row_cannot_be_split(tmp_path):
    rows = read_rows(write_lines(tmp_path / "rows.jsonl", [{"a": 1}]))
    with pytest.raises(AlignmentError, match="--eval_share 0"):
        rows.split(0.5, seed=0)


def test_an_empty_file_of_a_data_set_is_an_error_of_the_recipe(tmp_path):
    """Readers of datasets raise errors of many kinds, here a StopIteration without a message."""
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(AlignmentError, match="could not be loaded as a data set"):
        read_rows(str(tmp_path))
