"""What is asked of a configuration is not assumed to be there."""

from typing import Any

import pytest
import torch
from test_cached_model import random_ids
from tiny_models import tiny_model
from tiny_vision_models import IMAGE, VIDEO, tiny_vision_model
from transformers import CodeGenConfig, CodeGenForCausalLM, LlamaConfig, LlavaConfig, PreTrainedModel

from transformers_kad import DualDeferral, KADLogitsProcessor
from transformers_kad.models.cached_model import CachedModel
from transformers_kad.models.model_settings import (
    context_length,
    placeholder_ids,
    readable_ids,
    text_setting,
    vocabulary_size,
)

# What is read of configurations.
ASKED = ("eos_token_id", "max_position_embeddings", "pad_token_id", "tie_word_embeddings", "vocab_size")


def without_settings(model: PreTrainedModel) -> PreTrainedModel:
    """A model with a configuration of a class of its own, which has none of what is asked."""
    kept = {name: value for name, value in vars(model.config).items() if name not in ASKED}

    class Bare(type(model.config)):
        def __getattribute__(self, name: str) -> Any:
            if name in ASKED:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            return super().__getattribute__(name)

    bare = Bare.__new__(Bare)
    vars(bare).update(kept)
    model.config = bare
    return model


def tiny_codegen(seed: int) -> PreTrainedModel:
    """Its configuration has no `pad_token_id`."""
    sizes = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64}
    torch.manual_seed(seed)
    config = CodeGenConfig(**sizes, initializer_range=0.5, bos_token_id=None, eos_token_id=None)
    assert not hasattr(config, "pad_token_id")
    return CodeGenForCausalLM(config).eval()


def test_settings_of_parts_and_of_the_whole() -> None:
    config = LlavaConfig(text_config=LlamaConfig(vocab_size=50, max_position_embeddings=64, pad_token_id=7))
    config.only_at_the_top = 3
    assert text_setting(config, "vocab_size") == 50
    assert text_setting(config, "pad_token_id") == 7
    assert text_setting(config, "only_at_the_top") == 3
    assert text_setting(config, "nowhere") is None
    assert text_setting(config, "nowhere", 5) == 5


def test_placeholders_of_images_are_found_by_their_settings() -> None:
    assert placeholder_ids(tiny_vision_model("qwen3_vl")) == [IMAGE, VIDEO]
    assert placeholder_ids(tiny_vision_model("gemma3")) == [IMAGE]
    assert placeholder_ids(tiny_model()) == []


def test_a_context_is_known_where_the_configuration_says_so() -> None:
    model = tiny_model(max_position_embeddings=77)
    assert context_length(model) == 77
    for unlimited in (None, -1, 0):
        vars(model.config)["max_position_embeddings"] = unlimited
        assert context_length(model) is None


def test_a_configuration_that_says_nothing() -> None:
    model = without_settings(tiny_model(seed=2))
    assert [text_setting(model.config, name) for name in ASKED] == [None] * len(ASKED)
    assert context_length(model) is None
    assert vocabulary_size(model) == 50
    assert CachedModel(model).logits(torch.tensor([[1, 60]])).shape == (1, 1, 50)  # an id beyond the vocabulary


@pytest.mark.parametrize("role", ["base", "proxy"])
@pytest.mark.parametrize("kind", ["nothing asked", "codegen"])
def test_models_whose_configurations_lack_settings_serve_on_both_paths(kind: str, role: str) -> None:
    def lacking(seed: int) -> PreTrainedModel:
        return tiny_codegen(seed) if kind == "codegen" else without_settings(tiny_model(seed=seed))

    base = lacking(1) if role == "base" else tiny_model(seed=1)
    proxy = lacking(2) if role == "proxy" else tiny_model(seed=2)
    rule, text = DualDeferral(0.3), random_ids(1, 6)
    settings = {"logits_processor": [KADLogitsProcessor(proxy, rule)], "do_sample": False, "max_new_tokens": 8}
    ids = base.generate(text, **settings, pad_token_id=0)
    drafted = base.generate(text, **settings, pad_token_id=0, assistant_model=proxy)
    with torch.no_grad():
        for _ in range(8):
            probs = (model(text, use_cache=False).logits[:, -1].softmax(-1) for model in (base, proxy))
            text = torch.cat([text, rule(*probs).argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(ids, text)
    assert torch.equal(drafted, text)


def test_the_rows_of_an_embedding_are_known_while_deepspeed_keeps_it_empty() -> None:
    model = tiny_model()
    assert readable_ids(model) == 50
    weight = torch.nn.Parameter(torch.empty(0))
    weight.ds_shape = torch.Size([50, 16])
    model.get_input_embeddings().weight = weight
    assert readable_ids(model) == 50
    model.set_input_embeddings(torch.nn.Identity())  # as in all but the first process of a pipeline
    assert readable_ids(model) == 50
