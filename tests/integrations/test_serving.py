"""The OpenAI-compatible server, asked by the `openai` client, and what it rests on in transformers."""

import asyncio
import inspect
import json
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch
from fastapi.responses import StreamingResponse
from run_command import SECONDS
from transformers.cli.serving import chat_completion, completion, model_manager, response, server, utils
from versions import LIST_MODELS

from transformers_kad import KADConfig, KADLogitsProcessor, attached_processor
from transformers_kad.integrations import serving
from transformers_kad.integrations.loading.models import load_model, load_tokenizer
from transformers_kad.integrations.loading.prompts import PLAIN_SAMPLING, encode
from transformers_kad.recipes.arguments import ModelArguments
from transformers_kad.recipes.serving import make_app
from transformers_kad.recipes.word_problems import make_problems

PAIR = Path(__file__).resolve().parents[2] / "recipes" / "tiny_pair"
CONFIG = KADConfig("dual", {"threshold": 0.6})
QUESTIONS = [problem.question for problem in make_problems("test", 8, seed=2)]


def start(**settings):
    models = ModelArguments(base=str(PAIR / "base"), proxy=str(PAIR / "proxy"), device="cpu")
    return serving.BackgroundServer(make_app(models, settings.pop("config", CONFIG), **settings))


@pytest.fixture(scope="module")
def client():
    running = start()
    yield openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=SECONDS)
    running.stop()


@pytest.fixture(scope="module")
def pair():
    return load_model(PAIR / "base"), load_model(PAIR / "proxy"), load_tokenizer(PAIR / "base")


def direct(pair, question, *, rule="dual", speculative=True, **settings):
    """The answer of `generate` itself, and the statistics of the call."""
    base, proxy, tokenizer = pair
    parameters = settings.pop("parameters", {"threshold": 0.6} if rule == "dual" else {})
    kad = KADLogitsProcessor(proxy, rule, **parameters) if rule else None
    inputs = encode(tokenizer, [question])
    settings = {"max_new_tokens": 60, "eos_token_id": tokenizer.eos_token_id, "tokenizer": tokenizer, **settings}
    if kad:
        settings |= {"logits_processor": [kad], "assistant_model": proxy if speculative else None}
    torch.manual_seed(settings.pop("seed", 0))
    ids = base.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True), kad and kad.statistics


def ask(client, question, *, kad=None, **settings):
    """An answer from the server, greedy unless said otherwise."""
    settings = {"model": "base", "temperature": 0, "max_tokens": 60, **settings}
    body = {} if kad is None else {"kad": kad}
    return client.chat.completions.create(
        messages=[{"role": "user", "content": question}], extra_body=body, **settings
    )


def test_an_answer_is_that_of_the_call(client, pair):
    for question in QUESTIONS[:3]:
        text, statistics = direct(pair, question)
        answer = ask(client, question)
        assert answer.choices[0].message.content == text
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens == statistics.tokens
        assert answer.usage.kad == {
            "rule": "dual",
            "parameters": {"threshold": 0.6},
            "drafted_tokens": statistics.drafted,
            "accepted_tokens": statistics.accepted,
            "deferral_mass": pytest.approx(statistics.deferral_mass),
            "base_forwards": statistics.base_forwards,
            "proxy_forwards": answer.usage.kad["proxy_forwards"],  # fewer where the prompts begin alike
        }
        assert 0 < answer.usage.kad["accepted_tokens"] <= answer.usage.kad["drafted_tokens"]


def test_a_stream_is_the_same_answer_piece_by_piece(client, pair):
    text, statistics = direct(pair, QUESTIONS[0])
    chunks = list(ask(client, QUESTIONS[0], stream=True))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    assert "".join(pieces) == text
    assert len(pieces) > 5
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.kad["drafted_tokens"] == statistics.drafted


def test_the_rule_of_a_request(client, pair):
    question = QUESTIONS[1]
    by_default, _ = direct(pair, question)
    for rule, parameters in (
        ("dual", {"threshold": 0.01}),
        ("primal", {"budget": 0.9}),
        ("ensemble", {"weight": 0.3}),
    ):
        text, statistics = direct(pair, question, rule=rule, parameters=parameters)
        answer = ask(client, question, kad={"rule": rule, "parameters": parameters})
        assert answer.choices[0].message.content == text
        assert answer.usage.kad["rule"] == rule
        assert answer.usage.kad["parameters"] == parameters
        assert answer.usage.kad["deferral_mass"] == pytest.approx(statistics.deferral_mass)
    assert ask(client, question).choices[0].message.content == by_default
    assert ask(client, question, kad={"num_assistant_tokens": 2}).usage.kad["parameters"] == {"threshold": 0.6}
    assert ask(client, question, kad=True).choices[0].message.content == by_default


def test_a_request_for_the_base_alone(client, pair):
    text, _ = direct(pair, QUESTIONS[0], rule=None)
    answer = ask(client, QUESTIONS[0], kad=False)
    assert answer.choices[0].message.content == text
    assert text != direct(pair, QUESTIONS[0])[0]
    assert "kad" not in answer.usage.model_extra


@pytest.mark.parametrize(
    ("kad", "message"),
    [
        ({"rule": "duel"}, "Unknown rule 'duel'. Did you mean 'dual'?"),
        ({"rule": "dual", "parameters": {"treshold": 0.5}}, "Did you mean 'threshold'?"),
        ({"rules": "dual"}, "Unknown field of `kad`: 'rules'. Did you mean 'rule'?"),
        ({"parameters": {"threshold": 1.5}}, "1.5"),
        ({"parameters": [0.5]}, "`parameters` of `kad` must be an object, got [0.5]"),
        ("dual", "`kad` must be false or an object such as"),
        ({"verification": "blocks"}, "Did you mean 'block'?"),
        ({"num_assistant_tokens": 0}, "`num_assistant_tokens` must be a positive integer"),
        ({"rule": "implicit_reward"}, "needs the proxy before alignment, which this server has not loaded"),
        ({"drafter": "prompt_lookup"}, "Unknown field of `kad`: 'drafter'"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_rule_is_answered_with_400_and_what_to_do(client, kad, message, stream):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, QUESTIONS[0], kad=kad, stream=stream)
    assert caught.value.status_code == 400
    assert message in str(caught.value)


def test_a_seed_gives_the_same_sample_whatever_else_is_asked(client, pair):
    expected, _ = direct(pair, QUESTIONS[2], seed=7, **{**PLAIN_SAMPLING, "temperature": 2.0})
    assert ask(client, QUESTIONS[2], temperature=2.0, seed=7).choices[0].message.content == expected
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(ask, client, QUESTIONS[2], temperature=2.0, seed=seed) for seed in (7, 8, 7, 9)]
        texts = [job.result().choices[0].message.content for job in jobs]
    assert texts[0] == texts[2] == expected
    assert len({*texts}) > 1
    with pytest.raises(openai.BadRequestError, match="`seed` must be an integer, got 'x'"):
        ask(client, QUESTIONS[0], seed="x")


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings(client, pair, stream):
    whole, _ = direct(pair, QUESTIONS[0])
    stop = whole.split()[2]
    expected, _ = direct(pair, QUESTIONS[0], stop_strings=[stop])
    assert expected != whole
    answer = ask(client, QUESTIONS[0], stop=[stop], stream=stream)
    if stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
    else:
        text = answer.choices[0].message.content
    assert text == expected


def test_penalties_and_limits(client, pair):
    penalized, _ = direct(pair, QUESTIONS[3], repetition_penalty=1.5)
    assert ask(client, QUESTIONS[3], frequency_penalty=0.5).choices[0].message.content == penalized
    short = ask(client, QUESTIONS[3], max_tokens=3)
    assert (short.usage.completion_tokens, short.choices[0].finish_reason) == (3, "length")


def test_an_answer_ends_where_the_context_does(client, pair):
    end = pair[2].eos_token_id
    answer = ask(client, QUESTIONS[0], max_tokens=10_000, logit_bias={str(end): -1e9})
    assert answer.usage.total_tokens == 512
    assert answer.choices[0].finish_reason == "length"
    with pytest.raises(openai.BadRequestError, match="the models read at most 512"):
        ask(client, "How many? " * 300)
    with pytest.raises(openai.APIError, match="the models read at most 512"):
        list(ask(client, "How many? " * 300, stream=True))


def test_eight_clients_at_once_get_their_own_answers(client, pair):
    expected = [direct(pair, question)[0] for question in QUESTIONS]
    alone = [direct(pair, question, rule=None)[0] for question in QUESTIONS]
    barrier = threading.Barrier(8)

    def work(number):
        barrier.wait()
        answer = ask(client, QUESTIONS[number], kad=None if number % 2 else False, stream=number % 4 < 2)
        if number % 4 < 2:
            return "".join(chunk.choices[0].delta.content or "" for chunk in answer)
        return answer.choices[0].message.content

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(work, range(8)))
    assert answers == [expected[number] if number % 2 else alone[number] for number in range(8)]


def test_a_client_that_leaves_ends_its_request(client, pair, monkeypatch):
    """The server is told while the base stands at one of its forwards, so that no speed decides this test."""
    put, cancel = utils.DirectStreamer.put, utils.DirectStreamer.cancel
    streaming, left, puts = threading.Event(), threading.Event(), []

    def wait_for_the_client(self, value):
        puts.append(self)
        if len(puts) == 5:
            streaming.set()
            assert left.wait(30)
        put(self, value)

    def note(self):
        cancel(self)
        left.set()

    monkeypatch.setattr(utils.DirectStreamer, "put", wait_for_the_client)
    monkeypatch.setattr(utils.DirectStreamer, "cancel", note)
    end = pair[2].eos_token_id
    stream = ask(client, QUESTIONS[0], stream=True, max_tokens=400, logit_bias={str(end): -1e9})
    next(iter(stream))
    assert streaming.wait(30)
    stream.close()
    assert left.wait(30)
    monkeypatch.setattr(utils.DirectStreamer, "put", put)
    text, _ = direct(pair, QUESTIONS[1])
    assert ask(client, QUESTIONS[1]).choices[0].message.content == text
    assert len(puts) == 5


def test_the_other_endpoints_that_generate(client, pair):
    base, proxy, tokenizer = pair
    ids = tokenizer("Ada has 3 hats.", return_tensors="pt")
    kad = KADLogitsProcessor(proxy, "dual", threshold=0.6)
    settings = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": tokenizer.eos_token_id}
    found = base.generate(**ids, logits_processor=[kad], assistant_model=proxy, **settings)
    text = tokenizer.decode(found[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    settings = {"model": "base", "temperature": 0, "extra_body": {"kad": {"parameters": {"threshold": 0.6}}}}
    answer = client.completions.create(prompt="Ada has 3 hats.", max_tokens=8, **settings)
    assert answer.choices[0].text == text
    assert answer.usage.kad["drafted_tokens"] == kad.statistics.drafted
    chunks = list(client.completions.create(prompt="Ada has 3 hats.", max_tokens=8, stream=True, **settings))
    assert "".join(chunk.choices[0].text for chunk in chunks) == text
    assert chunks[-1].usage.kad["drafted_tokens"] == kad.statistics.drafted

    text, statistics = direct(pair, QUESTIONS[0])
    settings |= {"input": QUESTIONS[0], "max_output_tokens": 60}
    answer = client.responses.create(stream=False, **settings)
    assert answer.output_text == text
    assert answer.usage.kad["drafted_tokens"] == statistics.drafted
    events = list(client.responses.create(stream=True, **settings))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == text
    assert events[-1].response.usage.kad["drafted_tokens"] == statistics.drafted


def test_endpoints_that_would_answer_with_the_base_alone_are_not_there(client):
    with pytest.raises(openai.NotFoundError, match="guides /v1/chat/completions"):
        client.post("/systemone", cast_to=object, body={"model": "base", "state": "x", "questions": {"a": {}}})


def test_the_one_model_stays(client, pair):
    assert [model.id for model in client.models.list()] == ["base"]
    with pytest.raises(openai.BadRequestError, match="pinned to 'base'"):
        ask(client, QUESTIONS[0], model="other")
    with pytest.raises(openai.UnprocessableEntityError, match=r"Unexpected fields in the request: \{'kat'\}"):
        client.chat.completions.create(model="base", messages=[], extra_body={"kat": False})
    with urllib.request.urlopen(urllib.request.Request(str(client.base_url.join("/reset")), method="POST")) as answer:
        assert answer.status == 200
    assert ask(client, QUESTIONS[0]).choices[0].message.content == direct(pair, QUESTIONS[0])[0]


def test_a_server_of_other_settings(pair):
    running = start(config=KADConfig("implicit_reward", {"beta": 2.0}), name="guided", speculative=False)
    try:
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
        answer = ask(client, QUESTIONS[0], model="guided")
        assert answer.usage.kad["rule"] == "implicit_reward"
        assert answer.usage.kad["drafted_tokens"] == 0
        answer = ask(client, QUESTIONS[0], model="guided", kad={"rule": "dual", "parameters": {"threshold": 0.6}})
        assert answer.choices[0].message.content == direct(pair, QUESTIONS[0])[0]
    finally:
        running.stop()


def test_lazy_settings_are_refused_at_the_start():
    with pytest.raises(ValueError, match="`lazy=True` draws its tokens"):
        start(config=KADConfig(lazy=True))


def test_the_processor_is_attached_to_the_base(pair):
    base, proxy, tokenizer = load_model(PAIR / "base"), pair[1], pair[2]
    serving.build_app(base, tokenizer, CONFIG, lambda c: KADLogitsProcessor.from_config(proxy, c), name="x")
    assert attached_processor(base).rule == CONFIG.make_rule()


# --- What the server rests on ------------------------------------------------------------------------------------

WHAT_TO_DO = "transformers changed what integrations/serving.py rests on: "


def names(function):
    return list(inspect.signature(function).parameters)


def test_what_the_server_rests_on_in_transformers():
    """If this fails, a new transformers needs a look at integrations/serving.py before it is allowed."""
    assert names(server.build_server) == [
        *("model_manager", "chat_handler", "completion_handler", "response_handler", "transcription_handler"),
        *("systemone_handler", "generation_state", "enable_cors"),
    ], WHAT_TO_DO + "the arguments of build_server"
    for module, handler in (
        (chat_completion, "ChatCompletionHandler"),
        (completion, "CompletionHandler"),
        (response, "ResponseHandler"),
    ):
        assert hasattr(module, handler), WHAT_TO_DO + f"{module.__name__} has no {handler}"
        kind = getattr(module, handler)
        assert names(kind.handle_request) == ["self", "body", "request_id"], WHAT_TO_DO + f"{handler}.handle_request"
        assert issubclass(kind, utils.BaseHandler), WHAT_TO_DO + f"{handler} is no BaseHandler"
        if handler != "ResponseHandler":  # which writes whole events
            assert """{{"error": "{""" in inspect.getsource(kind), WHAT_TO_DO + f"how {handler} tells errors"
        source = inspect.getsource(kind.handle_request)
        assert "self._resolve_model(body)" in source, WHAT_TO_DO + f"{handler} gets its model in another way"
    assert names(utils.BaseHandler.__init__)[1:] == [
        *("model_manager", "generation_state", "chat_template_kwargs"),
    ], WHAT_TO_DO + "the arguments of handlers"
    resolve = inspect.getsource(utils.BaseHandler._resolve_model)
    assert "self.model_manager.load_model_and_processor(" in resolve, WHAT_TO_DO + "who loads models"
    assert "self.model_manager.force_model" in resolve, WHAT_TO_DO + "how a server is pinned to its model"
    for name in ("load_model_and_processor", LIST_MODELS, "shutdown", "process_model_name"):
        assert hasattr(model_manager.ModelManager, name), WHAT_TO_DO + f"ModelManager has no {name}"
    manager = inspect.getsource(utils.GenerateManager)
    assert "model.generate(**gen_kwargs)" in manager, WHAT_TO_DO + "how a stream is generated"
    assert "model.generate, **generate_kwargs" in manager, WHAT_TO_DO + "how an answer is generated"
    for name in ("streamer", "generation_config", "tokenizer"):
        assert f'"{name}"' in manager, WHAT_TO_DO + f"generate is not given {name}"
    state = utils.GenerationState()
    assert isinstance(state.get_manager("x"), utils.GenerateManager), WHAT_TO_DO + "how requests get their thread"
    assert state.get_manager("x") is state.get_manager("x"), WHAT_TO_DO + "requests of a model share no thread"
    assert hasattr(StreamingResponse(iter(())), "body_iterator"), WHAT_TO_DO + "starlette's streams"


def test_the_canary_says_what_moved(monkeypatch):
    monkeypatch.delattr(chat_completion, "ChatCompletionHandler")
    with pytest.raises(AssertionError, match=r"rests on: .*chat_completion has no ChatCompletionHandler"):
        test_what_the_server_rests_on_in_transformers()


def test_usage_is_found_in_parts_of_several_events():
    """A part of a stream may hold several events, and a text may hold the word."""
    chunks = [
        'data: {"a": "\\"usage\\""}\n\ndata: {"usage": {"total_tokens": 3}}\n\n',
        "data: x\n\n",
        'data: {"error": "pass "auto" or a number"}\n\n',  # as transformers writes it
    ]

    class Call:
        async def usage(self):
            return {"drafted_tokens": 1}

    async def parts():
        for chunk in chunks:
            yield chunk

    async def collect():
        return [part async for part in serving._completed(parts(), Call())]

    first, second, error = asyncio.run(collect())
    assert json.loads(error.removeprefix("data: "))["error"]["message"] == 'pass "auto" or a number'
    assert second == chunks[1]
    events = [json.loads(event.removeprefix("data: ")) for event in first.strip().split("\n\n")]
    assert events == [{"a": '"usage"'}, {"usage": {"total_tokens": 3, "kad": {"drafted_tokens": 1}}}]
