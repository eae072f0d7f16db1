"""RunningTexts against plain forwards, while texts join, grow, wait and leave."""

import pytest
import torch
from tiny_families import tiny_family
from tiny_models import tiny_model

from transformers_kad.models.running_texts import RunningTexts

MODELS = {
    "full attention": lambda: tiny_model(seed=3),
    "sliding windows": lambda: tiny_model("mistral", seed=3),  # of 8 tokens
    "positions of its own": lambda: tiny_model("gpt2", seed=3),
    "recurrent states": lambda: tiny_family("qwen3_5_text", seed=3),
}
LARGE = 2**30


def plain(model, texts):
    """Logits without any cache, text by text."""
    with torch.no_grad():
        return torch.stack([model(torch.tensor([text])).logits[0, -1] for text in texts.values()])


def random_text(generator, longest=20):
    length = int(torch.randint(1, longest, (), generator=generator))
    return torch.randint(1, 50, (length,), generator=generator).tolist()


def walk(generator, steps, running=6):
    """The texts of some steps: most grow by a token, some wait, leave, join or change places."""
    texts, joined = {}, 0
    for _ in range(steps):
        chance = torch.rand(running + 2, generator=generator).tolist()
        texts = {
            key: text if luck < 0.2 else [*text, int(torch.randint(1, 50, (), generator=generator))]
            for (key, text), luck in zip(texts.items(), chance, strict=False)
            if luck < 0.9
        }
        while len(texts) < running and (not texts or torch.rand((), generator=generator) < 0.5):
            texts[joined] = random_text(generator)
            joined += 1
        if chance[-1] < 0.3:
            texts = dict(reversed(texts.items()))
        yield texts


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_a_plain_forward(name):
    model = MODELS[name]()
    running = RunningTexts(model, cache_bytes=LARGE)
    for texts in walk(torch.Generator().manual_seed(1), 40):
        torch.testing.assert_close(running.logits(texts), plain(model, texts), atol=1e-4, rtol=1e-4)
        assert running.cached_rows == len(texts)


@pytest.mark.parametrize("name", MODELS)
def test_memory_stays_below_the_ceiling(name):
    """Texts that do not fit are read without a cache, and come back into it when there is room."""
    model = MODELS[name]()
    whole = RunningTexts(model, cache_bytes=LARGE)
    whole.logits({0: list(range(1, 21)), 1: list(range(1, 21))})
    ceiling = whole.cached_bytes * 5 // 4
    running, rows = RunningTexts(model, cache_bytes=ceiling), []
    for texts in walk(torch.Generator().manual_seed(2), 40):
        torch.testing.assert_close(running.logits(texts), plain(model, texts), atol=1e-4, rtol=1e-4)
        assert running.cached_bytes <= ceiling
        rows.append(running.cached_rows - len(texts))
    assert min(rows) < 0 == max(rows)


def test_without_memory_nothing_is_cached():
    model = tiny_model(seed=3)
    running = RunningTexts(model, cache_bytes=0)
    texts = {"a": [1, 2, 3], "b": [4]}
    for _ in range(2):
        torch.testing.assert_close(running.logits(texts), plain(model, texts), atol=1e-4, rtol=1e-4)
        assert running.cached_rows == running.cached_bytes == 0


def walk_with_drafts(generator, steps, running=5):
    """Texts of some steps with a draft at the end of each, and how many positions are wanted of each.

    The next step keeps the first tokens of a draft, none or all of them, and another token stands behind these.
    """
    texts, drafts, joined = {}, {}, 0
    for _ in range(steps):
        lengths = torch.randint(0, 5, (running,), generator=generator).tolist()
        chance = torch.rand(running + 1, generator=generator).tolist()
        if chance[-1] < 0.4:
            lengths = [lengths[0]] * running
        for key in [key for key, luck in zip(texts, chance, strict=False) if luck > 0.9]:
            del texts[key]
        for key, luck in zip(texts, chance, strict=False):
            kept = round(luck / 0.9 * len(drafts[key])) if chance[-1] > 0.2 else len(drafts[key])
            texts[key] = [*texts[key], *drafts[key][:kept], int(torch.randint(1, 50, (), generator=generator))]
        while len(texts) < running and (not texts or torch.rand((), generator=generator) < 0.5):
            texts[joined] = random_text(generator)
            joined += 1
        drafts = {
            key: torch.randint(1, 50, (length,), generator=generator).tolist()
            for key, length in zip(texts, lengths, strict=False)
        }
        yield {key: texts[key] + drafts[key] for key in texts}, {key: 1 + len(drafts[key]) for key in texts}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_logits_behind_drafts_are_those_of_a_plain_forward(name, share):
    """Texts join with drafts and without, and refuse different numbers of tokens, whatever the memory."""
    model = MODELS[name]()
    whole = RunningTexts(model, cache_bytes=LARGE)
    whole.logits({key: list(range(1, 41)) for key in range(5)})
    ceiling = LARGE if share == 1 else int(whole.cached_bytes * share)
    running, cached = RunningTexts(model, cache_bytes=ceiling), []
    for texts, positions in walk_with_drafts(torch.Generator().manual_seed(6), 50):
        with torch.no_grad():
            wanted = [model(torch.tensor([text])).logits[0, -positions[key] :] for key, text in texts.items()]
        torch.testing.assert_close(running.logits(texts, positions), torch.cat(wanted), atol=1e-4, rtol=1e-4)
        assert running.cached_bytes <= ceiling
        cached.append(running.cached_rows == len(texts))
    assert all(cached) if share == 1 else 0 < sum(cached) < len(cached)


def test_one_forward_reads_drafts_of_different_length():
    running = RunningTexts(tiny_model(seed=3), cache_bytes=LARGE)
    before = {0: [1, 2, 3], 1: [4, 5], 2: [6]}
    running.logits(before)
    running.logits({0: [*before[0], 7, 8, 9], 1: [*before[1], 7], 2: [*before[2], 7, 8]}, {0: 3, 1: 1, 2: 2})
    running.logits({0: [*before[0], 7, 8, 5], 1: [*before[1], 7, 4, 4], 2: [*before[2], 7, 9]}, {0: 1, 1: 2, 2: 1})
    assert running.forwards == 3


def test_one_forward_reads_all_texts_that_go_on():
    running = RunningTexts(tiny_model(seed=3), cache_bytes=LARGE)
    texts = {key: [1 + key] * (3 + key) for key in range(8)}
    running.logits(texts)
    assert running.forwards == 1  # of prompts that join together
    for step in range(5):
        texts = {key: [*text, 7] for key, text in texts.items()}
        running.logits(texts)
        assert running.forwards == 2 + step
    texts = {key: [*text, 7] for key, text in texts.items()} | {"late": [9, 9], "later": [8]}
    running.logits(texts)
    assert running.forwards == 8  # those that go on, and those that join
    running.logits({key: [*text, 7] for key, text in texts.items()})
    assert running.forwards == 9


def test_padding_is_dropped_when_the_longest_text_leaves():
    running = RunningTexts(tiny_model(seed=3), cache_bytes=LARGE)
    running.logits({"long": [1] * 100, "short": [2] * 5})
    before = running.cached_bytes
    text = [2] * 5
    for _ in range(3):
        text = [*text, 3]
        running.logits({"short": text})
    assert running.cached_bytes < before / 10


def test_a_text_that_became_shorter_is_read_anew():
    model = tiny_model(seed=3)
    running = RunningTexts(model, cache_bytes=LARGE)
    for texts in ({0: [1, 2, 3, 4], 1: [5]}, {0: [1, 2], 1: [5, 6]}, {0: [1, 2, 9], 1: [5, 6, 7]}):
        torch.testing.assert_close(running.logits(texts), plain(model, texts), atol=1e-4, rtol=1e-4)


def test_a_text_beyond_the_context_is_named():
    running = RunningTexts(tiny_model(seed=3, max_position_embeddings=4), cache_bytes=LARGE)
    running.logits({0: [1, 2, 3, 4]})
    with pytest.raises(ValueError, match=r"5 tokens, but the proxy .* ends at 4"):
        running.logits({0: [1, 2, 3, 4, 5]})


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"The proxy LlamaForCausalLM .* is in training mode"):
        RunningTexts(tiny_model(seed=3).train())


def test_a_draft_that_was_replaced_is_not_read_on():
    model = tiny_model(seed=3)
    running = RunningTexts(model, cache_bytes=LARGE)
    running.logits({0: [1, 2, 3, 4, 5]}, {0: 3})  # 4 and 5 are drafted
    texts = {0: [1, 2, 3, 9, 9, 7]}
    torch.testing.assert_close(running.logits(texts), plain(model, texts), atol=1e-4, rtol=1e-4)
