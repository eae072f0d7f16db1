"""`attach`: every call of `generate` is guided, with drafts wherever that is possible."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GenerationConfig,
    LogitsProcessor,
    StaticCache,
    StoppingCriteria,
)
from transformers.generation import BaseStreamer

from transformers_kad import DualDeferral, KADLogitsProcessor, attach, attached_processor, detach, kad_generate
from transformers_kad.models.by_version import CACHE

PROMPT = torch.tensor([[3, 14, 15, 9, 26]])
BATCH = torch.tensor([[3, 14, 15, 9, 26], [7, 7, 7, 2, 1]])
GREEDY = {"do_sample": False, "max_new_tokens": 10}
SAMPLING = {"do_sample": True, "top_k": 0, "max_new_tokens": 10}


@pytest.fixture
def base():
    """A base of the test's own, from which nothing needs to be detached."""
    return tiny_model(hidden=32, seed=1)


@pytest.fixture
def kad(proxy):
    return KADLogitsProcessor(proxy, DualDeferral(0.6), num_assistant_tokens=3)


def generated(base, processor, inputs=PROMPT, **settings):
    """The ids of a call, from a fixed random state and an empty cache."""
    processor.reset()
    torch.manual_seed(5)
    return base.generate(inputs, **settings)


@pytest.mark.parametrize("inputs", [PROMPT, BATCH])
@pytest.mark.parametrize("settings", [GREEDY, SAMPLING])
@pytest.mark.parametrize("speculative", [False, True])
def test_a_call_is_the_one_with_the_processor(base, kad, settings, inputs, speculative):
    assistant = kad.proxy if speculative else None
    expected = generated(base, kad, inputs, logits_processor=[kad], assistant_model=assistant, **settings)
    statistics = kad.statistics
    assert (statistics.drafted > 0) == speculative
    assert not torch.equal(generated(base, kad, inputs, **settings), expected)
    attach(base, kad, speculative=speculative)
    assert torch.equal(generated(base, kad, inputs, **settings), expected)
    assert kad.statistics == statistics


def test_calls_say_whether_they_are_guided(base, kad, proxy):
    alone, other = base.generate(PROMPT, **GREEDY), KADLogitsProcessor(proxy, DualDeferral(1.0))
    by_other = base.generate(PROMPT, logits_processor=[other], **GREEDY)
    attach(base, kad)
    assert torch.equal(base.generate(PROMPT, kad=False, **GREEDY), alone)
    assert kad.statistics is None
    assert torch.equal(base.generate(PROMPT, logits_processor=[other], **GREEDY), by_other)
    assert kad.statistics is None
    assert not torch.equal(base.generate(PROMPT, **GREEDY), alone)
    assert kad.statistics.drafted
    detach(base)
    detach(base)  # a second time changes nothing
    assert torch.equal(base.generate(PROMPT, **GREEDY), alone)
    assert torch.equal(base.generate(PROMPT, kad=False, **GREEDY), alone)


def test_a_call_within_one_that_is_not_guided_is_not_either(base, kad):
    def again(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        return model.generate(input_ids, **GREEDY)

    alone = base.generate(PROMPT, **GREEDY)
    attach(base, kad)
    assert torch.equal(base.generate(PROMPT, custom_generate=again, kad=False, **GREEDY), alone)
    assert not torch.equal(base.generate(PROMPT, **GREEDY), alone)  # the next one is


@pytest.mark.parametrize("attached", [False, True])
def test_a_call_may_name_a_processor_for_itself(base, kad, proxy, attached):
    other = KADLogitsProcessor(proxy, DualDeferral(1.0))
    expected = generated(base, other, logits_processor=[other], assistant_model=proxy, **GREEDY)
    if attached:
        attach(base, kad)
    assert torch.equal(generated(base, other, kad=other, **GREEDY), expected)
    assert other.statistics.drafted
    assert kad.statistics is None
    assert attached_processor(base) is (kad if attached else None)


@pytest.mark.parametrize("value", [True, "dual", 1])
def test_other_values_of_kad_are_refused(base, kad, value):
    attach(base, kad)
    with pytest.raises(TypeError, match=f"`kad` must be a KADLogitsProcessor, or False.*got {value!r}"):
        base.generate(PROMPT, kad=value, **GREEDY)
    for both in (False, kad):
        with pytest.raises(ValueError, match=r"Got kad=.* in `logits_processor`: pass one of the two"):
            base.generate(PROMPT, kad=both, logits_processor=[kad], **GREEDY)


def test_one_processor_is_attached(base, kad, proxy):
    assert attached_processor(base) is None
    attach(base, kad)
    attach(base, kad)
    assert attached_processor(base) is kad
    base.generate(PROMPT, **GREEDY)
    assert kad.statistics.drafted
    attach(base, kad, speculative=False)
    base.generate(PROMPT, **GREEDY)
    assert not kad.statistics.drafted
    with pytest.raises(
        ValueError, match=r"LlamaForCausalLM.* attached already, KADLogitsProcessor\(.*`detach\(base\)`"
    ):
        attach(base, KADLogitsProcessor(proxy))
    assert attached_processor(base) is kad


def test_what_can_not_be_attached_is_refused(base, kad, proxy):
    with pytest.raises(TypeError, match="`kad` must be a KADLogitsProcessor, got LlamaForCausalLM"):
        attach(base, proxy)
    with pytest.raises(TypeError, match=r"`base` must be a causal LM.*got LlamaModel"):
        attach(base.model, kad)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 50}
    with pytest.raises(ValueError, match="decoder-only base, got the encoder-decoder model Bart"):
        attach(BartForConditionalGeneration(BartConfig(**sizes)), kad)
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="adapter was put into the base model itself"):
        attach(base, KADLogitsProcessor(adapted.eval()))
    assert attached_processor(base) is None


def test_the_repr_of_a_processor_names_the_bases_that_it_is_attached_to(base, kad):
    alone = repr(kad)
    attach(base, kad)
    assert repr(kad) == f"{alone[:-1]}, attached to LlamaForCausalLM (unnamed))"
    other = copy.deepcopy(base)
    other.generate(PROMPT, **GREEDY)
    assert "attached to LlamaForCausalLM" in repr(attached_processor(other))
    detach(base)
    assert repr(kad) == alone


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda base: pickle.loads(pickle.dumps(base))])
def test_a_copy_of_the_base_is_guided_by_a_processor_of_its_own(base, kad, make_copy):
    attach(base, kad)
    expected = base.generate(PROMPT, **GREEDY)
    other = make_copy(base)
    own = attached_processor(other)
    assert own is not kad
    assert own.proxy is not kad.proxy
    detach(base)
    assert torch.equal(other.generate(PROMPT, **GREEDY), expected)
    assert own.statistics == kad.statistics


def test_weights_and_configuration_do_not_know_of_it(base, kad, tmp_path):
    names, config = list(base.state_dict()), base.config.to_dict()
    attach(base, kad)
    assert list(base.state_dict()) == names
    assert base.config.to_dict() == config
    base.save_pretrained(tmp_path)
    assert attached_processor(type(base).from_pretrained(tmp_path)) is None


class Collect(BaseStreamer):
    def __init__(self):
        self.puts = 0

    def put(self, value):
        self.puts += 1

    def end(self):
        pass


def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
    """A decoding method of the user's, greedy."""
    while not stopping_criteria(input_ids, None).all():
        scores = logits_processor(input_ids, model(input_ids).logits[:, -1])
        input_ids = torch.cat([input_ids, scores.argmax(-1, keepdim=True)], dim=-1)
    return input_ids


WITHOUT_DRAFTS = {
    "beams": {"num_beams": 3},
    "beams of a configuration": {"generation_config": GenerationConfig(num_beams=3, **GREEDY)},
    "a streamer for a batch": {"inputs": BATCH, "streamer": Collect()},
    "a static cache": {"cache_implementation": "static"},
    "attentions": {"output_attentions": True, "return_dict_in_generate": True},
    "hidden states": {"output_hidden_states": True, "return_dict_in_generate": True},
    "a decoding method": {"custom_generate": decode},
}


@pytest.mark.parametrize("name", WITHOUT_DRAFTS)
def test_calls_that_drafts_can_not_serve_are_decoded_token_by_token(base, kad, name):
    settings = GREEDY | WITHOUT_DRAFTS[name]
    inputs = settings.pop("inputs", PROMPT)
    if "generation_config" in settings:
        settings = {"generation_config": settings["generation_config"]}
    base.set_attn_implementation("eager")  # the one that shows attentions
    expected = generated(base, kad, inputs, logits_processor=[kad], **settings)
    attach(base, kad)
    found = generated(base, kad, inputs, **settings)
    assert torch.equal(getattr(found, "sequences", found), getattr(expected, "sequences", expected))
    assert kad.statistics.drafted == 0
    with pytest.raises(ValueError, match=r"."):  # so that this test is about what it says
        base.generate(inputs, assistant_model=kad.proxy, **settings)


def test_caches_that_a_call_brings(base, kad):
    """A static cache takes nothing back, and rows of a batch would leave the caller's cache."""
    expected = base.generate(PROMPT, logits_processor=[kad], **GREEDY)
    attach(base, kad)
    static = StaticCache(config=base.config, max_cache_len=64)
    assert torch.equal(base.generate(PROMPT, **{CACHE: static}, **GREEDY), expected)
    assert kad.statistics.drafted == 0
    for inputs, drafted in ((PROMPT, True), (BATCH, False)):
        first = base(inputs[:, :-1]).past_key_values
        found = base.generate(inputs, **{CACHE: first}, return_dict_in_generate=True, **GREEDY)
        assert torch.equal(found.sequences[:1], expected)
        assert (kad.statistics.drafted > 0) == drafted
        assert found.past_key_values is first
        assert len(first.layers[0].keys) == len(inputs)


def test_embeddings_beside_the_ids(base, kad):
    expected = base.generate(PROMPT, logits_processor=[kad], **GREEDY)
    attach(base, kad)
    embeds = base.get_input_embeddings()(PROMPT)
    assert torch.equal(base.generate(PROMPT, inputs_embeds=embeds, **GREEDY), expected)


def test_lazy_processors_and_the_loop_by_name(base, proxy):
    lazy = KADLogitsProcessor(proxy, DualDeferral(0.6), lazy=True)
    attach(base, lazy)
    base.generate(PROMPT, temperature=1.0, top_p=1.0, **SAMPLING)
    assert lazy.statistics.drafted == 0
    assert lazy.statistics.tokens == 10
    detach(base)
    kad = KADLogitsProcessor(proxy)
    attach(base, kad, speculative=False)
    base.generate(PROMPT, custom_generate=kad_generate, **GREEDY)
    assert kad.statistics.drafted


def test_processors_of_the_call_come_before_kad(base, kad):
    class Ban(LogitsProcessor):
        """Bans the ids below 25, which KAD is to remove from the proxy's distribution too."""

        def __call__(self, input_ids, scores):
            return scores.masked_fill(torch.arange(scores.shape[-1]) < 25, -torch.inf)

    expected = generated(base, kad, logits_processor=[Ban(), kad], assistant_model=kad.proxy, **GREEDY)
    given = [Ban()]
    attach(base, kad)
    assert torch.equal(generated(base, kad, logits_processor=given, **GREEDY), expected)
    assert len(given) == 1
    by_position = base.generate(PROMPT, GenerationConfig(**GREEDY), [Ban()])
    assert torch.equal(by_position, expected)
    assert expected[0, 5:].min() >= 25


def test_texts_end_where_either_model_ends_them(base, kad, monkeypatch):
    text = base.generate(PROMPT, logits_processor=[kad], **GREEDY)[0, 5:].tolist()
    early, late = text[2], text[5]
    assert early not in (*text[:2], late)
    assert late not in text[:5]
    attach(base, kad)
    monkeypatch.setattr(kad.proxy.generation_config, "eos_token_id", [early])
    assert base.generate(PROMPT, **GREEDY)[0, 5:].tolist() == text[:3]
    config = GenerationConfig(eos_token_id=late, **GREEDY)
    assert base.generate(PROMPT, generation_config=config)[0, 5:].tolist() == text[:3]
    assert config.eos_token_id == late
    monkeypatch.setattr(base.generation_config, "eos_token_id", late)
    assert base.generate(PROMPT, **GREEDY)[0, 5:].tolist() == text[:3]
    # An end that the call names is the only one.
    assert base.generate(PROMPT, eos_token_id=late, **GREEDY)[0, 5:].tolist() == text[:6]
    assert base.generate(PROMPT, kad=False, **GREEDY).shape[1] > 8


def test_finished_rows_are_filled_as_without_kad(base, kad, monkeypatch):
    """Without a padding token with the base's own end, not with that of the proxy, though its id be smaller."""
    settings = {**GREEDY, "attention_mask": torch.ones_like(BATCH)}
    rows = base.generate(BATCH, logits_processor=[kad], **settings)[:, 5:].tolist()
    own = max({*range(50)} - {*rows[0], *rows[1]})
    end = next(token for token in rows[0][:6] if token not in rows[1] and token < own)
    monkeypatch.setattr(base.generation_config, "pad_token_id", None)
    monkeypatch.setattr(base.generation_config, "eos_token_id", own)
    monkeypatch.setattr(kad.proxy.generation_config, "eos_token_id", end)
    attach(base, kad)
    filled = base.generate(BATCH, **settings)[0, 5:].tolist()
    behind = filled[filled.index(end) + 1 :]
    assert behind == [own] * len(behind) != []


@pytest.mark.parametrize("outer", [False, True])
def test_a_base_with_an_adapter_of_peft(base, kad, outer):
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    expected = adapted.generate(input_ids=PROMPT, logits_processor=[kad], assistant_model=kad.proxy, **GREEDY)
    attach(adapted if outer else base, kad)
    assert attached_processor(adapted) is attached_processor(base) is kad
    assert torch.equal(adapted.generate(input_ids=PROMPT, **GREEDY), expected)
    assert kad.statistics.drafted
    alone = adapted.generate(input_ids=PROMPT, kad=False, **GREEDY)
    detach(adapted)
    assert torch.equal(adapted.generate(input_ids=PROMPT, **GREEDY), alone)


def test_an_error_of_a_guided_call_says_how_to_leave_kad_out(base, kad):
    attach(base, kad)
    with pytest.raises(ValueError, match="drafts of a third model") as caught:
        base.generate(PROMPT, assistant_model=tiny_model(seed=9), **GREEDY)
    assert "`kad=False`" in caught.value.__notes__[0]
    detach(base)
    with pytest.raises(ValueError, match="drafts of a third model") as caught:
        base.generate(PROMPT, assistant_model=tiny_model(seed=9), logits_processor=[kad], **GREEDY)
    assert not hasattr(caught.value, "__notes__")


def test_a_second_call_at_once_is_told_how_to_go_on(base, kad):
    """One processor serves one call; another one, or none, can be named in the call."""
    attach(base, kad)
    notes = []

    class CallAgain(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            with pytest.raises(RuntimeError, match="calls `generate` again") as caught:
                base.generate(input_ids, **GREEDY)
            notes.extend(caught.value.__notes__)
            return torch.ones(len(input_ids), dtype=torch.bool)

    base.generate(PROMPT, stopping_criteria=[CallAgain()], **GREEDY)
    assert "`kad=False`" in notes[0]


def test_continuous_batching_of_an_attached_base_is_refused(base, kad):
    with pytest.raises(ValueError, match="would decode without the proxy"):
        base.generate_batch([[3, 4]], max_new_tokens=2, kad=kad)
    attach(base, kad)
    for start in (lambda: base.generate_batch([[3, 4]], max_new_tokens=2), base.init_continuous_batching):
        with pytest.raises(ValueError, match=r"would decode without the proxy, .*KADLogitsProcessor.* `kad=False`"):
            start()
    with pytest.raises(ValueError, match="would drop the KAD processor"):
        base.generate(PROMPT, cache_implementation="paged", **GREEDY)
