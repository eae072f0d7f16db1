"""What requests may ask for. The field `kad`: tests/integrations/test_serving.py and test_continuous_batching.py."""

import pytest

from transformers_kad.integrations.requests import tokens_that_fit
from transformers_kad.models.model_errors import ContextLengthError


def test_an_answer_ends_where_the_shortest_context_does(base, proxy, monkeypatch):
    monkeypatch.setattr(base.config, "max_position_embeddings", 20)
    monkeypatch.setattr(proxy.config, "max_position_embeddings", 16)
    assert tokens_that_fit(64, 12, base, proxy) == 4
    assert tokens_that_fit(3, 12, base, proxy) == 3
    assert tokens_that_fit(64, 12, base, None) == 8
    with pytest.raises(ContextLengthError, match="The prompt has 16 tokens, and the models read at most 16"):
        tokens_that_fit(64, 16, base, proxy)


def test_a_model_that_states_no_context_sets_no_limit(base, monkeypatch):
    monkeypatch.setattr(base.config, "max_position_embeddings", 0)
    assert tokens_that_fit(64, 12, base) == 64
