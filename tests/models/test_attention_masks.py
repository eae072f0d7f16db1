"""Masks that are made before a forward: the logits are those of the mask of columns, which nobody looks at."""

import pytest
import torch
from pretended_device import DEVICE, pretended_device
from tiny_families import tiny_family
from tiny_models import tiny_model
from transformers import DynamicCache

from transformers_kad.models.attention_masks import prepare_masks, takes_prepared_masks
from transformers_kad.models.by_version import CACHE

IDS = torch.tensor([[0, 0, 5, 6, 7, 8, 9, 3, 4, 2, 1, 5], [1, 2, 3, 4, 5, 6, 7, 8, 9, 3, 4, 2]])
MASK = (IDS != 0).long()


def filled(model, columns):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS[:, :columns], attention_mask=MASK[:, :columns], **{CACHE: cache})
    return cache


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma3_text", "llama4_text", "gpt2", "phi3"])
def test_logits_are_those_of_the_mask_of_columns(family, new, implementation):
    model = tiny_family(family, window=4)
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        inputs = {"input_ids": IDS[:, -new:], "attention_mask": MASK}
        inputs["position_ids"] = (MASK.cumsum(-1) - 1).clamp(min=0)[:, -new:]
        expected = model(**inputs, **{CACHE: filled(model, 12 - new)}).logits
        cache = filled(model, 12 - new)
        prepare_masks(model, inputs, cache)
        masks = inputs["attention_mask"]
        for mask in masks.values() if isinstance(masks, dict) else [masks]:
            assert mask.shape[:3] == (2, 1, new)
        assert torch.equal(model(**inputs, **{CACHE: cache}).logits, expected)


def test_what_the_model_would_look_at_itself_stays_as_it_is():
    model = tiny_model()
    inputs = {"input_ids": IDS[:, -1:], "attention_mask": MASK}
    first = dict(inputs)
    prepare_masks(model, first, None)
    typed = inputs | {"token_type_ids": torch.zeros_like(IDS)}
    prepare_masks(model, typed, filled(model, 11))
    model.config._attn_implementation = "flash_attention_2"
    assert not takes_prepared_masks(model)
    other = dict(inputs)
    prepare_masks(model, other, filled(tiny_model(), 11))
    for left in (first, typed, other):
        assert left["attention_mask"] is MASK


def test_no_value_is_read():
    model = tiny_model()
    with pretended_device() as waits:
        model.to(DEVICE)
        cache = DynamicCache(config=model.config)
        ids, mask = IDS.to(DEVICE), MASK.to(DEVICE)
        with torch.no_grad():
            model(ids[:, :11], attention_mask=mask[:, :11], **{CACHE: cache})
        inputs = {"input_ids": ids[:, -1:], "attention_mask": mask}
        prepare_masks(model, inputs, cache)
        assert inputs["attention_mask"].tolist() == MASK.bool()[:, None, None].tolist()
        waits.places.clear()
        prepare_masks(model, {"input_ids": ids[:, -1:], "attention_mask": mask}, cache)
    assert waits.count == 0
