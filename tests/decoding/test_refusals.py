"""Calls of `generate` that could not be answered rightly are refused before they begin."""

import inspect
import re
from types import SimpleNamespace

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

from transformers_kad import KADLogitsProcessor, kad_generate
from transformers_kad.decoding import parallel, refusals

PROMPT = torch.tensor([[3, 14, 15, 9, 26]])
GREEDY = {"do_sample": False, "max_new_tokens": 4}


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


def test_a_sharded_proxy_is_refused(base, proxy, monkeypatch):
    monkeypatch.setattr(proxy, "_is_fsdp_managed_module", True, raising=False)
    refused(base, "sharded", logits_processor=[KADLogitsProcessor(proxy)])


@pytest.mark.parametrize("speculative", [False, True])
def test_zero3_is_told_by_the_parameters_of_the_proxy(speculative):
    """A base in shards and a whole proxy are fine, whatever DeepSpeed does to models that are loaded now."""
    base, proxy = tiny_model(seed=1), tiny_model(seed=2)
    call = {"logits_processor": [KADLogitsProcessor(proxy)]} | ({"assistant_model": proxy} if speculative else {})
    expected = base.generate(PROMPT, **GREEDY, **call)
    base.lm_head.weight.ds_id = 0  # as DeepSpeed marks a parameter that it has partitioned
    assert torch.equal(base.generate(PROMPT, **GREEDY, **call), expected)
    proxy.lm_head.weight.ds_id = 1
    refused(base, "The proxy is sharded.*ZeRO-3", **call)


def test_zero3_that_is_enabled_refuses_nothing_by_itself(base, proxy, monkeypatch):
    """`is_deepspeed_zero3_enabled` speaks of the models that are loaded from now on."""
    kad = KADLogitsProcessor(proxy)
    expected = base.generate(PROMPT, **GREEDY, logits_processor=[kad])
    monkeypatch.setattr("transformers.generation.utils.is_deepspeed_zero3_enabled", lambda: True)
    monkeypatch.setattr("transformers.integrations.is_deepspeed_zero3_enabled", lambda: True)
    assert torch.equal(base.generate(PROMPT, **GREEDY, logits_processor=[kad]), expected)


def test_a_sharded_base_is_refused_with_compiled_forwards(proxy):
    base = tiny_model(seed=1)
    base.lm_head.weight.ds_id = 0
    kad = KADLogitsProcessor(proxy, compile=True)
    refused(base, "`compile=True`.*ZeRO-3", logits_processor=[kad], assistant_model=proxy)


class PipelineMesh:
    """The mesh of a model that transformers has spread over two processes."""

    mesh_dim_names = ("pp", "tp")

    def __getitem__(self, dimension):
        return SimpleNamespace(size=lambda: 2 if dimension == "pp" else 1)


def test_pipelines_are_refused_with_drafts_and_as_proxies(base, proxy, monkeypatch):
    kad = KADLogitsProcessor(proxy)
    with monkeypatch.context() as patch:
        patch.setattr(proxy, "_device_mesh", PipelineMesh())
        patch.setattr(parallel, "sharing_group", lambda model: None)  # there are no processes here
        refused(base, r"The proxy is spread over processes.*`pp_size`", logits_processor=[kad])
    monkeypatch.setattr(base, "_device_mesh", PipelineMesh())
    monkeypatch.setattr(parallel, "sharing_group", lambda model: None)
    monkeypatch.setattr(refusals, "sharing_group", lambda model: None)
    refused(base, r"Drafts.*pipeline parallelism.*`tp_size`", logits_processor=[kad], assistant_model=proxy)


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


WHAT_TO_DO = "transformers changed what the wrapper of generate rests on: "


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
    off = dict(refusals.WARPERS)
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
    known = {*refusals.WARPERS, "do_sample", "num_beams", "_eos_token_tensor", "renormalize_logits"}
    assert read == known, WHAT_TO_DO + f"the settings {read ^ known} of what comes behind the processors"
    off = {name: value for name, value in refusals.WARPERS.items() if name != "top_k"}
    assert prepared(base, **off) == ["TopKLogitsWarper"], WHAT_TO_DO + "its top_k without any setting"
    assert GenerationConfig._get_default_generation_params()["top_k"] == refusals.DEFAULT_TOP_K, (
        WHAT_TO_DO + "its top_k"
    )
    assert prepared(base, **refusals.WARPERS, renormalize_logits=True) == ["LogitNormalization"]


def test_a_processor_without_a_list_is_refused(base, proxy):
    refused(base, r"\[kad\]", error=TypeError, logits_processor=KADLogitsProcessor(proxy))


@pytest.mark.parametrize("in_list", [False, True])
def test_continuous_batching_which_would_drop_the_processor_is_refused(base, proxy, in_list):
    kad = KADLogitsProcessor(proxy)
    settings = {"logits_processor": [kad] if in_list else kad, "assistant_model": proxy}
    with pytest.raises(ValueError, match=r"`generate_batch` .* without the proxy, got .*KADLogitsProcessor.*padded"):
        base.generate_batch([PROMPT[0].tolist()], **settings, max_new_tokens=4)


def test_continuous_batching_without_a_kad_processor_is_untouched():
    """An empty list of prompts is answered before anything is set up."""
    assert tiny_model(seed=1).generate_batch([], logits_processor=None) == {}


def test_what_the_refusal_of_continuous_batching_rests_on_in_transformers():
    """If this fails, `generate_batch` may take processors now: look at how the KAD processor can be passed on."""
    names = inspect.signature(GenerationMixin.generate_batch).parameters
    assert "logits_processor" not in names
    assert names["kwargs"].kind is inspect.Parameter.VAR_KEYWORD
