"""Tiny random vision-language models, and prompts with images for them. Nothing is downloaded."""

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
    MllamaConfig,
    MllamaForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

VOCABULARY = 60
IMAGE, BEGIN, END, VIDEO = 50, 51, 52, 53  # the ids that a prompt with images has
IMAGE_TOKENS = 4  # placeholders of an image
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
VISION = {"hidden_size": 16, "intermediate_size": 32, "patch_size": 4, "initializer_range": 0.4}


def _qwen() -> PreTrainedModel:
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config={
            **VISION,
            "depth": 2,
            "num_heads": 2,
            "spatial_merge_size": 2,
            "temporal_patch_size": 1,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=BEGIN,
        vision_end_token_id=END,
    )
    return Qwen3VLForConditionalGeneration(config)


def _siglip(**settings: int) -> dict[str, object]:
    return {**VISION, "num_hidden_layers": 1, "num_attention_heads": 2, **settings}


def _gemma() -> PreTrainedModel:
    config = Gemma3Config(
        text_config={**TEXT, "sliding_window": 64},
        vision_config=_siglip(image_size=16),
        mm_tokens_per_image=IMAGE_TOKENS,
        image_token_id=IMAGE,
        boi_token_id=BEGIN,
        eoi_token_id=END,
        tie_word_embeddings=False,  # tied, it would repeat its last token
        initializer_range=TEXT["initializer_range"],
    )
    return Gemma3ForConditionalGeneration(config)


def _paligemma() -> PreTrainedModel:
    """It reads a prompt in both directions, where the token types say so."""
    config = PaliGemmaConfig(
        text_config={**TEXT, "model_type": "gemma"},
        vision_config=_siglip(image_size=8, num_image_tokens=IMAGE_TOKENS, projection_dim=32),
        image_token_id=IMAGE,
        projection_dim=32,
        hidden_size=32,
    )
    return PaliGemmaForConditionalGeneration(config)


def _mllama() -> PreTrainedModel:
    """It attends to images in layers of their own, where the cache holds the image instead of the text."""
    text = {name: value for name, value in TEXT.items() if name not in ("bos_token_id", "eos_token_id")}
    config = MllamaConfig(
        text_config={
            **text,
            "num_hidden_layers": 4,
            "cross_attention_layers": [1],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
            "max_num_tiles": 1,
            "vision_output_dim": 32,
            "intermediate_layers_indices": [0],
            "supported_aspect_ratios": [[1, 1]],
            "initializer_range": 0.4,
        },
        image_token_index=IMAGE,
    )
    model = MllamaForConditionalGeneration(config)
    for parameter in model.parameters():
        if parameter.numel() == 1:  # the gates of what the images add, which are closed before training
            parameter.data.fill_(1.0)
    return model


KINDS = {"mllama": _mllama, "qwen3_vl": _qwen, "gemma3": _gemma, "paligemma": _paligemma}
IMAGE_SIZE = {"gemma3": 16, "paligemma": 8}


def tiny_vision_model(kind: str, seed: int = 0) -> PreTrainedModel:
    """A random vision-language model that never says the id of a placeholder or of what surrounds it."""
    torch.manual_seed(seed)
    model = KINDS[kind]().eval()
    model.generation_config = GenerationConfig(pad_token_id=0, suppress_tokens=[IMAGE, BEGIN, END, VIDEO])
    return model


def prompts(kind: str, images: list[int | None], length: int = 12, seed: int = 5) -> dict[str, torch.Tensor]:
    """What a processor returns for prompts, each with an image at a place of it or None, padded on the left.

    Row i has i tokens of padding.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, IMAGE, (len(images), length), generator=generator)
    mask = torch.ones_like(ids)
    for row, at in enumerate(images):
        if at is not None:
            ids[row, at], ids[row, at + 1 + IMAGE_TOKENS] = BEGIN, END
            ids[row, at + 1 : at + 1 + IMAGE_TOKENS] = IMAGE
        ids[row, :row], mask[row, :row] = 0, 0
    is_image = (ids == IMAGE).long()
    types = {
        "qwen3_vl": {"mm_token_type_ids": is_image},
        "gemma3": {"token_type_ids": is_image},
        "paligemma": {"token_type_ids": torch.zeros_like(ids)},
    }[kind]
    return {"input_ids": ids, "attention_mask": mask, **types, **_pixels(kind, images)}


def _pixels(kind: str, images: list[int | None]) -> dict[str, torch.Tensor]:
    """The images of prompts; each depends on its row and place alone."""
    seeds = [100 * row + at for row, at in enumerate(images) if at is not None]
    if not seeds:
        return {}
    shape = (16, 48) if kind == "qwen3_vl" else (3, IMAGE_SIZE[kind], IMAGE_SIZE[kind])
    pixels = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    if kind == "qwen3_vl":
        return {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.tensor([[1, 4, 4]] * len(seeds))}
    return {"pixel_values": torch.stack(pixels)}


def mllama_prompt(image: bool) -> dict[str, torch.Tensor]:
    """A prompt with one placeholder for its image, or without image."""
    ids = prompts("qwen3_vl", [None])["input_ids"]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if image:
        ids[0, 2] = IMAGE
        sees_image = (torch.arange(ids.shape[1]) >= 2).long()[None, :, None, None]
        pixels = torch.randn(1, 1, 1, 3, 8, 8, generator=torch.Generator().manual_seed(3))
        ratio = torch.ones(1, 1, dtype=torch.long)
        inputs |= {"pixel_values": pixels, "cross_attention_mask": sees_image}
        inputs |= {"aspect_ratio_ids": ratio, "aspect_ratio_mask": ratio[..., None]}
    return inputs


def row_of(inputs: dict[str, torch.Tensor], row: int, kind: str, images: list[int | None]) -> dict[str, torch.Tensor]:
    """The prompt of one row as it is alone, without padding."""
    kept = inputs["attention_mask"][row].bool()
    per_token = {name: value for name, value in inputs.items() if value.shape == inputs["input_ids"].shape}
    pixels = _pixels(kind, [at if other == row else None for other, at in enumerate(images)])
    return {name: value[row][kept][None] for name, value in per_token.items()} | pixels


@torch.no_grad()
def next_logits(model: PreTrainedModel, prompt: dict[str, torch.Tensor], text: torch.Tensor) -> torch.Tensor:
    """A model's logits behind a text `(1, L)` that continues a prompt, `(1, V)`: the whole of it, without a cache."""
    new = text.shape[1] - prompt["input_ids"].shape[1]
    inputs = {**prompt, "input_ids": text, "attention_mask": torch.ones_like(text)}
    of_text = int(type(model) is PaliGemmaForConditionalGeneration)
    for name, behind in (("token_type_ids", of_text), ("mm_token_type_ids", 0)):
        if name in prompt:
            inputs[name] = torch.nn.functional.pad(prompt[name], (0, new), value=behind)
    if "cross_attention_mask" in prompt:
        seen = prompt["cross_attention_mask"]
        inputs["cross_attention_mask"] = torch.cat([seen, seen[:, -1:].expand(-1, new, -1, -1)], dim=1)
    return model(**inputs, use_cache=False).logits[:, -1].float()
