"""Tiny random models of every causal language model family that transformers knows by name. Nothing is downloaded."""

import dataclasses
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    DynamicCache,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

VOCABULARY = 96
HIDDEN = 32
LOGITS_STD = 3.0

# Values of the settings that families have in common; a family's configuration takes those that it has.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "unpadded_vocab_size": VOCABULARY,
    "pad_token_id": None,
    "eos_token_id": None,
    "bos_token_id": None,
    "sep_token_id": None,
    "is_decoder": True,
    "hidden_size": HIDDEN,
    "d_model": HIDDEN,
    "n_embd": HIDDEN,
    "dim_model": HIDDEN,
    "embedding_size": HIDDEN,
    "input_embedding_size": HIDDEN,
    "output_embedding_size": HIDDEN,
    "word_embed_proj_dim": HIDDEN,
    "emb_dim": HIDDEN,
    "lru_width": HIDDEN,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "decoder_layers": 2,
    "encoder_layers": 1,
    "num_decoder_layers": 2,
    "num_blocks": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "num_encoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "d_ff": 48,
    "d_inner": 48,
    "n_inner": 48,
    "dim_ff": 48,
    "dff": 48,
    "ffn_hidden_size": 48,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "moe_intermediate_size": 16,
    "expert_ffn_hidden_size": 16,
    "shared_expert_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "max_position_embeddings": 512,
    "n_positions": 512,
    "max_target_positions": 512,
    "max_source_positions": 64,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
    "state_size": 8,
    "time_step_rank": 4,
    "mamba_dt_rank": 4,
    "chunk_size": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "rotary_dim": 4,
    "type_vocab_size": 2,
    "initializer_range": 0.3,
    "init_std": 0.3,
    "use_cache": True,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
    "dropout": 0.0,
    "hidden_dropout": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0,
    "use_mamba_kernels": False,
    "image_size": 32,
    "patch_size": 16,
}
NOT_SURVEYED = {
    "gemma3n": "its image encoder needs timm, which is not installed; its text model is gemma3n_text",
    "gemma4_assistant": "reads the keys and values of a Gemma 4, and is no model by itself",
    "gemma4_unified_assistant": "reads the keys and values of a Gemma 4, and is no model by itself",
    "musicgen": "writes audio codes, and its `generate` takes no text",
    "musicgen_melody": "writes audio codes, and its `generate` takes no text",
}
WINDOWS_BESIDE_THE_CACHE = ("gpt_neo", "recurrent_gemma")
WINDOWS = (
    "sliding_window",
    "sliding_window_size",
    "attention_chunk_size",
    "window_size",
    "local_attention",
    "attention_window_size",
)


def sizes_of(config_class: type[PreTrainedConfig], window: int) -> dict[str, Any]:
    """The common settings that a configuration has, also in the configurations within it."""
    names = {field.name for field in dataclasses.fields(config_class)}
    sizes = {name: value for name, value in SIZES.items() if name in names}
    sizes |= {name: window for name in WINDOWS if name in names}
    for name, part in config_class.sub_configs.items():
        if isinstance(part, type) and dataclasses.is_dataclass(part):
            sizes[name] = sizes_of(part, window)
    return sizes


def part(family: str, **changes: Any) -> dict[str, Any]:
    """The settings of a text model within one that can have several kinds of it."""
    return {"model_type": family} | sizes_of(CONFIG_MAPPING[family], 8) | changes


# What a family needs besides: sizes that its own checks ask for, and layers of every kind that it has.
SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
ENCODER_DECODER = {"encoder_layers": 2}
ROBERTA = {"pad_token_id": 0, "max_position_embeddings": 520}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16}
LATENT = {"num_key_value_heads": 4}
VISION = {"num_hidden_layers": 1, "depth": 1, "num_layers": 1, "pad_token_id": 0}
QWEN3_5 = {"text_config": LINEAR, "vision_config": VISION}
GEMMA3N = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "activation_sparsity_pattern": [0.0] * 4,
    "laurel_rank": 8,
    "altup_num_inputs": 2,
}
QWEN4 = {
    "layer_types": ["linear_attention", "indexed_attention"],
    "hc_count": 2,
    "hc_lowrank": 8,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
INKLING = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "layer_types": ["hybrid_sliding", "hybrid"],
    "d_rel": 4,
    "rel_extent": 64,
}
PARTS = {"num_hidden_layers": 1}
OVERRIDES: dict[str, dict[str, Any]] = {
    "afmoe": SLIDING,
    "axk1": LATENT,
    "axk2": LATENT,
    "bailing_hybrid": LATENT | LINEAR | {"kda_lower_bound": -0.3},
    "bamba": MAMBA2 | {"attn_layer_indices": [1]},
    "bart": ENCODER_DECODER,
    "bigbird_pegasus": ENCODER_DECODER,
    "blenderbot": ENCODER_DECODER,
    "blenderbot-small": ENCODER_DECODER,
    "blt": {
        "num_hidden_layers": 1,
        "encoder_hash_byte_group_vocab": 64,
        "patcher_config": PARTS,
        "encoder_config": PARTS | {"hidden_size_global": 32},
        "decoder_config": PARTS | {"hidden_size_global": 32},
        "global_config": PARTS,
    },
    "camembert": ROBERTA,
    "cohere2": SLIDING,
    "cohere2_moe": SLIDING,
    "cohere_compass_text": SLIDING
    | {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
            for kind in SLIDING["layer_types"]
        }
    },
    "cwm": SLIDING | {"bos_token_id": 0},
    "data2vec-text": ROBERTA,
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT,
    "deepseek_v4": {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "heavily_compressed_attention", "compressed_sparse_attention"],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "num_key_value_heads": 1,
        "o_lora_rank": 8,
        "o_groups": 2,
        "index_topk": 4,
    },
    "doge": {"num_experts": 4},
    "dots1": SLIDING | {"n_shared_experts": 1},
    "dots3_note": {
        "text_config": LATENT,
        "vision_config": {"num_hidden_layers": 1, "per_layer_config": {}, "adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": VISION | {"adapter_out_dim": 32, "adapter_input_size": 32, "downsample_hidden_size": 8},
    },
    "dots3_note_text": LATENT,
    "fuyu": {"text_config": part("persimmon"), "patch_size": 4},
    "got_ocr2": {
        "text_config": part("qwen2"),
        "vision_config": {"num_hidden_layers": 1, "mlp_dim": 32, "output_channels": 8, "global_attn_indexes": [0]},
    },
    "emu3": {"text_config": {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}},
    "exaone4": SLIDING,
    "exaone_moe": SLIDING,
    "falcon_h1": MAMBA2 | {"mamba_d_ssm": 64},
    "gemma3": {"text_config": SLIDING, "vision_config": part("siglip_vision_model", num_hidden_layers=1)},
    "gemma3_text": SLIDING,
    "gemma3n_text": GEMMA3N,
    "gemma4": {"text_config": {"pad_token_id": 0}, "vision_config": VISION, "audio_config": VISION},
    "gemma4_unified": {
        "text_config": {"pad_token_id": 0},
        "vision_config": {"mm_embed_dim": 32, "mm_posemb_size": 16},
        "audio_config": VISION,
    },
    "gemma4_text": {"global_head_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT | {"index_topk": 8},
    "granitemoehybrid": MAMBA2 | LINEAR,
    "inkling_text": INKLING | {"logits_mup_width_multiplier": 1.0},
    "inkling2_text": INKLING,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": LATENT | LINEAR | {"linear_head_dim": 8, "linear_num_heads": 4, "q_lora_rank": None},
    "kolibri1": SLIDING,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"num_hidden_layers": 3, "layer_types": ["conv", "sliding_attention", "full_attention"]},
    "llama4": {"text_config": {"layer_types": ["chunked_attention", "full_attention"]}, "vision_config": VISION},
    "llama4_text": {"layer_types": ["chunked_attention", "full_attention"]},
    "longcat_flash": LATENT | {"zero_expert_num": 2},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "marian": ENCODER_DECODER,
    "mbart": ENCODER_DECODER,
    "minicpm3": LATENT,
    "ministral": SLIDING,
    "minimax": {"layer_types": ["full_attention", "linear_attention"], "block_size": 8},
    "mllama": {
        "text_config": {"bos_token_id": 0, "pad_token_id": 0, "cross_attention_layers": [1]},
        "vision_config": VISION,
    },
    "modernbert-decoder": SLIDING
    | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
    "moss_transcribe_diarize": {"text_config": part("qwen3"), "audio_config": VISION},
    "moshi": {"audio_vocab_size": 16},
    "mvp": ENCODER_DECODER,
    "nemotron_h": {
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 1,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
    },
    "olmo3": SLIDING,
    "pegasus": ENCODER_DECODER,
    "phi4_multimodal": {
        "vision_config": VISION,
        "audio_config": {
            "num_blocks": 1,
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
            "nemo_conv_channels": 32,
            "input_size": 16,
        },
    },
    "plbart": ENCODER_DECODER,
    "prophetnet": {"pad_token_id": 0},
    "qwen3_5": QWEN3_5,
    "qwen3_5_moe": QWEN3_5,
    "qwen3_5_moe_text": LINEAR,
    "qwen3_5_text": LINEAR,
    "qwen3_next": LINEAR,
    "qwen4_exp": {"text_config": QWEN4, "vision_config": VISION},
    "qwen4_exp_text": QWEN4,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "axial_pos_embds_dim": (8, 24),
        "axial_pos_shape": (16, 32),
        "attn_layers": ["local", "local"],
        "attention_head_size": 8,
    },
    "roberta": ROBERTA,
    "roberta-prelayernorm": ROBERTA,
    "roc_bert": {
        "pronunciation_vocab_size": 96,
        "shape_vocab_size": 96,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "xlm": {"use_lang_emb": False, "pad_token_id": 0, "pad_index": 0},
    "xlm-roberta": ROBERTA,
    "xlm-roberta-xl": ROBERTA,
    "xlstm": {"hidden_size": 128, "head_dim": None},
    "xmod": ROBERTA | {"default_language": "en_XX"},
    "youtu": LATENT,
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "adapter_rank": 8,
    },
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding"], "router_hidden_size": 8},
}


def merged(sizes: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Settings with some of them replaced, also within parts."""
    result = dict(sizes)
    for name, value in changes.items():
        is_part = isinstance(value, dict) and isinstance(result.get(name), dict)
        result[name] = merged(result[name], value) if is_part else value
    return result


def tiny_config(family: str, *, window: int = 8, **changes: Any) -> PreTrainedConfig:
    """The configuration of a tiny model of a family; see `tiny_family`."""
    config_class = CONFIG_MAPPING[family]
    settings = merged(sizes_of(config_class, window), OVERRIDES.get(family, {}))
    config = config_class(**merged(settings, changes))
    is_text_model = MODEL_FOR_CAUSAL_LM_MAPPING[config_class].config_class is not config_class
    return config.get_text_config(decoder=True) if is_text_model else config


def tiny_family(family: str, *, window: int = 8, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random causal LM of a family, in float32.

    Args:
        family: a model type of `MODEL_FOR_CAUSAL_LM_MAPPING_NAMES`.
        window: tokens in sliding windows and chunks.
        seed: of the weights.
        changes: further settings of its configuration.
    """
    torch.manual_seed(seed)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[family]]
    model = model_class._from_config(tiny_config(family, window=window, **changes)).eval()
    lengthen_memory(model)
    sharpen(model, changes.get("vocab_size", VOCABULARY))
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model


def has_windows(family: str) -> bool:
    """Whether some layers of a family's tiny model attend to a window or a chunk of the text only."""
    config = tiny_config(family).get_text_config(decoder=True)
    if family in WINDOWS_BESIDE_THE_CACHE:
        return True
    try:
        layers = DynamicCache(config=config).layers
    except (AttributeError, ValueError, KeyError):  # a family with a cache of its own
        return False
    return any(getattr(layer, "is_sliding", False) for layer in layers)


@torch.no_grad()
def lengthen_memory(model: PreTrainedModel) -> None:
    """Let recurrent states decay slowly, so that a wrong one changes the text."""
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            parameter.fill_(-2.0)
        elif name.endswith("dt_bias"):
            parameter.fill_(0.0)


@torch.no_grad()
def sharpen(model: PreTrainedModel, vocabulary: int) -> None:
    """Scale the output embeddings, so that the logits spread as `LOGITS_STD` says and rounding decides no token."""
    head = model.get_output_embeddings()
    if head is None or head.weight is model.get_input_embeddings().weight:
        return
    ids = torch.randint(3, vocabulary, (4, 16), generator=torch.Generator().manual_seed(0))
    scale = LOGITS_STD / model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.std()
    head.weight.mul_(scale)
    if getattr(head, "bias", None) is not None:
        head.bias.mul_(scale)
