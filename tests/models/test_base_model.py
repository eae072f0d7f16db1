"""The base in speculative decoding, with the cache and the inputs of its call."""

import pytest
import torch
from test_adapters import ENDS, GREEDY, adapted, generated, padded_prompts
from test_cached_model import plain, random_ids
from tiny_models import tiny_model
from transformers import DynamicCache, StaticCache

from transformers_kad import DualDeferral, KADLogitsProcessor
from transformers_kad.models.base_model import BaseModel


def base_of(model, ids, held=0, **further):
    """The base with a cache that holds the first `held` tokens of the prompts."""
    cache = DynamicCache(config=model.config)
    if held:
        with torch.no_grad():
            model(ids[:, :held], past_key_values=cache)
    return BaseModel(model, ids, None, {"use_cache": True, "past_key_values": cache, **further})


@pytest.mark.parametrize("held", [0, 5])
def test_it_reads_on_from_the_cache_of_the_call(held):
    model, ids = tiny_model(seed=3), random_ids(1, 9)
    base = base_of(model, ids, held)
    assert base.cached_length == held
    torch.testing.assert_close(base.logits(ids, logits_to_keep=2), plain(model, ids, 2), atol=1e-4, rtol=1e-4)
    draft = random_ids(1, 3, seed=5)
    whole = torch.cat([ids, draft], dim=1)
    torch.testing.assert_close(base.extend(draft, logits_to_keep=3), plain(model, whole, 3), atol=1e-4, rtol=1e-4)
    base.keep_columns(torch.tensor([[True, False, False]]))
    assert base.cached_length == base.cache.get_seq_length() == 10
    other = random_ids(1, 2, seed=6)
    whole = torch.cat([ids, draft[:, :1], other], dim=1)
    torch.testing.assert_close(base.extend(other), plain(model, whole), atol=1e-4, rtol=1e-4)


def test_the_cache_of_the_call_is_not_dropped():
    """Of a window that moved on, what the call brought can't be taken back."""
    model, ids = tiny_model("mistral", seed=3), random_ids(1, 20)  # a window of 8
    base = base_of(model, ids, 20)
    with pytest.raises(ValueError, match="can't take back what `past_key_values` held beyond its window"):
        base.crop(17)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_cache": False}, "needs a key-value cache, got use_cache=False"),
        ({"past_key_values": None}, "a cache of type NoneType"),
        ({"past_key_values": StaticCache(config=tiny_model().config, max_cache_len=64)}, "can take tokens back"),
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
        BaseModel(model, ids[:, :4], None, {"use_cache": True, "past_key_values": cache})


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
