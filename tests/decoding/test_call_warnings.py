"""Warnings about calls that are answered, though perhaps not as the caller means."""

import torch
from tiny_models import tiny_model

from transformers_kad import KADLogitsProcessor

PROMPT = torch.tensor([[3, 14, 15, 9, 26]])
GREEDY = {"do_sample": False, "max_new_tokens": 4}


def test_a_proxy_that_ends_its_turns_otherwise_is_warned_about_once(base, caplog):
    proxy = tiny_model(seed=2)
    proxy.generation_config.eos_token_id = [7, 9]
    kad = KADLogitsProcessor(proxy)
    with caplog.at_level("WARNING", logger="transformers_kad"):
        for _ in range(2):
            base.generate(PROMPT, logits_processor=[kad], eos_token_id=9, **GREEDY)
        base.generate(PROMPT, logits_processor=[kad], eos_token_id=[7, 9], **GREEDY)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert "eos_token_id=[7, 9]" in messages[0]
