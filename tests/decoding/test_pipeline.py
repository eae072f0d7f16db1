"""The text-generation pipeline, and every streamer: what people wrap around `generate`."""

import asyncio
import threading
from pathlib import Path

import pytest
import torch
from run_command import SECONDS
from transformers import AsyncTextIteratorStreamer, TextIteratorStreamer, TextStreamer, pipeline

from transformers_kad import DualDeferral, KADLogitsProcessor, attach
from transformers_kad.integrations.loading.models import load_model, load_tokenizer
from transformers_kad.integrations.loading.prompts import PLAIN_SAMPLING, encode
from transformers_kad.recipes.word_problems import make_problems

PAIR = Path(__file__).resolve().parents[2] / "recipes" / "tiny_pair"
PROBLEMS = make_problems("test", 3, seed=2)
CHATS = [[{"role": "user", "content": problem.question}] for problem in PROBLEMS]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(PAIR / "base")


@pytest.fixture(scope="module")
def models():
    return load_model(PAIR / "base"), load_model(PAIR / "proxy")


def generated(base, tokenizer, question, **settings):
    inputs = encode(tokenizer, [question])
    ids = base.generate(**inputs, max_new_tokens=40, **settings)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("sampling", [{"do_sample": False}, PLAIN_SAMPLING])
def test_a_chat_through_the_pipeline_is_the_call_of_generate(models, tokenizer, speculative, sampling):
    base, proxy = models
    kad = KADLogitsProcessor(proxy, DualDeferral(0.6))
    settings = {"logits_processor": [kad], "eos_token_id": tokenizer.eos_token_id, **sampling}
    if speculative:
        settings["assistant_model"] = proxy
    generator = pipeline("text-generation", model=base, tokenizer=tokenizer)
    kad.reset()
    torch.manual_seed(4)
    (answer,) = generator(CHATS[0], max_new_tokens=40, **settings)
    assert (kad.statistics.drafted > 0) == speculative
    kad.reset()
    torch.manual_seed(4)
    assert answer["generated_text"][-1] == {
        "role": "assistant",
        "content": generated(base, tokenizer, PROBLEMS[0].question, **settings),
    }


def test_a_batch_of_chats_through_the_pipeline(models, tokenizer):
    base, proxy = models
    kad = KADLogitsProcessor(proxy, DualDeferral(0.6))
    settings = {"logits_processor": [kad], "eos_token_id": tokenizer.eos_token_id, "do_sample": False}
    generator = pipeline("text-generation", model=base, tokenizer=tokenizer)
    answers = generator(CHATS, batch_size=3, max_new_tokens=40, **settings)
    assert len(kad.statistics.sequences) == 3  # one call
    texts = [answer[0]["generated_text"][-1]["content"] for answer in answers]
    assert texts == [generated(base, tokenizer, problem.question, **settings) for problem in PROBLEMS]


def test_pipelines_and_chat_loops_know_nothing_of_an_attached_processor(tokenizer):
    base, proxy = load_model(PAIR / "base"), load_model(PAIR / "proxy")
    kad = KADLogitsProcessor(proxy, DualDeferral(0.6))
    with_kad = {"logits_processor": [kad], "eos_token_id": tokenizer.eos_token_id, "do_sample": False}
    expected = [generated(base, tokenizer, problem.question, **with_kad) for problem in PROBLEMS]
    attach(base, kad)
    generator = pipeline("text-generation", model=base, tokenizer=tokenizer)
    for chat, text in zip(CHATS, expected, strict=True):  # one after the other, as a chat loop does
        (answer,) = generator(chat, max_new_tokens=40, do_sample=False)
        assert answer["generated_text"][-1]["content"] == text
        assert kad.statistics.drafted
    answers = generator(CHATS, batch_size=3, max_new_tokens=40, do_sample=False)
    assert [answer[0]["generated_text"][-1]["content"] for answer in answers] == expected
    assert len(kad.statistics.sequences) == 3
    (alone,) = generator(CHATS[0], max_new_tokens=40, do_sample=False, kad=False)
    assert alone["generated_text"][-1]["content"] != expected[0]
    pieces = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=SECONDS)
    thread = threading.Thread(
        target=base.generate,
        kwargs={**encode(tokenizer, [PROBLEMS[0].question]), "streamer": pieces, "max_length": 99},
    )
    thread.start()
    assert "".join(pieces) == expected[0]
    thread.join()


@pytest.mark.parametrize("speculative", [False, True])
def test_streamers_give_the_text_piece_by_piece(models, tokenizer, speculative, capsys):
    base, proxy = models
    kad = KADLogitsProcessor(proxy, DualDeferral(0.6))
    settings = {"logits_processor": [kad], "eos_token_id": tokenizer.eos_token_id, "do_sample": False}
    if speculative:
        settings["assistant_model"] = proxy
    question = PROBLEMS[0].question
    expected = generated(base, tokenizer, question, **settings)
    kwargs = {"skip_prompt": True, "skip_special_tokens": True}

    generated(base, tokenizer, question, streamer=TextStreamer(tokenizer, **kwargs), **settings)
    assert capsys.readouterr().out == expected + "\n"

    def in_thread(streamer):
        thread = threading.Thread(
            target=generated, args=(base, tokenizer, question), kwargs={"streamer": streamer, **settings}
        )
        thread.start()
        return thread

    streamer = TextIteratorStreamer(tokenizer, timeout=SECONDS, **kwargs)
    thread = in_thread(streamer)
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == expected
    assert len(pieces) > 5

    async def collect():
        streamer = AsyncTextIteratorStreamer(tokenizer, timeout=SECONDS, **kwargs)
        thread = in_thread(streamer)
        pieces = [piece async for piece in streamer]
        thread.join()
        return pieces

    assert asyncio.run(collect()) == pieces
