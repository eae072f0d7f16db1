"""Inflated models: the same logits, the parameters that were asked for."""

import pytest
import torch
from tiny_models import tiny_model

from transformers_kad.recipes.benchmarking.inflate import InertWidth, inflate, parse_by_model, parse_count

IDS = torch.tensor([[3, 14, 15, 9, 26, 5], [35, 8, 9, 7, 9, 3]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral"])
def test_logits_stay_and_parameters_come(architecture, dtype):
    model = tiny_model(architecture).to(dtype)
    with torch.no_grad():
        before = model(IDS).logits
        assert inflate(model, 1_000_000) is model
        assert torch.equal(model(IDS).logits, before)
    assert model.num_parameters() == pytest.approx(1_000_000, rel=0.02)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert not model.training


def test_the_width_is_used_and_generation_goes_on_as_before():
    model, settings = tiny_model(hidden=32), {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    text = model.generate(IDS, **settings)
    wide = inflate(model, 300_000).model.layers[0].mlp
    assert isinstance(wide, InertWidth)
    assert wide.gate_proj.weight.std() > 0.01
    assert wide.up_proj.weight.std() > 0.01
    assert torch.equal(model.generate(IDS, **settings), text)
    with torch.no_grad():
        wide.down_proj.weight.fill_(0.1)  # what is inert is only this
        assert (model(IDS).logits - tiny_model(hidden=32)(IDS).logits).abs().max() > 0.1


def test_what_cannot_be_inflated_is_refused():
    with pytest.raises(ValueError, match="GPT2LMHeadModel has none"):
        inflate(tiny_model("gpt2"), 10**6)
    model = tiny_model()
    with pytest.raises(ValueError, match=f"{model.num_parameters():,} parameters, and can't be inflated to 100"):
        inflate(model, 100)


def test_numbers_of_parameters():
    assert [parse_count(text) for text in ("300M", "1.7b", "640k", "12")] == [3 * 10**8, 17 * 10**8, 640_000, 12]
    for text in ("", "M", "3 hundred", "-3M", "1e9"):
        with pytest.raises(ValueError, match=f"got {text!r}"):
            parse_count(text)


def test_what_is_said_of_both_models():
    assert parse_by_model("proxy=a/b", "--x") == {"proxy": "a/b"}
    assert parse_by_model(None, "--x") == {}
    for text in ("300M", "base=", "base=1,base=2", "bass=1", "base=1,,proxy=2"):
        with pytest.raises(ValueError, match="--x is written as base="):
            parse_by_model(text, "--x")
