"""Tokens: which of a chat's tokens are learned, and what a chat template must offer for that."""

import re

import pytest
from alignment import BASE, chats, preferences
from transformers import AutoTokenizer

from transformers_kad.recipes.training import AlignmentError
from transformers_kad.recipes.training.chats import UnusableRow
from transformers_kad.recipes.training.tokens import ChatTokenizer

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
    with pytest.raises(AlignmentError, match="renders an empty field differently from a missing one"):
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
