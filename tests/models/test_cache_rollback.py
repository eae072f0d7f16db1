"""What caches can take back, for every kind of layer."""

import pytest
import torch
from test_adapters import adapted
from test_cached_model import random_ids
from test_forward_inputs import make
from tiny_families import tiny_family
from tiny_models import tiny_model
from transformers import DynamicCache

from transformers_kad.models.by_version import CACHE
from transformers_kad.models.cache_rollback import (
    Rollback,
    can_drop,
    drop_columns,
    forget_past,
    gather_columns,
    has_columns,
    has_recurrent_state,
    layers_of,
    record_past,
    rollback_of,
    select_cached_rows,
    trim_convolutions,
)
from transformers_kad.models.cached_model import CachedModel


def test_a_window_that_was_passed_cannot_be_taken_back():
    model = tiny_model("mistral", seed=3)  # a window of 8
    cached = CachedModel(model)
    cached.logits(random_ids(1, 20))
    assert not can_drop(cached._cache, 1)
    cached.crop(19)
    assert cached.cached_length == 0  # dropped, to be filled anew
    full = CachedModel(tiny_model(seed=3))
    full.logits(random_ids(1, 20))
    full.crop(7)
    assert full.cached_length == 7


@torch.no_grad()
def cache_of(model, ids, recorded=None, **inputs):
    """The cache behind some ids, and behind others that it was asked to record."""
    cache = model(ids, use_cache=True, **inputs).past_key_values
    if recorded is not None:
        record_past(cache)
        model(recorded, **{CACHE: cache})
    return cache


@pytest.mark.parametrize(
    ("name", "rollback", "croppable"),
    [
        ("llama", Rollback.BEHIND_MASK, True),
        ("gemma3_text", Rollback.BY_ROW, False),  # a window of 8
        ("bamba", Rollback.BY_STATE, False),
    ],
)
def test_layers_decide_what_a_cache_can_take_back(name, rollback, croppable):
    cache = cache_of(make(name), random_ids(1, 20))
    assert rollback_of(cache) is rollback
    assert (can_drop(cache, 0), can_drop(cache, 1)) == (True, croppable)


@pytest.mark.parametrize(
    ("family", "rollback"),
    [
        ("lfm2", Rollback.BY_ROW),
        ("qwen3_next", Rollback.BY_STATE),
        ("zaya", Rollback.BY_STATE),
        ("minimax", Rollback.BY_COPY),
        ("deepseek_v4", Rollback.BY_COPY),  # layers of its own, which inherit a `crop` that knows less than they keep
    ],
)
def test_layers_of_families_decide_it(family, rollback):
    assert rollback_of(cache_of(tiny_family(family), random_ids(1, 20))) is rollback


def test_a_window_takes_back_what_it_recorded_until_it_forgets_it():
    cache = cache_of(tiny_model("mistral", seed=3), random_ids(1, 20), recorded=random_ids(1, 4, seed=1))
    assert [can_drop(cache, count) for count in (0, 4, 5)] == [True, True, False]
    forget_past(cache)
    assert not can_drop(cache, 1)
    forget_past(cache_of(make("bamba"), random_ids(1, 20), recorded=random_ids(1, 1)))  # which can't take back any


def test_a_convolution_takes_back_what_it_recorded():
    cache = cache_of(tiny_family("lfm2"), random_ids(1, 20), recorded=random_ids(1, 4, seed=1))
    assert [has_columns(cache, count) for count in (0, 4, 5)] == [True, True, False]
    forget_past(cache)
    assert not has_columns(cache, 1)


def test_a_window_that_was_not_passed_is_full_attention():
    cache = cache_of(tiny_model("mistral", seed=3), random_ids(1, 5))
    assert can_drop(cache, 4)


@pytest.mark.parametrize("family", ["llama", "mistral", "lfm2", "falcon_h1", "zaya"])
def test_rows_that_dropped_different_numbers_hold_what_was_before(family):
    """Apart from states that are restored from copies."""
    model, first, more = tiny_family(family), random_ids(2, 12), random_ids(2, 4, seed=1)
    dropped = cache_of(model, first, recorded=more)
    counts = [3, 1]
    drop_columns(dropped, counts)
    for row, count in enumerate(counts):
        text = torch.cat([first, more[:, : 4 - count]], dim=1)[row : row + 1]
        for layer, wanted in zip(layers_of(dropped), layers_of(cache_of(model, text)), strict=True):
            if hasattr(layer, "keys"):
                assert layer.get_seq_length() == 15  # that of the longest row
                columns = min(wanted.keys.shape[2], layer.keys.shape[2])
                torch.testing.assert_close(layer.keys[row, :, -columns:], wanted.keys[0, :, -columns:])
                torch.testing.assert_close(layer.values[row, :, -columns:], wanted.values[0, :, -columns:])
            if hasattr(layer, "conv_states") and not has_recurrent_state(layer):
                torch.testing.assert_close(layer.conv_states[0][row], wanted.conv_states[0][0])


def test_convolutions_beside_a_recurrent_state_record_nothing():
    """A layer with a window as well has one switch for both."""
    cache = cache_of(tiny_family("zaya"), random_ids(1, 12))
    before = [{index: state.clone() for index, state in layer.conv_states.items()} for layer in layers_of(cache)]
    record_past(cache)
    assert any(layer.record_past for layer in layers_of(cache))
    for layer in layers_of(cache):
        layer.update_conv_state(torch.ones_like(layer.conv_states[0]))
    trim_convolutions(cache)
    for layer, states in zip(layers_of(cache), before, strict=True):
        assert layer.conv_states[0].shape == states[0].shape
        assert bool((layer.conv_states[0] == 1).all())


@pytest.mark.parametrize("family", ["mistral", "falcon_h1", "zaya", "minimax", "lfm2"])
def test_selected_rows_take_all_states_along(family):
    model, ids = tiny_family(family), random_ids(3, 12)
    cache = cache_of(model, ids)
    select_cached_rows(cache, torch.tensor([2, 0]))
    following = torch.tensor([[5], [6]])
    with torch.no_grad():
        got = model(following, **{CACHE: cache}).logits
        expected = model(following, **{CACHE: cache_of(model, ids[[2, 0]])}).logits
        other = model(following, **{CACHE: cache_of(model, ids[[0, 1]])}).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(got, other, atol=1e-2)


def test_windows_over_a_cache_without_a_configuration_are_full_attention_to_the_cache():
    """The model says that it has windows, see `ForwardInputs.rollback`."""
    model = tiny_model("mistral", seed=3)
    cache = cache_of(model, random_ids(1, 20), **{CACHE: DynamicCache()})
    assert rollback_of(cache) is Rollback.BEHIND_MASK
    assert CachedModel(model)._inputs.rollback(rollback_of(cache)) is Rollback.BY_ROW


def test_both_caches_of_a_shadow_adapter_are_seen():
    model = adapted("SHADOW")
    cache = cache_of(model, random_ids(1, 6))
    below, own = len(cache.base.layers), len(cache.shadow.layers)
    assert own > 0
    assert len(layers_of(cache)) == below + own
    assert can_drop(cache, 2)


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
