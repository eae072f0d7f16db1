"""Texts that grow together, join and leave, against plain forwards."""

import random

import pytest
import torch
from test_cached_model import plain
from tiny_families import tiny_family
from tiny_models import tiny_model

from transformers_kad.models.running_texts import LARGEST_SHARE_OF_PADDING, RunningTexts


def check(running, texts):
    expected = torch.cat([plain(running.model, torch.tensor([text]))[:, -1] for text in texts.values()])
    torch.testing.assert_close(running.logits(texts), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "qwen3_5_text"])
def test_any_order_of_coming_and_going(family):
    model = tiny_family(family, seed=3) if "_" in family else tiny_model(family, seed=3)
    running, chance, texts = RunningTexts(model, "proxy"), random.Random(5), {}
    for step in range(40):
        texts = {name: text for name, text in texts.items() if chance.random() > 0.15}
        texts = {name: [*text, chance.randrange(1, 50)] for name, text in texts.items()}
        if chance.random() < 0.1:  # one that is taken out and put back has another length than expected
            texts = {name: [*text, 7, 9] for name, text in texts.items()}
        for number in range(chance.choice([0, 0, 0, 1, 2]) + (not texts)):
            texts[step, number] = [chance.randrange(1, 50) for _ in range(chance.choice([1, 4, 30]))]
        names = chance.sample(list(texts), len(texts))
        check(running, {name: texts[name] for name in names})
        assert running._texts.columns <= max(map(len, texts.values())) * (1 + LARGEST_SHARE_OF_PADDING) + 1


def test_a_step_is_one_forward_and_one_more_for_those_that_join():
    running = RunningTexts(tiny_model(seed=3), "proxy")
    texts = {"a": [1, 2, 3], "b": [4, 5, 6, 7, 8]}
    for forwards in (1, 2, 3):
        check(running, texts)
        assert running.forwards == forwards
        texts = {name: [*text, 9] for name, text in texts.items()}
    texts |= {"c": [3], "d": [2, 2]}
    check(running, texts)
    assert running.forwards == 5
    check(running, {name: [*texts[name], 4] for name in ("d", "a")})
    assert running.forwards == 6
    check(running, {"e": [5, 6]})
    assert running.forwards == 7


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"The proxy LlamaForCausalLM .* is in training mode"):
        RunningTexts(tiny_model(seed=3).train(), "proxy")
