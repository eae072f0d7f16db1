"""The wrapper of generate: what it touches, what it refuses, and what it rests on in transformers."""

import inspect
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    WatermarkingConfig,
)
from transformers.generation import BaseStreamer
from transformers.generation.utils import GENERATION_MODES_MAPPING

from transformers_kad import DualDeferral, KADLogitsProcessor, kad_generate
from transformers_kad.decoding import generate_wrapper

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


def refused(base, message, error=ValueError, inputs=PROMPT, **arguments):
    with pytest.raises(error, match=message):
        base.generate(inputs, **{**GREEDY, **arguments})


def test_two_kad_processors_are_refused(base, proxy):
    refused(base, "one KAD processor", logits_processor=[KADLogitsProcessor(proxy), KADLogitsProcessor(proxy)])


def test_another_assistant_is_refused(base, proxy):
    refused(base, "kad.proxy", logits_processor=[KADLogitsProcessor(proxy)], assistant_model=tiny_model(seed=5))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("penalty_alpha", 0.6),
        ("dola_layers", "low"),
        ("use_mtp", True),
        ("assistant_ensemble_weight", 0.5),
        ("force_words_ids", [[3]]),
    ],
)
def test_other_ways_of_decoding_are_refused_with_drafts(base, proxy, name, value):
    kad = KADLogitsProcessor(proxy)
    refused(base, f"`{name}={re.escape(repr(value))}`", logits_processor=[kad], assistant_model=proxy, **{name: value})
    refused(base, f"`{name}=", logits_processor=[kad], custom_generate=kad_generate, **{name: value})


def test_every_way_of_decoding_of_this_transformers_is_drafted_or_refused():
    """If this fails, a new transformers decodes in a way that the loop would take for sampling."""
    handled = {"greedy_search", "sample", "assisted_generation"}
    of_beams = {"beam_search", "beam_sample", "group_beam_search"}  # refused by `num_beams`
    refused_by_name = {"dola_generation", "contrastive_search", "constrained_beam_search"}
    assert {mode.value for mode in GENERATION_MODES_MAPPING} == handled | of_beams | refused_by_name


@pytest.mark.parametrize("speculative", [False, True])
def test_ids_of_one_dimension_are_refused(base, proxy, speculative):
    kad = KADLogitsProcessor(proxy)
    assistant = {"assistant_model": proxy} if speculative else {}
    refused(base, r"shape \(B, L\).*got \(5,\)", inputs=PROMPT[0], logits_processor=[kad], **assistant)


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("name", ["inputs", "attention_mask"])
@pytest.mark.parametrize("value", [PROMPT.tolist(), {"input_ids": PROMPT}])
def test_inputs_that_are_no_tensors_are_refused(base, proxy, name, value, speculative):
    assistant = {"assistant_model": proxy} if speculative else {}
    settings = {"logits_processor": [KADLogitsProcessor(proxy)], **assistant, name: value}
    refused(base, rf"must be a tensor, got {type(value).__name__}.*\*\*inputs", TypeError, **settings)


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("name", ["position_ids", "token_type_ids"])
@pytest.mark.parametrize("value", [torch.arange(3)[None], torch.arange(5)])
def test_inputs_for_every_token_must_be_for_every_token(name, value, speculative):
    base, proxy = tiny_model("gpt2", seed=1), tiny_model("gpt2", seed=2)
    assistant = {"assistant_model": proxy} if speculative else {}
    settings = {"logits_processor": [KADLogitsProcessor(proxy)], **assistant, name: value}
    refused(base, f"`{name}` .* one value for each token of `input_ids` \\(1, 5\\)", **settings)


@pytest.mark.parametrize("speculative", [False, True])
def test_ids_that_the_base_can_not_read_are_an_error(base, proxy, speculative):
    """Of a tokenizer that is not the base's; the proxy may have fewer rows than the base, the base may not."""
    assistant = {"assistant_model": proxy} if speculative else {}
    kad = KADLogitsProcessor(proxy)
    refused(base, "out of range", IndexError, inputs=PROMPT + 40, logits_processor=[kad], **assistant)


def test_an_encoder_decoder_base_is_refused(proxy):
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 50}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    bart = BartForConditionalGeneration(BartConfig(**sizes, **heads)).eval()
    refused(bart, "encoder-decoder model Bart", logits_processor=[KADLogitsProcessor(proxy)])


def test_the_paged_cache_is_refused(base, proxy):
    refused(base, "paged", logits_processor=[KADLogitsProcessor(proxy)], cache_implementation="paged")


def test_prompt_lookup_is_refused(base, proxy):
    refused(
        base, "prompt_lookup_num_tokens=3", logits_processor=[KADLogitsProcessor(proxy)], prompt_lookup_num_tokens=3
    )


def test_beams_together_with_an_assistant_are_refused(base, proxy):
    refused(base, "num_beams=2", logits_processor=[KADLogitsProcessor(proxy)], assistant_model=proxy, num_beams=2)


@pytest.mark.parametrize("arguments", [{"inputs": PROMPT.repeat(2, 1)}, {"num_return_sequences": 2}])
def test_a_streamer_of_several_sequences_in_speculative_mode_is_refused(base, proxy, arguments):
    class Silent(BaseStreamer):
        def put(self, value):
            pass

        def end(self):
            pass

    arguments = {"do_sample": True, "streamer": Silent(), **arguments}
    refused(base, "got 2", logits_processor=[KADLogitsProcessor(proxy)], assistant_model=proxy, **arguments)


def test_a_trace_with_beams_is_refused(base, proxy):
    refused(base, "trace", logits_processor=[KADLogitsProcessor(proxy, trace=True)], num_beams=2)


def test_a_proxy_in_training_mode_is_refused(base):
    proxy = tiny_model(seed=2)
    kad = KADLogitsProcessor(proxy)
    proxy.train()
    refused(base, "proxy Llama.* training mode", logits_processor=[kad])
    with pytest.raises(ValueError, match="training mode"):
        kad(PROMPT, torch.zeros(1, 50))
    proxy.eval()
    reference = tiny_model(seed=3)
    kad = KADLogitsProcessor(proxy, "implicit_reward", reference=reference)
    reference.train()
    refused(base, "reference Llama.* training mode", logits_processor=[kad])


def test_an_adapter_inside_the_base_is_refused():
    base = tiny_model(seed=1)
    proxy = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM")).eval()
    refused(base, "base model itself", logits_processor=[KADLogitsProcessor(proxy)])


def test_a_processor_without_a_list_is_refused(base, proxy):
    refused(base, r"\[kad\]", error=TypeError, logits_processor=KADLogitsProcessor(proxy))


@pytest.mark.parametrize("eos", [7, [7, 9], (7, 9), torch.tensor(7), torch.tensor([7, 9])])
def test_ends_of_sequence_in_every_form(base, proxy, eos, monkeypatch):
    monkeypatch.setattr(base.generation_config, "pad_token_id", None)
    kad = KADLogitsProcessor(proxy)
    expected = base.generate(PROMPT, eos_token_id=[7, 9] if len(torch.as_tensor(eos).shape) else 7, **GREEDY)
    assert base.generate(PROMPT, logits_processor=[kad], eos_token_id=eos, **GREEDY).shape[0] == len(expected)
    assert kad.statistics.tokens <= 4


def test_a_sharded_proxy_is_refused(base, proxy, monkeypatch):
    monkeypatch.setattr(generate_wrapper, "is_fsdp_managed_module", lambda model: model is proxy)
    refused(base, "sharded", logits_processor=[KADLogitsProcessor(proxy)])


def test_synced_gpus_in_speculative_mode_are_refused(base, proxy):
    refused(base, "synced_gpus", logits_processor=[KADLogitsProcessor(proxy)], assistant_model=proxy, synced_gpus=True)


def test_a_part_of_the_text_with_a_longer_mask_is_refused(base, proxy):
    refused(
        base,
        "whole text",
        logits_processor=[KADLogitsProcessor(proxy)],
        attention_mask=torch.ones(1, 9, dtype=torch.long),
    )


def test_a_proxy_prompt_for_another_batch_size_is_refused(base, proxy):
    kad = KADLogitsProcessor(proxy)
    with kad.proxy_prompt(PROMPT.repeat(3, 1)):
        refused(base, "3 prompts, the call has 1", logits_processor=[kad])
    with pytest.raises(ValueError, match=r"\(5,\)"), kad.proxy_prompt(PROMPT[0]):
        pass


def test_an_assistant_and_another_custom_generate_are_refused(base, proxy):
    refused(
        base,
        "either",
        logits_processor=[KADLogitsProcessor(proxy)],
        assistant_model=proxy,
        custom_generate=lambda model, input_ids, **kwargs: input_ids,
    )


def test_nothing_is_left_open_after_a_refusal(base, proxy):
    kad = KADLogitsProcessor(proxy)
    expected = base.generate(PROMPT, logits_processor=[kad], **GREEDY)
    refused(base, "num_beams=2", logits_processor=[kad], assistant_model=proxy, num_beams=2)
    refused(base, "not used by the model", logits_processor=[kad], max_new_tokns=3)  # by transformers, half way in
    assert torch.equal(base.generate(PROMPT, logits_processor=[kad], **GREEDY), expected)


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


def test_a_proxy_that_ends_its_turns_otherwise_is_warned_about_once(base, caplog):
    proxy = tiny_model(seed=2)
    proxy.generation_config.eos_token_id = [7, 9]
    kad = KADLogitsProcessor(proxy)
    with caplog.at_level("WARNING", logger="transformers_kad.decoding.generate_wrapper"):
        for _ in range(2):
            base.generate(PROMPT, logits_processor=[kad], eos_token_id=9, **GREEDY)
        base.generate(PROMPT, logits_processor=[kad], eos_token_id=[7, 9], **GREEDY)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert "eos_token_id=[7, 9]" in messages[0]


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

    with caplog.at_level("WARNING", logger="transformers_kad.records.statistics"):
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
    for name in ("past_key_values", "use_cache", "attention_mask", "position_ids", "logits_to_keep"):
        assert name in seen, WHAT_TO_DO + f"model_kwargs lack {name}"
    assert seen["generation_config"].prefill_chunk_size is None, WHAT_TO_DO + "no prefill_chunk_size"
    prepare = inspect.signature(type(base).prepare_inputs_for_generation).parameters
    for name in ("next_sequence_length", "is_first_iteration"):
        assert name in prepare, WHAT_TO_DO + f"prepare_inputs_for_generation has no {name}"


def prepared(base, **settings):
    """The processors that `generate` would call for a call with a KAD processor, in order."""
    marker, seen = Marker(), []

    def record(model, input_ids, logits_processor, **model_kwargs):
        seen.extend(logits_processor)
        return input_ids

    arguments = {"logits_processor": [marker], "custom_generate": record, "do_sample": True, "max_new_tokens": 4}
    GenerationMixin.generate.__kad_original__(base, PROMPT, **arguments, **settings)
    return [type(p).__name__ for p in seen[seen.index(marker) + 1 :]]


class Marker(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


@pytest.mark.parametrize(
    ("name", "value", "warper"),
    [
        ("temperature", 0.7, "TemperatureLogitsWarper"),
        ("top_h", 0.4, "TopHLogitsWarper"),
        ("top_k", 20, "TopKLogitsWarper"),
        ("top_p", 0.9, "TopPLogitsWarper"),
        ("min_p", 0.05, "MinPLogitsWarper"),
        ("typical_p", 0.9, "TypicalLogitsWarper"),
        ("epsilon_cutoff", 3e-4, "EpsilonLogitsWarper"),
        ("eta_cutoff", 3e-4, "EtaLogitsWarper"),
        ("watermarking_config", WatermarkingConfig(), "WatermarkLogitsProcessor"),
    ],
)
def test_what_generate_puts_behind_the_processors(base, proxy, name, value, warper):
    KADLogitsProcessor(proxy)
    off = dict(generate_wrapper.WARPERS)
    assert prepared(base, **off) == [], WHAT_TO_DO + "a warper that no value of WARPERS switches off"
    assert prepared(base, **{**off, name: value}) == [warper], WHAT_TO_DO + f"{name} makes no {warper}"
    assert prepared(base, **{**off, name: None}) == [], WHAT_TO_DO + f"{name}=None is not off"


def test_nothing_else_can_come_behind_the_processors(base, proxy):
    """Every setting that generate reads behind the user's processors has its place in WARPERS."""
    KADLogitsProcessor(proxy)
    source = inspect.getsource(GenerationMixin._get_logits_processor)
    _, merged, behind = source.partition("_merge_criteria_processor_list")
    assert merged, WHAT_TO_DO + "where the user's processors come"
    read = set(re.findall(r"generation_config\.(\w+)", behind))
    known = {*generate_wrapper.WARPERS, "do_sample", "num_beams", "_eos_token_tensor", "renormalize_logits"}
    assert read == known, WHAT_TO_DO + f"the settings {read ^ known} of what comes behind the processors"
    off = {name: value for name, value in generate_wrapper.WARPERS.items() if name != "top_k"}
    assert prepared(base, **off) == ["TopKLogitsWarper"], WHAT_TO_DO + "its top_k without any setting"
    assert GenerationConfig._get_default_generation_params()["top_k"] == generate_wrapper.DEFAULT_TOP_K, (
        WHAT_TO_DO + "its top_k"
    )
    assert prepared(base, **generate_wrapper.WARPERS, renormalize_logits=True) == ["LogitNormalization"]
