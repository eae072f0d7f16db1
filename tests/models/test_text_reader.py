"""A reader follows what the base emits, in the tokens of the model that it reads for."""

import pytest
import torch
from architectures import LONGROPE
from test_cached_model import plain, random_ids
from test_vocabulary import TOKENIZERS, align_cached
from tiny_families import tiny_family
from tiny_models import tiny_model

from transformers_kad.models.cached_model import CachedModel
from transformers_kad.models.model_errors import ContextLengthError, is_unusable
from transformers_kad.models.text_reader import TextReader, tempered

BASE, PROXY = "tiny pair", "byte-level"
SIZE = len(TOKENIZERS[BASE])


def reader_of(model, **settings):
    return TextReader(CachedModel(model), **{"vocabulary": 50, **settings})


def test_rows_go_on_from_what_each_of_them_accepted():
    model, prompts = tiny_model(seed=3), random_ids(3, 6)
    reader = reader_of(model, component_temperature=0.5)
    reader.begin(prompts)
    expected = plain(model, prompts) / 0.5
    torch.testing.assert_close(reader.read(), expected, atol=1e-4, rtol=1e-4)
    draft = random_ids(3, 3, seed=1)
    reader.read(draft, logits_to_keep=4)
    reader.accept([3, 0, 1])
    last = random_ids(3, 1, seed=2)
    got = reader.read(last)
    for row, count in enumerate([3, 0, 1]):
        text = torch.cat([prompts[row], draft[row, :count], last[row]])[None]
        torch.testing.assert_close(got[row : row + 1], plain(model, text) / 0.5, atol=1e-3, rtol=1e-3)
    # The token that ended a round stays, whatever is accepted in the next one; rows leave in between.
    reader.read(draft)
    reader.accept([0, 0, 0])
    reader.select_rows([2, 0])
    got = reader.read(draft[:2, :1])
    for place, (row, count) in enumerate([(2, 1), (0, 3)]):
        text = torch.cat([prompts[row], draft[row, :count], last[row], draft[place, :1]])[None]
        torch.testing.assert_close(got[place : place + 1], plain(model, text) / 0.5, atol=1e-3, rtol=1e-3)


def spelled(alignment, prompt, tokens):
    return torch.tensor([[*prompt.tolist(), *(piece for token in tokens for piece in alignment.spell_token(token))]])


def test_tokens_that_the_model_spells_in_several_count_as_one():
    alignment = align_cached(BASE, PROXY)
    widths = [len(alignment.spell_token(token)) for token in range(SIZE)]
    one, three = widths.index(1, 10), widths.index(3)
    model = tiny_model(vocabulary=len(TOKENIZERS[PROXY]), seed=3)
    reader = reader_of(model, vocabulary=SIZE, vocabulary_alignment=alignment)
    prompts = random_ids(2, 5)
    reader.begin(prompts)
    drafts = [[three, one, one], [one, three, one]]
    got = reader.read(torch.tensor(drafts), logits_to_keep=3)
    for row in range(2):
        for place in range(3):
            own = plain(model, spelled(alignment, prompts[row], drafts[row][: place + 1]))
            expected = alignment.to_base(own[:, 0], SIZE)[0]
            torch.testing.assert_close(got[row, place], expected, atol=1e-3, rtol=1e-3)
    reader.accept([1, 2])
    last = torch.tensor([[three], [one]])
    got = reader.read(last)
    for row, count in enumerate([1, 2]):
        own = plain(model, spelled(alignment, prompts[row], [*drafts[row][:count], int(last[row])]))
        torch.testing.assert_close(got[row, 0], alignment.to_base(own[:, 0], SIZE)[0], atol=1e-3, rtol=1e-3)


def test_the_context_is_counted_in_the_models_own_tokens():
    alignment = align_cached(BASE, PROXY)
    widths = [len(alignment.spell_token(token)) for token in range(SIZE)]
    one, three = widths.index(1, 10), widths.index(3)
    model = tiny_model(vocabulary=len(TOKENIZERS[PROXY]), seed=3, max_position_embeddings=16)
    reader = reader_of(model, vocabulary=SIZE, vocabulary_alignment=alignment)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    reader.begin(random_ids(2, 9), mask)
    assert reader.own_tokens_left(None) == [7, 11]
    assert reader.own_tokens_left(torch.tensor([[three], [one]])) == [4, 10]
    drafts = [[one, three, one], [three, three, three, three]]
    assert reader.cut_to_context(torch.tensor([[three], [one]]), drafts) == [drafts[0][:2], drafts[1][:3]]
    reader.read(torch.tensor([[three, three], [one, one]]))
    reader.accept([2, 2])
    assert reader.own_tokens_left(None) == [1, 9]
    with pytest.raises(ContextLengthError, match=r"has 18 tokens, but the proxy .* ends at 16"):
        reader.own_tokens_left(torch.tensor([[three], [one]]))


def test_without_a_context_nothing_is_cut():
    model = tiny_model(seed=3)
    vars(model.config)["max_position_embeddings"] = None  # as of models without a limit
    reader = reader_of(model)
    reader.begin(random_ids(2, 4))
    assert reader.own_tokens_left(None) == [None, None]
    assert reader.cut_to_context(None, [[1, 2], [3]]) == [[1, 2], [3]]


def test_a_temperature_of_one_leaves_the_logits():
    logits = torch.tensor([1.0, 3.0])
    assert tempered(logits, 1.0) is logits
    assert tempered(logits, 0.5).tolist() == [2.0, 6.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.1, 0.6, 3.0])
def test_a_temperature_takes_no_row_out_of_the_numbers(dtype, temperature):
    """Where a forced token is banned with -inf, all that is left may lie at the smallest number of the dtype."""
    smallest = torch.finfo(dtype).min
    rows = [[smallest, -torch.inf, smallest], [-smallest, 1.0, -torch.inf], [1.0, smallest, 1.0]]
    want = [[0.5, 0.0, 0.5], [1.0, 0.0, 0.0], [0.5, 0.0, 0.5]]
    assert tempered(torch.tensor(rows, dtype=dtype), temperature).double().softmax(-1).tolist() == want


@pytest.mark.parametrize("offset", [-1e4, -1e3, 1e4])
def test_a_temperature_keeps_the_differences_between_tokens_far_from_zero(offset):
    """Where all other tokens are banned with -inf, all that are left may have the same finite ban."""
    logits = offset + torch.tensor([0.7178, 0.5508, -0.0693, -1.4160, -torch.inf])
    want = (logits.double() / 0.6).softmax(-1)
    torch.testing.assert_close(tempered(logits, 0.6).double().softmax(-1), want, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "temperature"), [(torch.float16, 1e-4), (torch.bfloat16, 1e-37), (torch.float32, 1e-37)]
)
def test_a_tiny_temperature_leaves_the_likeliest_token(dtype, temperature):
    assert tempered(torch.tensor([50.0, 49.0], dtype=dtype), temperature).double().softmax(-1).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("row", [[-torch.inf, -torch.inf], [torch.inf, 0.0], [torch.nan, 0.0]])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_a_temperature_hides_no_unusable_row(row, temperature):
    assert is_unusable(tempered(torch.tensor([row]), temperature)).tolist() == [True]


@pytest.mark.parametrize("family", ["mistral", "lfm2", "qwen3_next", "zaya", "jamba"])
def test_rows_are_spelled_in_different_numbers_over_windows_and_states(family):
    alignment = align_cached(BASE, PROXY)
    widths = [len(alignment.spell_token(token)) for token in range(SIZE)]
    one, three = widths.index(1, 10), widths.index(3)
    model = tiny_family(family, vocab_size=len(TOKENIZERS[PROXY]))
    reader = reader_of(model, vocabulary=SIZE, vocabulary_alignment=alignment)
    prompts = random_ids(2, 10)
    reader.begin(prompts)
    reader.read()
    texts = [[], []]
    for drafts, accepted in (([[three, one], [one, three]], [1, 2]), ([[one, three, one], [three, one, one]], [1, 0])):
        for tokens in zip(*drafts, strict=True):
            got = reader.read(torch.tensor(tokens)[:, None])
        for row in range(2):
            own = plain(model, spelled(alignment, prompts[row], texts[row] + drafts[row]))
            torch.testing.assert_close(got[row, 0], alignment.to_base(own[:, 0], SIZE)[0], atol=2e-3, rtol=2e-3)
        lead = 1 if texts[0] else 0  # the token that ended the round before stays
        reader.accept(accepted)
        texts = [text + own[: count + lead] for text, own, count in zip(texts, drafts, accepted, strict=True)]
    last = [three, one]
    got = reader.read(torch.tensor(last)[:, None])
    for row in range(2):
        own = plain(model, spelled(alignment, prompts[row], [*texts[row], last[row]]))
        torch.testing.assert_close(got[row, 0], alignment.to_base(own[:, 0], SIZE)[0], atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(("family", "forwards"), [("llama", 1), ("mistral", 2), ("qwen3_next", 2), ("jamba", 4)])
def test_a_prompt_is_read_alone_where_the_draft_behind_it_could_not_be_taken_back(family, forwards):
    """Jamba reads the draft one token at a time."""
    model, prompts, draft = tiny_family(family), random_ids(2, 9), random_ids(2, 3, seed=1)
    reader = reader_of(model, vocabulary=96)
    reader.begin(prompts)
    reader.read()  # from now on the kind of the cache is known
    for _ in range(2):
        reader.model.reset()
        reader.begin(prompts)
        before = reader.model.forwards
        got = reader.read(draft, logits_to_keep=4)
        assert reader.model.forwards - before == forwards
        expected = plain(model, torch.cat([prompts, draft], dim=1), 4)
        torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)


def test_the_longest_row_decides_where_the_rotary_embeddings_change():
    reader = reader_of(tiny_family("phi3", window=64, **LONGROPE), vocabulary=96)  # behind 16 tokens
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[1, :6] = 0
    reader.begin(random_ids(2, 13), mask)
    assert reader.own_tokens_left(None) == [3, 3]
    assert reader.own_tokens_left(torch.tensor([[5], [6]])) == [2, 2]
    reader.read(random_ids(2, 3, seed=1))
    reader.accept([3, 3])
    assert reader.own_tokens_left(None) == [0, 0]
    assert reader.own_tokens_left(torch.tensor([[5], [6]])) == [512 - 17, 512 - 11]
    reader.select_rows([1])
    assert reader.own_tokens_left(None) == [6]
