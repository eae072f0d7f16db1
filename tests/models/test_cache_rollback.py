"""What caches can take back, for every kind of layer."""

import pytest
import torch
from test_adapters import adapted
from test_cached_model import random_ids
from test_forward_inputs import make
from tiny_models import tiny_model

from transformers_kad.models.cache_rollback import (
    can_crop,
    can_have_holes,
    forget_past,
    gather_columns,
    layers_of,
    record_past,
    shortest_window,
)
from transformers_kad.models.cached_model import CachedModel


def test_a_window_that_was_passed_cannot_be_taken_back():
    model = tiny_model("mistral", seed=3)  # a window of 8
    cached = CachedModel(model)
    cached.logits(random_ids(1, 20))
    assert not can_crop(cached._cache, 1)
    cached.crop(19)
    assert cached.cached_length == 0  # dropped, to be filled anew
    full = CachedModel(tiny_model(seed=3))
    full.logits(random_ids(1, 20))
    full.crop(7)
    assert full.cached_length == 7


@torch.no_grad()
def cache_of(model, ids, recorded=None):
    """The cache behind some ids, and behind others that it was asked to record."""
    cache = model(ids, use_cache=True).past_key_values
    if recorded is not None:
        record_past(cache)
        model(recorded, past_key_values=cache)
    return cache


@pytest.mark.parametrize(
    ("name", "croppable", "holes", "window"),
    [("llama", True, True, None), ("gemma3_text", False, False, 8), ("bamba", False, False, None)],
)
def test_layers_decide_what_a_cache_can_take_back(name, croppable, holes, window):
    cache = cache_of(make(name), random_ids(1, 20))
    assert (can_crop(cache, 1), can_have_holes(cache), shortest_window(cache)) == (croppable, holes, window)


def test_a_window_takes_back_what_it_recorded_until_it_forgets_it():
    cache = cache_of(tiny_model("mistral", seed=3), random_ids(1, 20), recorded=random_ids(1, 4, seed=1))
    assert [can_crop(cache, count) for count in (0, 4, 5)] == [True, True, False]
    forget_past(cache)
    assert not can_crop(cache, 1)
    forget_past(cache_of(make("bamba"), random_ids(1, 20), recorded=random_ids(1, 1)))  # which can't take back any


def test_both_caches_of_a_shadow_adapter_are_seen():
    model = adapted("SHADOW")
    cache = cache_of(model, random_ids(1, 6))
    below, own = len(cache.base.layers), len(cache.shadow.layers)
    assert own > 0
    assert len(layers_of(cache)) == below + own
    assert can_crop(cache, 2)


def test_columns_are_gathered_row_by_row():
    """Tokens of which some are left out, at the positions that they had: as if the others had been masked."""
    model, ids = tiny_model("gpt2", seed=3), random_ids(2, 6)
    cache = cache_of(model, ids)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in layers_of(cache)]
    columns = torch.tensor([[0, 2, 5], [1, 2, 3]])
    gather_columns(cache, columns)
    for layer, (keys, values) in zip(layers_of(cache), before, strict=True):
        for row in range(2):
            torch.testing.assert_close(layer.keys[row], keys[row][:, columns[row]])
            torch.testing.assert_close(layer.values[row], values[row][:, columns[row]])
