"""Errors that name a model."""

import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model

from transformers_kad.models.model_errors import (
    UnusableLogitsError,
    describe,
    is_unusable,
    source_of,
    unusable_logits_error,
)


def test_unusable_logits():
    inf, nan = float("inf"), float("nan")
    rows = torch.tensor([[0.0, -inf], [-inf, -inf], [inf, 0.0], [nan, 0.0], [0.0, nan], [-1e30, -inf]])
    assert is_unusable(rows).tolist() == [False, True, True, True, True, False]


def test_a_model_is_called_by_its_class_and_its_source():
    model = tiny_model()
    assert describe(model) == "LlamaForCausalLM (unnamed)"
    model.config._name_or_path = "org/name"
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    assert (source_of(adapted), describe(adapted)) == ("org/name", "PeftModelForCausalLM (org/name)")


def test_the_error_says_which_model_and_where():
    error = unusable_logits_error("proxy", tiny_model(), 7, 2)
    assert isinstance(error, UnusableLogitsError)
    assert "the proxy LlamaForCausalLM (unnamed) for position 7 of sequence 2" in str(error)
    assert "the base for position 7 of sequence 0" in str(unusable_logits_error("base", None, 7))
