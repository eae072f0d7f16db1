"""Tasks without right answers: prompts of one's own, and summaries."""

import json
from pathlib import Path

import pytest

from transformers_kad.recipes.evaluation.prompt_files import read_chats
from transformers_kad.recipes.evaluation.quality_report import TextScores, summarize_quality
from transformers_kad.recipes.evaluation.report import summarize
from transformers_kad.recipes.evaluation.tasks import get_task

FIXTURES = Path(__file__).parent / "fixtures"
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Name a river."},
]


def lines(tmp_path, *rows):
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(file)


def test_prompts_of_one_s_own(tmp_path):
    file = lines(
        tmp_path, {"prompt": "Name a lake.", "reference": "Lake Geneva"}, "", {"messages": CHAT}, "What is it?"
    )
    task = get_task("chat")
    question, chat, plain = task.load(prompts=file)
    assert task.messages(question) == [{"role": "user", "content": "Name a lake."}]
    assert task.messages(chat) == CHAT
    assert task.messages(plain) == [{"role": "user", "content": "What is it?"}]
    assert [one.answer for one in (question, chat, plain)] == ["Lake Geneva", "", ""]
    assert len({one.id for one in (question, chat, plain)}) == 3
    assert task.load(prompts=file, limit=2) == [question, chat]


def test_chats_that_differ_in_an_earlier_turn_have_ids_of_their_own(tmp_path):
    other = [{"role": "system", "content": "Be long."}, *CHAT[1:]]
    first, second = get_task("chat").load(prompts=lines(tmp_path, {"messages": CHAT}, {"messages": other}))
    assert first.id != second.id.partition("-")[0]


def test_an_answer_to_an_open_question_is_neither_right_nor_wrong(tmp_path):
    task = get_task("chat")
    (instance,) = task.load(prompts=lines(tmp_path, "Name a lake."))
    assert task.score(instance, "Lake Geneva", True) == {"prediction": None, "answer": "", "correct": None}
    assert not task.has_right_answers


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": 1', "the line begins like JSON, but is not a JSON object"),
        ({"question": "x"}, '"prompt" or "messages" is needed'),
        ({"messages": []}, '"messages" can\'t be used'),
        ({"prompt": "x", "reference": ["y"]}, "\"reference\" must be text, got ['y']"),
        ({"prompt": "x", "chat_template_kwargs": {"enable_thinking": False}}, "use --template_arguments"),
    ],
)
def test_a_malformed_line_is_named_with_its_number(row, message, tmp_path):
    file = lines(tmp_path, {"prompt": "fine"}, "", row)
    with pytest.raises(ValueError) as raised:
        read_chats(file)
    assert f"--prompts {file!r}, line 3: " in str(raised.value)
    assert message in str(raised.value)


def test_a_file_without_prompts_or_no_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no prompts"):
        read_chats(lines(tmp_path, "", " "))
    with pytest.raises(ValueError, match=r"--prompts .*nowhere.* can't be read"):
        read_chats(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="The task 'chat' needs --prompts"):
        get_task("chat").load()


def test_summaries_are_asked_for_in_words_with_an_example_before(tmp_path):
    task = get_task("cnn_dailymail")
    first, *others = task.load(data_dir=FIXTURES)
    assert len(others) == 4
    assert first.question.startswith("The town of Elm has a new bridge.")
    assert first.question.endswith("Write the summary and nothing else.")
    (example,) = task.few_shot_examples(1, data_dir=FIXTURES)
    chat = task.messages(first, [example])
    assert [turn["role"] for turn in chat] == ["user", "assistant", "user"]
    assert chat[1]["content"] == example.answer


def record(instance, method, text, **more):
    return {
        "task": "cnn_dailymail",
        "method": method,
        "instance": instance.id,
        "sample": 0,
        "prediction": None,
        "answer": instance.answer,
        "correct": None,
        "text": text,
        "ended": True,
        "error": None,
        "tokens": 9,
        "seconds": 0.1,
        **more,
    }


def test_summaries_have_rouge_and_no_accuracy():
    task = get_task("cnn_dailymail")
    instances = task.load(data_dir=FIXTURES)
    methods = {
        "good": [record(one, "good", f"<think>Hm.</think>{one.answer}") for one in instances],
        "bad": [record(one, "bad", "Nothing happened.") for one in instances],
        "failed": [record(one, "failed", "", error="too long") for one in instances],
    }
    found = summarize_quality(task, methods, TextScores({}))
    good, bad, failed = (row["figures"] for row in found["rows"])
    assert [good[name]["value"] for name in ("rouge1", "rouge2", "rougeL")] == [1, 1, 1]
    assert bad["rouge1"]["value"] == 0
    assert "rouge1" not in failed and "tokens" not in failed
    assert {c["figure"] for c in found["comparisons"]} >= {"rouge1", "rouge2", "rougeL", "tokens"}
    assert "in_form" not in good and "instructions" not in good
    assert summarize(methods["good"])["accuracy"] is None


def test_rouge_is_of_the_answers_that_have_a_reference(tmp_path):
    task = get_task("chat")
    with_reference, without = task.load(prompts=lines(tmp_path, {"prompt": "a", "reference": "one two"}, "b"))
    rows = [{**record(one, "m", "one two three"), "task": "chat"} for one in (with_reference, without)]
    figures = summarize_quality(task, {"m": rows}, TextScores({}))["rows"][0]["figures"]
    assert figures["rouge1"]["value"] == pytest.approx(2 * (2 / 3) / (2 / 3 + 1))
    assert figures["rouge1"]["instances"] == 1
    assert figures["distinct_1"]["instances"] == 2
