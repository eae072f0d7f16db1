"""Windows, convolutions and recurrent states through `generate`, against texts that were decoded without any cache."""

from typing import Any

import architectures
import pytest
import torch
from architectures import (
    LONGROPE,
    PROMPT_LENGTHS,
    WithoutCache,
    answers,
    generated,
    kad_choice,
    padded,
    references,
    until,
)
from tiny_families import tiny_family
from transformers import Cache, DynamicCache, PreTrainedModel

from transformers_kad import DualDeferral, ImplicitReward, KADLogitsProcessor
from transformers_kad.decoding import lazy
from transformers_kad.models.by_version import CACHE

RULE = DualDeferral(architectures.THRESHOLD)


def make_kad(proxy: PreTrainedModel, rule: Any = RULE, **settings: Any) -> KADLogitsProcessor:
    return KADLogitsProcessor(proxy, rule, **settings)


def pair(family: str, role: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A base and a proxy, of which one is of the family and the other a Llama."""
    model, llama = tiny_family(family), tiny_family("llama", seed=1)
    return (model, llama) if role == "base" else (llama, model)


def prompts_of(texts: list[list[int]]) -> list[list[int]]:
    return [text[:length] for text, length in zip(texts, PROMPT_LENGTHS, strict=True)]


@pytest.mark.parametrize("family", ["falcon_h1", "mistral", "zaya"])
def test_beams_take_the_states_of_a_proxy_along(family: str) -> None:
    base, proxy = pair(family, "proxy")
    prompt = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14]]
    expected = generated(base, prompt, logits_processor=[WithoutCache(proxy)], use_cache=False, **architectures.BEAMS)
    kad = make_kad(proxy)
    assert generated(base, prompt, logits_processor=[kad], **architectures.BEAMS) == expected
    assert kad.statistics.proxy_forwards == architectures.BEAMS["max_new_tokens"]


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("family", ["mistral", "lfm2", "qwen3_next", "zaya"])
def test_a_chat_goes_on_from_the_cache_of_the_proxy(
    family: str, speculative: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, proxy = pair(family, "proxy")
    text = references(kad_choice(base, proxy), mixed=True)[0]
    length = PROMPT_LENGTHS[0]
    kad = make_kad(proxy)
    settings = {"logits_processor": [kad]} | ({"assistant_model": proxy} if speculative else {})
    assert generated(base, [text[:length]], max_new_tokens=8, **settings) == [text[: length + 8]]
    widths = []
    forward = type(proxy).forward
    monkeypatch.setattr(
        type(proxy),
        "forward",
        lambda self, input_ids, **more: widths.append(input_ids.shape[1]) or forward(self, input_ids, **more),
    )
    assert generated(base, [text[: length + 8]], max_new_tokens=8, **settings) == [text]
    assert max(widths) < length + 8  # the text is not read anew


@pytest.mark.parametrize("family", ["mistral", "qwen3_next"])
def test_lazy_steps_read_what_was_kept_without_the_proxy(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The likeliest tokens in place of draws, so that there is one text."""
    base, proxy = pair(family, "proxy")
    monkeypatch.setattr(lazy, "draw", lambda probs: probs.argmax(-1))
    texts = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [14, 15, 16, 17, 18]]
    expected, asked = [], 0
    for text in texts:
        longer = list(text)
        for _ in range(16):
            p = torch.tensor(architectures.next_probs(base, longer))
            token = int(p.argmax())
            if p[token] < architectures.THRESHOLD:
                token = int(torch.tensor(architectures.next_probs(proxy, longer)).argmax())
                asked += 1
            longer.append(token)
        expected.append(longer)
    assert 0 < asked < 32
    kad = make_kad(proxy, lazy=True)
    settings = {"logits_processor": [kad], "do_sample": True, "top_k": 0}
    assert generated(base, texts, **settings) == expected
    assert [generated(base, [text], **settings)[0] for text in texts] == expected


@pytest.mark.parametrize("role", ["base", "proxy"])
@pytest.mark.parametrize("family", ["mistral", "lfm2", "qwen3_next", "jamba"])
def test_drafts_are_looked_up(family: str, role: str) -> None:
    base, proxy = pair(family, role)
    texts = references(kad_choice(base, proxy), mixed=True)
    prompts = prompts_of(texts)
    for rows in (slice(0, 1), slice(0, 3)):
        kad = make_kad(proxy, drafter="prompt_lookup")
        assert generated(base, prompts[rows], logits_processor=[kad], assistant_model=proxy) == texts[rows]
    assert kad.statistics.drafted > 0


@pytest.mark.parametrize("role", ["base", "proxy"])
@pytest.mark.parametrize("family", ["lfm2", "qwen3_next", "mamba2", "rwkv"])
def test_compiled_forwards_are_refused_and_the_message_says_what_to_leave_out(family: str, role: str) -> None:
    base, proxy = pair(family, role)
    kad = make_kad(proxy, compile=True)
    with pytest.raises(ValueError, match=rf"needs attention in all layers, .* and the {role} .*Leave out `compile`"):
        generated(base, [[5, 6, 7]], logits_processor=[kad], assistant_model=proxy)


@pytest.mark.parametrize("family", ["mistral", "lfm2", "qwen3_next", "zaya"])
def test_a_proxy_does_not_read_what_a_mask_leaves_out(family: str) -> None:
    base, proxy = pair(family, "proxy")
    texts = references(kad_choice(base, proxy), mixed=True)
    inputs = padded(prompts_of(texts))
    gap = {"input_ids": torch.full((3, 2), 7), "attention_mask": torch.zeros(3, 2, dtype=torch.long)}
    inputs = {name: torch.cat([values[:, :-3], gap[name], values[:, -3:]], dim=1) for name, values in inputs.items()}
    kad = make_kad(proxy)
    settings = {"logits_processor": [kad], "do_sample": False, "max_new_tokens": architectures.NEW_TOKENS}
    for drafts in ({}, {"assistant_model": proxy}):
        rows = base.generate(**inputs, **settings, **drafts)[:, inputs["input_ids"].shape[1] :].tolist()
        assert rows == answers(texts)


@pytest.mark.parametrize("family", ["mistral", "qwen3_next"])
def test_a_base_reads_masks_with_gaps_as_it_does_token_by_token(family: str) -> None:
    base, proxy = pair(family, "base")
    ids = torch.randint(3, 90, (3, 14), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[:, 8:10] = mask[1, :4] = 0
    settings = {
        "logits_processor": [make_kad(proxy)],
        "attention_mask": mask,
        "do_sample": False,
        "max_new_tokens": 16,
    }
    expected = base.generate(ids, **settings)
    assert torch.equal(base.generate(ids, assistant_model=proxy, **settings), expected)


@pytest.mark.parametrize("family", ["mistral", "lfm2", "qwen3_next"])
def test_positions_of_the_prompts_stay_with_a_reference_whose_rows_move(family: str) -> None:
    """Positions with gaps, so that they could not be counted from the text."""
    base, proxy = tiny_family("gpt2", seed=1), tiny_family(family)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        prompts = [torch.randint(3, 96, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]
        inputs = padded(prompts)
        inputs["position_ids"] = (2 * inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        settings = {"do_sample": False, "max_new_tokens": 16}
        reference = tiny_family(family, seed=5)
        one, other = (make_kad(proxy, ImplicitReward(1.0), reference=reference) for _ in range(2))
        expected = base.generate(**inputs, logits_processor=[one], **settings)
        for _ in range(2):  # in the first call the kind of the cache is not known yet
            ids = base.generate(**inputs, logits_processor=[other], assistant_model=proxy, **settings)
            assert torch.equal(ids, expected)


def test_a_window_over_a_cache_without_a_configuration() -> None:
    base, proxy = pair("mistral", "base")
    texts = references(kad_choice(base, proxy), mixed=True)
    settings = {"logits_processor": [make_kad(proxy)], "assistant_model": proxy}
    assert generated(base, prompts_of(texts), **{CACHE: DynamicCache()}, **settings) == texts


def test_a_recurrent_base_goes_on_from_the_cache_that_a_call_returned() -> None:
    base, proxy = pair("qwen3_next", "base")
    text = references(kad_choice(base, proxy), mixed=True)[0]
    settings = {"logits_processor": [make_kad(proxy)], "assistant_model": proxy, "do_sample": False}
    first = base.generate(torch.tensor([text[:11]]), max_new_tokens=6, return_dict_in_generate=True, **settings)
    held = first.past_key_values
    assert isinstance(held, Cache)
    assert 11 <= held.get_seq_length() < 17
    # Three tokens that the user adds.
    assert base.generate(torch.tensor([text[:20]]), **{CACHE: held}, max_new_tokens=7, **settings)[0].tolist() == text


@pytest.mark.parametrize("family", ["qwen3_next", "falcon_h1", "lfm2"])
def test_calls_in_inference_mode(family: str) -> None:
    base, proxy = pair(family, "proxy")
    texts = references(kad_choice(base, proxy), mixed=True)
    kad = make_kad(proxy)
    settings = {"logits_processor": [kad], "assistant_model": proxy}
    with torch.inference_mode():
        assert generated(base, prompts_of(texts), **settings) == texts
        generated(base, prompts_of(texts)[:1], max_new_tokens=6, **settings)
    assert generated(base, [texts[0][:17]], max_new_tokens=10, **settings) == texts[:1]


@torch.no_grad()
def greedy_of_active_rows(
    base: PreTrainedModel, proxy: PreTrainedModel, rows: list[list[int]], end: int
) -> list[list[int]]:
    """Greedy texts of a batch without a cache, which rows leave when they end."""
    rows, active = [list(row) for row in rows], list(range(len(rows)))
    for _ in range(20):
        inputs = padded([rows[row] for row in active])
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        p, q = (
            model(**inputs, position_ids=positions, use_cache=False).logits[:, -1].softmax(-1)
            for model in (base, proxy)
        )
        for row, token in zip(active, RULE(p, q).argmax(-1).tolist(), strict=True):
            rows[row].append(token)
        active = [row for row in active if rows[row][-1] != end]
        if not active:
            break
    return rows


@pytest.mark.parametrize("drafter", ["proxy", "prompt_lookup"])
@pytest.mark.parametrize("role", ["base", "proxy"])
def test_rows_that_leave_let_longrope_change_its_factors_for_the_others(role: str, drafter: str) -> None:
    """The longest row of a batch decides. It ends before or after the others have got to 16 tokens."""
    model, llama = tiny_family("phi3", window=64, **LONGROPE), tiny_family("llama", seed=1)
    base, proxy = (model, llama) if role == "base" else (llama, model)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        prompts = [torch.randint(3, 96, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]
        end = greedy_of_active_rows(base, proxy, prompts, -1)[0][PROMPT_LENGTHS[0] + 4]
        expected = greedy_of_active_rows(base, proxy, prompts, end)
        assert len(expected[0]) <= 16
        kad = make_kad(proxy, drafter=drafter)
        rows = generated(
            base, prompts, logits_processor=[kad], assistant_model=proxy, max_new_tokens=20, eos_token_id=end
        )
        assert [until(end, row) for row in answers(rows)] == answers(expected)
