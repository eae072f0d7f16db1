"""KADCandidateGenerator on its own."""

import pytest
import torch
from scipy.stats import chisquare
from tiny_models import tiny_model

from transformers_kad import KADCandidateGenerator
from transformers_kad.models.cached_model import CachedModel

PROMPT = torch.tensor([[3, 1, 2, 0, 1]])


def generator_for(model, **settings):
    return KADCandidateGenerator(
        CachedModel(model), **{"num_assistant_tokens": 4, "vocabulary": model.config.vocab_size, **settings}
    )


def test_the_logits_are_those_of_the_proxy_along_the_draft():
    model = tiny_model(seed=2)
    ids, logits = generator_for(model, component_temperature=0.5).get_candidates(PROMPT)
    assert ids.shape == (1, 9)
    assert torch.equal(ids[:, :5], PROMPT)
    with torch.no_grad():
        expected = model(ids).logits[:, 4:-1] / 0.5
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_the_draft_is_drawn_from_these_logits():
    """Chi-square over 1,000 first draft tokens; false alarms with probability 1e-6."""
    model = tiny_model(seed=2, vocabulary=4)
    generator = generator_for(model, num_assistant_tokens=1)
    torch.manual_seed(0)
    counts = torch.zeros(4)
    for _ in range(1000):
        ids, logits = generator.get_candidates(PROMPT)
        counts[ids[0, -1]] += 1
    expected = logits[0, 0].double().softmax(-1) * 1000
    assert expected.min() > 5
    assert chisquare(counts.double().numpy(), expected.numpy()).pvalue > 1e-6


def test_greedy_drafts_are_argmax():
    model = tiny_model(seed=2)
    ids, logits = generator_for(model, do_sample=False).get_candidates(PROMPT)
    assert ids[0, 5:].tolist() == logits[0].argmax(-1).tolist()


@pytest.mark.parametrize(("max_length", "drafted"), [(6, 0), (7, 1), (8, 2), (20, 4), (None, 4)])
def test_the_draft_leaves_room_for_the_token_after_it(max_length, drafted):
    ids, logits = generator_for(tiny_model(seed=2), max_length=max_length).get_candidates(PROMPT)
    assert ids.shape[1] - 5 == logits.shape[1] == drafted


def test_the_draft_ends_with_an_end_of_sequence():
    model = tiny_model(seed=2)
    ids, _ = generator_for(model, do_sample=False).get_candidates(PROMPT)
    eos = int(ids[0, 6])
    shorter, logits = generator_for(model, do_sample=False, eos_token_ids=[eos]).get_candidates(PROMPT)
    stop = ids[0, 5:].tolist().index(eos) + 1
    assert shorter[0].tolist() == ids[0, : 5 + stop].tolist()
    assert logits.shape[1] == stop


def test_rounds_after_refusals_continue_from_the_texts():
    """Rows keep 2, 0 and 4 draft tokens; one of them leaves; every draft is that of a fresh start."""
    model = tiny_model(seed=2)
    generator = generator_for(model, do_sample=False)
    texts = [PROMPT, PROMPT.flip(1), PROMPT + 3]
    generator.begin(torch.cat(texts))
    draft, accepted = generator.draft(None, [5, 5, 5]), [2, 0, 4]
    generator.next_logits()  # all of the last row's draft is read
    for leaving in ([], [1], []):
        generator.accept(accepted)
        texts = [
            torch.cat([text, ids[None, :count], torch.tensor([[9]])], dim=1)
            for text, ids, count in zip(texts, draft.ids, accepted, strict=True)
        ]
        if leaving:
            generator.select_rows([row for row in range(len(texts)) if row not in leaving])
            texts = [text for row, text in enumerate(texts) if row not in leaving]
        draft = generator.draft(torch.tensor([[9]] * len(texts)), [text.shape[1] for text in texts])
        for text, ids in zip(texts, draft.ids, strict=True):
            fresh, _ = generator_for(model, do_sample=False).get_candidates(text)
            assert ids.tolist() == fresh[0, text.shape[1] :].tolist()
        generator.next_logits()
        accepted = [1, 3, 0][: len(texts)]


def test_an_unrelated_text_is_no_continuation():
    model = tiny_model(seed=2)
    generator = KADCandidateGenerator(model, num_assistant_tokens=4, vocabulary=50, do_sample=False)
    generator.get_candidates(PROMPT)
    again, _ = generator.get_candidates(PROMPT.flip(1))
    fresh, _ = generator_for(model, do_sample=False).get_candidates(PROMPT.flip(1))
    assert torch.equal(again, fresh)


def test_several_sequences_draft_at_once():
    model = tiny_model(seed=2)
    texts = torch.cat([PROMPT, PROMPT.flip(1)])
    ids, logits = generator_for(model, do_sample=False).get_candidates(texts)
    assert logits.shape == (2, 4, 50)
    for row, text in enumerate(texts):
        own, _ = generator_for(model, do_sample=False).get_candidates(text[None])
        assert torch.equal(ids[row], own[0])
