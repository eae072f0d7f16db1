"""Models and tokenizers from folders, adapters included."""

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, TrainableTokensConfig, get_peft_model
from peft.tuners.lora import Linear
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, TorchAoConfig

from transformers_kad.integrations.loading.models import below_adapter, load_merged, load_model, load_tokenizer

PAIR = Path(__file__).resolve().parents[3] / "recipes" / "tiny_pair"


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


# --- Merging ------------------------------------------------------------------------------------------------

IDS = torch.arange(1, 20)[None]


def lora(**settings):
    return LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)


def save_adapter(folder, config, *, rows=None, save_embedding_layers=False, **model):
    """An adapter with random weights on a tiny model, in a folder each; the logits of both together."""
    tiny_model(**model).save_pretrained(folder / "below")
    below = AutoModelForCausalLM.from_pretrained(folder / "below")
    if rows is not None:
        below.resize_token_embeddings(rows)
    adapted = get_peft_model(below, copy.deepcopy(config))
    torch.manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.eval().save_pretrained(folder / "adapter", save_embedding_layers=save_embedding_layers)
    return logits(adapted, torch.arange(1, rows)[None] if rows else IDS)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


TIED = {"tie_word_embeddings": True}


@pytest.mark.parametrize(
    ("config", "model", "reason"),
    [
        (lora(target_modules=["q_proj", "lm_head"]), TIED, "embeddings that input and output share"),
        (lora(target_modules=["q_proj", "embed_tokens"]), TIED, "embeddings that input and output share"),
        (lora(target_modules=["embed_tokens"], ensure_weight_tying=True), TIED, "embeddings that input and output"),
        (lora(alora_invocation_tokens=[5, 6]), {}, "an activated LoRA acts only after its invocation tokens"),
        (lora(lora_bias=True), {}, "the base layer has no bias"),
        (
            PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
            {},
            "PREFIX_TUNING changes the model's input",
        ),
    ],
)
def test_what_merging_would_change_stays_unmerged_and_it_is_said(tmp_path, config, model, reason):
    wanted = save_adapter(tmp_path, config, **model)
    with pytest.warns(UserWarning, match=f"adapter '{tmp_path}/adapter' is not merged into its model: .*{reason}"):
        loaded = load_model(tmp_path / "adapter")
    assert isinstance(loaded, PeftModel)
    assert torch.equal(logits(loaded), wanted)
    with pytest.raises(ValueError, match=reason):
        load_merged(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("config", "model"),
    [
        (lora(), TIED),
        (lora(use_dora=True), {}),
        (lora(lora_bias=True), {"architecture": "gpt2"}),
        (lora(bias="all"), {"architecture": "gpt2"}),
        (lora(target_modules=["embed_tokens", "lm_head"]), {}),
        (lora(modules_to_save=["lm_head"]), TIED),
        (lora(modules_to_save=["embed_tokens", "lm_head"]), TIED),
        (lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True), TIED),
        (lora(trainable_token_indices=[3, 49]), TIED),
        (TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=[3, 49]), TIED),
    ],
)
def test_what_stays_the_same_is_merged(tmp_path, recwarn, config, model):
    wanted = save_adapter(tmp_path, config, **model)
    loaded = load_model(tmp_path / "adapter")
    assert not isinstance(loaded, PeftModel)
    torch.testing.assert_close(logits(loaded), wanted, atol=1e-4, rtol=1e-4)
    assert not [warning for warning in recwarn if "not merged" in str(warning.message)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merge_that_changed_the_model_is_thrown_away(tmp_path, monkeypatch, dtype):
    """Whatever goes wrong in a merge that nobody knows of, and whether or not it can be taken back."""
    save_adapter(tmp_path, lora(target_modules=["q_proj", "down_proj"]))
    right = Linear.get_delta_weight
    unmerged = load_model(tmp_path / "adapter", dtype=dtype, merge=False)
    assert load_model(tmp_path / "adapter", dtype=dtype).dtype == unmerged.dtype  # in bfloat16, rounding is no change

    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, adapter: 1.5 * right(self, adapter))
    with pytest.warns(
        UserWarning, match=r"is not merged .*: the merged model's logits .* differ by \d+\.\d% of their"
    ):
        loaded = load_model(tmp_path / "adapter", dtype=dtype)
    assert isinstance(loaded, PeftModel)
    assert torch.equal(logits(loaded), logits(unmerged))


def test_nothing_is_merged_into_quantized_weights(tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    settings = TorchAoConfig(quantization.Int8WeightOnlyConfig(set_inductor_config=False))
    save_adapter(tmp_path, lora())
    with pytest.warns(UserWarning, match="the model below it is quantized"):
        assert isinstance(load_model(tmp_path / "adapter", quantization_config=settings), PeftModel)


def test_an_adapter_on_an_adapter_that_cannot_be_merged_is_refused(tmp_path):
    """peft would leave out the weights of the upper one without an error."""
    save_adapter(tmp_path, lora(lora_bias=True))
    upper = get_peft_model(tiny_model(), lora())
    upper.peft_config["default"].base_model_name_or_path = "../adapter"
    upper.save_pretrained(tmp_path / "upper")
    with pytest.raises(ValueError, match=r"the adapter '.*/adapter' can't be merged .* the base layer has no bias"):
        load_model(tmp_path / "upper", merge=False)


# --- Tokens that were added before training -----------------------------------------------------------------


@pytest.mark.parametrize("model", [{}, TIED])
@pytest.mark.parametrize(
    ("config", "rows", "saved"),
    [
        (lora(), 53, True),
        (lora(), 45, True),  # padding rows were cut off
        (lora(modules_to_save=["embed_tokens", "lm_head"]), 53, False),
        (lora(target_modules=["embed_tokens", "lm_head"]), 53, True),
        (lora(trainable_token_indices=[50, 51, 52]), 53, True),
        (lora(trainable_token_indices={"embed_tokens": [50, 51, 52], "lm_head": [50, 51, 52]}), 53, False),
    ],
)
@pytest.mark.parametrize("merge", [True, False])
def test_adapters_bring_the_embeddings_of_added_tokens(tmp_path, config, rows, saved, model, merge):
    wanted = save_adapter(tmp_path, config, rows=rows, save_embedding_layers=saved, **model)
    loaded = load_model(tmp_path / "adapter", merge=merge)
    torch.testing.assert_close(logits(loaded, torch.arange(1, rows)[None]), wanted, atol=1e-4, rtol=1e-4)
    assert loaded.config.vocab_size == rows


@pytest.mark.parametrize(
    ("config", "model", "lacking"),
    [
        (lora(modules_to_save=["embed_tokens"]), {}, "lm_head"),
        (lora(modules_to_save=["embed_tokens"]), TIED, "lm_head"),
        (lora(trainable_token_indices=[50, 51, 52]), {}, "lm_head"),
        (lora(trainable_token_indices=[51, 52]), TIED, "model.embed_tokens, lm_head"),
    ],
)
def test_embeddings_that_no_file_holds_are_not_made_up(tmp_path, config, model, lacking):
    save_adapter(tmp_path, config, rows=53, **model)
    with pytest.raises(
        ValueError, match=f"with 53 tokens, the model '.*/below'.* has 50, .* of the others in {lacking}"
    ):
        load_model(tmp_path / "adapter")


def test_an_adapter_of_another_shape_is_named(tmp_path):
    save_adapter(tmp_path, lora())
    tiny_model(hidden=32).save_pretrained(tmp_path / "below")
    with pytest.raises(ValueError, match=r"'.*/adapter' was trained on a model of another shape than '.*/below'"):
        load_model(tmp_path / "adapter")
