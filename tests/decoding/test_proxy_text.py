"""The base's texts as the proxy reads them, against the plain concatenation of its parts."""

import pytest
import torch
from test_vocabulary import TOKENIZERS

from transformers_kad import align_vocabularies
from transformers_kad.decoding.proxy_text import ProxyText, without_placeholders

TEXT = torch.tensor([[0, 3, 14, 15], [2, 7, 18, 2]])
MASK = torch.tensor([[0, 1], [1, 1]])


def test_a_text_without_padding_is_itself():
    ids, mask = ProxyText(2)(TEXT)
    assert torch.equal(ids, TEXT)
    assert mask is None


def test_the_mask_of_the_prompts_goes_on_with_ones():
    text = ProxyText(2, MASK)
    ids, mask = text(TEXT)
    assert torch.equal(ids, TEXT)
    assert mask.tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]
    assert text.prompt_length == 2


def test_prompts_of_the_proxys_own_are_repeated_for_beams():
    prompt = torch.tensor([[30, 31, 32], [40, 41, 42]])
    text = ProxyText(2, MASK, (prompt, None))
    ids, mask = text(TEXT.repeat_interleave(2, 0))
    assert ids[:, :3].tolist() == [[30, 31, 32]] * 2 + [[40, 41, 42]] * 2
    assert torch.equal(ids[:, 3:], TEXT[:, 2:].repeat_interleave(2, 0))
    assert mask is None
    assert text.prompt_length == 3


def test_spelling_goes_on_where_it_was_and_begins_anew_for_other_texts():
    base, proxy = TOKENIZERS["tiny pair"], TOKENIZERS["byte-level"]
    alignment = align_vocabularies(base, proxy)
    prompt = torch.tensor([[1, 2]])
    generated = torch.tensor([base.encode(" carrots and apples")])
    text = ProxyText(2, None, (prompt, None), alignment)
    for row in (generated, generated.flip(-1)):
        for length in range(row.shape[1] + 1):
            ids, mask = text(torch.cat([prompt, row[:, :length]], -1))
            spelled, spelled_mask, _ = alignment.spell(row[:, :length])
            assert ids[:, 2:].tolist() == spelled.tolist()
            assert mask[:, 2:].tolist() == spelled_mask.tolist()


def test_placeholders_are_left_out_and_the_rest_is_padded_on_the_left():
    ids = torch.tensor([[1, 2, 9, 9, 8, 3], [0, 4, 9, 5, 9, 6], [0, 0, 0, 1, 2, 3]])
    mask = torch.tensor([[1] * 6, [0] + [1] * 5, [0] * 3 + [1] * 3])
    text, kept = without_placeholders(ids, mask, [8, 9])
    assert kept.tolist() == [[1, 1, 1], [1, 1, 1], [1, 1, 1]]
    assert text.tolist() == [[1, 2, 3], [4, 5, 6], [1, 2, 3]]
    text, kept = without_placeholders(ids[:2], None, [9])
    assert kept.tolist() == [[1, 1, 1, 1], [1, 1, 1, 1]]
    assert text.tolist() == [[1, 2, 8, 3], [0, 4, 5, 6]]
    text, kept = without_placeholders(ids, mask, [1])
    assert kept.tolist() == [[1] * 5, [1] * 5, [0] * 3 + [1] * 2]
    assert [row[m.bool()].tolist() for row, m in zip(text, kept, strict=True)] == [
        [2, 9, 9, 8, 3],
        [4, 9, 5, 9, 6],
        [2, 3],
    ]
    for placeholders in ([], [7]):
        assert without_placeholders(ids, mask, placeholders) == (ids, mask)
    with pytest.raises(ValueError, match="Prompt 2 has placeholders"):
        without_placeholders(ids, mask, [1, 2, 3])
