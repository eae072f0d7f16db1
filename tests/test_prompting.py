"""Prompts as model inputs, and the ids that end a text."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from transformers_kad.prompting import PLAIN_SAMPLING, encode, eos_token_ids, message_text

PAIR = Path(__file__).resolve().parents[1] / "recipes" / "tiny_pair"


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
