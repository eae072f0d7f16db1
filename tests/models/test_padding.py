"""Padding and holes: which columns of a text are its tokens."""

import torch
from test_cached_model import plain, random_ids
from tiny_models import tiny_model

from transformers_kad.models.cached_model import CachedModel
from transformers_kad.models.padding import PaddedTexts, keep_ends, match_rows


def test_a_hole_behind_texts_without_padding_is_not_read():
    """One row goes on with a token more than the other."""
    model, ids = tiny_model("llama", seed=3), random_ids(2, 6)
    cached = CachedModel(model)
    cached.logits(ids)
    logits = cached.extend(torch.tensor([[0, 7], [9, 7]]), torch.tensor([[0, 1], [1, 1]]))
    torch.testing.assert_close(logits[:1], plain(model, torch.cat([ids[:1], torch.tensor([[7]])], dim=-1)))
    torch.testing.assert_close(logits[1:], plain(model, torch.cat([ids[1:], torch.tensor([[9, 7]])], dim=-1)))


IDS = torch.tensor([[0, 5, 6, 7], [8, 9, 10, 11]])
MASK = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])


def test_a_mask_is_made_when_something_is_no_token():
    texts = PaddedTexts(IDS)
    assert texts.extend(IDS, None).mask is None
    assert texts.extend(IDS, torch.ones_like(IDS)).mask is None
    assert texts.extend(IDS, MASK).mask.tolist() == [[1] * 4 + [0, 1, 1, 1], [1] * 8]
    assert PaddedTexts(IDS, MASK).extend(IDS, None).mask.tolist() == [[0, 1, 1, 1] + [1] * 4, [1] * 8]


def test_rows_keep_different_columns_and_holes_are_closed():
    texts = PaddedTexts(IDS, MASK).extend(torch.tensor([[20, 21, 22], [30, 31, 32]]), None)
    kept = texts.keep(4, torch.tensor([[True, True], [True, False]]))
    assert kept.ids.tolist() == [[0, 5, 6, 7, 20, 21], [8, 9, 10, 11, 30, 31]]
    assert kept.mask.tolist() == [[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]]
    assert kept.lengths.tolist() == [5, 5]
    closed, columns = kept.close_holes(5)
    assert closed.ids.tolist() == [[5, 6, 7, 20, 21], [8, 9, 10, 11, 30]]
    assert closed.full_mask.all()
    assert columns.tolist() == [[1, 2, 3, 4, 5], [0, 1, 2, 3, 4]]
    # What was counted is not counted again.
    again = closed.extend(torch.tensor([[40], [41]]), None).keep(5, torch.tensor([[False], [True]]))
    assert again.lengths.tolist() == [5, 6]
    assert again.select_rows([1]).lengths.tolist() == [6]
    assert again.crop(5).lengths is None


def test_each_text_finds_the_row_that_shares_most():
    held = PaddedTexts(torch.tensor([[1, 2, 3, 4], [1, 2, 5, 6]]))
    texts = PaddedTexts(torch.tensor([[1, 2, 5, 6, 7], [1, 2, 3, 9, 9], [1, 2, 3, 4, 4]]))
    assert match_rows(held, texts) == (3, [1, 0, 0])
    assert match_rows(held, PaddedTexts(torch.tensor([[9, 2]])))[0] == 0
    # The same ids under another mask are another text, and of equally good rows the first one is taken.
    masked = PaddedTexts(torch.tensor([[1, 2, 3, 4]]), torch.tensor([[0, 1, 1, 1]]))
    assert match_rows(held, masked) == (0, [0])


def test_rows_keep_the_columns_before_their_own_ends():
    values = torch.arange(1, 11).view(2, 5)
    assert keep_ends(values, [4, 4], 3, dim=-1).tolist() == [[2, 3, 4], [7, 8, 9]]
    assert keep_ends(values, [5, 3], 4, dim=-1).tolist() == [[2, 3, 4, 5], [0, 6, 7, 8]]
    assert keep_ends(values, [2, 2], 3, dim=-1).tolist() == [[0, 1, 2], [0, 6, 7]]
    other_dimension = keep_ends(values.view(2, 5, 1), [5, 3], 2, dim=-2)
    assert other_dimension.flatten(1).tolist() == [[4, 5], [7, 8]]


def test_rows_that_take_back_different_numbers_end_in_the_same_column():
    texts = PaddedTexts(IDS, MASK)
    shorter = texts.take_back([0, 2])
    assert shorter.ids.tolist() == [[0, 5, 6, 7], [0, 0, 8, 9]]
    assert shorter.mask.tolist() == [[0, 1, 1, 1], [0, 0, 1, 1]]
    assert texts.take_back([1, 1]).ids.tolist() == [[0, 5, 6], [8, 9, 10]]
    assert PaddedTexts(IDS).take_back([1, 1]).mask is None
    assert PaddedTexts(IDS).take_back([1, 2]).mask.tolist() == [[1, 1, 1], [0, 1, 1]]


def test_columns_that_all_rows_were_moved_by_are_left_out():
    """Otherwise the texts would grow in every round by as many columns as the row with the most new tokens."""
    texts = PaddedTexts(IDS, MASK).take_back([0, 2])
    assert texts.moved == (0, 2)
    texts = texts.extend(torch.tensor([[1, 2], [3, 4]]), None).take_back([1, 0])
    assert texts.ids.tolist() == [[0, 5, 6, 7, 1], [0, 8, 9, 3, 4]]
    assert texts.moved == (0, 1)
    alone = texts.select_rows([1]).without_moved()
    assert (alone.ids.tolist(), alone.moved) == ([[8, 9, 3, 4]], (0,))
    texts = texts.extend(torch.tensor([[1, 2], [3, 4]]), None).take_back([2, 0])
    assert texts.ids.tolist() == [[0, 0, 5, 6, 7, 1], [8, 9, 3, 4, 3, 4]]
    assert texts.mask.tolist() == [[0, 0, 1, 1, 1, 1], [1] * 6]
    assert texts.moved == (1, 0)


def test_zeros_between_tokens_are_gaps_and_padding_is_none():
    assert not PaddedTexts(IDS).has_gaps
    assert not PaddedTexts(IDS, MASK).has_gaps
    texts = PaddedTexts(IDS, torch.tensor([[0, 1, 0, 1], [1, 0, 1, 1]]))
    assert texts.has_gaps
    closed = texts.without_gaps()
    assert closed.ids.tolist() == [[6, 5, 7], [8, 10, 11]]
    assert closed.mask.tolist() == [[0, 1, 1], [1, 1, 1]]
    assert not closed.has_gaps
    padded = PaddedTexts(IDS, MASK)
    assert padded.without_gaps() is padded


def test_common_padding_is_left_out():
    texts = PaddedTexts(IDS, MASK).keep(2, torch.ones(2, 2, dtype=torch.bool))
    shorter = texts.without_first(1)
    assert shorter.ids.tolist() == [[5, 6, 7], [9, 10, 11]]
    assert shorter.mask.tolist() == [[1, 1, 1], [1, 1, 1]]
    assert shorter.lengths.tolist() == [3, 4]


def test_texts_of_different_length_are_padded_and_joined():
    short, long = PaddedTexts(IDS[:, 1:]), PaddedTexts(IDS, MASK)
    assert short.padded_to(3) is short
    padded = short.padded_to(5)
    assert padded.ids.tolist() == [[0, 0, 5, 6, 7], [0, 0, 9, 10, 11]]
    assert padded.mask.tolist() == [[0, 0, 1, 1, 1]] * 2
    joined = long.padded_to(5).join(padded)
    assert joined.ids.tolist() == [[0, 0, 5, 6, 7], [0, 8, 9, 10, 11], [0, 0, 5, 6, 7], [0, 0, 9, 10, 11]]
    assert joined.mask.tolist() == [[0, 0, 1, 1, 1], [0, 1, 1, 1, 1], *[[0, 0, 1, 1, 1]] * 2]
    assert short.join(short).mask is None
