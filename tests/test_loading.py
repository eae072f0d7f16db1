"""Models and tokenizers from folders, adapters included."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from transformers_kad.loading import below_adapter, load_model, load_tokenizer

PAIR = Path(__file__).resolve().parents[1] / "recipes" / "tiny_pair"


def test_adapters_find_their_model_beside_them_or_by_name(tmp_path):
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    below = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes))
    below.save_pretrained(tmp_path / "below")
    assert below_adapter(str(tmp_path / "below")) is None
    adapted = get_peft_model(
        LlamaForCausalLM.from_pretrained(tmp_path / "below"),
        LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False),
    ).eval()
    ids = torch.tensor([[1, 2, 3]])
    for name in ("../below", str(tmp_path / "below")):
        adapted.peft_config["default"].base_model_name_or_path = name
        adapted.save_pretrained(tmp_path / "adapter")
        assert below_adapter(str(tmp_path / "adapter")) == str(tmp_path / "below")
        loaded = load_model(str(tmp_path / "adapter"))
        assert isinstance(loaded, LlamaForCausalLM)  # merged
        assert not loaded.training
        with torch.no_grad():
            torch.testing.assert_close(loaded(ids).logits, adapted(ids).logits, atol=1e-5, rtol=1e-4)
        assert load_model(str(tmp_path / "adapter"), dtype="bfloat16").dtype == torch.bfloat16
        unmerged = load_model(str(tmp_path / "adapter"), merge=False)
        assert isinstance(unmerged, PeftModel)
        assert not unmerged.training
        with torch.no_grad():
            torch.testing.assert_close(unmerged(ids).logits, adapted(ids).logits)


def test_an_adapter_without_tokenizer_uses_its_model_s(tmp_path):
    below = tmp_path / "below"
    AutoTokenizer.from_pretrained(PAIR / "base", padding_side="right").save_pretrained(below)
    model = LlamaForCausalLM.from_pretrained(PAIR / "reference")
    model.save_pretrained(below)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM"))
    adapted.peft_config["default"].base_model_name_or_path = str(below)
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer = load_tokenizer(tmp_path / "adapter")
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(PAIR / "base").get_vocab()
    assert tokenizer.padding_side == "left"


def test_a_folder_without_tokenizer_says_so(tmp_path):
    LlamaForCausalLM.from_pretrained(PAIR / "reference").save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=f"No tokenizer could be loaded from '{tmp_path}/model'"):
        load_tokenizer(tmp_path / "model")
