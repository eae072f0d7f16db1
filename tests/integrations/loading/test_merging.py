"""Merging: the difference that decides, the reasons against it, and tokens that were trained one by one."""

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, TrainableTokensConfig, get_peft_model
from tiny_models import tiny_model

from transformers_kad.integrations.loading.merging import (
    merge_and_compare,
    reason_not_to_merge,
    relative_difference,
    trained_tokens,
)


def adapted(**settings):
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)
    return get_peft_model(tiny_model(hidden=16, seed=3), config).eval()


def test_the_difference_is_that_of_the_position_that_changed_most():
    before = torch.tensor([[0.0, 2.0], [0.0, 4.0]])
    after = torch.tensor([[0.0, 3.0], [0.0, 5.0]])  # spreads of 1 and 2, both changed by 0.5
    assert relative_difference(before, after) == pytest.approx(0.5)
    assert relative_difference(before, before + 7) == 0


def test_a_plain_adapter_is_merged_into_the_same_model():
    model = adapted(target_modules=["q_proj"])
    assert reason_not_to_merge(model) is None
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        merged, reason = merge_and_compare(model)
        after = merged(input_ids=ids).logits
    assert reason is None
    assert not hasattr(merged, "peft_config")
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


def test_a_merged_model_that_differs_is_found(monkeypatch):
    model = adapted(target_modules=["q_proj"])

    def without_the_adapter():
        return model.unload()

    monkeypatch.setattr(model, "merge_and_unload", without_the_adapter)
    _, reason = merge_and_compare(model)
    assert "the merged model's logits on a short text differ by" in reason


def test_prompts_cannot_be_merged():
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    reason = reason_not_to_merge(get_peft_model(tiny_model(hidden=16, seed=3), config))
    assert reason == "PROMPT_TUNING changes the model's input, not its weights"


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        (LoraConfig(), {}),
        (LoraConfig(trainable_token_indices=[4, 5]), {None: [4, 5]}),
        (LoraConfig(trainable_token_indices={"embed_tokens": [4]}), {"embed_tokens": [4]}),
        (TrainableTokensConfig(token_indices=[6]), {None: [6]}),
    ],
)
def test_tokens_that_were_trained_one_by_one(config, tokens):
    assert trained_tokens(config) == tokens
