"""The tiny models of the fuzz: a few of every kind of cache, built once per process, with random weights.

A proxy of the base's family has the base's weights with noise on them, so that about half of its drafts are accepted.
A proxy of another family has weights of its own: what is accepted then comes from the deferred mass.
"""

import functools

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_families import tiny_family
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 40
PADDING = 0
FIRST_CHARACTER = ord("a")
NOISE = 0.15  # of the proxy's weights, in standard deviations of the base's

FAMILIES = {
    "full": ("llama", "gpt2", "qwen3", "gpt_neox", "opt", "deepseek_v3"),
    "windows": ("mistral", "gemma3_text", "llama4_text", "cohere2", "olmo3", "phi3"),
    "states": ("mamba", "mamba2", "falcon_h1", "lfm2", "qwen3_next", "jamba", "minimax", "granitemoehybrid"),
}
NOT_IN_FLOAT64 = (
    "granitemoehybrid",
    "jamba",
    "minimax",
    "qwen3_next",
)  # their experts are multiplied in at most float32
IN_FLOAT32_INSIDE = ("falcon_h1", "mamba2")  # whatever the dtype of their weights is
WITHOUT_GIVEN_CACHE = ("mamba", "mamba2", "minimax")  # they take no `DynamicCache` from outside
# In transformers' own loop, a prompt behind a cache of theirs forgets the states, even without KAD.
FORGETTING_IN_PROMPTS = ("jamba",)
# Linear layers that an adapter is put on.
ADAPTED = {
    "llama": ["q_proj", "v_proj"],
    "qwen3": ["q_proj", "down_proj"],
    "mistral": ["v_proj"],
}


@functools.cache
def base_model(family: str, dtype: str) -> PreTrainedModel:
    """A base, with `VOCABULARY` tokens."""
    return tiny_family(family, seed=1, vocab_size=VOCABULARY).to(getattr(torch, dtype))


@functools.cache
def proxy_model(family: str, dtype: str, vocabulary: int, noisy: bool, adapted: bool) -> PreTrainedModel | PeftModel:
    """A proxy; `noisy` has the weights of the base of the family with noise, `adapted` two LoRA adapters."""
    model = tiny_family(family, seed=1 if noisy else 2, vocab_size=vocabulary)
    torch.manual_seed(3)
    if noisy:
        with torch.no_grad():
            for parameter in model.parameters():
                scale = NOISE * float(parameter.std()) if parameter.numel() > 1 else 0.0
                parameter.add_(scale * torch.randn(parameter.shape))
    if adapted:
        settings = {
            "r": 2,
            "init_lora_weights": False,
            "target_modules": ADAPTED[family],
        }
        model = get_peft_model(model, LoraConfig(**settings), adapter_name="first")
        model.add_adapter("second", LoraConfig(**settings))
    return model.eval().to(getattr(torch, dtype))


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One character for each id, for stop strings."""
    characters = {chr(FIRST_CHARACTER + token): token for token in range(VOCABULARY)}
    plain = Tokenizer(WordLevel(characters, unk_token="a"))
    plain.pre_tokenizer, plain.decoder = (
        pre_tokenizers.Split("", "isolated"),
        decoders.Fuse(),
    )
    return PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="a", pad_token="a")
