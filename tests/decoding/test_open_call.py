"""What an open call knows of its rows."""

import threading

import pytest
import torch

from transformers_kad import DualDeferral
from transformers_kad.decoding.ended_rows import EndedRows
from transformers_kad.decoding.open_call import OpenCall
from transformers_kad.decoding.proxy_models import ProxyModels
from transformers_kad.decoding.settings import DecodingSettings


@pytest.fixture
def call(proxy):
    models = ProxyModels(proxy, None, without_adapter=False)
    return OpenCall(
        DecodingSettings(DualDeferral(0.4)),
        models,
        lambda ids: (ids, None),
        prompt_length=2,
        batch_size=2,
        eos_token_ids=frozenset({9}),
        pad_token_id=0,
    )


def test_rows_that_ended_are_known_from_the_criteria(call):
    ids = torch.tensor([[1, 2, 9], [1, 2, 4]])
    assert call.ended(ids).tolist() == [False, False]
    call.ended_rows = EndedRows([], call.eos_token_ids, fills_up=True)
    call.ended_rows(ids, None)
    assert call.ended(ids).tolist() == [True, False]
    assert call.ended(ids[:1]).tolist() == [False]  # texts of another number of rows


def test_emitted_tokens_are_counted_by_the_criteria_or_else_by_the_text(call):
    sequences = torch.tensor([[1, 2, 9, 0, 0], [1, 2, 4, 0, 0], [1, 2, 4, 5, 6]])
    assert call._emitted_tokens(sequences) == [1, 1, 3]
    assert call._emitted_tokens(sequences[:1]) == [3]  # a single row is never filled up
    call.ended_rows = EndedRows([], call.eos_token_ids, fills_up=True)
    for length in (3, 4, 5):
        call.ended_rows(sequences[:, :length], None)
    assert call._emitted_tokens(sequences) == [1, 3, 3]  # padding ids that were chosen are tokens


def test_the_thread_of_a_call(call):
    seen = []
    thread = threading.Thread(target=lambda: seen.append(call.is_in_this_thread))
    thread.start()
    thread.join()
    assert (call.is_in_this_thread, seen) == (True, [False])
