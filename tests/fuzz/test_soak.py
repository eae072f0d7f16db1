"""The soak in short: many calls on one processor, each compared with a fresh one."""

import pytest
from soak import CHANGES, PATHS, soak

from transformers_kad.models import cached_forwards

CALLS = 80


@pytest.mark.slow
def test_a_processor_that_has_served_many_calls_answers_as_a_new_one():
    result = soak(CALLS)
    assert result["different"] == []
    assert all(result["by path"][path] for path in PATHS)
    assert all(result["by change"][change] for change in CHANGES)
    after_fifty, at_the_end = result["tensors"]
    assert at_the_end <= 1.2 * after_fifty  # of caches as of everything else


@pytest.mark.slow
def test_the_soak_finds_a_cache_of_other_weights(monkeypatch):
    monkeypatch.setattr(cached_forwards, "fingerprint", lambda model: 0)
    assert soak(CALLS)["different"]
