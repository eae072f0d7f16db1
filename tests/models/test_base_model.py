"""The base in speculative decoding, with the cache and the inputs of its call."""

import pytest
import torch
from test_adapters import ENDS, GREEDY, adapted, generated, padded_prompts
from test_cached_model import plain, random_ids
from tiny_families import tiny_family
from tiny_models import tiny_model
from transformers import Cache, DynamicCache, StaticCache

from transformers_kad import DualDeferral, KADLogitsProcessor
from transformers_kad.models.base_model import BaseModel
from transformers_kad.models.by_version import CACHE, BaseQuantizedLayer
from transformers_kad.models.cached_model import MOST_ONE_BY_ONE
from transformers_kad.models.forward_inputs import ForwardInputs


def base_of(model, ids, held=0, **further):
    """The base with a cache that holds the first `held` tokens of the prompts."""
    cache = DynamicCache(config=model.config)
    if held:
        with torch.no_grad():
            model(ids[:, :held], **{CACHE: cache})
    return BaseModel(model, ids, None, {"use_cache": True, CACHE: cache, **further})


@pytest.mark.parametrize("held", [0, 5])
def test_it_reads_on_from_the_cache_of_the_call(held):
    model, ids = tiny_model(seed=3), random_ids(1, 9)
    base = base_of(model, ids, held)
    assert base.cached_length == held
    torch.testing.assert_close(base.logits(ids, logits_to_keep=2), plain(model, ids, 2), atol=1e-4, rtol=1e-4)
    draft = random_ids(1, 3, seed=5)
    whole = torch.cat([ids, draft], dim=1)
    torch.testing.assert_close(base.extend(draft, logits_to_keep=3), plain(model, whole, 3), atol=1e-4, rtol=1e-4)
    base.take_back([2])
    assert base.cached_length == base.cache.get_seq_length() == 10
    other = random_ids(1, 2, seed=6)
    whole = torch.cat([ids, draft[:, :1], other], dim=1)
    torch.testing.assert_close(base.extend(other), plain(model, whole), atol=1e-4, rtol=1e-4)


def test_what_a_window_of_the_call_dropped_is_read_again():
    """Of a window that moved on, what the call brought can't be taken back."""
    model, ids = tiny_model("mistral", seed=3), random_ids(1, 20)  # a window of 8
    base = base_of(model, ids, 20)
    base.crop(17)
    assert base.cached_length == 0
    other = random_ids(1, 2, seed=6)
    whole = torch.cat([ids[:, :17], other], dim=1)
    torch.testing.assert_close(base.extend(other), plain(model, whole), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({CACHE: StaticCache(config=tiny_model().config, max_cache_len=64)}, "static or quantized cache"),
        ({"inputs_embeds": torch.zeros(1, 4, 16)}, "needs `input_ids`, got `inputs_embeds`"),
    ],
)
def test_what_no_draft_can_be_verified_with_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        base_of(tiny_model(seed=3), random_ids(1, 4), **settings)


def test_a_cache_that_holds_more_than_the_text_is_refused():
    model, ids = tiny_model(seed=3), random_ids(1, 9)
    cache = base_of(model, ids, 9).cache
    with pytest.raises(ValueError, match="holds 9 tokens, more than the 4 of `input_ids`"):
        BaseModel(model, ids[:, :4], None, {"use_cache": True, CACHE: cache})


@pytest.mark.parametrize("name", ["activated LoRA", "SHADOW", "ADAPTION_PROMPT"])
def test_a_base_with_an_adapter_verifies_drafts(name: str) -> None:
    base, kad = adapted(name), KADLogitsProcessor(tiny_model(seed=9), DualDeferral(0.05))
    ids, mask = padded_prompts()
    settings = {**GREEDY, "logits_processor": [kad], "eos_token_id": ENDS}
    alone = [
        generated(base.generate(input_ids=row[kept.bool()][None], **settings), int(kept.sum()))[0]
        for row, kept in zip(ids, mask, strict=True)
    ]
    assert len({len(text) for text in alone}) > 1
    together = base.generate(input_ids=ids, attention_mask=mask, assistant_model=kad.proxy, **settings)
    assert generated(together, 12) == alone
    assert kad.statistics.accepted < kad.statistics.drafted
    # Several texts a prompt, drawn so cold that they are the likeliest ones.
    settings |= {"do_sample": True, "temperature": 1e-6, "num_return_sequences": 2}
    together = base.generate(input_ids=ids, attention_mask=mask, assistant_model=kad.proxy, **settings)
    assert generated(together, 12) == [text for text in alone for _ in range(2)]


def test_states_of_an_encoder_follow_the_rows_that_stay() -> None:
    base, kad = tiny_model("gpt2", seed=1, add_cross_attention=True), KADLogitsProcessor(tiny_model(seed=9), "dual")
    states = torch.randn(4, 3, 16, generator=torch.Generator().manual_seed(3))
    settings = {"input_ids": random_ids(4, 6), "encoder_hidden_states": states, "logits_processor": [kad], **GREEDY}
    settings["eos_token_id"] = ENDS
    texts = generated(base.generate(**settings), 6)
    assert len({len(text) for text in texts}) > 1
    assert generated(base.generate(assistant_model=kad.proxy, **settings), 6) == texts


class TinyQuantizedLayer(BaseQuantizedLayer):
    """Quantizes nothing. Those of transformers need packages of their own."""

    def _quantize(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def _dequantize(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def test_a_quantized_cache_is_refused() -> None:
    cache = Cache(layers=[TinyQuantizedLayer() for _ in range(2)])
    with pytest.raises(ValueError, match=r"can't take tokens back from a static or quantized cache, got Cache\("):
        base_of(tiny_model(seed=3), random_ids(1, 4), **{CACHE: cache})


def test_a_base_that_reads_in_both_directions_is_refused() -> None:
    model = tiny_model(seed=3)
    model.config.is_decoder = False
    with pytest.raises(ValueError, match="needs a base that reads from left to right, and LlamaForCausalLM"):
        base_of(model, random_ids(1, 4))


def test_a_cache_of_states_alone_cannot_be_continued() -> None:
    model, ids = tiny_family("mamba2"), random_ids(1, 6)
    with torch.no_grad():
        cache = model(ids, use_cache=True).cache_params
    with pytest.raises(ValueError, match="can't tell how many tokens are in a cache of recurrent states alone"):
        BaseModel(model, ids, None, {"use_cache": True, ForwardInputs(model).cache_name: cache})


@pytest.mark.parametrize("family", ["qwen3_next", "falcon_h1", "jamba", "minimax", "zaya", "lfm2"])
def test_states_that_came_with_the_call_are_continued(family: str) -> None:
    model, ids = tiny_family(family), random_ids(1, 14)
    with torch.no_grad():
        cache = model(ids[:, :9], use_cache=True).past_key_values
    base = BaseModel(model, ids, None, {"use_cache": True, CACHE: cache})
    assert (base.cached_length, base.reads_prompt_alone) == (9, True)
    torch.testing.assert_close(base.logits(ids), plain(model, ids), atol=1e-3, rtol=1e-3)
    draft, other = random_ids(1, 3, seed=1), random_ids(1, 2, seed=2)
    whole = torch.cat([ids, draft], dim=1)
    torch.testing.assert_close(base.extend(draft, logits_to_keep=3), plain(model, whole, 3), atol=1e-3, rtol=1e-3)
    base.take_back([2])
    whole = torch.cat([ids, draft[:, :1], other], dim=1)
    torch.testing.assert_close(base.extend(other), plain(model, whole), atol=1e-3, rtol=1e-3)


def test_many_tokens_behind_states_that_are_read_one_by_one_are_read_anew() -> None:
    model, ids = tiny_family("jamba"), random_ids(1, 9 + MOST_ONE_BY_ONE + 1)
    with torch.no_grad():
        cache = model(ids[:, :9], use_cache=True).past_key_values
    base = BaseModel(model, ids, None, {"use_cache": True, CACHE: cache})
    torch.testing.assert_close(base.logits(ids), plain(model, ids), atol=1e-3, rtol=1e-3)
    assert base.cache is not cache
