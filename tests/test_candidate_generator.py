"""KADCandidateGenerator on its own."""

import pytest
import torch
from scipy.stats import chisquare
from tiny_models import tiny_model

from transformers_kad import KADCandidateGenerator
from transformers_kad.proxy import CachedModel

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
    """Chi-square over 4,000 first draft tokens; false alarms with probability 1e-6."""
    model = tiny_model(seed=2, vocabulary=4)
    generator = generator_for(model, num_assistant_tokens=1)
    torch.manual_seed(0)
    counts = torch.zeros(4)
    for _ in range(4000):
        ids, logits = generator.get_candidates(PROMPT)
        counts[ids[0, -1]] += 1
    expected = logits[0, 0].double().softmax(-1) * 4000
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


def test_a_round_after_a_refusal_continues_from_the_text():
    model = tiny_model(seed=2)
    generator = generator_for(model, do_sample=False)
    ids, _ = generator.get_candidates(PROMPT)
    text = torch.cat([ids[:, :7], torch.tensor([[9]])], dim=1)  # two accepted, then another token
    generator.settle(text)
    again, _ = generator.get_candidates(text)
    fresh, _ = generator_for(model, do_sample=False).get_candidates(text)
    assert torch.equal(again, fresh)


def test_an_unrelated_text_is_no_continuation():
    model = tiny_model(seed=2)
    generator = KADCandidateGenerator(model, num_assistant_tokens=4, vocabulary=50, do_sample=False)
    generator.get_candidates(PROMPT)
    again, _ = generator.get_candidates(PROMPT.flip(1))
    fresh, _ = generator_for(model, do_sample=False).get_candidates(PROMPT.flip(1))
    assert torch.equal(again, fresh)


def test_several_sequences_are_refused():
    with pytest.raises(ValueError, match="got 3"):
        generator_for(tiny_model()).get_candidates(PROMPT.repeat(3, 1))
