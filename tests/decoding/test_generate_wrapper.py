"""The wrapper of generate: what it touches, how it keeps the records, and what it rests on in transformers."""

import functools
import inspect
import threading

import pytest
import torch
from transformers import (
    GenerationMixin,
)
from transformers.generation import BaseStreamer

from transformers_kad import DualDeferral, KADLogitsProcessor, kad_generate
from transformers_kad.decoding import generate_wrapper
from transformers_kad.decoding.open_call import OpenCall
from transformers_kad.models.by_version import CACHE

PROMPT = torch.tensor([[3, 14, 15, 9, 26]])
GREEDY = {"do_sample": False, "max_new_tokens": 4}


def test_the_wrapper_is_installed_once_and_keeps_the_signature(proxy):
    KADLogitsProcessor(proxy)
    first = GenerationMixin.generate
    KADLogitsProcessor(proxy)
    assert GenerationMixin.generate is first
    assert first.__name__ == "generate"
    assert inspect.signature(first) == inspect.signature(first.__kad_original__)
    assert not hasattr(first.__kad_original__, "__kad_original__")


@pytest.mark.parametrize("settings", [{"do_sample": True, "top_k": 0}, {"num_beams": 3}, {"assisted": True}])
def test_a_call_without_a_kad_processor_is_untouched(base, proxy, settings):
    """Same tokens and same random state as from the original function."""
    KADLogitsProcessor(proxy)
    settings = {"max_new_tokens": 10, **settings}
    if settings.pop("assisted", False):
        settings |= {"assistant_model": proxy, "do_sample": True}
    wrapped, original = GenerationMixin.generate, GenerationMixin.generate.__kad_original__
    outcomes = []
    for function in (wrapped, original):
        torch.manual_seed(3)
        outcomes.append((function(base, PROMPT, **settings), torch.get_rng_state()))
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert torch.equal(outcomes[0][1], outcomes[1][1])


def test_positional_arguments_are_understood(base, proxy):
    kad = KADLogitsProcessor(proxy)
    expected = base.generate(PROMPT, logits_processor=[kad], **GREEDY)
    assert torch.equal(base.generate(PROMPT, None, [kad], **GREEDY), expected)


@pytest.mark.parametrize("eos", [7, [7, 9], (7, 9), torch.tensor(7), torch.tensor([7, 9])])
def test_ends_of_sequence_in_every_form(base, proxy, eos, monkeypatch):
    monkeypatch.setattr(base.generation_config, "pad_token_id", None)
    kad = KADLogitsProcessor(proxy)
    expected = base.generate(PROMPT, eos_token_id=[7, 9] if len(torch.as_tensor(eos).shape) else 7, **GREEDY)
    assert base.generate(PROMPT, logits_processor=[kad], eos_token_id=eos, **GREEDY).shape[0] == len(expected)
    assert kad.statistics.tokens <= 4


@pytest.mark.parametrize("speculative", [False, True])
def test_a_call_after_one_whose_exception_is_kept(base, proxy, speculative):
    """As `sys.last_value` keeps it in a notebook, with the frames of the call and all that they hold."""
    kad, ids = KADLogitsProcessor(proxy, DualDeferral(0.5)), torch.tensor([[0, 5, 9], [3, 7, 7]])
    settings = {"logits_processor": [kad], "attention_mask": (ids != 0).long(), **GREEDY}
    settings |= {"assistant_model": proxy} if speculative else {}
    expected, kept = base.generate(ids, **settings), []
    for _ in range(2):
        try:
            base.generate(ids, min_new_tokens="many", **settings)
        except Exception as exception:
            kept.append(exception)
    assert len(kept) == 2
    assert torch.equal(base.generate(ids, **settings), expected)


def test_a_custom_decoding_method_of_the_users_gets_the_processor(base, proxy):
    """Any order of texts: the proxy compares instead of trusting that each step continues the last."""
    rule = DualDeferral(0.4)
    kad = KADLogitsProcessor(proxy, rule)
    texts = [PROMPT, torch.tensor([[1, 2, 3, 4, 5, 6]]), torch.cat([PROMPT, PROMPT], dim=1)]

    def decode(model, input_ids, logits_processor, **kwargs):
        for text in texts:
            scores = model(text).logits[:, -1]
            expected = rule(scores.softmax(-1), proxy(text).logits[:, -1].softmax(-1)).log()
            torch.testing.assert_close(logits_processor(text, scores), expected, atol=1e-4, rtol=1e-4)
        return torch.cat([input_ids, input_ids[:, :1]], dim=1)

    ids = base.generate(PROMPT, logits_processor=[kad], custom_generate=decode, **GREEDY)
    assert ids.shape[1] == PROMPT.shape[1] + 1
    assert kad.statistics.tokens == 1


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("asked", [0, 2])
def test_a_decoding_method_that_skips_the_processor_keeps_its_text_and_is_named(base, proxy, caplog, asked, trace):
    kad = KADLogitsProcessor(proxy, trace=trace)

    def decode(model, input_ids, logits_processor, **kwargs):
        for step in range(5):
            scores = model(input_ids).logits[:, -1]
            if step < asked:
                scores = logits_processor(input_ids, scores)
            input_ids = torch.cat([input_ids, scores.argmax(-1, keepdim=True)], dim=1)
        return input_ids

    with caplog.at_level("WARNING", logger="transformers_kad.records.recorders"):
        ids = base.generate(PROMPT, logits_processor=[kad], custom_generate=decode, **GREEDY)
    assert ids.shape[1] == PROMPT.shape[1] + 5
    assert f"for {5 - asked} of the 5 tokens" in caplog.text
    assert kad.statistics.tokens == 5
    assert kad.statistics.deferral_mass is None
    assert kad.trace is None


WHAT_TO_DO = "transformers changed what the wrapper of generate rests on: "


def test_what_the_wrapper_rests_on_in_transformers(base, proxy):
    """If this fails, a new transformers needs a look at generate_wrapper.py and generation.py before it is allowed."""
    KADLogitsProcessor(proxy)
    original = GenerationMixin.generate.__kad_original__
    names = list(inspect.signature(original).parameters)
    assert names[1:4] == ["inputs", "generation_config", "logits_processor"], WHAT_TO_DO + f"its arguments {names}"
    for name in ("assistant_model", "custom_generate", "streamer", "stopping_criteria"):
        assert name in names, WHAT_TO_DO + f"no argument {name}"

    seen = {}

    def record(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        seen.update(model_kwargs, model=model, logits_processor=logits_processor, criteria=stopping_criteria)
        seen["generation_config"] = generation_config
        return input_ids

    original(base, PROMPT, custom_generate=record, temperature=0.5, **(GREEDY | {"do_sample": True}))
    assert seen["model"] is base, WHAT_TO_DO + "a callable custom_generate gets the model first"
    assert [type(p).__name__ for p in seen["logits_processor"]][:1] == ["TemperatureLogitsWarper"], (
        WHAT_TO_DO + "the warpers come in logits_processor"
    )
    assert seen["criteria"].max_length == PROMPT.shape[1] + 4, WHAT_TO_DO + "criteria have no max_length"
    for name in (CACHE, "use_cache", "attention_mask", "position_ids", "logits_to_keep"):
        assert name in seen, WHAT_TO_DO + f"model_kwargs lack {name}"
    assert seen["generation_config"].prefill_chunk_size is None, WHAT_TO_DO + "no prefill_chunk_size"
    prepare = inspect.signature(type(base).prepare_inputs_for_generation).parameters
    for name in ("next_sequence_length", "is_first_iteration"):
        assert name in prepare, WHAT_TO_DO + f"prepare_inputs_for_generation has no {name}"


def emit_two_a_step(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
    """A decoding method that asks for every second token, and takes the next one unasked."""
    for _ in range(2):
        scores = logits_processor(input_ids, model(input_ids).logits[:, -1])
        input_ids = torch.cat([input_ids, scores.topk(2).indices], dim=-1)
    return input_ids


def return_a_list(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
    return [emit_two_a_step(model, input_ids, logits_processor, stopping_criteria, generation_config)]


def return_more_rows(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
    logits_processor(input_ids, model(input_ids).logits[:, -1])
    return input_ids.repeat(3, 2)


def return_one_dimension(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
    return input_ids[0]


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("method", [emit_two_a_step, return_a_list, return_more_rows, return_one_dimension])
def test_bookkeeping_never_destroys_what_a_decoding_method_returned(base, proxy, caplog, method, trace):
    kad = KADLogitsProcessor(proxy, trace=trace)
    base.generate(PROMPT, logits_processor=[kad], **GREEDY)
    before = kad.statistics
    result = base.generate(PROMPT, logits_processor=[kad], custom_generate=method, **GREEDY)
    expected = {emit_two_a_step: (1, 9), return_more_rows: (3, 10), return_one_dimension: (5,)}
    if method is return_a_list:
        assert isinstance(result, list)
        assert result[0].shape == (1, 9)
    else:
        assert result.shape == expected[method]
    assert "statistics" in caplog.text or "may not be guided by the proxy" in caplog.text
    assert kad.statistics is not before
    if kad.statistics is not None:
        assert kad.statistics.tokens == result.shape[1] - 5 if len(result) == 1 else 15
        assert kad.statistics.deferral_mass is None
    assert kad.trace is None
    assert base.generate(PROMPT, logits_processor=[kad], **GREEDY).shape == (1, 9)
    assert kad.statistics == before


def test_a_fault_of_the_library_itself_is_no_warning(base, proxy, monkeypatch):
    """A device reports its errors late, when the records are fetched: they must not be taken for bookkeeping."""

    def fail(self, sequences):
        raise RuntimeError("device-side assert")

    kad = KADLogitsProcessor(proxy)
    monkeypatch.setattr(OpenCall, "finish", fail)
    for assistant in (None, proxy):
        with pytest.raises(RuntimeError, match="device-side assert"):
            base.generate(PROMPT, logits_processor=[kad], assistant_model=assistant, **GREEDY)
    ids = base.generate(PROMPT, logits_processor=[kad], custom_generate=emit_two_a_step, **GREEDY)
    assert ids.shape == (1, 9)
    assert kad.statistics is None


def test_kad_generate_with_some_arguments_bound(base, proxy):
    """It is the project's loop all the same, which decodes speculatively."""
    kad = KADLogitsProcessor(proxy)
    expected = base.generate(PROMPT, logits_processor=[kad], assistant_model=proxy, **GREEDY)
    statistics = kad.statistics
    assert statistics.drafted
    streamer = CollectTokens()
    for loop in (functools.partial(kad_generate), functools.partial(kad_generate, streamer=streamer)):
        ids = base.generate(PROMPT, logits_processor=[kad], custom_generate=loop, **GREEDY)
        assert torch.equal(ids, expected)
        assert kad.statistics.drafted == statistics.drafted
    assert streamer.tokens == expected[0, 5:].tolist()


class CollectTokens(BaseStreamer):
    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens += value.tolist()

    def end(self):
        pass


def test_many_threads_wrap_generate_once():
    generate_wrapper.uninstall()
    original = GenerationMixin.generate
    assert not hasattr(original, "__kad_original__")
    try:
        barrier = threading.Barrier(8)

        def install():
            barrier.wait()
            generate_wrapper.install()

        threads = [threading.Thread(target=install) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert GenerationMixin.generate.__kad_original__ is original
    finally:
        generate_wrapper.install()


def test_without_the_wrapper_a_call_is_an_error(base, proxy):
    kad = KADLogitsProcessor(proxy)
    generate_wrapper.uninstall()
    try:
        generate_wrapper.uninstall()  # a second time changes nothing
        with pytest.raises(RuntimeError, match="looked up before transformers_kad was imported"):
            base.generate(PROMPT, logits_processor=[kad], **GREEDY)
    finally:
        generate_wrapper.install()
    assert base.generate(PROMPT, logits_processor=[kad], **GREEDY).shape == (1, 9)


def test_a_wrapper_around_the_wrapper_is_not_lost(monkeypatch):
    @functools.wraps(GenerationMixin.generate)
    def other(self, *args, **kwargs):
        return GenerationMixin.generate.__wrapped__(self, *args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "generate", other)
    with pytest.raises(RuntimeError, match="was wrapped again"):
        generate_wrapper.uninstall()
    assert GenerationMixin.generate is other


GROUP_BEAMS = """
import torch
from transformers import GenerationMixin


def search(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
    ids = input_ids.repeat_interleave(2, 0)
    while ids.shape[1] < generation_config.max_length:
        scores = [logits_processor(ids[group::2], model(ids[group::2]).logits[:, -1]) for group in range(2)]
        new = torch.stack([scores[0].topk(1).indices[:, 0], scores[1].topk(2).indices[:, 1]], 1)
        ids = torch.cat([ids, new.view(-1, 1)], -1)
    return ids


def generate(model, *args, **kwargs):
    return GenerationMixin.generate(model, *args, custom_generate=search, **kwargs)
"""


def test_a_mode_from_the_hub_that_calls_generate_inside_and_the_processors_by_group(base, proxy, tmp_path, caplog):
    (tmp_path / "custom_generate").mkdir()
    (tmp_path / "custom_generate" / "generate.py").write_text(GROUP_BEAMS)
    kad = KADLogitsProcessor(proxy, DualDeferral(0.6))
    mode = {"custom_generate": str(tmp_path), "trust_remote_code": True}
    ids = base.generate(PROMPT, logits_processor=[kad], **mode, **GREEDY)
    assert torch.equal(ids[0], base.generate(PROMPT, logits_processor=[kad], **GREEDY)[0])  # the first group is greedy
    assert ids.shape == (2, 9)
    assert "the statistics of this call can't be told" in caplog.text
    assert "thread" not in caplog.text
