"""The memory of static caches, in which every row has a length of its own."""

import torch
from tiny_models import tiny_model
from transformers.masking_utils import create_masks_for_generate

from transformers_kad.models.static_cache import RowCache, TextStore, has_attention_only, has_windows
from transformers_kad.models.static_masks import ColumnMasks

CPU = torch.device("cpu")


def filled_store(rows: int = 4, capacity: int = 6) -> TextStore:
    """A store of one layer, whose numbers tell row and column."""
    store = TextStore(1, rows=rows, capacity=capacity, device=CPU)
    numbers = 10 * torch.arange(rows)[:, None] + torch.arange(capacity)
    store.allocate(0, torch.zeros(1, 2, 1, 3), torch.zeros(1, 2, 1, 3))
    store.tokens.copy_(numbers)
    store.keys[0].copy_(numbers[:, None, :, None].expand(-1, 2, -1, 3))
    store.values[0].copy_(-store.keys[0])
    return store


def test_rows_change_places_up_to_a_column() -> None:
    store = filled_store()
    store.move_rows([3, 0], [0, 3], 4)
    assert store.tokens[0].tolist() == [30, 31, 32, 33, 4, 5]
    assert store.tokens[3].tolist() == [0, 1, 2, 3, 34, 35]
    assert store.tokens[1].tolist() == [10, 11, 12, 13, 14, 15]
    for row in range(4):
        assert torch.equal(store.keys[0][row, 1, :, 2], store.tokens[row].float())
        assert torch.equal(store.values[0][row, 0, :, 0], -store.tokens[row].float())


def test_a_larger_store_has_the_same_texts_and_the_old_one_is_freed() -> None:
    store = filled_store()
    expected = store.keys[0].clone()
    larger = store.resized(8, 10)
    assert store.keys == [None]
    assert larger.keys[0].shape == (8, 2, 10, 3)
    assert torch.equal(larger.keys[0][:4, :, :6], expected)
    assert torch.equal(larger.values[0][:4, :, :6], -expected)
    assert torch.equal(larger.tokens[:4, :6], store.tokens)


def test_every_row_is_written_behind_its_own_text() -> None:
    store = filled_store()
    store.starts.copy_(torch.tensor([1, 4, 0, 3]))
    cache = RowCache(store, 2)
    new = torch.tensor([[101.0, 102.0], [103.0, 104.0]])[:, None, :, None].expand(-1, 2, -1, 3)
    keys, values = cache.update(new, -new, 0)
    assert keys[:, 1, :, 2].tolist() == [[0, 101, 102, 3, 4, 5], [10, 11, 12, 13, 103, 104]]
    assert torch.equal(values, -keys)
    assert store.keys[0][2, 0, :, 0].tolist() == [20, 21, 22, 23, 24, 25]  # rows beyond the cache stay
    assert keys.data_ptr() == store.keys[0].data_ptr()
    assert all(layer.cumulative_length.data_ptr() == store.starts.data_ptr() for layer in cache.layers)
    assert cache.get_mask_sizes(2, 0) == (6, 0)


def test_prompts_are_written_to_the_same_columns_of_all_rows() -> None:
    store = filled_store()
    cache = RowCache(store, 2, begin=1)
    new = torch.full((2, 2, 3, 3), 7.0)
    keys, _ = cache.update(new, new, 0)
    assert keys[:, 0, :, 0].tolist() == [[0, 7, 7, 7], [10, 7, 7, 7]]
    assert cache.get_mask_sizes(3, 0) == (4, 0)
    assert cache.get_seq_length() == 1


def test_masks_are_those_that_generate_makes_for_one_row() -> None:
    for architecture in ("llama", "mistral"):
        model = tiny_model(architecture)
        assert has_windows(model) == (architecture == "mistral")
        assert has_attention_only(model)
        for implementation in ("sdpa", "eager"):
            model.set_attn_implementation(implementation)
            masks = ColumnMasks(model)
            store = TextStore(2, rows=1, capacity=24, device=CPU)
            for begin in (3, 13):
                store.starts.fill_(begin)
                columns = torch.arange(begin, begin + 4)[None]
                cache = RowCache(store, 1)
                expected = create_masks_for_generate(model.config, torch.zeros(1, 4, 16), None, cache)
                assert torch.equal(masks.build(columns, 24, torch.float32), expected)


def test_every_row_has_a_mask_of_its_own_columns() -> None:
    mask = ColumnMasks(tiny_model("mistral", sliding_window=3)).build(torch.tensor([[0, 1], [4, 5]]), 7, torch.float32)
    assert mask.shape == (2, 1, 2, 7)
    assert mask.long()[:, 0].tolist() == [
        [[1, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0]],
        [[0, 0, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 0]],
    ]
