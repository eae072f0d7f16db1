"""CachedModel against plain forwards, however the texts change between calls."""

import pytest
import torch
from architectures import LONGROPE
from tiny_families import tiny_family
from tiny_models import tiny_model

from transformers_kad.models.base_model import BaseModel
from transformers_kad.models.cache_rollback import layers_of
from transformers_kad.models.cached_model import CachedModel
from transformers_kad.models.text_reader import TextReader


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


# Of every kind of cache: full attention, windows, convolutions, recurrent states, both in one layer, states that are
# read one token at a time, a cache of a model's own, positions by columns, no cache.
KINDS = [
    "llama",
    "mistral",
    "lfm2",
    "qwen3_next",
    "falcon_h1",
    "zaya",
    "mamba2",
    "jamba",
    "minimax",
    "bloom",
    "mpt",
]


def padded(rows):
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


def check_logits(model, got, rows):
    """Logits at the last positions of rows against those of each row alone, without a cache."""
    for row, text in enumerate(rows):
        ids = torch.tensor([text])
        with torch.no_grad():
            expected = model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, -got.shape[1] :]
        torch.testing.assert_close(got[row], expected, atol=2e-3, rtol=2e-3)


# Of five rounds with drafts of four tokens, how many of them each row keeps. Behind the second round a row leaves.
KEPT = ([1, 4, 2], [3, 1, 4], [2, 1], [2, 4], [1, 2])


def read_rounds(model, rows, *, at_once):
    """Rounds after some prompts: the model that has read them, and the texts.

    `at_once` says whether a draft is read in one forward.
    """
    cached = CachedModel(model)
    check_logits(model, cached.logits(*padded(rows)), rows)
    for number, of_rows in enumerate(KEPT):
        draft = random_ids(len(rows), 4, seed=10 + number)
        texts = rows
        for step in [draft] if at_once else draft.split(1, dim=1):
            texts = [text + more for text, more in zip(texts, step.tolist(), strict=True)]
            check_logits(model, cached.extend(step, logits_to_keep=step.shape[1]), texts)
        kept = of_rows[:1] * len(rows) if cached.needs_rows_in_step else of_rows
        cached.take_back([4 - count for count in kept])
        rows = [text + own[:count] for text, own, count in zip(rows, draft.tolist(), kept, strict=True)]
        if number == 1:
            cached.select_rows([2, 0])
            rows = [rows[2], rows[0]]
    return cached, rows


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("family", KINDS)
def test_rows_that_take_back_different_numbers_read_on_as_if_they_were_alone(family, at_once):
    model = tiny_family(family, seed=3)  # windows of 8
    rows = [random_ids(1, length, seed=length)[0].tolist() for length in (11, 5, 9)]
    cached, rows = read_rounds(model, rows, at_once=at_once)
    # A later call goes on with the texts, and with other ones.
    rows = [[*row, 5, 6] for row in rows]
    check_logits(model, cached.logits(*padded(rows)), rows)
    other = [row[:6] for row in rows]
    check_logits(model, cached.logits(*padded(other)), other)


@pytest.mark.parametrize(
    ("family", "at_once", "expected"),
    [
        ("llama", True, False),
        ("mistral", True, False),
        ("qwen3_next", False, False),  # there is a copy of the states from before each forward
        ("qwen3_next", True, True),
        ("bloom", False, True),
        ("minimax", False, True),
    ],
)
def test_rows_go_in_step_where_they_cannot_take_back_their_own_numbers(family, at_once, expected):
    cached = CachedModel(tiny_family(family))
    cached.logits(random_ids(2, 9))
    for step in [random_ids(2, 2, seed=1)] if at_once else random_ids(2, 2, seed=1).split(1, dim=1):
        cached.extend(step)
    assert cached.needs_rows_in_step is expected
    alone = CachedModel(cached.model)
    alone.logits(random_ids(1, 9))
    alone.extend(random_ids(1, 2))
    assert not alone.needs_rows_in_step


def test_a_model_without_a_cache_reads_all_again():
    model = tiny_family("rwkv")
    cached, rows = CachedModel(model), [random_ids(1, 9)[0].tolist()]
    with pytest.warns(UserWarning, match="reads the whole text again for every token"):
        check_logits(model, cached.logits(torch.tensor(rows)), rows)
    assert not cached.has_cache
    draft = random_ids(1, 4, seed=1)
    check_logits(model, cached.extend(draft, logits_to_keep=4), [rows[0] + draft[0].tolist()])
    cached.take_back([3])
    check_logits(model, cached.extend(draft), [rows[0] + draft[0, :1].tolist() + draft[0].tolist()])


@pytest.mark.parametrize("family", ["falcon_h1", "granitemoehybrid", "lfm2", "mamba", "mamba2", "qwen3_next"])
@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_padding_is_no_token_in_any_chunk_of_a_prompt(family, chunk):
    """Layers with states ignore the mask of a forward over a single column."""
    model = tiny_family(family)
    ids, mask = random_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :6] = 0
    for reader in (CachedModel(model), BaseModel(model, ids, mask, {})):
        for _ in range(2):  # the second time it is known how the model reads behind a cache
            got = reader.logits(ids, mask, chunk_size=chunk)
            torch.testing.assert_close(got[:1], plain(model, ids[:1, 6:]), atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(got[1:], plain(model, ids[1:]), atol=1e-4, rtol=1e-4)
            reader.reset()


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_next", "lfm2"])
def test_columns_that_all_rows_were_moved_by_leave_the_cache(family):
    """Rows that take turns in accepting their drafts hold no more columns than the longest text has."""
    model, generator = tiny_family(family), torch.Generator().manual_seed(0)
    reader, texts = CachedModel(model), random_ids(2, 4).tolist()
    reader.logits(torch.tensor(texts))
    for turn in range(8):
        for _ in range(3):
            new = torch.randint(3, 50, (2, 1), generator=generator)
            logits = reader.extend(new)
            texts = [[*text, int(token)] for text, token in zip(texts, new, strict=True)]
        back = [2, 0] if turn % 2 else [0, 2]
        reader.take_back(back)
        texts = [text[: len(text) - count] for text, count in zip(texts, back, strict=True)]
        assert reader.cached_length == max(map(len, texts))
    reader.take_back([0, 0])
    new = torch.randint(3, 50, (2, 1), generator=generator)
    logits = reader.extend(new)
    for row, text in enumerate(texts):
        expected = plain(model, torch.tensor([[*text, int(new[row])]]))
        torch.testing.assert_close(logits[row : row + 1], expected, atol=1e-4, rtol=1e-4)
    for layer in layers_of(reader._cache):
        if getattr(layer, "keys", None) is not None and not getattr(layer, "is_sliding", False):
            assert layer.keys.shape[-2] == reader.cached_length
    reader.select_rows([0])
    assert reader.cached_length == len(texts[0]) + 1


@pytest.mark.parametrize(("following", "forwards"), [(4, 1), (2, 2)])
def test_accepted_tokens_that_wait_are_read_with_the_next(following, forwards):
    """Three tokens stay of a forward over four, whose states were restored to before it."""
    model, prompts = tiny_family("qwen3_next"), random_ids(2, 9)
    cached = CachedModel(model)
    cached.logits(prompts)
    draft, more = random_ids(2, 4, seed=1), random_ids(2, following, seed=2)
    cached.extend(draft)
    cached.take_back([1, 1])
    assert cached.cached_length == 9
    cached.select_rows([1, 0])  # what waits goes along
    before = cached.forwards
    texts = torch.cat([prompts, draft[:, :3], more[[1, 0]]], dim=1)[[1, 0]].tolist()
    check_logits(model, cached.extend(more, logits_to_keep=2), texts)
    assert cached.forwards - before == forwards  # more than the new ones have one of their own
    cached.take_back([following, following])
    check_logits(model, cached.extend(more), texts)


def test_what_waits_at_the_end_of_a_call_is_read_by_the_next():
    model, prompts, draft = tiny_family("qwen3_next"), random_ids(1, 9), random_ids(1, 4, seed=1)
    cached = CachedModel(model)
    cached.logits(prompts)
    cached.extend(draft)
    cached.take_back([2])
    text = torch.cat([prompts, draft[:, :2], random_ids(1, 3, seed=2)], dim=1)
    check_logits(model, cached.logits(text), text.tolist())


@pytest.mark.parametrize("family", ["mistral", "lfm2", "qwen3_next", "zaya"])
def test_gaps_are_closed_also_where_the_texts_continue(family):
    """The rows move when one of them has a token more than another."""
    model = tiny_family(family)
    cached, ids = CachedModel(model), random_ids(2, 14)
    mask = torch.ones_like(ids)
    mask[0, 10] = mask[1, 12] = 0
    for length in (10, 12, 14):
        texts = [row[kept.bool()].tolist() for row, kept in zip(ids[:, :length], mask[:, :length], strict=True)]
        got = cached.logits(ids[:, :length], mask[:, :length], continues=length > 10)
        check_logits(model, got, texts)


@pytest.mark.parametrize("family", ["llama", "qwen3_next", "lfm2", "mistral"])
def test_a_cache_of_inference_mode_goes_on_outside_of_it(family):
    model, prompts, draft = tiny_family(family), random_ids(3, 9), random_ids(3, 2, seed=1)
    cached = CachedModel(model)
    with torch.inference_mode():
        cached.logits(prompts)
        for step in draft.split(1, dim=1):
            cached.extend(step)
        cached.take_back([0, 1, 2])
        cached.select_rows([2, 1])
    texts = [prompts[2].tolist(), prompts[1].tolist() + draft[1, :1].tolist()]
    check_logits(
        model, cached.extend(draft[:2]), [text + more for text, more in zip(texts, draft.tolist()[:2], strict=True)]
    )


def test_padding_of_all_rows_leaves_a_model_that_counts_columns_for_its_embeddings():
    """When the longest row leaves, the others have not reached the longer factors of LongRoPE."""
    model = tiny_family("phi3", window=64, **LONGROPE)  # which change behind 16 tokens
    cached = CachedModel(model)
    rows = [random_ids(1, length, seed=length)[0].tolist() for length in (15, 9)]
    cached.logits(*padded(rows))
    draft = random_ids(2, 3, seed=1)
    for step in draft.split(1, dim=1):
        cached.extend(step)
    cached.take_back([0, 0])
    cached.select_rows([1])
    text = rows[1] + draft[1].tolist()
    assert cached.cached_length == 0
    for token in range(10, 20):  # passes the 16 tokens
        text = [*text, token]
        check_logits(model, cached.extend(torch.tensor([[token]])), [text])


@pytest.mark.parametrize("family", ["mistral", "lfm2", "zaya"])
def test_a_hole_within_a_round_leaves_less_to_take_back(family):
    """Closing it makes windows forget what they recorded, so that the text is read anew."""
    model, prompts = tiny_family(family), random_ids(2, 12)
    cached = CachedModel(model)
    cached.logits(prompts)
    cached.extend(torch.tensor([[0, 7], [9, 7]]), torch.tensor([[0, 1], [1, 1]]))
    for step in random_ids(2, 2, seed=1).split(1, dim=1):
        cached.extend(step)
    cached.take_back([3, 4])
    check_logits(
        model, cached.extend(torch.tensor([[5], [6]])), [[*prompts[0].tolist(), 5], [*prompts[1].tolist(), 6]]
    )


def test_several_logits_behind_a_state_that_is_read_one_by_one():
    """Mamba ignores its state in a forward of several tokens, so that the text is read as a whole."""
    model, ids = tiny_family("mamba"), random_ids(1, 14)
    cached = CachedModel(model)
    cached.logits(ids[:, :8])
    got = cached.logits(ids, logits_to_keep=5)
    with torch.no_grad():
        torch.testing.assert_close(got, model(ids).logits[:, -5:], atol=1e-3, rtol=1e-3)


def test_a_draft_that_was_read_with_the_prompt_is_taken_back_without_reading_the_prompt_again():
    model = tiny_model("mistral", seed=3)  # a window of 8
    widths = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    reader = TextReader(CachedModel(model), vocabulary=50)
    reader.begin(random_ids(1, 20))
    reader.read(random_ids(1, 5, seed=1), logits_to_keep=6)
    reader.accept([1])
    reader.read(random_ids(1, 6, seed=2), logits_to_keep=6)
    assert widths == [20, 5, 6]


@pytest.mark.parametrize(("architecture", "joins"), [("llama", True), ("gpt2", True), ("mistral", False)])
def test_readers_join(architecture, joins):
    """Rows that come with shorter and with longer texts; windows can't be joined, and nothing changes."""
    model = tiny_model(architecture, seed=3)
    ids, mask = random_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    reader = CachedModel(model)
    reader.logits(ids, mask)
    for length in (5, 14):
        new = random_ids(2, length, seed=length)
        other, new_mask = CachedModel(model), torch.ones_like(new)
        new_mask[0, :3] = 0
        other.logits(new, new_mask)
        forwards = reader.forwards
        assert reader.join(other) == joins
        assert reader.cached_length == (max(9, length) if joins else 9)
        assert reader.forwards == forwards
        if not joins:
            break
        width = max(ids.shape[1], length)
        ids, mask = (
            torch.cat([torch.nn.functional.pad(part, (width - part.shape[1], 0)) for part in parts])
            for parts in ((ids, new), (mask, new_mask))
        )
    ids, mask = torch.cat([ids, ids[:, -1:]], dim=1), torch.nn.functional.pad(mask, (0, 1), value=1)
    torch.testing.assert_close(
        reader.logits(ids, mask, continues=True), plain(model, ids, 1, mask), atol=1e-4, rtol=1e-4
    )


def test_a_reader_that_has_read_nothing_joins_nobody():
    model, reader = tiny_model(seed=3), CachedModel(tiny_model(seed=3))
    assert not reader.join(CachedModel(model))
    reader.logits(random_ids(1, 4))
    assert not reader.join(CachedModel(model))
    assert reader.cached_length == 4
