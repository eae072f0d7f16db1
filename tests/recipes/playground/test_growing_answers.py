"""Answers that grow: their texts and figures are those of `generate`, and they end when they are told to."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from transformers_kad import KADLogitsProcessor
from transformers_kad.integrations.loading.prompts import PLAIN_SAMPLING, encode
from transformers_kad.models.model_errors import ContextLengthError
from transformers_kad.recipes.arguments import ModelArguments
from transformers_kad.recipes.pair import Pair
from transformers_kad.recipes.playground.answers import MAX_NEW_TOKENS, MAX_PROMPT, Question, answer

PAIR = Path(__file__).resolve().parents[3] / "recipes" / "tiny_pair"
MIA = "Mia has 83 apples. She gives 47 to Jon. How many apples does Mia have now?"
ADA = "Ada has 12 hats. She finds 5 more. How many hats does Ada have now?"


@pytest.fixture(scope="module")
def pair():
    return Pair(ModelArguments(str(PAIR / "base"), str(PAIR / "proxy"), device="cpu"))


def steps_of(pair, question, **settings):
    return list(answer(pair, question, threading.Event(), **settings))


def last_of(pair, question):
    last = steps_of(pair, question)[-1]
    return last.guided, last.base, last.proxy


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_texts_and_figures_are_those_of_generate(pair, temperature):
    question = Question(MIA, "dual", {"threshold": 0.4}, temperature, seed=3, max_new_tokens=30)
    inputs = encode(pair.tokenizer, [MIA])
    sampling = {**PLAIN_SAMPLING, "temperature": temperature} if temperature else {"do_sample": False}
    settings = {**sampling, "max_new_tokens": 30, "pad_token_id": pair.pad_token_id}

    def text(model, ends, **arguments):
        torch.manual_seed(3)
        ids = model.generate(**inputs, **settings, eos_token_id=ends, **arguments)
        return pair.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :])

    kad = KADLogitsProcessor(pair.proxy, "dual", threshold=0.4, trace=True)
    guided = text(pair.base, pair.eos_token_ids, logits_processor=[kad], assistant_model=pair.proxy)
    trace, base, proxy = last_of(pair, question)
    assert [*trace] == [*kad.trace]
    assert trace.statistics == kad.statistics
    assert pair.tokenizer.decode([record.token_id for record in trace]) == guided
    assert base == text(pair.base, pair.eos_token_ids) != guided
    assert proxy == text(pair.proxy, pair.proxy_eos_token_ids)


def test_the_texts_grow_one_after_the_other(pair):
    steps = steps_of(pair, Question(MIA), every=0.0)
    guided = [0 if step.guided is None else len(step.guided) for step in steps]
    assert guided == sorted(guided)
    assert len({*guided}) > 3  # the rounds of the guided text
    whole = steps[-1]
    for step in steps:
        assert whole.base.startswith(step.base) and whole.proxy.startswith(step.proxy)
        assert not step.base or step.guided == whole.guided
        assert not step.proxy or step.base == whole.base
    assert len({step.base for step in steps}) > 10
    assert len({step.proxy for step in steps}) > 10


def test_steps_are_told_no_more_often_than_asked(pair):
    assert len(steps_of(pair, Question(MIA), every=60.0)) == 3  # each text as a whole


def test_the_seed_decides_a_sampled_text(pair):
    texts = [last_of(pair, Question(MIA, temperature=1.0, seed=seed))[1] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("rule, parameters", [("implicit_reward", {"beta": 1.0}), ("paced", {"budget": 0.2})])
def test_rules_with_a_reference_or_a_memory(pair, rule, parameters):
    trace, *_ = last_of(pair, Question(MIA, rule, parameters))
    assert (trace.statistics.deferral_mass is None) == (rule == "implicit_reward")
    assert len(trace) == trace.statistics.tokens > 5


def test_two_visitors_at_once_get_their_own_texts_and_figures(pair, monkeypatch):
    processors, make = [], pair.processor

    def processor(*arguments, **settings):
        processors.append(make(*arguments, **settings))
        return processors[-1]

    monkeypatch.setattr(pair, "processor", processor)
    questions = [
        Question(MIA, "dual", {"threshold": 0.4}, temperature=1.0, seed=1),
        Question(ADA, "nudging", {"threshold": 0.7}, temperature=1.0, seed=2),
    ]
    alone = [last_of(pair, question) for question in questions]
    assert alone[0] != alone[1]
    for _ in range(3):
        with ThreadPoolExecutor(2) as pool:
            together = [*pool.map(lambda question: last_of(pair, question), questions)]
        assert together == alone
        assert [trace.statistics for trace, *_ in together] == [trace.statistics for trace, *_ in alone]
    assert len({id(kad) for kad in processors}) == 8


def test_a_text_ends_where_it_is_stopped_and_no_other_begins(pair):
    stop = threading.Event()
    question = Question(MIA, "dual", {"threshold": 0.01}, max_new_tokens=60)  # the base does not end by itself
    whole = last_of(pair, question)[0]
    steps = answer(pair, question, stop, every=0.0)
    first = next(step for step in steps if step.guided)
    stop.set()
    last = [first, *steps][-1]
    assert len(first.guided) <= len(last.guided) < len(whole) == 60
    assert last.guided.statistics.tokens == len(last.guided)
    assert (last.base, last.proxy) == ("", "")


def test_leaving_ends_the_text_and_the_next_visitor_is_served(pair):
    forwards = []
    hook = pair.base.register_forward_pre_hook(lambda *_: forwards.append(1))
    threads = threading.active_count()
    steps = answer(pair, Question(MIA, "dual", {"threshold": 0.01}, max_new_tokens=200), threading.Event(), every=0.0)
    next(steps)
    steps.close()
    hook.remove()
    assert threading.active_count() == threads
    assert len(forwards) < 100
    assert last_of(pair, Question(ADA))[0].statistics.tokens > 5


def test_what_goes_wrong_is_raised_where_the_answer_is_read(pair):
    threads = threading.active_count()
    for question, error, words in (
        (Question("123 " * 500), ContextLengthError, "The prompt has .* tokens, and the models read at most 512"),
        (Question(MIA, "dual", {"threshold": 1.5}), ValueError, r"`DualDeferral.threshold` must lie in \(0, 1\]"),
        (Question(MIA, "paced", {"threshold": 0.1, "smallest_threshold": 0.5}), ValueError, "must lie between"),
        (Question(MIA, "duel"), ValueError, "Did you mean 'dual'"),
    ):
        with pytest.raises(error, match=words):
            steps_of(pair, question)
    assert threading.active_count() == threads


def test_a_text_ends_where_the_context_does(pair):
    length = encode(pair.tokenizer, ["apple " * 100])["input_ids"].shape[1]
    question = Question("apple " * 100, "dual", {"threshold": 0.01}, max_new_tokens=MAX_NEW_TOKENS)
    assert len(last_of(pair, question)[0]) == 512 - length


@pytest.mark.parametrize(
    "values, words",
    [
        ({"prompt": "  "}, "Write a prompt first"),
        ({"prompt": "x" * (MAX_PROMPT + 1)}, f"at most {MAX_PROMPT} characters here, got {MAX_PROMPT + 1}"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must lie between 1 and 512, got 0"),
        ({"max_new_tokens": 10**9}, "`max_new_tokens` must lie between 1 and 512"),
        ({"temperature": -0.1}, "`temperature` must lie between 0 and 2.0, got -0.1"),
        ({"temperature": float("nan")}, "`temperature` must lie between"),
        ({"seed": -1}, "`seed` must lie between 0 and 4294967295, got -1"),
    ],
)
def test_what_a_visitor_may_ask_for_is_bounded(values, words):
    with pytest.raises(ValueError, match=words):
        Question(**({"prompt": MIA} | values))
