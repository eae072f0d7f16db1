"""KAD in continuous batching: texts, requests that join and leave, and what it rests on in transformers."""

import inspect

import pytest
import torch
from architectures import LONGROPE
from run_command import SECONDS
from scipy.stats import chisquare
from tiny_families import tiny_family
from tiny_models import tiny_model
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList
from transformers.generation.continuous_batching import cb_logits_processors, continuous_api, requests

from transformers_kad import DualDeferral, KADLogitsProcessor, PacedDeferral, attach
from transformers_kad.integrations import continuous_batching as module
from transformers_kad.integrations.continuous_batching import (
    continuous_batching,
    generate_batch,
    init_continuous_batching,
)
from transformers_kad.models.model_errors import ContextLengthError

LENGTHS = [3, 17, 5, 9, 1, 12, 7, 30, 4, 4, 21, 2, 8, 15, 6, 11]
NEW = [12, 3, 8, 1, 15, 6, 10, 4, 9, 2, 14, 5, 7, 11, 13, 16]


def prompts(count=16):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, 50, (length,), generator=generator).tolist() for length in LENGTHS[:count]]


def small(**settings):
    """Batches of few tokens, so that prompts are read in chunks and requests join one after the other."""
    return ContinuousBatchingConfig(**{"page_size": 8, "num_blocks": 64, "max_batch_tokens": 40, **settings})


@pytest.fixture
def base():
    return tiny_model(hidden=32, seed=1)


def expected(base, kad, prompt, new):
    ids = torch.tensor([prompt])
    return base.generate(ids, logits_processor=[kad], do_sample=False, max_new_tokens=new)[0, len(prompt) :].tolist()


def decoded(base, kad, new=NEW, config=None, **parameters):
    """The texts of all prompts, each with its own number of tokens."""
    with continuous_batching(base, kad, continuous_batching_config=config or small()) as manager:
        processor = manager.logit_processor.logits_processor[0]
        ids = [
            manager.add_request(
                prompt, max_new_tokens=count, **{name: values[at] for name, values in parameters.items()}
            )
            for at, (prompt, count) in enumerate(zip(prompts(len(new)), new, strict=True))
        ]
        outputs = {}
        while len(outputs) < len(ids):
            output = manager.get_result(timeout=SECONDS)
            assert output is not None
            outputs[output.request_id] = output
    assert not any(output.error for output in outputs.values())
    return [outputs[name].generated_tokens for name in ids], processor


PROXIES = {
    "full attention": lambda: tiny_model(hidden=16, seed=2),
    "sliding windows": lambda: tiny_model("mistral", hidden=16, seed=2),  # of 8 tokens
    "positions of its own": lambda: tiny_model("gpt2", hidden=16, seed=2),
    "recurrent states": lambda: tiny_family("qwen3_5_text", seed=2),
}


@pytest.mark.parametrize("name", PROXIES)
def test_texts_are_those_of_generate(base, name):
    kad = KADLogitsProcessor(PROXIES[name](), DualDeferral(0.5))
    texts, _ = decoded(base, kad)
    assert texts == [expected(base, kad, *request) for request in zip(prompts(), NEW, strict=True)]


@pytest.mark.parametrize("config", [{}, {"num_blocks": 8}])
def test_a_rule_with_a_memory_remembers_each_request(base, config):
    """With room for few texts, requests are moved out of the batch and come back."""
    kad = KADLogitsProcessor(tiny_model(hidden=16, seed=2), PacedDeferral(0.5, threshold=0.3, step_size=1.5))
    texts, _ = decoded(base, kad, config=small(**config))
    wanted = [expected(base, kad, *request) for request in zip(prompts(), NEW, strict=True)]
    assert texts == wanted
    forgetful = KADLogitsProcessor(kad.proxy, DualDeferral(0.3))
    assert texts != [expected(base, forgetful, *request) for request in zip(prompts(), NEW, strict=True)]


def test_another_rule_with_a_reference_and_a_temperature(base, proxy):
    kad = KADLogitsProcessor(
        proxy, "implicit_reward", beta=0.7, reference=tiny_model(hidden=16, seed=7), component_temperature=1.3
    )
    texts, _ = decoded(base, kad)
    assert texts == [expected(base, kad, *request) for request in zip(prompts(), NEW, strict=True)]


def test_requests_that_are_put_off_and_begin_anew(base, proxy):
    """In a cache that can't hold all of them at once."""
    kad = KADLogitsProcessor(proxy, DualDeferral(0.5))
    new = [24] * 8
    texts, _ = decoded(base, kad, new, small(num_blocks=12, max_batch_tokens=24))
    assert texts == [expected(base, kad, *request) for request in zip(prompts(8), new, strict=True)]


@pytest.mark.parametrize("count", [1, 8])
def test_one_forward_of_the_proxy_reads_all_running_requests(base, proxy, count):
    kad = KADLogitsProcessor(proxy, DualDeferral(0.5))
    config = small(max_batch_tokens=256)
    manager = init_continuous_batching(base, kad, continuous_batching_config=config)
    for prompt in prompts(count):  # before it starts, so that all of them join in the first step
        manager.add_request(prompt, max_new_tokens=12)
    manager.start()
    outputs = [manager.get_result(timeout=SECONDS) for _ in range(count)]
    manager.stop()
    assert [len(output.generated_tokens) for output in outputs] == [12] * count
    (texts,) = manager.logit_processor.logits_processor[0]._models
    assert texts.forwards == 12


def test_a_request_that_is_cancelled_leaves_the_others_alone(base, proxy):
    kad = KADLogitsProcessor(proxy, DualDeferral(0.5))
    with continuous_batching(base, kad, continuous_batching_config=small()) as manager:
        long = manager.add_request(prompts()[7], max_new_tokens=400, streaming=True)
        assert manager.get_result(timeout=SECONDS).request_id == long  # it runs
        manager.cancel_request(long)
        for prompt in prompts()[:3]:
            manager.add_request(prompt, max_new_tokens=9)
        outputs = []
        while len(outputs) < 3:
            output = manager.get_result(timeout=SECONDS)
            outputs += [output] if output.request_id != long else []
    found = {tuple(output.prompt_ids): output.generated_tokens for output in outputs}
    assert found == {tuple(prompt): expected(base, kad, prompt, 9) for prompt in prompts()[:3]}


def test_padding_does_not_pile_up(base, proxy):
    kad = KADLogitsProcessor(proxy, DualDeferral(0.5))
    new = [2] * 7 + [40] + [30]  # the prompt of 30 tokens leaves late, the last one, of 4, goes on
    texts, processor = decoded(base, kad, new)
    assert texts == [expected(base, kad, *request) for request in zip(prompts(9), new, strict=True)]
    (running,) = processor._models
    assert running._batches[0].columns <= 70


def test_a_threshold_for_each_request(base, proxy):
    thresholds = [(0.05, 0.3, 0.6, 0.95)[at % 4] for at in range(16)]
    texts, _ = decoded(base, KADLogitsProcessor(proxy, DualDeferral(0.5)), threshold=thresholds)
    wanted = [
        expected(base, KADLogitsProcessor(proxy, DualDeferral(threshold)), *request)
        for threshold, *request in zip(thresholds, prompts(), NEW, strict=True)
    ]
    assert texts == wanted
    assert texts != decoded(base, KADLogitsProcessor(proxy, DualDeferral(0.5)))[0]


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({"threshold": 1.5}, ValueError, "`DualDeferral.threshold` must lie in .* got 1.5"),
        ({"treshold": 0.5}, TypeError, "Unknown parameter of a request: 'treshold'. Did you mean 'threshold'?"),
        ({"threshold": "high"}, (TypeError, ValueError), "'high'"),
    ],
)
def test_a_bad_parameter_is_refused_and_the_others_go_on(base, proxy, parameters, error, message):
    kad = KADLogitsProcessor(proxy, DualDeferral(0.5))
    with continuous_batching(base, kad, continuous_batching_config=small()) as manager:
        with pytest.raises(error, match=message):
            manager.add_request([3, 4], max_new_tokens=4, **parameters)
        manager.add_request([3, 4], max_new_tokens=4, threshold=1)
        output = manager.get_result(timeout=SECONDS)
    assert output.generated_tokens == expected(base, KADLogitsProcessor(proxy, DualDeferral(1.0)), [3, 4], 4)


def test_parameters_of_other_processors(base, proxy):
    """They are those of transformers' own, and what is left of r at top_k=1 is its likeliest token."""
    kad, config = KADLogitsProcessor(proxy, DualDeferral(0.5)), small(per_request_processors=True)
    sampling = GenerationConfig(do_sample=True, top_k=40)
    with continuous_batching(base, kad, generation_config=sampling, continuous_batching_config=config) as manager:
        manager.add_request([3, 4], max_new_tokens=8, top_k=1)
        output = manager.get_result(timeout=SECONDS)
        with pytest.raises(
            TypeError, match=r"Unknown parameter of a request: 'temperature'\. Known: threshold, top_k"
        ):
            manager.add_request([3, 4], temperature=0.5)
    assert output.generated_tokens == expected(base, kad, [3, 4], 8)


def test_texts_end_where_the_context_of_the_proxy_does(base):
    kad = KADLogitsProcessor(tiny_model(hidden=16, seed=2, max_position_embeddings=20), DualDeferral(0.5))
    with continuous_batching(base, kad, continuous_batching_config=small()) as manager:
        with pytest.raises(ContextLengthError, match="The prompt has 20 tokens, and the proxy reads at most 20"):
            manager.add_request([3] * 20)
        for length, wanted in ((15, None), (15, 3), (19, 50)):
            manager.add_request([3] * length, max_new_tokens=wanted)
        outputs = [manager.get_result(timeout=SECONDS) for _ in range(3)]
    found = {output.request_id: output.generated_tokens for output in outputs}
    assert not any(output.error for output in outputs)
    assert [len(found[f"req_{number}"]) for number in range(3)] == [5, 3, 1]
    assert found["req_0"] == expected(base, kad, [3] * 15, 5)


def test_a_list_of_prompts(base, proxy, monkeypatch):
    """With ends of both models, and an attached base."""
    kad = KADLogitsProcessor(proxy, DualDeferral(0.5))
    whole = [expected(base, kad, prompt, 10) for prompt in prompts()]
    end = whole[0][3]
    assert end not in whole[0][:3]
    monkeypatch.setattr(proxy.generation_config, "eos_token_id", end)
    attach(base, kad)
    outputs = generate_batch(base, prompts(), kad, max_new_tokens=10, continuous_batching_config=small())
    for output, text in zip(outputs, whole, strict=True):
        assert output.generated_tokens == (text[: text.index(end) + 1] if end in text else text)


def test_sampled_tokens_are_distributed_as_the_target(base, proxy):
    """2,000 times the first token of one prompt. A right implementation fails once in a million."""
    kad, prompt = KADLogitsProcessor(proxy, DualDeferral(0.3)), prompts()[0]
    ids = torch.tensor([prompt])
    with torch.no_grad():
        target = kad(ids, base(ids).logits[:, -1])[0].exp().double()
    config = GenerationConfig(do_sample=True, top_k=0, temperature=1.0, top_p=1.0)
    outputs = generate_batch(
        base,
        [prompt] * 2000,
        kad,
        max_new_tokens=1,
        generation_config=config,
        continuous_batching_config=small(max_batch_tokens=600, num_blocks=400, seed=5),
    )
    counts = torch.bincount(torch.tensor([output.generated_tokens[0] for output in outputs]), minlength=50).double()
    rare = target * 2000 < 5
    assert counts[target == 0].sum() == 0
    found = torch.cat([counts[~rare], counts[rare].sum()[None]])
    wanted = torch.cat([target[~rare], target[rare].sum()[None]])
    assert len(wanted) > 5
    assert chisquare(found[wanted > 0], (wanted / wanted.sum() * 2000)[wanted > 0]).pvalue > 1e-6


def test_what_can_not_be_guided_is_refused(base, proxy):
    kad = KADLogitsProcessor(proxy, DualDeferral(0.5))

    def refused(message, kad=kad, **settings):
        with pytest.raises(ValueError, match=message):
            generate_batch(
                base, [[3, 4]], kad, max_new_tokens=2, **{"continuous_batching_config": small(), **settings}
            )

    refused("one token for each request and step, .*`assistant_model` .LlamaForCausalLM", assistant_model=proxy)
    for name in ("lazy", "trace"):
        refused(f"`{name}=True` is not available", KADLogitsProcessor(proxy, DualDeferral(0.5), **{name: True}))
    for name, value in (("use_async_batching", True), ("use_cuda_graph", True), ("default_compile_level", 1)):
        refused(f"runs without `{name}`, got {value}", continuous_batching_config=small(**{name: value}))
    several = GenerationConfig(num_return_sequences=3, do_sample=True)
    refused("`num_return_sequences` must be 1, got 3", generation_config=several)
    training = KADLogitsProcessor(tiny_model(seed=9), DualDeferral(0.5))
    training.proxy.train()
    refused("The proxy LlamaForCausalLM .* is in training mode", training)
    longrope = KADLogitsProcessor(tiny_family("phi3", **LONGROPE), DualDeferral(0.5))
    refused("A proxy with LongRoPE is not available", longrope)


def test_logits_that_are_none_end_the_session(base):
    broken = tiny_model(hidden=16, seed=2)
    kad = KADLogitsProcessor(broken, DualDeferral(0.5))
    torch.nn.init.constant_(broken.lm_head.weight, torch.nan)
    (output,) = generate_batch(base, [[3, 4]], kad, max_new_tokens=2, continuous_batching_config=small())
    assert "logits of the proxy LlamaForCausalLM" in output.error


# --- What it rests on --------------------------------------------------------------------------------------------

WHAT_TO_DO = "transformers changed what integrations/continuous_batching.py rests on: "


def test_what_continuous_batching_rests_on_in_transformers(base):
    """If this fails, a new transformers needs a look at integrations/continuous_batching.py before it is allowed."""
    processor = cb_logits_processors.ContinuousBatchingLogitsProcessor
    assert {"fill_defaults", "prepare_tensor_args", "__call__"} == processor.__abstractmethods__, (
        WHAT_TO_DO + "the methods of processors"
    )
    names = list(inspect.signature(processor.prepare_tensor_args).parameters)
    assert names == ["self", "requests_with_new_token"], WHAT_TO_DO + "what a processor is told of the requests"
    names = list(inspect.signature(processor.__call__).parameters)
    assert names == ["self", "scores", "tensor_arg"], WHAT_TO_DO + "what a processor is called with"
    processors = cb_logits_processors.ContinuousBatchingLogitsProcessorList(LogitsProcessorList())
    for name in ("tensors_required", "supported_keys", "logits_processor"):
        assert hasattr(processors, name), WHAT_TO_DO + f"the list of processors has no {name}"
    state = requests.RequestState("x", [1, 2])
    for name in ("initial_tokens", "generated_tokens", "logit_processor_kwargs"):
        assert hasattr(state, name), WHAT_TO_DO + f"requests have no {name}"
    names = list(inspect.signature(continuous_api.ContinuousBatchingManager).parameters)
    assert names[:3] == ["model", "generation_config", "continuous_batching_config"], WHAT_TO_DO + "managers"
    names = list(inspect.signature(continuous_api.ContinuousBatchingManager.add_request).parameters)
    own = ["request_id", "max_new_tokens", "streaming", "record_timestamps", "eos_token_id"]
    assert names == ["self", "input_ids", *own, "logit_processor_kwargs"], WHAT_TO_DO + "add_request"
    source = inspect.getsource(continuous_api)
    assert "logit_processor=self.logit_processor" in source, WHAT_TO_DO + "when the processors are taken"
    assert "self.add_request(" in source, WHAT_TO_DO + "add_requests calls add_request no more"
    manager = base.init_continuous_batching(GenerationConfig(), small())
    assert isinstance(manager.logit_processor, cb_logits_processors.ContinuousBatchingLogitsProcessorList), (
        WHAT_TO_DO + "where a manager keeps its processors"
    )
    assert manager.batch_processor is None, WHAT_TO_DO + "a manager makes its batches at once"
    for name in module._NEED_ONE_PROGRAM:
        assert hasattr(small(), name), WHAT_TO_DO + f"the configuration has no {name}"


def test_the_canary_says_what_moved(base, monkeypatch):
    monkeypatch.setattr(continuous_api.ContinuousBatchingManager, "add_request", lambda self, prompt: None)
    with pytest.raises(AssertionError, match="rests on: add_request"):
        test_what_continuous_batching_rests_on_in_transformers(base)
