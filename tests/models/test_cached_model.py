"""CachedModel against plain forwards, however the texts change between calls."""

import pytest
import torch
from tiny_models import tiny_model

from transformers_kad.models.cached_model import CachedModel


def plain(model, ids, keep=1, mask=None):
    """Logits without any cache, row by row without padding."""
    rows = []
    for row in range(len(ids)):
        text = ids[row] if mask is None else ids[row][mask[row].bool()]
        with torch.no_grad():
            rows.append(model(text[None]).logits[0, -keep:])
    return torch.stack(rows)


def random_ids(rows, length, seed=0):
    return torch.randint(1, 50, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral", "gpt2"])
@pytest.mark.parametrize("chunk", [None, 3])
def test_logits_are_those_of_a_plain_forward(architecture, chunk):
    """A random walk of growing, shrinking, branching, reordering and unrelated texts."""
    model = tiny_model(architecture, seed=3)
    cached = CachedModel(model)
    generator = torch.Generator().manual_seed(1)
    ids = random_ids(2, 10)
    for step in range(40):
        move = int(torch.randint(0, 6, (), generator=generator))
        if move == 0:  # grow
            ids = torch.cat([ids, random_ids(len(ids), 1 + step % 4, seed=step)], dim=1)
        elif move == 1:  # shrink
            ids = ids[:, : max(5, ids.shape[1] - 3)]
        elif move == 2:  # branch
            ids = torch.cat([ids[:, :-1], random_ids(len(ids), 1, seed=step)], dim=1)
        elif move == 3:  # reorder and duplicate rows
            ids = ids[torch.randint(0, len(ids), (len(ids),), generator=generator)]
        elif move == 4:  # other number of rows
            ids = ids[torch.randint(0, len(ids), (1 + step % 3,), generator=generator)]
        else:  # something else
            ids = random_ids(1 + step % 3, 8, seed=100 + step)
        keep = 1 + step % 3
        got = cached.logits(ids, logits_to_keep=keep, chunk_size=chunk)
        torch.testing.assert_close(got, plain(model, ids, keep), atol=1e-4, rtol=1e-4)
        cached.crop(ids.shape[1] - step % 2)


def test_left_padding():
    model = tiny_model(seed=3)
    cached = CachedModel(model)
    ids, mask = random_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    for _ in range(3):
        got = cached.logits(ids, mask, logits_to_keep=2)
        torch.testing.assert_close(got, plain(model, ids, 2, mask), atol=1e-4, rtol=1e-4)
        ids, mask = torch.cat([ids, ids[:, -1:]], dim=1), torch.cat([mask, mask[:, -1:]], dim=1)
    # The same ids under another mask are another text.
    other = torch.ones_like(mask)
    torch.testing.assert_close(cached.logits(ids, other), plain(model, ids), atol=1e-4, rtol=1e-4)


def test_drafts_taken_back_by_promise():
    model = tiny_model("mistral", seed=3)
    cached = CachedModel(model)
    text = random_ids(1, 20)
    cached.logits(text)
    for seed in range(6):
        draft = torch.cat([text, random_ids(1, 3, seed=seed)], dim=1)
        for length in range(text.shape[1] + 1, draft.shape[1] + 1):
            got = cached.logits(draft[:, :length], continues=True)
            torch.testing.assert_close(got, plain(model, draft[:, :length]), atol=1e-4, rtol=1e-4)
        text = torch.cat([draft[:, : text.shape[1] + seed % 3], random_ids(1, 1, seed=50 + seed)], dim=1)
        cached.crop(text.shape[1] - 1)
        got = cached.logits(text, continues=True)
        torch.testing.assert_close(got, plain(model, text), atol=1e-4, rtol=1e-4)


def test_an_empty_text_is_refused():
    with pytest.raises(ValueError, match="empty prompt"):
        CachedModel(tiny_model()).logits(torch.empty(1, 0, dtype=torch.long))
