"""What an open call knows of its rows."""

import threading

import pytest
import torch
from transformers.generation import BaseStreamer

from transformers_kad import DualDeferral, KADLogitsProcessor
from transformers_kad.decoding.ended_rows import EndedRows
from transformers_kad.decoding.open_call import OpenCall
from transformers_kad.decoding.proxy_models import ProxyModels
from transformers_kad.decoding.settings import DecodingSettings

PROMPT = torch.tensor([[1, 2, 3]])


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


def watched(base, kad, proxy, **settings):
    """Generate, and return the traces that a streamer sees at each token, and the trace at the end."""
    seen = []

    class Watch(BaseStreamer):
        def put(self, value):
            seen.append(kad.state.open_call.trace_so_far() if kad.state.open_call is not None else None)

        def end(self):
            pass

    base.generate(PROMPT, logits_processor=[kad], max_new_tokens=16, do_sample=False, streamer=Watch(), **settings)
    return seen


def test_the_trace_so_far_is_the_beginning_of_the_trace(base, proxy):
    kad = KADLogitsProcessor(proxy, "dual", threshold=0.5, num_assistant_tokens=3, trace=True)
    _, *seen = watched(base, kad, proxy, assistant_model=proxy)
    assert len(seen) == 16
    ends = {len(trace) for trace in seen}
    assert len(ends) > 2  # several rounds
    for trace in seen:
        assert [*trace] == [*kad.trace[: len(trace)]]
        assert trace.statistics.tokens == len(trace)
        assert trace.statistics.rounds <= kad.statistics.rounds
    assert [trace.statistics.proxy_forwards for trace in seen] == sorted(t.statistics.proxy_forwards for t in seen)
    assert 0 < seen[0].statistics.proxy_forwards < seen[-1].statistics.proxy_forwards <= kad.statistics.proxy_forwards


def test_there_is_no_trace_so_far_without_a_trace_or_token_by_token(base, proxy):
    for kad, settings in (
        (KADLogitsProcessor(proxy, "dual", threshold=0.5), {"assistant_model": proxy}),
        (KADLogitsProcessor(proxy, "dual", threshold=0.5, trace=True), {}),
    ):
        assert set(watched(base, kad, proxy, **settings)) == {None}
