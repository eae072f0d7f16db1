"""Settings of models, which are asked of their configurations. None can be assumed to be there."""

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

# Settings with the ids that stand for images, videos and sound in a prompt, as configurations name them.
PLACEHOLDERS = (
    "audio_token_id",
    "audio_token_index",
    "image_token_id",
    "image_token_index",
    "img_context_token_id",
    "sound_context_token_id",
    "video_context_token_id",
    "video_token_id",
    "video_token_index",
)


def text_setting(config: PreTrainedConfig, name: str, default: Any = None) -> Any:
    """A setting of the language model that a configuration describes, perhaps beside models of images or sound.

    Some configurations have such a setting only at their top. `default` if they have none of this name.
    """
    return getattr(config.get_text_config(decoder=True), name, getattr(config, name, default))


def context_length(model: PreTrainedModel) -> int | None:
    """The longest text that a model takes, in tokens; None if its configuration does not say."""
    length = text_setting(model.config, "max_position_embeddings")
    return length if isinstance(length, int) and length > 0 else None


def longrope_switch(model: PreTrainedModel) -> int | None:
    """The length of text up to which LongRoPE (arXiv 2402.13753) uses its short factors; None without LongRoPE."""
    rope = text_setting(model.config, "rope_parameters") or {}
    for parameters in (rope, *(part for part in rope.values() if isinstance(part, dict))):  # one for each layer type
        if parameters.get("rope_type") == "longrope":
            length = parameters.get("original_max_position_embeddings")
            length = text_setting(model.config, "original_max_position_embeddings") if length is None else length
            return length if isinstance(length, int) else None
    return None


def placeholder_ids(model: PreTrainedModel) -> list[int]:
    """The ids that stand in a prompt for the parts of an image, a video or a sound; none for a model of text alone."""
    named = (getattr(model.config, name, None) for name in PLACEHOLDERS)
    return sorted({index for index in named if isinstance(index, int)})


def vocabulary_size(model: PreTrainedModel) -> int:
    """The number of ids that a model can say: by its configuration, or else the number that it can read."""
    size = text_setting(model.config, "vocab_size")
    return size if isinstance(size, int) else readable_ids(model)


def readable_ids(model: PreTrainedModel) -> int:
    """The number of ids that a model can read: the rows of its embedding."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    if weight is None:  # in pipeline parallelism only the first process has it
        return int(text_setting(model.config, "vocab_size"))
    # Under DeepSpeed ZeRO-3 a weight is empty while no forward needs it, and `ds_shape` is the shape that it has then.
    rows: int = getattr(weight, "ds_shape", weight.shape)[0]
    return rows
