"""Padding and holes: which columns of a text are its tokens."""

import torch
from test_cached_model import plain, random_ids
from tiny_models import tiny_model

from transformers_kad.models.cached_model import CachedModel
from transformers_kad.models.padding import PaddedTexts, match_rows


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
    assert again.select_rows(torch.tensor([1])).lengths.tolist() == [6]
    assert again.crop(5).lengths is None


def test_each_text_finds_the_row_that_shares_most():
    held = PaddedTexts(torch.tensor([[1, 2, 3, 4], [1, 2, 5, 6]]))
    texts = PaddedTexts(torch.tensor([[1, 2, 5, 6, 7], [1, 2, 3, 9, 9], [1, 2, 3, 4, 4]]))
    assert match_rows(held, texts) == (3, [1, 0, 0])
    assert match_rows(held, PaddedTexts(torch.tensor([[9, 2]])))[0] == 0
    # The same ids under another mask are another text, and of equally good rows the first one is taken.
    masked = PaddedTexts(torch.tensor([[1, 2, 3, 4]]), torch.tensor([[0, 1, 1, 1]]))
    assert match_rows(held, masked) == (0, [0])
