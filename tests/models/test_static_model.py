"""compile=True: static caches and compiled forwards give the same text."""

import pytest
import torch
from architectures import LONGROPE
from test_adapters import adapted
from test_batches import padded
from test_cached_model import random_ids
from tiny_families import tiny_family
from tiny_models import tiny_model
from versions import skip_if_bloom_is_not_static

from transformers_kad import DualDeferral, ImplicitReward, KADLogitsProcessor
from transformers_kad.models.by_version import CACHE
from transformers_kad.models.static_model import CAPACITY_STEP, StaticCacheModel

PROMPT = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9, 3]])
GREEDY = {"do_sample": False, "max_new_tokens": 40}


@pytest.mark.slow
def test_greedy_text_is_that_of_the_eager_path_and_shapes_are_compiled_once(base, proxy):
    torch._dynamo.reset()  # which keeps the counts of what was compiled before
    compiled = torch._dynamo.utils.counters["stats"]
    before = compiled["unique_graphs"]
    kad = KADLogitsProcessor(proxy, DualDeferral(0.6), num_assistant_tokens=3, compile=True)
    eager = KADLogitsProcessor(proxy, DualDeferral(0.6), num_assistant_tokens=3)
    graphs = []
    for prompt, count in ((PROMPT, 40), (PROMPT[:, :5], 90), (PROMPT[:, 2:], 17)):
        settings = {"assistant_model": proxy, "do_sample": False, "max_new_tokens": count}
        expected = base.generate(prompt, logits_processor=[eager], **settings)
        assert torch.equal(base.generate(prompt, logits_processor=[kad], **settings), expected)
        assert kad.statistics.acceptance_histogram == eager.statistics.acceptance_histogram
        graphs.append(compiled["unique_graphs"] - before)
    assert graphs == [2, 2, 2]  # the proxy's step and the base's verification


@pytest.mark.parametrize(("base_architecture", "proxy_architecture"), [("llama", "gpt2"), ("gpt2", "qwen3")])
@pytest.mark.parametrize("settings", [{}, {"drafter": "prompt_lookup"}, {"num_assistant_tokens": 1}])
def test_static_caches_take_tokens_back(uncompiled, base_architecture, proxy_architecture, settings):
    base, proxy = tiny_model(base_architecture, hidden=32, seed=1), tiny_model(proxy_architecture, seed=2)
    kad = KADLogitsProcessor(proxy, DualDeferral(0.6), compile=True, **settings)
    eager = KADLogitsProcessor(proxy, DualDeferral(0.6), **settings)
    for prompt in (PROMPT, PROMPT.flip(1), PROMPT):
        ids, expected = (
            base.generate(prompt, assistant_model=proxy, logits_processor=[k], **GREEDY) for k in (kad, eager)
        )
        assert torch.equal(ids, expected)
        assert kad.statistics.acceptance_histogram == eager.statistics.acceptance_histogram
        assert kad.statistics.proxy_forwards == eager.statistics.proxy_forwards
        assert kad.statistics.base_forwards == eager.statistics.base_forwards


def test_forwards_have_one_shape_behind_the_prompt(base, proxy, monkeypatch):
    shapes = {base: [], proxy: []}

    def compiled(forward, **settings):
        def run(cache, ids):
            shapes[forward.model].append(tuple(ids.shape))
            return forward(cache, ids)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    kad = KADLogitsProcessor(proxy, DualDeferral(0.6), num_assistant_tokens=4, compile=True)
    base.generate(PROMPT, logits_processor=[kad], assistant_model=proxy, eos_token_id=7, pad_token_id=0, **GREEDY)
    assert set(shapes[base]) == {(1, 5)}
    assert set(shapes[proxy]) == {(1, 1)}


def test_a_context_that_ends_before_the_filling_does(uncompiled):
    base, proxy = (tiny_model("gpt2", hidden=32, seed=seed, n_positions=30) for seed in (1, 2))
    kad = KADLogitsProcessor(proxy, DualDeferral(0.6), num_assistant_tokens=5, compile=True)
    settings = {"do_sample": False, "max_new_tokens": 18}
    ids = base.generate(PROMPT, logits_processor=[kad], assistant_model=proxy, **settings)
    kad = KADLogitsProcessor(proxy, DualDeferral(0.6))
    assert torch.equal(ids, base.generate(PROMPT, logits_processor=[kad], **settings))


def test_the_cache_is_kept_for_texts_that_fit_and_grows_for_longer_ones(uncompiled, base, proxy):
    kad = KADLogitsProcessor(proxy, compile=True)
    settings = {"logits_processor": [kad], "assistant_model": proxy, "do_sample": False}
    caches, capacities = [], []
    for count in (5, 60, CAPACITY_STEP + 1):
        base.generate(PROMPT, max_new_tokens=count, **settings)
        compiled = kad.state.models.static_base(base, 6)
        caches.append(compiled._store)
        capacities.append(compiled.capacity)
    assert caches[0] is caches[1]
    assert capacities == [CAPACITY_STEP, CAPACITY_STEP, 2 * CAPACITY_STEP]


def test_a_reference_is_followed_eagerly(uncompiled, base, proxy):
    settings = {"reference": tiny_model(seed=9)}
    kad, eager = (KADLogitsProcessor(proxy, ImplicitReward(1.0), compile=on, **settings) for on in (True, False))
    ids = base.generate(PROMPT, logits_processor=[kad], assistant_model=proxy, **GREEDY)
    assert torch.equal(ids, base.generate(PROMPT, logits_processor=[eager], **GREEDY))


def test_what_cannot_be_compiled_is_refused(uncompiled, base, proxy):
    kad = KADLogitsProcessor(proxy, compile=True)
    settings = {"logits_processor": [kad], "assistant_model": proxy, **GREEDY}
    cache = base.generate(PROMPT, return_dict_in_generate=True, **GREEDY).past_key_values
    with pytest.raises(ValueError, match="a filled cache"):
        base.generate(PROMPT.repeat(1, 5), **{CACHE: cache}, **settings)
    with pytest.raises(ValueError, match='got num_assistant_tokens="auto"'):
        KADLogitsProcessor(proxy, compile=True, num_assistant_tokens="auto")
    assert "compile=True" in repr(kad)


def test_a_model_with_masks_of_its_own_takes_one_sequence(uncompiled, proxy):
    base = tiny_family("bloom")
    skip_if_bloom_is_not_static()
    kad = KADLogitsProcessor(proxy, compile=True)
    settings = {"logits_processor": [kad], "assistant_model": proxy, **GREEDY}
    row = {name: value[1:2] for name, value in padded(2).items()}
    expected = base.generate(**row, logits_processor=[KADLogitsProcessor(proxy)], **GREEDY)
    assert torch.equal(base.generate(**row, **settings), expected)
    with pytest.raises(ValueError, match=r"for a batch of 2 sequences, and the base BloomForCausalLM"):
        base.generate(PROMPT.repeat(2, 1), **settings)


@pytest.mark.parametrize("family", ["gpt_neo", "deepseek_v4"])
def test_attention_that_no_static_cache_can_serve_is_refused(uncompiled, family, proxy):
    kad = KADLogitsProcessor(proxy, compile=True)
    with pytest.raises(ValueError, match=r"that a static cache can serve, and the base .* Leave out `compile`"):
        tiny_family(family).generate(PROMPT, logits_processor=[kad], assistant_model=proxy, **GREEDY)


def test_attention_that_takes_no_mask_is_refused_for_windows(uncompiled, proxy):
    base = tiny_model("mistral", seed=3)
    base.config._attn_implementation = "flex_attention"
    kad = KADLogitsProcessor(proxy, compile=True)
    with pytest.raises(ValueError, match=r"`sdpa` or `eager` .* for sliding windows, and the base Mistral"):
        base.generate(PROMPT, logits_processor=[kad], assistant_model=proxy, **GREEDY)


def test_longrope_is_compiled_up_to_its_switch(uncompiled, proxy):
    base = tiny_family("phi3", **LONGROPE | {"original_max_position_embeddings": 40})
    base.config.rope_parameters["original_max_position_embeddings"] = 40
    kad = KADLogitsProcessor(proxy, num_assistant_tokens=3, compile=True)
    settings = {"assistant_model": proxy, "do_sample": False}
    expected = base.generate(PROMPT, logits_processor=[KADLogitsProcessor(proxy)], max_new_tokens=24, **settings)
    assert torch.equal(base.generate(PROMPT, logits_processor=[kad], max_new_tokens=24, **settings), expected)
    with pytest.raises(ValueError, match=r"more than 40 tokens .* got a limit of 37 tokens"):
        base.generate(PROMPT, logits_processor=[kad], max_new_tokens=25, **settings)


def test_the_compiled_model_is_the_model(uncompiled):
    model = tiny_model(seed=3)
    compiled = StaticCacheModel(model, "proxy", width=4)
    compiled.reserve(40)
    ids = torch.randint(0, 50, (1, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids).logits
    torch.testing.assert_close(
        compiled.logits(ids[:, :20], logits_to_keep=3), expected[:, 17:20], atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(
        compiled.extend(ids[:, 20:23], logits_to_keep=3), expected[:, 20:23], atol=1e-4, rtol=1e-4
    )
    compiled.take_back([2])
    assert compiled.cached_length == 21
    torch.testing.assert_close(
        compiled.extend(ids[:, 21:25], logits_to_keep=4), expected[:, 21:25], atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(compiled.logits(ids[:, :10], logits_to_keep=1), expected[:, 9:10], atol=1e-4, rtol=1e-4)


def last_logits(model, texts):
    """The logits behind each text, read alone and without a cache."""
    with torch.no_grad():
        return torch.stack([model(torch.tensor([text])).logits[0, -1] for text in texts])


@pytest.mark.parametrize("architecture", ["qwen3", "mistral"])
def test_rows_of_several_lengths_take_back_what_each_refuses(uncompiled, architecture):
    model = tiny_model(architecture, seed=3)
    compiled = StaticCacheModel(model, "proxy", width=4)
    compiled.reserve(40, 5)
    texts = [random_ids(1, length, seed=length)[0].tolist() for length in (9, 3, 12, 1, 6)]
    width = max(map(len, texts))
    ids = torch.tensor([[0] * (width - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])

    def check(logits):
        torch.testing.assert_close(logits, last_logits(model, texts), atol=1e-4, rtol=1e-4)

    check(compiled.logits(ids, mask)[:, -1])
    for turn, staying in enumerate(([0, 1, 2, 3, 4], [0, 2, 3, 4], [3, 1], [0], [0])):
        drafts = random_ids(len(texts), 3, seed=50 + turn)
        kept = [(row + turn) % 4 for row in range(len(texts))]
        compiled.extend(drafts)
        compiled.take_back([3 - count for count in kept])
        texts = [text + draft[:count].tolist() for text, draft, count in zip(texts, drafts, kept, strict=True)]
        texts = [texts[row] for row in staying]
        compiled.select_rows(staying)
        last = random_ids(len(texts), 1, seed=90 + turn)
        texts = [text + token.tolist() for text, token in zip(texts, last, strict=True)]
        check(compiled.extend(last)[:, -1])
        assert compiled.cached_length == min(map(len, texts))
    assert compiled.forwards == 11


def test_columns_without_tokens_are_left_out_and_long_pieces_are_read_in_several_forwards(uncompiled):
    model = tiny_model(seed=3)
    compiled = StaticCacheModel(model, "proxy", width=2)
    compiled.reserve(20, 2)
    texts = random_ids(2, 6, seed=1).tolist()
    compiled.logits(torch.tensor(texts))
    piece, mask = random_ids(2, 5, seed=2), torch.tensor([[0, 1, 1, 1, 1], [0, 0, 1, 0, 1]])
    logits = compiled.extend(piece, mask, logits_to_keep=3)
    for row, held in enumerate(texts):
        for column in (2, 3, 4):
            if mask[row, column]:
                read = piece[row, : column + 1][mask[row, : column + 1].bool()].tolist()
                expected = last_logits(model, [held + read])[0]
                torch.testing.assert_close(logits[row, column - 2], expected, atol=1e-4, rtol=1e-4)
    assert compiled._lengths == [10, 8]


def test_a_text_that_outgrows_the_cache_is_not_read_again(uncompiled):
    model = tiny_model(seed=3)
    compiled = StaticCacheModel(model, "proxy", width=4)
    compiled.reserve(20, 2)
    texts = random_ids(2, CAPACITY_STEP - 6, seed=1).tolist()
    compiled.logits(torch.tensor(texts))
    assert compiled.capacity == CAPACITY_STEP
    widths = []
    model.register_forward_pre_hook(  # `last_logits` passes the ids by place
        lambda model, args, inputs: widths.extend([inputs["input_ids"].shape[1]] if inputs else []), with_kwargs=True
    )
    for turn in range(3):
        new = random_ids(2, 3, seed=10 + turn)
        texts = [text + more.tolist() for text, more in zip(texts, new, strict=True)]
        logits = compiled.extend(new)[:, -1]
        torch.testing.assert_close(logits, last_logits(model, texts), atol=1e-4, rtol=1e-4)
    assert widths == [4, 4, 4]
    assert compiled.capacity == 2 * CAPACITY_STEP


def test_an_empty_prompt_is_refused(uncompiled):
    compiled = StaticCacheModel(tiny_model(seed=3), "proxy", width=4)
    with pytest.raises(ValueError, match="needs at least one token"):
        compiled.logits(torch.tensor([[5, 6], [0, 0]]), torch.tensor([[1, 1], [0, 0]]))


@pytest.mark.parametrize("name", ["activated LoRA", "SHADOW"])
def test_compiled_code_takes_no_adapter_that_changes_from_call_to_call(name: str) -> None:
    proxy, base = adapted(name), tiny_model(seed=1)
    kad = KADLogitsProcessor(proxy, num_assistant_tokens=2, compile=True)
    with pytest.raises(ValueError, match="leave out `compile`"):
        base.generate(input_ids=random_ids(1, 6), logits_processor=[kad], assistant_model=proxy, **GREEDY)
