"""Attention masks that are made before a forward, so that the model need not look at the padding itself."""

from typing import Any

import torch
from transformers import DynamicCache
from transformers.masking_utils import create_masks_for_generate

from .by_version import CACHE, TAKING_NO_MASKS

# Implementations of attention that take a mask with an entry for each query and key. Others make something else of a
# mask of columns, and look at its values to do so.
TAKING_PREPARED_MASKS = frozenset({"eager", "sdpa"})
# Inputs by which a model reads some tokens in both directions.
_TYPES_OF_TOKENS = ("token_type_ids", "mm_token_type_ids")


def prepare_masks(model: Any, inputs: dict[str, Any], cache: object) -> None:
    """Replace the mask of columns `(B, S)` in the inputs of a forward by what the model would make of it.

    Given a mask of columns, the functions of transformers that make the real masks look first whether there is any
    padding, for which the host waits for the device at every forward. What they make without looking is passed
    instead: a mask `(B, 1, n, S)`, or one for each type of layers. This is done for models that are made to take such
    masks, as `generate` passes them with a static cache. The inputs of all others stay as they are, and so do those of
    the first forward, of which there is one in a call.

    Args:
        model: the causal LM, below any adapter.
        inputs: as the model's `prepare_inputs_for_generation` made them; changed in place.
        cache: of the model; None for a first forward.
    """
    mask = inputs.get("attention_mask")
    if type(cache) is not DynamicCache or not torch.is_tensor(mask) or mask.dim() != 2:
        return
    if not takes_prepared_masks(model) or any(inputs.get(name) is not None for name in _TYPES_OF_TOKENS):
        return
    ids = inputs["input_ids"]
    create = getattr(model, "create_masks_for_generate", create_masks_for_generate)
    inputs["attention_mask"] = create(
        config=model.config,
        inputs_embeds=torch.empty(*ids.shape, 0, dtype=model.dtype, device=ids.device),  # nothing but shape and type
        attention_mask=mask,
        position_ids=inputs.get("position_ids"),
        is_first_iteration=False,
        **{CACHE: _Compileable(cache)},
    )


def is_made_for_static_caches(model: Any) -> bool:
    """Whether a model, below any adapter, makes masks for static caches, as it says to transformers."""
    return bool(getattr(model, "_can_compile_fullgraph", False)) and model.config.model_type not in TAKING_NO_MASKS


def takes_prepared_masks(model: Any) -> bool:
    """Whether a model is made to take masks with an entry for each query and key, or a dictionary of them."""
    implementation = getattr(model.config.get_text_config(decoder=True), "_attn_implementation", None)
    return is_made_for_static_caches(model) and implementation in TAKING_PREPARED_MASKS


class _Compileable(DynamicCache):
    """The layers of a cache, for the functions that make masks: with a compileable cache they look at no values."""

    is_compileable = True

    def __init__(self, cache: DynamicCache) -> None:
        self.__dict__.update(cache.__dict__)
