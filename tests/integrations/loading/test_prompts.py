"""Prompts as model inputs, and the ids that end a text."""

import copy
import inspect
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from transformers import AutoTokenizer

from transformers_kad.integrations.loading.prompts import (
    PLAIN_SAMPLING,
    RESERVED,
    encode,
    eos_token_ids,
    message_text,
    pad_token_id,
)

PAIR = Path(__file__).resolve().parents[3] / "recipes" / "tiny_pair"


@pytest.fixture(autouse=True)
def as_before(base, proxy, monkeypatch):
    """The models are shared by all tests: their configurations are changed as copies."""
    for model in (base, proxy):
        monkeypatch.setattr(model, "generation_config", copy.deepcopy(model.generation_config))


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(PAIR / "base", padding_side="left")


def test_questions_become_the_user_s_turn_and_chats_stay_as_they_are(tokenizer):
    chat = [{"role": "user", "content": "Ada has 1 hat."}]
    question = encode(tokenizer, ["Ada has 1 hat."])
    assert question["input_ids"].tolist() == encode(tokenizer, [chat])["input_ids"].tolist()
    assert tokenizer.decode(question["input_ids"][0]) == "<|user|>\nAda has 1 hat.\n<|assistant|>\n"


def test_plain_prompts_have_no_markup(tokenizer):
    plain = encode(tokenizer, ["Ada has 1 hat."], chat=False)
    assert tokenizer.decode(plain["input_ids"][0]) == "Ada has 1 hat."


def test_several_prompts_are_padded_on_the_left(tokenizer):
    inputs = encode(tokenizer, ["Ada has 1 hat.", "Ben has 12 hats now."])
    assert inputs["attention_mask"][0, 0] == 0
    assert inputs["attention_mask"][:, -1].tolist() == [1, 1]


TWO = ["Ada has 1 hat.", "Ben has 12 hats now."]


@pytest.mark.parametrize("chat", [True, False])
def test_a_batch_is_padded_with_the_end_of_sequence_where_there_is_no_padding_token(tokenizer, chat):
    """Seen by the model are the same ids as with a padding token, and the tokenizer stays as it was."""
    expected = encode(tokenizer, TWO, chat=chat)
    tokenizer.pad_token = None
    found = encode(tokenizer, TWO, chat=chat)
    assert tokenizer.pad_token is None
    assert torch.equal(found["attention_mask"], expected["attention_mask"])
    mask = found["attention_mask"].bool()
    assert torch.equal(found["input_ids"][mask], expected["input_ids"][mask])
    assert set(found["input_ids"][~mask].tolist()) == {tokenizer.eos_token_id}


def test_without_any_token_to_pad_with_batches_are_refused_with_advice_and_single_prompts_are_not(tokenizer):
    tokenizer.pad_token = tokenizer.eos_token = None
    assert pad_token_id(tokenizer) is None
    assert len(encode(tokenizer, TWO[:1])["input_ids"]) == 1
    assert len(encode(tokenizer, [TWO[0], TWO[0]])["input_ids"]) == 2  # nothing is filled up
    with pytest.raises(ValueError, match=r"tiny_pair/base.*tokenizer_config.json.*--batch_size 1"):
        encode(tokenizer, TWO)


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("names", [["input_ids", "token_type_ids", "attention_mask"], ["input_ids"]])
def test_what_the_tokenizer_s_configuration_lists_does_not_decide_what_the_model_gets(tokenizer, names, chat):
    """`generate` refuses token types that a model does not take, and without a mask can't see that EOS is padding."""
    model = tiny_model(vocabulary=640)
    expected = encode(tokenizer, TWO, chat=chat)
    ids = model.generate(**expected, do_sample=False, max_new_tokens=4)
    tokenizer.model_input_names = names
    found = encode(tokenizer, TWO, chat=chat)
    assert set(found) == {"input_ids", "attention_mask"}
    assert torch.equal(model.generate(**found, do_sample=False, max_new_tokens=4), ids)


def test_token_types_are_passed_to_a_model_whose_forward_takes_them(tokenizer):
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    model = tiny_model("gpt2", vocabulary=640)
    inputs = encode(tokenizer, TWO, model=model)
    assert inputs["token_type_ids"].shape == inputs["input_ids"].shape
    model.generate(**inputs, max_new_tokens=2)
    assert "token_type_ids" not in encode(tokenizer, TWO, model=tiny_model())


def test_prompts_are_padded_on_the_left_whatever_the_tokenizer_s_side(tokenizer):
    expected = encode(tokenizer, TWO)
    tokenizer.padding_side = "right"
    found = encode(tokenizer, TWO)
    assert {name: t.tolist() for name, t in found.items()} == {name: t.tolist() for name, t in expected.items()}


def test_without_a_template_questions_are_plain_and_chats_refused(tokenizer):
    tokenizer.chat_template = None
    assert tokenizer.decode(encode(tokenizer, ["One hat."])["input_ids"][0]) == "One hat."
    for prompts, chat in ((["One hat."], True), ([[{"role": "user", "content": "One hat."}]], None)):
        with pytest.raises(ValueError, match="no chat template"):
            encode(tokenizer, prompts, chat=chat)


def test_a_chat_that_is_not_to_be_one_is_echoed(tokenizer):
    with pytest.raises(ValueError, match="One hat"):
        encode(tokenizer, [[{"role": "user", "content": "One hat."}]], chat=False)


@pytest.mark.parametrize("prompts", ["One hat.", [{"role": "user", "content": "One hat."}]])
def test_one_prompt_instead_of_several_is_refused(tokenizer, prompts):
    with pytest.raises(TypeError, match=r"got a single one: pass .*One hat"):
        encode(tokenizer, prompts)


def test_what_a_template_refuses_is_echoed(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(ValueError, match=r"refused the prompt: System role not supported.*One hat"):
        encode(tokenizer, ["One hat."])


def test_the_union_of_end_of_sequence_ids(base, proxy):
    base.generation_config.eos_token_id = [5, 2]
    proxy.generation_config.eos_token_id = 7
    assert eos_token_ids(base, proxy) == [2, 5, 7]
    base.generation_config.eos_token_id = None
    assert eos_token_ids(base) == []


def test_plain_sampling_overrides_what_a_model_brings(base):
    """A model's own temperature, top-k, top-p and penalty leave no trace in the scores."""
    ids = torch.tensor([[1, 2, 3]])
    settings = {"max_new_tokens": 2, "output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    for name, value in (("temperature", 0.3), ("top_k", 2), ("top_p", 0.5), ("repetition_penalty", 2.0)):
        setattr(base.generation_config, name, value)
    base.generation_config.do_sample = True
    warped = base.generate(ids, pad_token_id=0, **settings)
    assert not torch.equal(warped.scores[0], warped.logits[0])
    plain = base.generate(ids, pad_token_id=0, **settings, **PLAIN_SAMPLING)
    assert all(torch.equal(a, b) for a, b in zip(plain.scores, plain.logits, strict=True))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("Ada has 1 hat.", "Ada has 1 hat."),
        ([{"type": "text", "text": "Ada has "}, {"type": "text", "text": "1 hat."}], "Ada has 1 hat."),
        ([{"type": "text", "text": "Ada has ", "cache_control": {"type": "ephemeral"}}, "1 hat."], "Ada has 1 hat."),
        ([], ""),
        ("\U0001f3a9", "\U0001f3a9"),
    ],
)
def test_the_text_of_a_message_is_its_content_or_its_parts_joined(content, text):
    assert message_text(content) == text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "got None"),
        (5, "got 5"),
        ({"type": "text", "text": "Ada"}, "got {'type'"),
        ([{"type": "text", "text": "What is this?"}, {"type": "image", "url": "hat.png"}], r"hat\.png.* as part 2 "),
        ([{"type": "text", "text": 5}], "5} as part 1 "),
        ([["Ada"]], "Ada.* as part 1 "),
        ("caf\ud83d", r"lone surrogate.*caf\\ud83d"),
        ([{"type": "text", "text": "caf\ud83d"}], r"lone surrogate.*caf\\ud83d"),
    ],
)
def test_content_that_is_no_text_is_refused_with_the_reason(content, message):
    with pytest.raises(ValueError, match=message):
        message_text(content)


def test_parts_of_text_are_never_printed_into_the_prompt_as_python(tokenizer):
    """Templates that print the content as it is would print the list; those that look for parts print the text."""
    chats = [
        [{"role": "user", "content": content}]
        for content in ("Ada has 1 hat.", [{"type": "text", "text": "Ada has "}, {"type": "text", "text": "1 hat."}])
    ]
    for content in ("message['content']", "message['content'] | trim"):
        tokenizer.chat_template = "{% for message in messages %}{{ " + content + " }}{% endfor %}"
        assert [tokenizer.decode(encode(tokenizer, [chat])["input_ids"][0]) for chat in chats] == [
            "Ada has 1 hat."
        ] * 2


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "at least one message"),
        (5, "got 5"),
        (["Ada"], 'Message 1 needs a "role".*Ada'),
        ([{"role": "user", "content": "Ada"}, {"role": 5, "content": "Ada"}], 'Message 2 needs a "role"'),
        ([{"role": "user"}], 'and "content"'),
        ([{"role": "user", "content": "Ada", "name": "caf\ud83d"}], "lone surrogate"),
        ([{"role": "assistant", "content": None}], "got None"),
        ("caf\ud83d", "lone surrogate"),
    ],
)
def test_prompts_that_are_none_are_refused_with_the_reason(tokenizer, prompt, message):
    with pytest.raises(ValueError, match=message):
        encode(tokenizer, [prompt])


def test_a_message_that_calls_a_tool_needs_no_content(tokenizer):
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "sum"}}]}
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['tool_calls'][0]['function']['name'] }}{% endfor %}"
    )
    assert tokenizer.decode(encode(tokenizer, [[call]])["input_ids"][0]) == "sum"


@pytest.mark.parametrize(
    "template", ["{{ messages[0]['content'] + 1 }}", "{{ 1 / 0 }}", "{{ messages[0].content.so() }}"]
)
def test_whatever_goes_wrong_in_a_template_is_a_refusal_that_echoes_the_prompt(tokenizer, template):
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=r"refused the prompt.*One hat"):
        encode(tokenizer, ["One hat."])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokenize": False}, "'tokenize'"),
        ({"return_tensors": "np"}, "'return_tensors'"),
        ({"tools": "sum"}, '"tools"'),
        ({"tools": ["sum"]}, '"tools"'),
        ({"name": "caf\ud83d"}, "lone surrogate"),
    ],
)
def test_arguments_that_no_template_can_be_given_are_refused(tokenizer, arguments, message):
    with pytest.raises(ValueError, match=message):
        encode(tokenizer, ["One hat."], **arguments)


def test_every_argument_of_the_tokenizers_method_is_refused_or_one_for_the_template(tokenizer):
    """What a new transformers adds to `apply_chat_template` is to be looked at: it may not be the template's."""
    known = {*RESERVED, "tools", "documents", "chat_template", "sanitize_control_tokens", "kwargs"}
    assert {*inspect.signature(tokenizer.apply_chat_template).parameters} <= known
