"""Copies of states, put back row by row."""

import pytest
import torch
from test_cached_model import plain, random_ids
from tiny_families import tiny_family
from tiny_models import tiny_model

from transformers_kad.models.by_version import CACHE
from transformers_kad.models.cache_rollback import Rollback, layers_of
from transformers_kad.models.forward_inputs import ForwardInputs
from transformers_kad.models.recurrent_states import StateCopy, reads_one_by_one


@torch.no_grad()
def read(model, ids, cache=None):
    """The cache behind some ids; its states are written to in place."""
    return model(ids, **{CACHE: cache}, use_cache=True).past_key_values


def states_of(cache, row):
    return [
        state[row].clone()
        for layer in layers_of(cache)
        for states in (getattr(layer, "conv_states", {}), getattr(layer, "recurrent_states", {}))
        for state in states.values()
        if state is not None
    ]


@pytest.mark.parametrize("family", ["qwen3_next", "falcon_h1"])
def test_each_row_gets_the_states_of_its_own_copy_back(family):
    model, ids = tiny_family(family), random_ids(2, 8)
    cache = read(model, ids[:, :6])
    copies, states = [], []
    for end in (6, 7):
        copies.append(StateCopy(cache, Rollback.BY_STATE))
        states.append([states_of(cache, row) for row in range(2)])
        cache = read(model, ids[:, end : end + 1], cache)
    StateCopy.restore_rows(cache, [copies[1], copies[0]])
    assert len(states[0][0]) > 0
    for row, number in enumerate([1, 0]):
        torch.testing.assert_close(states_of(cache, row), states[number][row], atol=0, rtol=0)
        assert not torch.equal(states[0][row][-1], states[1][row][-1])


def test_a_copy_can_be_restored_more_than_once():
    """What is read after a restore does not change the copy."""
    model, ids = tiny_family("qwen3_next"), random_ids(2, 8)
    cache = read(model, ids[:, :6])
    copied, wanted = StateCopy(cache, Rollback.BY_STATE), states_of(cache, 0)
    for end in (6, 7):
        cache = read(model, ids[:, end : end + 1], cache)
        StateCopy.restore_rows(cache, [copied, copied])
        torch.testing.assert_close(states_of(cache, 0), wanted, atol=0, rtol=0)


def test_a_whole_cache_goes_on_from_its_copy():
    model, ids = tiny_family("minimax"), random_ids(1, 8)
    cache = read(model, ids[:, :7])
    copied = StateCopy(cache, Rollback.BY_COPY)
    read(model, random_ids(1, 3, seed=1), cache)
    with torch.no_grad():
        got = model(ids[:, 7:], **{CACHE: copied.cache}).logits
    torch.testing.assert_close(got, plain(model, ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "rollback", "expected"),
    [
        ("llama", Rollback.BEHIND_MASK, False),
        ("mistral", Rollback.BY_ROW, False),
        ("qwen3_next", Rollback.BY_STATE, False),
        ("jamba", Rollback.BY_STATE, True),
        ("jamba", None, False),  # without a cache, or before there is one
        ("minimax", Rollback.BY_COPY, True),
        ("xlnet", None, True),
    ],
)
def test_models_whose_longer_forwards_differ_read_one_by_one(family, rollback, expected):
    assert reads_one_by_one(tiny_family(family), rollback) is expected


def test_a_model_that_reads_in_both_directions_reads_one_by_one():
    model = tiny_model()
    assert not reads_one_by_one(model, Rollback.BEHIND_MASK)
    model.config.is_decoder = False
    assert reads_one_by_one(model, Rollback.BEHIND_MASK)


@pytest.mark.parametrize("family", ["bamba", "falcon_h1", "mamba2", "olmo_hybrid", "qwen3_next", "zaya"])
def test_several_tokens_behind_a_state_are_read_as_one_by_one(family):
    """What the list of such families promises."""
    model, ids = tiny_family(family), random_ids(2, 12)
    name = ForwardInputs(model).cache_name
    with torch.no_grad():
        cache = getattr(model(ids[:, :8], use_cache=True), name)
        positions = {} if family == "mamba2" else {"position_ids": torch.arange(8, 12).expand(2, -1)}
        got = model(ids[:, 8:], **{name: cache}, use_cache=True, **positions).logits
    torch.testing.assert_close(got, plain(model, ids, 4), atol=1e-3, rtol=1e-3)
