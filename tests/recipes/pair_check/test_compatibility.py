"""Tokenizers, ends of turns and chat templates of a pair."""

from pathlib import Path

import pytest
from test_vocabulary import TOKENIZERS
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from transformers_kad.integrations.loading import load_tokenizer
from transformers_kad.recipes.arguments import ModelArguments
from transformers_kad.recipes.pair import Pair
from transformers_kad.recipes.pair_check.compatibility import compare_ends, compare_templates, compare_vocabularies

TINY = Path(__file__).resolve().parents[3] / "recipes" / "tiny_pair"


@pytest.fixture
def tokenizers():
    return load_tokenizer(TINY / "base"), load_tokenizer(TINY / "proxy")


def test_one_vocabulary_needs_no_alignment(tokenizers):
    found = compare_vocabularies(*tokenizers, ["Mia has 12 apples."])
    assert (found.difference, found.shares, found.refusal, found.report) == (None, 1.0, None, None)


def test_the_share_is_that_of_the_prompts(tokenizers):
    other = TOKENIZERS["byte-level"]
    one = compare_vocabularies(tokenizers[0], other, ["a b c d"])
    words = compare_vocabularies(tokenizers[0], other, ["Mia has 12 apples. She buys 30 more apples."])
    assert one.difference is not None and one.report is not None
    assert words.shares < one.shares <= 1
    assert words.report["base_text_tokens"] > 5


def test_tokens_that_are_no_text_are_refused_with_the_reason(tokenizers):
    pieces = Tokenizer(models.WordPiece(vocab={"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    pieces.decoder = decoders.WordPiece()
    found = compare_vocabularies(tokenizers[0], PreTrainedTokenizerFast(tokenizer_object=pieces), ["a b"])
    assert "WordPiece" in found.refusal
    assert found.shares == 0


def test_equal_templates_render_equal_prompts(tokenizers):
    found = compare_templates(*tokenizers, "How many?", {})
    assert (found.base, found.proxy, found.prompts_equal) == (True, True, True)


def test_templates_that_render_differently_or_refuse_are_told(tokenizers):
    base, proxy = tokenizers
    proxy.chat_template = "{{ messages[0].content }}!"
    assert compare_templates(base, proxy, "How many?", {}).prompts_equal is False
    proxy.chat_template = "{{ raise_exception('no') }}"
    assert compare_templates(base, proxy, "How many?", {}).prompts_equal is False


def test_a_missing_template_is_told(tokenizers):
    base, proxy = tokenizers
    proxy.chat_template = None
    found = compare_templates(base, proxy, [{"role": "user", "content": "How many?"}], {})
    assert (found.base, found.proxy, found.prompts_equal) == (True, False, None)


def test_the_ends_of_the_tiny_pair_are_shared():
    pair = Pair(ModelArguments(base=str(TINY / "base"), proxy=str(TINY / "proxy"), device="cpu"))
    found = compare_ends(pair)
    assert found.of_call == pair.eos_token_ids
    assert found.proxy == found.proxy_shared == 1
