"""The expected number of rounds, against a simulation and by hand."""

import random

import pytest
import torch

from transformers_kad.recipes.pair_check.rounds import expected_rounds


def decode(acceptance, draft_length, rng):
    """The rounds and bonus steps of one text, by drawing what is accepted."""
    at = rounds = bonus = 0
    while at < len(acceptance):
        rounds += 1
        accepted = 0
        while accepted < draft_length and at + accepted < len(acceptance):
            if rng.random() >= acceptance[at + accepted]:
                break
            accepted += 1
        bonus += accepted == draft_length and at + accepted < len(acceptance)
        at += accepted + 1
    return rounds, bonus


@pytest.mark.parametrize("draft_length", [1, 3, 5, 20])
def test_it_is_the_mean_of_simulated_texts(draft_length):
    rng = random.Random(draft_length)
    acceptance = [rng.random() ** 0.3 for _ in range(17)]
    texts = [decode(acceptance, draft_length, rng) for _ in range(20_000)]
    expected = expected_rounds(torch.tensor([acceptance]), draft_length)
    for place, value in enumerate(expected):
        own = torch.tensor([text[place] for text in texts]).double()
        error = own.std() / len(texts) ** 0.5
        assert abs(float(own.mean() - value[0])) < 4.5 * float(error) + 1e-9


def test_rules_do_not_influence_each_other():
    rows = torch.rand(3, 9, generator=torch.Generator().manual_seed(0))
    together = expected_rounds(rows, 4)
    for at, row in enumerate(rows):
        alone = expected_rounds(row[None], 4)
        assert torch.equal(together.rounds[at : at + 1], alone.rounds)
        assert torch.equal(together.bonus_steps[at : at + 1], alone.bonus_steps)


def test_a_text_of_one_token_is_one_round():
    expected = expected_rounds(torch.tensor([[0.3]]), 5)
    assert (expected.rounds.tolist(), expected.bonus_steps.tolist()) == ([1.0], [0.0])
