"""A step of a call: log r, the parents of beams, and rows that have ended."""

import pytest
import torch

from transformers_kad import DualDeferral
from transformers_kad.decoding.ended_rows import EndedRows
from transformers_kad.decoding.open_call import OpenCall
from transformers_kad.decoding.proxy_models import ProxyModels
from transformers_kad.decoding.settings import DecodingSettings
from transformers_kad.decoding.token_by_token import EagerStep
from transformers_kad.models.model_errors import UnusableLogitsError

IDS = torch.tensor([[3, 14, 15], [9, 26, 5]])


def make_call(proxy, **attributes):
    models = ProxyModels(proxy, None, without_adapter=False)
    models.prepare()
    return OpenCall(DecodingSettings(DualDeferral(0.4)), models, lambda ids: (ids, None), **attributes)


def test_a_step_gives_log_r(base, proxy):
    with torch.no_grad():
        scores, q = base(IDS).logits[:, -1], proxy(IDS).logits[:, -1].softmax(-1)
        got = EagerStep(make_call(proxy))(IDS, scores)
    expected = DualDeferral(0.4)(scores.softmax(-1), q)
    torch.testing.assert_close(got.exp(), expected)


def test_the_proxy_reads_only_what_is_new_of_texts_that_go_on(base, proxy):
    call = make_call(proxy)
    step, scores = EagerStep(call), torch.zeros(2, 50)
    read = []
    forward = call.models.proxy._call
    call.models.proxy._call = lambda texts, new, *rest: read.append(new) or forward(texts, new, *rest)
    longer = torch.cat([IDS, IDS[:, :1]], -1)
    for ids in (IDS, longer, torch.cat([longer, IDS], -1)):
        step(ids, scores)
    assert read == [3, 1, 3]


def test_unusable_logits_of_rows_that_have_ended_are_nobodys_fault(proxy):
    scores = torch.zeros(2, 50)
    scores[1] = torch.nan
    call = make_call(proxy, eos_token_ids=frozenset({5}))
    with pytest.raises(UnusableLogitsError, match="base for position 3 of sequence 1"):
        EagerStep(call)(IDS, scores)
    call.ended_rows = EndedRows([], {5}, fills_up=True)
    call.ended_rows(IDS, None)
    got = EagerStep(call)(IDS, scores)
    assert torch.equal(got[1], torch.zeros(50))  # `generate` samples a token there, which it throws away
    assert not got.isnan().any()


def test_beams_continue_the_first_equal_text_of_the_same_prompt(proxy):
    step = EagerStep(make_call(proxy, beams=2, rows_stay=False))
    before = torch.tensor([[1, 2], [1, 3], [1, 3], [1, 3]])
    assert step._parents(before) == [0, 1, 2, 3]
    after = torch.tensor([[1, 3, 7], [1, 2, 8], [1, 3, 9], [1, 3, 4]])
    assert step._parents(after) == [1, 0, 2, 2]
    assert EagerStep(make_call(proxy))._parents(after) is None


def test_texts_that_continue_none_stand_for_their_own_rows(proxy):
    step = EagerStep(make_call(proxy, rows_stay=False))
    step._parents(torch.tensor([[1, 2], [1, 3]]))
    assert step._parents(torch.tensor([[4, 4, 4], [1, 2, 8]])) == [0, 0]
    assert step._parents(torch.tensor([[5], [6], [7]])) == [0, 1, 2]  # shorter texts, as of another prompt


def test_rows_of_equal_prompts_continue_themselves(proxy):
    step = EagerStep(make_call(proxy, rows_stay=False))
    step._parents(torch.tensor([[1, 2], [1, 2], [1, 3]]))
    assert step._parents(torch.tensor([[1, 2, 5], [1, 2, 6], [1, 2, 7]])) == [0, 1, 0]
