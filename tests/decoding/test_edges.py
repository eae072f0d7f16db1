"""A cache that is dropped, a context that ends, an unusual mask or device: texts stay right, or are refused."""

import itertools
import os
import sys
from pathlib import Path

import pytest
import torch
from run_command import run_command
from test_batches import padded
from test_forward_inputs import make
from tiny_models import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, MusicgenForCausalLM

from transformers_kad import DualDeferral, ImplicitReward, KADLogitsProcessor
from transformers_kad.models.cached_model import CachedModel

ROOT = Path(__file__).parents[2]
GREEDY = {"do_sample": False, "max_new_tokens": 24}


# --- Caches that can't take tokens back -----------------------------------------------------------------------


def layered(name, seed=2):
    """A proxy whose layers count tokens: in a window of 8, or in a recurrent state."""
    return tiny_model("mistral", seed=seed) if name == "window" else make("bamba")


@pytest.mark.parametrize("drafter", ["proxy", "prompt_lookup"])
@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("length", [3, 7, 12, 20])
@pytest.mark.parametrize("kind", ["window", "state"])
def test_drafts_that_such_a_cache_holds_are_right(base, kind, length, rows, drafter):
    """The texts are those of token by token, whether or not they outgrow the window."""
    proxy = layered(kind)
    kad = KADLogitsProcessor(proxy, DualDeferral(0.6), drafter=drafter, num_assistant_tokens=3)
    generator = torch.Generator().manual_seed(length)
    prompts = torch.randint(1, 50, (rows, (length + 1) // 2), generator=generator).repeat(1, 2)[:, :length]
    settings = {"logits_processor": [kad], **GREEDY}
    expected = base.generate(prompts, **settings)
    assert torch.equal(base.generate(prompts, assistant_model=proxy, **settings), expected)
    assert torch.equal(base.generate(prompts, **settings), expected)  # nothing is left of that call


@pytest.mark.parametrize("dropped", [False, True])
def test_rows_stay_what_they_keep_and_are_selected_whether_or_not_the_cache_is_there(dropped):
    """The kind of fault: what is noted of the texts must not depend on the cache."""
    model = tiny_model(seed=3)
    cached = CachedModel(model)
    texts = padded(3)["input_ids"].clamp(min=1)
    cached.logits(texts)
    draft = torch.tensor([[4, 5, 6], [7, 8, 9], [10, 11, 12]])
    cached.extend(draft, logits_to_keep=3)
    if dropped:
        cached._cache = None
    cached.take_back([1, 2, 0])
    cached.select_rows([2, 1])
    last = torch.tensor([[13], [14]])
    got = cached.extend(last)[:, -1]
    for place, (row, count) in enumerate([(2, 3), (1, 1)]):
        text = torch.cat([texts[row], draft[row, :count], last[place]])
        with torch.no_grad():
            torch.testing.assert_close(got[place], model(text[None]).logits[0, -1], atol=1e-4, rtol=1e-4)


def test_a_window_that_drops_its_cache_forgets_only_the_cache():
    model = tiny_model("mistral", seed=3)
    cached = CachedModel(model)
    text = torch.arange(1, 21)[None]
    cached.logits(text)
    cached.crop(18)
    assert cached.cached_length == 0
    got = cached.extend(torch.tensor([[30]]))[:, -1]
    with torch.no_grad():
        expected = model(torch.cat([text[:, :18], torch.tensor([[30]])], dim=1)).logits[:, -1]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


# --- The end of a context -------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("drafter", ["proxy", "prompt_lookup"])
@pytest.mark.parametrize("length", [10, 15, 16, 17, 24])
@pytest.mark.parametrize("rows", [1, 3])
def test_beyond_the_bases_context_drafts_go_on_as_token_by_token(uncompiled, length, rows, drafter, compiled):
    """Rotary positions go on beyond 16; only drafts that nobody reads may be read elsewhere."""
    base = tiny_model(hidden=32, seed=1, max_position_embeddings=16)
    kad = KADLogitsProcessor(tiny_model(seed=2), DualDeferral(0.6), drafter=drafter, compile=compiled)
    generator = torch.Generator().manual_seed(length)
    prompts = torch.randint(1, 50, (rows, length), generator=generator)
    settings = {"logits_processor": [kad], **GREEDY}
    expected = base.generate(prompts, **settings)
    kad.reset()
    assert torch.equal(base.generate(prompts, assistant_model=kad.proxy, **settings), expected)


@pytest.mark.parametrize("rows", [1, 3])
def test_with_padding_too(rows):
    base = tiny_model(hidden=32, seed=1, max_position_embeddings=16)
    kad = KADLogitsProcessor(tiny_model(seed=2), DualDeferral(0.6))
    settings = {"logits_processor": [kad], **GREEDY, **padded(rows)}
    expected = base.generate(**settings)
    assert torch.equal(base.generate(assistant_model=kad.proxy, **settings), expected)


@pytest.mark.parametrize("length", [12, 15, 16])
def test_learned_positions_end_in_both_ways_of_decoding_alike(length):
    """Up to the context's end the texts are equal, one token more is an error."""
    base = tiny_model("gpt2", hidden=32, seed=1, n_positions=16)
    kad = KADLogitsProcessor(tiny_model(seed=2), DualDeferral(0.6))
    prompts = torch.randint(1, 50, (2, length), generator=torch.Generator().manual_seed(1))
    settings = {"logits_processor": [kad], "do_sample": False}
    most = 16 - length + 1
    for assistant, count in itertools.product((None, kad.proxy), (most, most + 1)):
        kad.reset()
        if count == most:
            ids = base.generate(prompts, assistant_model=assistant, max_new_tokens=count, **settings)
            assert torch.equal(ids, base.generate(prompts, max_new_tokens=count, **settings))
        else:
            with pytest.raises(IndexError):
                base.generate(prompts, assistant_model=assistant, max_new_tokens=count, **settings)


# --- Masks, devices and modes that are not the usual ones -----------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_masks_of_any_type(architecture, speculative, dtype):
    base = tiny_model(architecture, hidden=32, seed=1)
    kad = KADLogitsProcessor(tiny_model(architecture, seed=2), DualDeferral(0.6))
    inputs = padded(3)
    settings = {"logits_processor": [kad], **GREEDY}
    settings |= {"assistant_model": kad.proxy} if speculative else {}
    expected = base.generate(**inputs, **settings)
    mask = inputs["attention_mask"].to(dtype)
    assert torch.equal(base.generate(inputs["input_ids"], attention_mask=mask, **settings), expected)
    with kad.proxy_prompt({"input_ids": inputs["input_ids"], "attention_mask": mask}):
        assert torch.equal(base.generate(**inputs, **settings), expected)


@pytest.mark.parametrize("kind", ["llama", "mistral", "bamba", "compiled"])
@pytest.mark.parametrize("speculative", [False, True])
def test_calls_within_and_outside_inference_mode_take_turns(uncompiled, base, kind, speculative):
    """The kind of fault: a tensor that one call leaves behind, and another may not write to."""
    if kind == "compiled" and not speculative:
        pytest.skip("compile=True is for drafts")
    proxy = make("bamba") if kind == "bamba" else tiny_model("llama" if kind == "compiled" else kind, seed=2)
    kad = KADLogitsProcessor(proxy, DualDeferral(0.6), compile=kind == "compiled")
    settings = {"logits_processor": [kad], "do_sample": False, "max_new_tokens": 10}
    settings |= {"assistant_model": proxy} if speculative else {}
    text = torch.tensor([[5, 9, 3, 7]])
    expected = []
    for _ in range(4):
        expected.append(base.generate(expected[-1] if expected else text, **settings))
    kad.reset()
    for turn, ids in enumerate(expected):
        with torch.inference_mode(turn % 2 == 0):
            assert torch.equal(base.generate(expected[turn - 1] if turn else text, **settings), ids)


DEFAULT_DEVICE = """
import sys
sys.path[:0] = ["tests", "tests/models", "tests/decoding"]
import torch
from test_batches import padded
from test_units import ALIGNMENT, make_base, make_proxy, prompts
from tiny_models import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers_kad import DualDeferral, ImplicitReward, KADLogitsProcessor, PrimalDeferral

base, proxy, reference = tiny_model(hidden=32, seed=1), tiny_model(seed=2), tiny_model(seed=9)
wide, letters = make_base(), make_proxy()
inputs, texts, draw = padded(3), prompts(2), {"do_sample": True, "top_k": 0, "max_new_tokens": 6}
calls = []
for settings in ({"do_sample": False, "max_new_tokens": 6}, draw):
    for drafts in ({}, {"assistant_model": proxy}):
        for rule in (DualDeferral(0.6), PrimalDeferral(0.9), ImplicitReward(1.0)):
            more = {"reference": reference} if rule.needs_reference else {}
            kad = KADLogitsProcessor(proxy, rule, trace=True, **more)
            calls.append((base, dict(**inputs, logits_processor=[kad], **settings, **drafts)))
    kad = KADLogitsProcessor(proxy, DualDeferral(0.6), drafter="prompt_lookup")
    calls.append((base, dict(**inputs, logits_processor=[kad], assistant_model=proxy, **settings)))
    kad = KADLogitsProcessor(proxy, DualDeferral(0.6), num_assistant_tokens="auto")
    calls.append((base, dict(**inputs, logits_processor=[kad], assistant_model=proxy, **settings)))
    for drafter in ("proxy", "prompt_lookup"):
        kad = KADLogitsProcessor(letters, DualDeferral(0.6), drafter=drafter, vocabulary_alignment=ALIGNMENT)
        calls.append((wide, dict(inputs=texts, logits_processor=[kad], assistant_model=letters, **settings)))
calls.append((base, dict(**inputs, logits_processor=[KADLogitsProcessor(proxy, lazy=True)], **draw)))


def run(settings):
    torch.manual_seed(0)
    return settings[0].generate(**settings[1])


automatic = [call[1]["logits_processor"][0].num_assistant_tokens == "auto" and call[1]["do_sample"] for call in calls]
expected = [run(call) for call in calls]
torch.set_default_device("meta")
for call, ids, by_time in zip(calls, expected, automatic):
    got = run(call)
    assert by_time or torch.equal(got, ids), call
print("same texts")
"""


@pytest.mark.slow
def test_a_default_device_that_is_not_that_of_the_models():
    """Every tensor that is made says where: on the device `meta`, one that does not has no values.

    Without beams, whose own code in transformers does not work there.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = run_command([sys.executable, "-c", DEFAULT_DEVICE], cwd=ROOT, env=environment)
    assert run.stdout == "same texts\n", run.stderr[-3000:]


def of_type(model_type, **settings):
    sizes = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "pad_token_id": 0}
    config = AutoConfig.for_model(model_type, **sizes, hidden_size=32, num_hidden_layers=2, **settings)
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("model_type", ["openai-gpt", "codegen", "xlm"])
def test_bases_that_read_their_whole_text_again_or_have_no_padding_id(proxy, model_type):
    base = of_type(model_type, **({"rotary_dim": 4} if model_type == "codegen" else {}), num_attention_heads=4)
    kad = KADLogitsProcessor(proxy, DualDeferral(0.3))
    settings = {"logits_processor": [kad], "pad_token_id": 0, **GREEDY, **padded(3)}
    expected = base.generate(**settings)
    assert torch.equal(base.generate(assistant_model=proxy, **settings), expected)


def test_models_without_a_padding_id_of_their_own_as_proxy(base):
    kad = KADLogitsProcessor(of_type("codegen", rotary_dim=4), DualDeferral(0.3))
    settings = {"logits_processor": [kad], **GREEDY, **padded(3)}
    expected = base.generate(**settings)
    assert torch.equal(base.generate(assistant_model=kad.proxy, **settings), expected)


def test_a_proxy_without_a_cache_reads_its_text_again_and_says_so(base):
    kad = KADLogitsProcessor(of_type("rwkv", attention_hidden_size=32), DualDeferral(0.3))
    settings = {"logits_processor": [kad], **GREEDY}
    with pytest.warns(UserWarning, match="returned no `Cache` .* reads the whole text again for every token"):
        expected = base.generate(torch.tensor([[3, 4]]), **settings)
    assert torch.equal(base.generate(torch.tensor([[3, 4]]), assistant_model=kad.proxy, **settings), expected)


def test_a_base_that_reads_in_both_directions_verifies_no_drafts(proxy):
    base = of_type("bert", num_attention_heads=4, intermediate_size=64)
    settings = {"logits_processor": [KADLogitsProcessor(proxy)], "pad_token_id": 0, **GREEDY}
    base.generate(torch.tensor([[3, 4]]), **settings)
    with pytest.raises(ValueError, match="reads in both directions"):
        base.generate(torch.tensor([[3, 4]]), assistant_model=proxy, **settings)


def test_a_proxy_of_audio_codes_is_refused():
    sizes = {"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 16}
    config = AutoConfig.for_model("musicgen_decoder", num_codebooks=2, pad_token_id=0, bos_token_id=0, **sizes)
    with pytest.raises(TypeError, match="model of text with one table of embeddings, got MusicgenForCausalLM"):
        KADLogitsProcessor(MusicgenForCausalLM(config))


def test_a_proxy_without_generate_is_refused():
    with pytest.raises(TypeError, match="must be a causal LM"):
        KADLogitsProcessor(tiny_model(seed=2).model)


def test_references_are_followed_like_proxies(base):
    """A reference with a window, behind a text that is longer."""
    proxy, reference = tiny_model("mistral", seed=2), tiny_model("mistral", seed=4)
    kad = KADLogitsProcessor(proxy, ImplicitReward(0.5), reference=reference, num_assistant_tokens=3)
    text = torch.randint(1, 50, (1, 20), generator=torch.Generator().manual_seed(1))
    settings = {"logits_processor": [kad], **GREEDY}
    expected = base.generate(text, **settings)
    assert torch.equal(base.generate(text, assistant_model=proxy, **settings), expected)
