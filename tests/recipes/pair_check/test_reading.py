"""p and q along a text: those of forwards over the whole text, whatever the blocks, prompts and tokenizers."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_model

from transformers_kad.integrations.loading import load_model, load_tokenizer
from transformers_kad.models.model_errors import ContextLengthError, UnusableLogitsError
from transformers_kad.models.vocabulary import VocabularyAlignment
from transformers_kad.recipes.pair_check import reading
from transformers_kad.recipes.pair_check.reading import PairReader

TINY = Path(__file__).resolve().parents[3] / "recipes" / "tiny_pair"
TEXT = [5, 9, 31, 4, 4, 17, 8, 40, 2, 11, 23]


def inputs_of(ids):
    return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}


def pair_of(base, proxy, alignment=None):
    return SimpleNamespace(base=base, proxy=proxy, alignment=alignment)


def whole(model, prompt, text):
    """The distributions at every position of the text, by one forward without a cache."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + text]), use_cache=False).logits[0]
    return logits[len(prompt) - 1 : -1].softmax(-1)


@pytest.mark.parametrize("at_once", [1, 3, 100])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt2"])
def test_blocks_are_the_positions_of_a_whole_forward(architecture, at_once, base, monkeypatch):
    proxy = tiny_model(architecture, seed=4)
    monkeypatch.setattr(reading, "PROBABILITIES_AT_ONCE", 50 * at_once)
    prompt, own = [3, 7, 7, 12], [44, 1]
    reader = PairReader(pair_of(base, proxy))
    for proxy_prompt in (None, own, None):  # the caches of an earlier text change nothing
        blocks = list(reader.read(TEXT, inputs_of(prompt), None if proxy_prompt is None else inputs_of(proxy_prompt)))
        assert [len(block.tokens) for block in blocks][:-1] == [at_once] * (len(blocks) - 1)
        assert torch.cat([block.tokens for block in blocks]).tolist() == TEXT
        p = torch.cat([block.base_probs for block in blocks])
        q = torch.cat([block.proxy_probs for block in blocks])
        torch.testing.assert_close(p, whole(base, prompt, TEXT), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(q, whole(proxy, proxy_prompt or prompt, TEXT), rtol=1e-4, atol=1e-6)
        assert not any(bool(block.unknown.any()) for block in blocks)


def test_no_more_probabilities_are_held_than_allowed(monkeypatch):
    base, proxy = tiny_model(vocabulary=1000), tiny_model(vocabulary=990, seed=1)
    monkeypatch.setattr(reading, "PROBABILITIES_AT_ONCE", 4500)
    blocks = list(PairReader(pair_of(base, proxy)).read(TEXT, inputs_of([1, 2])))
    assert [block.base_probs.shape for block in blocks] == [(4, 1000), (4, 1000), (3, 1000)]
    assert blocks[0].unknown.nonzero().flatten().tolist() == list(range(990, 1000))


def test_a_proxy_with_a_tokenizer_of_its_own_is_read_in_its_own_tokens():
    tokenizer, other = (load_tokenizer(TINY / "base") for _ in range(2))
    base, proxy = load_model(TINY / "base"), load_model(TINY / "reference")
    alignment = VocabularyAlignment(tokenizer, other)
    ids = tokenizer("Mia has 12 apples. She buys 30 more. So there are 42.")["input_ids"]
    prompt, text = inputs_of(ids[:6]), ids[6:]
    (plain,) = PairReader(pair_of(base, proxy)).read(text, prompt)
    (aligned,) = PairReader(pair_of(base, proxy, alignment)).read(text, prompt)
    torch.testing.assert_close(aligned.proxy_probs, plain.proxy_probs)
    torch.testing.assert_close(aligned.base_probs, plain.base_probs)


def test_unusable_logits_name_the_model(base):
    proxy = tiny_model(seed=5)
    with torch.no_grad():
        proxy.lm_head.weight[3] = torch.nan
    with pytest.raises(UnusableLogitsError, match="proxy"):
        list(PairReader(pair_of(base, proxy)).read(TEXT, inputs_of([1, 2])))


def test_a_text_beyond_the_context_is_refused(base):
    proxy = tiny_model(seed=5, max_position_embeddings=8)
    with pytest.raises(ContextLengthError, match="8"):
        list(PairReader(pair_of(base, proxy)).read(TEXT, inputs_of([1, 2])))
