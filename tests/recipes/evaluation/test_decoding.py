"""Answers of every method to batches: the same as direct calls, whatever came before, and failures one by one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from transformers_kad import KADLogitsProcessor
from transformers_kad.integrations.loading.prompts import PLAIN_SAMPLING, encode
from transformers_kad.models.model_errors import ContextLengthError, UnusableLogitsError
from transformers_kad.recipes.arguments import ModelArguments
from transformers_kad.recipes.evaluation.decoding import Decoder, as_text, is_failure, own_settings
from transformers_kad.recipes.evaluation.methods import PLAIN_METHODS, RULE_METHODS, parse_methods
from transformers_kad.recipes.evaluation.tasks import get_task
from transformers_kad.recipes.pair import Pair
from transformers_kad.recipes.word_problems import EOS, make_problems

PAIR = Path(__file__).resolve().parents[3] / "recipes" / "tiny_pair"
QUESTIONS = [problem.question for problem in make_problems("test", 4)]


def load(folder=PAIR, **models):
    return Pair(ModelArguments(base=str(folder / "base"), proxy=str(folder / "proxy"), device="cpu", **models))


@pytest.fixture(scope="module")
def pair():
    return load()


@pytest.fixture
def decoder(pair):
    return Decoder(pair, dict(PLAIN_SAMPLING), speculative=False, aligned=str(PAIR / "proxy"))


def method(word):
    return parse_methods([word])[0]


def texts(answers):
    return [(answer.text, answer.ended, answer.tokens) for answer in answers]


@pytest.mark.parametrize("name", [*PLAIN_METHODS, *RULE_METHODS])
@pytest.mark.parametrize("speculative", [False, True], ids=["token-by-token", "speculative"])
def test_every_method_answers_the_same_again(pair, name, speculative):
    decoder = Decoder(pair, dict(PLAIN_SAMPLING), speculative=speculative, aligned=str(PAIR / "proxy"))
    if name == "assisted" and not speculative:
        with pytest.raises(ValueError, match="'assisted' is speculative"):
            decoder.prepare(method(name))
        return
    first = decoder.answer(method(name), QUESTIONS[:2], 7, 12)
    decoder.answer(method("kad-dual:threshold=0.9"), QUESTIONS[2:], 1, 8)
    again = decoder.answer(method(name), QUESTIONS[:2], 7, 12)
    assert texts(first) == texts(again)
    assert all(answer.error is None and 1 <= answer.tokens <= 12 and answer.seconds > 0 for answer in first)


@pytest.mark.parametrize("name", [*PLAIN_METHODS, "kad-dual", "implicit-reward"])
def test_a_batch_with_drafts_is_answered_as_its_prompts_are_alone(pair, name):
    decoder = Decoder(pair, {"do_sample": False}, aligned=str(PAIR / "proxy"))
    together = decoder.answer(method(name), QUESTIONS, 0, 40)
    alone = [decoder.answer(method(name), [question], 0, 40)[0] for question in QUESTIONS]
    assert texts(together) == texts(alone)
    if method(name).config is not None:
        assert [one.statistics.accepted for one in together] == [one.statistics.accepted for one in alone]
        assert len({one.seconds for one in together}) == 1  # one call answered all of them


@pytest.mark.parametrize("name", ["base", "ensemble"])
def test_another_seed_gives_other_answers(decoder, name):
    assert texts(decoder.answer(method(name), QUESTIONS, 7, 30)) != texts(
        decoder.answer(method(name), QUESTIONS, 8, 30)
    )


@pytest.mark.parametrize("speculative", [False, True], ids=["token-by-token", "speculative"])
def test_the_rule_guides_as_in_a_direct_call(pair, speculative):
    decoder = Decoder(pair, dict(PLAIN_SAMPLING), speculative=speculative)
    answers = decoder.answer(method("kad-dual:threshold=0.4"), QUESTIONS[:1], 3, 40)
    base = AutoModelForCausalLM.from_pretrained(PAIR / "base", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(PAIR / "base")
    kad = KADLogitsProcessor(pair.proxy, "dual", threshold=0.4)
    inputs = encode(tokenizer, QUESTIONS[:1])
    set_seed(3)
    ids = base.generate(
        **inputs,
        **PLAIN_SAMPLING,
        max_new_tokens=40,
        eos_token_id=pair.eos_token_ids,
        pad_token_id=tokenizer.pad_token_id,
        logits_processor=[kad],
        assistant_model=kad.proxy if speculative else None,
    )[0, inputs["input_ids"].shape[1] :]
    (answer,) = answers
    assert answer.ended
    assert answer.text + EOS == tokenizer.decode(ids)
    assert answer.tokens == len(ids) == answer.statistics.tokens
    assert answer.statistics == kad.statistics.sequences[0]


def test_a_batch_gives_each_row_its_own_statistics(decoder):
    answers = decoder.answer(method("kad-dual"), QUESTIONS, 0, 40)
    assert [answer.tokens for answer in answers] == [answer.statistics.tokens for answer in answers]
    assert len({answer.seconds for answer in answers}) == 1


def test_the_proxy_speaks_when_it_is_asked_alone(pair, decoder):
    greedy = Decoder(pair, {"do_sample": False}, speculative=False)
    (answer,) = greedy.answer(method("proxy"), QUESTIONS[:1], 0, 40)
    assert answer.text.startswith("We get ")
    assert answer.ended
    (base,) = greedy.answer(method("base"), QUESTIONS[:1], 0, 40)
    assert (base.ended, base.tokens) == (False, 40)
    # Stock speculative decoding is the base's own distribution.
    (assisted,) = Decoder(pair, {"do_sample": False}).answer(method("assisted"), QUESTIONS[:1], 0, 40)
    assert assisted.text == base.text


def test_what_a_model_brings_along_does_not_count(tmp_path, pair):
    for name in ("base", "proxy"):
        model, tokenizer = getattr(pair, name), AutoTokenizer.from_pretrained(PAIR / name)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        settings = {"repetition_penalty": 5.0, "min_new_tokens": 30, "temperature": 0.1, "top_k": 3, "do_sample": True}
        config = AutoModelForCausalLM.from_pretrained(PAIR / "base").generation_config
        config.update(**settings)
        config.save_pretrained(tmp_path / name)
    changed = Decoder(load(tmp_path), dict(PLAIN_SAMPLING), speculative=False)
    plain = Decoder(pair, dict(PLAIN_SAMPLING), speculative=False)
    for name in ("base", "proxy", "kad-dual"):
        assert texts(changed.answer(method(name), QUESTIONS, 5, 30)) == texts(
            plain.answer(method(name), QUESTIONS, 5, 30)
        )


@pytest.mark.parametrize("name", ["base", "proxy", "kad-dual"])
@pytest.mark.parametrize("speculative", [False, True], ids=["token-by-token", "speculative"])
def test_a_prompt_too_long_fails_alone(pair, name, speculative):
    long = QUESTIONS[0] * 40
    decoder = Decoder(pair, {"do_sample": False}, speculative=speculative)
    limit = pair.base.config.max_position_embeddings
    answers = decoder.answer(method(name), [QUESTIONS[0], long, QUESTIONS[1]], 0, 20)
    assert f"ends at {limit}" in answers[1].error
    assert (answers[1].text, answers[1].tokens) == ("", 0)
    apart = [decoder.answer(method(name), [question], 0, 20)[0] for question in QUESTIONS[:2]]
    assert texts([answers[0], answers[2]]) == texts(apart)


def test_the_room_behind_the_prompt_is_used_up_and_no_more(pair):
    decoder = Decoder(pair, {"do_sample": False}, speculative=False)
    limit = pair.base.config.max_position_embeddings
    (answer,) = decoder.answer(method("base"), QUESTIONS[:1], 0, limit)
    prompt = encode(pair.tokenizer, QUESTIONS[:1])["input_ids"].shape[1]
    assert answer.error is None
    assert answer.tokens <= limit - prompt


def test_a_long_prompt_leaves_the_others_their_room(pair):
    decoder = Decoder(pair, {"do_sample": False}, speculative=False)
    long = QUESTIONS[1]
    while encode(pair.tokenizer, [long])["input_ids"].shape[1] < pair.base.config.max_position_embeddings - 40:
        long = f"{QUESTIONS[1]} {long}"
    long = long[len(QUESTIONS[1]) // 2 :]
    beside, _ = decoder.answer(method("kad-dual"), [QUESTIONS[0], long], 0, 40)
    (alone,) = decoder.answer(method("kad-dual"), QUESTIONS[:1], 0, 40)
    assert texts([beside]) == texts([alone])
    assert beside.ended


def test_chats_become_plain_text_where_there_is_no_template(pair):
    chat = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1."},
        {"role": "user", "content": "Two?"},
    ]
    assert as_text(chat) == "One?\n\n1.\n\nTwo?\n"
    plain = Decoder(pair, {"do_sample": False}, speculative=False, chat=False)
    questions = [[{"role": "user", "content": question}] for question in QUESTIONS[:2]]
    answers = plain.answer(method("kad-dual"), questions, 0, 20)
    assert [answer.error for answer in answers] == [None, None]
    assert texts(answers) == texts(plain.answer(method("kad-dual"), [q + "\n" for q in QUESTIONS[:2]], 0, 20))


@pytest.mark.parametrize("speculative", [False, True], ids=["token-by-token", "speculative"])
def test_a_thought_that_the_chat_template_opens_is_shown(speculative):
    """Else a thought that is cut at the token limit looks like an answer."""
    pair = load()
    pair.tokenizer.chat_template += "{{ '<think>\n' }}"
    decoder = Decoder(pair, {"do_sample": False}, speculative=speculative)
    questions = [[{"role": "user", "content": question}] for question in QUESTIONS[:2]]
    opened = decoder.answer(method("kad-dual"), questions, 0, 20)
    assert [one.text.rpartition("<think>\n")[0] for one in opened] == [""] * 2
    assert [one.text[: len("<think>\nWe get")] for one in opened] == ["<think>\nWe get"] * 2
    assert get_task("tiny").extract(opened[0].text, False) is None


def test_stock_speculative_decoding_needs_vocabularies_of_one_size():
    pair = load()
    pair.base.resize_token_embeddings(704)
    with pytest.raises(ValueError, match="got 704 and 640 rows"):
        Decoder(pair, {"do_sample": False}).prepare(method("assisted"))


def test_two_decoders_may_share_a_pair(pair):
    first, second = (Decoder(pair, {"do_sample": False}, speculative=False) for _ in range(2))
    for decoder in (first, second):
        assert decoder.answer(method("proxy"), QUESTIONS[:1], 0, 40)[0].ended


@pytest.mark.parametrize("name", ["base", "kad-dual"])
def test_logits_that_are_nan_are_a_failure_with_a_reason(name):
    pair = load()
    with torch.no_grad():
        pair.base.lm_head.weight.fill_(torch.nan)
    decoder = Decoder(pair, dict(PLAIN_SAMPLING), speculative=False)
    answers = decoder.answer(method(name), QUESTIONS[:2], 0, 5)
    assert all("NaN" in answer.error and not answer.ended for answer in answers)


def test_what_is_no_fault_of_a_prompt_ends_the_run():
    assert is_failure(ContextLengthError("too long"))
    assert is_failure(UnusableLogitsError("NaN"))
    assert not is_failure(ValueError("another proxy"))
    assert is_failure(RuntimeError("probability tensor contains either `inf`, `nan` or element < 0"))
    assert is_failure(torch.OutOfMemoryError())
    assert not is_failure(RuntimeError("CUDA error: device-side assert"))
    assert not is_failure(TypeError())


def test_the_aligned_model_must_be_named(pair):
    with pytest.raises(ValueError, match="--aligned"):
        Decoder(pair, {"do_sample": False}).prepare(method("aligned"))


def test_the_proxy_may_see_its_own_chat_template(pair):
    plain = Decoder(pair, {"do_sample": False}, speculative=False, chat=False)
    own = Decoder(pair, {"do_sample": False}, speculative=False, chat=False, proxy_chat=True)
    (without,), (with_template,) = (
        d.answer(method("kad-dual:threshold=0.9"), QUESTIONS[:1], 0, 30) for d in (plain, own)
    )
    assert without.text != with_template.text
    (alone,) = own.answer(method("proxy"), QUESTIONS[:1], 0, 30)
    assert alone.text.startswith("We get ")


def test_settings_that_change_how_a_method_decodes_are_recorded():
    """So that a run with another drafter is not taken for the same run. Defaults are left out, as in older results."""
    (method,) = parse_methods(["kad-dual:threshold=0.5"])
    plain = own_settings(None, method)
    assert not {"drafter", "compile", "lazy", "verification"} & plain.keys()
    other = replace(method, config=replace(method.config, drafter="prompt_lookup"))
    assert own_settings(None, other) == {**plain, "drafter": "prompt_lookup"}
    (block,) = parse_methods(["kad-dual:threshold=0.5:verification=block"])
    shown = {"shown_parameters": {"threshold": 0.5, "verification": "block"}}
    assert own_settings(None, block) == {**plain, **shown, "verification": "block"}
