"""Tiny random models with spread-out distributions. Nothing is downloaded."""

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

ARCHITECTURES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 8}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 8}),
    "gpt2": (GPT2LMHeadModel, GPT2Config, {}),
}


def tiny_model(
    architecture: str = "llama", *, vocabulary: int = 50, hidden: int = 16, seed: int = 0, **settings: object
) -> PreTrainedModel:
    """A random causal LM. Its initial weights are large, so that its distributions are far from uniform."""
    model_class, config_class, defaults = ARCHITECTURES[architecture]
    if architecture == "gpt2":
        sizes = {"n_embd": hidden, "n_layer": 2, "n_head": 2, "n_positions": 512}
    else:
        sizes = {
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
        }
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    torch.manual_seed(seed)
    config = config_class(
        **{"vocab_size": vocabulary, "initializer_range": 0.5, **sizes, **special, **defaults, **settings}
    )
    model = model_class(config).eval()
    model.generation_config.pad_token_id = 0
    return model
