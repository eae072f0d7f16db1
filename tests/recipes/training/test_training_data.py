"""Rows: what is read, what is refused and where, what is skipped and how it is said, which tokens are learned."""

import json
import re

import datasets
import pytest
from alignment import BASE, REFERENCE, chats, preferences, write_lines
from transformers import AutoTokenizer

from transformers_kad.recipes.training import AlignmentError
from transformers_kad.recipes.training.arguments import AlignmentArguments
from transformers_kad.recipes.training.checks import check_pair
from transformers_kad.recipes.training.data import (
    ChatTokenizer,
    UnusableRow,
    as_chat,
    as_preference,
    load_examples,
    make_examples,
    read_rows,
    template_settings,
)

USER, ASSISTANT = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
UNMARKED = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# Past answers lose their thoughts, as in the templates of reasoning models.
FORGETFUL = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}"
    "{% if loop.last and m['role'] == 'assistant' %}{{ 'think ' }}{% endif %}{{ m['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
FORGETFUL_MARKED = FORGETFUL.replace(
    "{{ m['content'] + '<|end|>\n' }}",
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|end|>\n' }}{% endif %}",
)


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


def chat_tokenizer(tokenizer, template=None, limit=None, vocabulary=640):
    tokenizer.chat_template = template or tokenizer.chat_template
    return ChatTokenizer(tokenizer, vocabulary, limit)


def learned(tokenizer, example):
    """What the loss is on, run by run."""
    runs, last = [], None
    for index, (token, label) in enumerate(zip(example["input_ids"], example["labels"], strict=True)):
        if label == -100:
            continue
        assert label == token
        if last == index - 1:
            runs[-1].append(token)
        else:
            runs.append([token])
        last = index
    return [tokenizer.decode(run) for run in runs]


# --- Reading ------------------------------------------------------------------------------------------------


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
    with pytest.raises(AlignmentError, match=r"'nobody/nothing' is no file, .*split 'test'"):
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


# --- Checking -----------------------------------------------------------------------------------------------


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
            "message 1 of `messages`: Only text can be read, got {'type': 'image'}",
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
        ({"tools": "[{"}, "`tools` is text, but no JSON"),
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


# --- Tokens -------------------------------------------------------------------------------------------------

TALK = [USER, {"role": "assistant", "content": "So it is."}, USER, {"role": "assistant", "content": "Because 6."}]


def test_only_answers_are_learned_with_the_templates_own_markers(tokenizer):
    tokens = chat_tokenizer(tokenizer)
    (example,) = tokens.examples({"messages": TALK})
    assert learned(tokenizer, example) == ["So it is.<|end|>", "Because 6.<|end|>"]
    assert tokenizer.decode(example["input_ids"]) == tokenizer.apply_chat_template(TALK, tokenize=False)
    (example,) = tokens.examples({"prompt": TALK[:3], "completion": TALK[3:]})
    assert learned(tokenizer, example) == ["Because 6.<|end|>"]


def test_only_answers_are_learned_without_markers(tokenizer):
    tokens = chat_tokenizer(tokenizer, UNMARKED)
    (example,) = tokens.examples({"messages": TALK})
    assert learned(tokenizer, example) == ["So it is.<|end|>\n", "Because 6.<|end|>\n"]
    assert tokenizer.decode(example["input_ids"]) == tokenizer.apply_chat_template(TALK, tokenize=False)
    (example,) = tokens.examples({"prompt": TALK[:3], "completion": TALK[3:]})
    assert learned(tokenizer, example) == ["Because 6.<|end|>\n"]


@pytest.mark.parametrize("off", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"weight": 1, "train": False}])
@pytest.mark.parametrize(
    ("template", "end"),
    [(None, "<|end|>"), (UNMARKED, "<|end|>\n"), (FORGETFUL, "<|end|>\n"), (FORGETFUL_MARKED, "<|end|>")],
)
def test_answers_that_are_switched_off_have_no_loss(tokenizer, off, template, end):
    tokens = chat_tokenizer(tokenizer, template)
    plain = tokens.examples({"messages": TALK})
    both = [text for example in plain for text in learned(tokenizer, example)]
    assert [text.removeprefix("think ").removesuffix(end) for text in both] == ["So it is.", "Because 6."]
    for index, kept in ((1, 1), (3, 0)):
        chat = [m | (off if i == index else {"weight": 1, "train": None}) for i, m in enumerate(TALK)]
        (example,) = tokens.examples({"messages": chat})
        assert learned(tokenizer, example) == [both[kept]]
        assert example["input_ids"] in [one["input_ids"] for one in plain]
    with pytest.raises(UnusableRow, match="answers all have `weight` 0 or `train` false"):
        tokens.examples({"messages": [m | off for m in TALK]})


USING = (  # a template that reads what a row and its messages give it
    "{% if tools %}{{ tools[0]['name'] }} {% endif %}{% if short is defined %}{{ 'short ' ~ short }} {% endif %}"
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + (m['content'] or '') }}"
    "{% if m['tool_calls'] %}{{ m['tool_calls'][0]['name'] }}{% endif %}{{ '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


@pytest.mark.parametrize("tools", [[{"name": "add"}], '[{"name": "add"}]'])
def test_tools_and_template_arguments_of_a_row_reach_the_template(tokenizer, tools):
    tokens = chat_tokenizer(tokenizer, USING)
    row = {"messages": [USER, ASSISTANT], "tools": tools, "chat_template_kwargs": {"short": True, "other": None}}
    (example,) = tokens.examples(row)
    assert tokenizer.decode(example["input_ids"]).startswith("add short True <|user|>")
    assert learned(tokenizer, example) == ["So.<|end|>\n"]
    row = {"prompt": "Why?", "chosen": "So.", "rejected": "No.", **row}
    (example,) = tokens.preference(row)
    for text in tokens.preference_texts(example):
        assert text.startswith("add short True <|user|>")


def test_a_call_of_a_tool_is_an_answer_without_content(tokenizer):
    tokens = chat_tokenizer(tokenizer, USING)
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    (example,) = tokens.examples({"messages": [USER, call]})
    assert learned(tokenizer, example) == ["add<|end|>\n"]


def test_preferences_keep_what_their_template_is_to_be_told(tokenizer):
    tokens = chat_tokenizer(tokenizer, USING)
    pair = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
    rows = [pair, pair | {"tools": [{"name": "add", "unit": 1}]}, pair | {"tools": [{"name": "sub", "unit": "m"}]}]
    examples = [tokens.preference(row)[0] for row in rows]
    starts = [tokens.preference_texts(example)[0].split("<")[0] for example in tokens.preference_dataset(examples)]
    assert starts == ["", "add ", "sub "]
    (example,) = tokens.preference(pair | {"chat_template_kwargs": {"short": 1}})
    assert list(tokens.preference_dataset([example])) == [example]
    with pytest.raises(AlignmentError, match="something else where a field is empty than where it is missing"):
        tokens.preference_dataset([*examples, example])
    chosen = [{**ASSISTANT, "weight": 1, "train": True}]
    assert tokens.preference(pair | {"chosen": chosen})[0]["chosen"] == [ASSISTANT]


@pytest.mark.parametrize("template", [None, UNMARKED, "system<|end|>\n" + UNMARKED, FORGETFUL])
def test_a_chat_may_begin_with_the_assistant(tokenizer, template):
    tokens = chat_tokenizer(tokenizer, template)
    examples = tokens.examples({"messages": [ASSISTANT, *TALK[:2]]})
    texts = [text for example in examples for text in learned(tokenizer, example)]
    assert [re.sub(r"think |<\|end\|>\n?$", "", text) for text in texts] == ["So.", "So it is."]


def test_a_template_that_does_not_tell_where_a_first_answer_begins(tokenizer):
    for template in (UNMARKED.partition("{% if add")[0], UNMARKED.replace("'<|assistant|>\n'", "'<|assistant|>\n\n'")):
        with pytest.raises(
            AlignmentError, match="begins with an assistant's turn, and the chat template does not tell"
        ):
            chat_tokenizer(tokenizer, template).examples({"messages": [ASSISTANT, *TALK[:2]]})


@pytest.mark.parametrize(
    "template", ["{{ messages[0]['content'] + 1 }}", "{{ messages[0]['content'] / 0 }}", "{{ nothing.x }}"]
)
def test_whatever_a_template_stumbles_over_is_no_crash(tokenizer, template):
    with pytest.raises(AlignmentError, match="the chat template refuses it: "):
        chat_tokenizer(tokenizer, template).examples({"messages": [USER, ASSISTANT]})


def test_both_ways_agree_on_the_same_template():
    marked, unmarked = AutoTokenizer.from_pretrained(BASE), AutoTokenizer.from_pretrained(BASE)
    unmarked.chat_template = re.sub(r"{% (end)?generation %}", "", marked.chat_template)
    newline = marked("\n")["input_ids"]
    for row in chats(50):
        (one,) = chat_tokenizer(marked).examples(row)
        (two,) = chat_tokenizer(unmarked).examples(row)
        assert one["input_ids"] == two["input_ids"]
        tail = two["labels"][-1:]  # the newline behind the end of the turn
        assert (one["labels"][-1:], tail) == ([-100], newline)
        assert one["labels"][:-1] == two["labels"][:-1]


def test_a_template_that_rewrites_past_answers_gives_an_example_for_each(tokenizer):
    tokens = chat_tokenizer(tokenizer, FORGETFUL)
    one, two = tokens.examples({"messages": TALK})
    assert tokenizer.decode(one["input_ids"]) == tokenizer.apply_chat_template(TALK[:2], tokenize=False)
    assert learned(tokenizer, one) == ["think So it is.<|end|>\n"]
    assert tokenizer.decode(two["input_ids"]) == tokenizer.apply_chat_template(TALK, tokenize=False)
    assert learned(tokenizer, two) == ["think Because 6.<|end|>\n"]


def test_a_template_that_renders_the_prompt_differently_is_refused(tokenizer):
    tokens = chat_tokenizer(tokenizer, UNMARKED.replace("'<|assistant|>\n'", "'<|assistant|>\nthink\n'"))
    with pytest.raises(AlignmentError, match=r"'.*think\\n' before the answer, but '.*So\..* once it is there"):
        tokens.examples({"messages": [USER, ASSISTANT]})
    with pytest.raises(AlignmentError, match="--chat_template FILE"):
        tokens.preference({"prompt": "Why?", "chosen": "So.", "rejected": "No."})


def test_what_a_template_refuses_is_no_crash(tokenizer):
    tokens = chat_tokenizer(tokenizer, "{{ raise_exception('two users in a row') }}")
    with pytest.raises(AlignmentError, match="the chat template refuses it: two users in a row"):
        tokens.examples({"messages": [USER, USER, ASSISTANT]})


def test_markers_that_cover_nothing_are_refused(tokenizer):
    template = tokenizer.chat_template.replace("message['role'] == 'assistant'", "message['role'] == 'bot'")
    with pytest.raises(AlignmentError, match="markers cover nothing"):
        chat_tokenizer(tokenizer, template).examples({"messages": [USER, ASSISTANT]})


def test_prompt_and_answer_that_share_a_token_are_skipped(tokenizer):
    tokens = chat_tokenizer(tokenizer, UNMARKED.replace("<|assistant|>\n", "<|assistant|>T"))
    tokens.tokenizer.chat_template = tokens.tokenizer.chat_template.replace(
        "'<|' + m['role'] + '|>\n'", "('<|assistant|>T' if m['role'] == 'assistant' else '<|user|>\n')"
    )
    (example,) = tokens.examples({"prompt": "Why?", "completion": "6 it is."})
    assert learned(tokenizer, example) == ["6 it is.<|end|>\n"]
    with pytest.raises(UnusableRow, match="share a token"):
        tokens.examples({"prompt": "Why?", "completion": "he answer is 6."})
    with pytest.raises(UnusableRow, match="share a token"):
        tokens.preference({"prompt": "Why?", "chosen": "6.", "rejected": "he answer is 6."})


def test_ids_beyond_the_proxy_are_named(tokenizer):
    with pytest.raises(AlignmentError, match=r"the token '.+' \(\d+\) is beyond the proxy's 300 embeddings"):
        chat_tokenizer(tokenizer, vocabulary=300).examples(chats(1)[0])


@pytest.mark.parametrize("template", [None, UNMARKED, FORGETFUL])
def test_the_token_that_ends_an_answer(tokenizer, template):
    tokens = chat_tokenizer(tokenizer, template)
    assert tokens.end_of_answer({"messages": TALK}) == tokenizer.eos_token_id
    assert tokens.end_of_answer(preferences(1)[0]) == tokenizer.eos_token_id


def test_an_answer_without_an_end_is_refused(tokenizer):
    outside = tokenizer.chat_template.replace(
        "message['content'] + '<|end|>' }}{% endgeneration %}", "message['content'] }}{% endgeneration %}<|end|>"
    )
    assert outside != tokenizer.chat_template
    for template in (outside, UNMARKED.replace("<|end|>", "")):
        with pytest.raises(AlignmentError, match="never learn to stop"):
            chat_tokenizer(tokenizer, template).end_of_answer({"messages": [USER, ASSISTANT]})


# --- Whole data sets ----------------------------------------------------------------------------------------


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
    assert "37 examples to learn from, 0 held out." in out


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
