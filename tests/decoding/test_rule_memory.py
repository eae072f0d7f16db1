"""Rules with a memory inside `generate`: the exact law, the states of rows, beams and drafts, and chats that go on.

The laws are those of `test_distribution`: exact, of models with four tokens, compared by chi-square. A p-value below
THRESHOLD fails a test. P_VALUES of them are computed at most, so with correct code the module gives a false alarm with
a probability of at most FALSE_ALARM over the choice of the seeds, which are fixed. Planted bugs must be refused.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import exact_law
import pytest
import torch
from exact_law import Paced
from test_batches import padded
from test_distribution import (
    PACE,
    Setting,
    make_kad,
    models,
    p_values_around_the_bonus,
    p_values_of_padded_batch,
    sample_speculative,
)

from transformers_kad import KADLogitsProcessor, PacedDeferral, StatefulRule
from transformers_kad.decoding.rule_memory import RuleMemory
from transformers_kad.models.cached_model import CachedModel

FALSE_ALARM = 1e-6
P_VALUES = 24
THRESHOLD = FALSE_ALARM / P_VALUES

RULE = PacedDeferral(budget=0.5, threshold=0.3, step_size=1.5, smallest_threshold=0.02, largest_threshold=0.8)
PROMPT = torch.tensor([[3, 14, 15, 9, 26, 5]])
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def judge() -> Iterator[Callable[[float], None]]:
    """Counts the p-values that can raise a false alarm."""
    yield from exact_law.counted_p_values(THRESHOLD, P_VALUES)


def speculative_p_values(
    drafts: int, samples: int, rows: int, setting: Setting | None = None, **settings: Any
) -> list[float]:
    """Of the first two tokens, and of those around the end of the first draft."""
    setting, chosen, length = setting or Setting(), models(), drafts + 2
    kad = make_kad(chosen, PacedDeferral(**PACE), setting, drafts, **settings)
    drafted = sample_speculative(kad, chosen.base, setting, length, samples, seed=drafts, rows=rows)
    assert 0 < drafted.accepted < 0.9 * drafted.drafted
    return p_values_around_the_bonus(drafted.texts, setting.law(Paced(**PACE), chosen, length), drafts)


# --- The distribution ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("verification", ["token", "block"])
@pytest.mark.parametrize(
    ("drafts", "samples", "rows"), [(1, 8000, 1000), (3, 8000, 1000), (5, 8000, 1000), (3, 500, 1)]
)
def test_speculative(judge: Callable[[float], None], verification: str, drafts: int, samples: int, rows: int) -> None:
    for p_value in speculative_p_values(drafts, samples, rows, verification=verification):
        judge(p_value)


@pytest.mark.slow
def test_rows_that_end_their_rounds_together(judge: Callable[[float], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CachedModel, "needs_rows_in_step", True)
    for p_value in speculative_p_values(3, 2000, 20):
        judge(p_value)


@pytest.mark.slow
def test_processors_that_are_asked_position_by_position(judge: Callable[[float], None]) -> None:
    for p_value in speculative_p_values(2, 2000, 100, Setting(bias=True, temperature=1.3)):
        judge(p_value)


@pytest.mark.slow
def test_padded_rows_that_leave_the_batch(judge: Callable[[float], None]) -> None:
    for p_value in p_values_of_padded_batch(2000, rule=("paced", PACE, Paced(**PACE)), drafts=2):
        judge(p_value)


# The comparisons above refuse wrong code


@pytest.mark.slow
def test_refuses_states_that_refused_tokens_have_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    end_round = RuleMemory.end_round

    def behind_the_draft(self, rows, states, emitted, staying):
        end_round(self, rows, states, emitted, staying)
        self.current = states[staying, -1]

    monkeypatch.setattr(RuleMemory, "end_round", behind_the_draft)
    assert min(speculative_p_values(3, 8000, 1000)) < THRESHOLD


@pytest.mark.slow
def test_refuses_states_that_rows_share(monkeypatch: pytest.MonkeyPatch) -> None:
    end_round = RuleMemory.end_round

    def shared(self, *arguments):
        end_round(self, *arguments)
        self.current = self.current.mean(0, keepdim=True).expand_as(self.current)

    monkeypatch.setattr(RuleMemory, "end_round", shared)
    assert min(speculative_p_values(3, 8000, 1000)) < THRESHOLD


@pytest.mark.slow
def test_refuses_a_state_that_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PacedDeferral, "advance", lambda self, state, mass: state)
    assert min(speculative_p_values(3, 8000, 1000)) < THRESHOLD


# --- Greedy texts, recomputed --------------------------------------------------------------------------------------


@dataclass
class Followed:
    """A text, followed by a rule without caches."""

    tokens: list[int]
    log_probs: list[float]  # log r of the tokens
    masses: list[float]


def log_r(rule: StatefulRule, base: Any, proxy: Any, text: list[int], state: torch.Tensor) -> Any:
    with torch.no_grad():
        p, q = (model(torch.tensor([text]), use_cache=False).logits[:, -1].softmax(-1) for model in (base, proxy))
    return rule.step(p, q, state)


def follow(base: Any, proxy: Any, prompt: list[int], tokens: list[int] | int, rule: StatefulRule = RULE) -> Followed:
    """Score some tokens behind a prompt, or choose the likeliest so many times."""
    state, followed = rule.initial_state(1), Followed([], [], [])
    given = tokens if isinstance(tokens, list) else [None] * tokens
    for token in given:
        target, mass, state = log_r(rule, base, proxy, prompt + followed.tokens, state)
        chosen = int(target.argmax()) if token is None else token
        followed.tokens.append(chosen)
        followed.log_probs.append(float(target[0, chosen].log()))
        followed.masses.append(float(mass))
    return followed


@pytest.mark.parametrize("way", ["token by token", "speculative", "prompt lookup", "compiled"])
@pytest.mark.parametrize("rows", [1, 3])
def test_texts_are_those_of_the_rule_that_follows_them(uncompiled, base, proxy, way, rows):
    inputs = padded(rows)
    settings = {"drafter": "prompt_lookup"} if way == "prompt lookup" else {"compile": way == "compiled"}
    kad = KADLogitsProcessor(proxy, RULE, num_assistant_tokens=4, trace=True, **settings)
    call = {} if way == "token by token" else {"assistant_model": proxy}
    ids = base.generate(**inputs, logits_processor=[kad], max_new_tokens=24, **call, **GREEDY)
    length = inputs["input_ids"].shape[1]
    for row in range(rows):
        prompt = inputs["input_ids"][row][inputs["attention_mask"][row] == 1].tolist()
        expected = follow(base, proxy, prompt, 24)
        assert ids[row, length:].tolist() == expected.tokens
        masses = [record.deferral_mass for record in kad.trace.sequences[row]]
        assert masses == pytest.approx(expected.masses, abs=1e-4)
        forgetful = [
            float(log_r(RULE, base, proxy, prompt + expected.tokens[:at], RULE.initial_state(1))[1])
            for at in range(24)
        ]
        assert masses != pytest.approx(forgetful, abs=0.05)  # the memory makes a difference


def test_beams_take_their_states_along(base, proxy):
    inputs = padded(2)
    kad = KADLogitsProcessor(proxy, RULE)
    output = base.generate(
        **inputs,
        logits_processor=[kad],
        num_beams=4,
        num_return_sequences=3,
        length_penalty=0.0,
        max_new_tokens=10,
        return_dict_in_generate=True,
        output_scores=True,
        **GREEDY,
    )
    parents = output.beam_indices[:, :10]
    assert any(len(set(own.tolist())) > 2 for own in parents)  # beams have changed places
    for row, ids in enumerate(output.sequences):
        prompt = inputs["input_ids"][row // 3][inputs["attention_mask"][row // 3] == 1].tolist()
        followed = follow(base, proxy, prompt, ids[inputs["input_ids"].shape[1] :].tolist())
        assert float(output.sequences_scores[row]) == pytest.approx(sum(followed.log_probs), abs=1e-3)


def test_lazy_draws_follow_the_thresholds(base, proxy):
    kad = KADLogitsProcessor(proxy, RULE, lazy=True)
    torch.manual_seed(0)
    call = {"do_sample": True, "top_k": 0, "max_new_tokens": 24, "eos_token_id": None, "pad_token_id": 0}
    ids = base.generate(PROMPT, logits_processor=[kad], **call)
    followed = follow(base, proxy, PROMPT[0].tolist(), ids[0, PROMPT.shape[1] :].tolist())
    expected = sum(followed.masses) / 24
    assert kad.statistics.deferral_mass == pytest.approx(expected, abs=1e-4)


# --- From call to call ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("speculative", [False, True])
def test_a_chat_that_continues_goes_on_with_its_state(base, proxy, speculative):
    kad = KADLogitsProcessor(proxy, RULE, num_assistant_tokens=3)
    call = {"logits_processor": [kad], **GREEDY} | ({"assistant_model": proxy} if speculative else {})
    first = base.generate(PROMPT, max_new_tokens=9, **call)
    whole = follow(base, proxy, PROMPT[0].tolist(), 21)
    assert first[0, 6:].tolist() == whole.tokens[:9]
    other = base.generate(first, max_new_tokens=12, **call)
    assert other[0, 6:].tolist() == whole.tokens
    anew = follow(base, proxy, first[0].tolist(), 12)
    assert anew.tokens != whole.tokens[9:]  # so that the state makes a difference
    again = base.generate(first, max_new_tokens=12, **call)  # the same once more, as of the text of the call before
    assert torch.equal(again, other)
    kad.reset()
    assert base.generate(first, max_new_tokens=12, **call)[0, 15:].tolist() == anew.tokens


def test_rows_of_a_batch_go_on_each_with_its_own_state_and_others_begin_anew(base, proxy):
    kad = KADLogitsProcessor(proxy, RULE, num_assistant_tokens=3)
    call = {"logits_processor": [kad], "assistant_model": proxy, **GREEDY}
    inputs = padded(3)
    first = base.generate(**inputs, max_new_tokens=9, **call)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 9, dtype=torch.long)], dim=1)
    prompts = [ids[own == 1].tolist() for ids, own in zip(first, mask, strict=True)]
    starts = [ids[own == 1].tolist() for ids, own in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    order = [2, 0]
    other = PROMPT.expand(1, -1).new_zeros(1, first.shape[1])
    other[0, -6:] = PROMPT[0]
    ids = torch.cat([first[order], other])
    mask = torch.cat([mask[order], (other != 0).long()])
    second = base.generate(ids, attention_mask=mask, max_new_tokens=8, **call)
    for row, source in enumerate(order):
        so_far = prompts[source][len(starts[source]) :]
        expected = follow(base, proxy, starts[source], len(so_far) + 8).tokens
        assert so_far + second[row, first.shape[1] :].tolist() == expected
    assert second[2, first.shape[1] :].tolist() == follow(base, proxy, PROMPT[0].tolist(), 8).tokens


def test_a_question_by_hand_is_about_a_first_position(base, proxy):
    kad = KADLogitsProcessor(proxy, RULE)
    base.generate(PROMPT, logits_processor=[kad], max_new_tokens=4, **GREEDY)
    scores = base(PROMPT).logits[:, -1]
    expected, _, _ = log_r(RULE, base, proxy, PROMPT[0].tolist(), RULE.initial_state(1))
    torch.testing.assert_close(kad(PROMPT, scores).exp(), expected, atol=1e-5, rtol=1e-4)


def test_return_sequences_begin_alike_and_go_on_apart(base, proxy):
    kad = KADLogitsProcessor(proxy, RULE, num_assistant_tokens=3, trace=True)
    call = {"do_sample": True, "top_k": 0, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
    for speculative in ({}, {"assistant_model": proxy}):
        torch.manual_seed(1)
        ids = base.generate(PROMPT, logits_processor=[kad], num_return_sequences=3, **call, **speculative)
        assert len({tuple(own.tolist()) for own in ids}) == 3
        for row in range(3):
            expected = follow(base, proxy, PROMPT[0].tolist(), ids[row, 6:].tolist()).masses
            assert [record.deferral_mass for record in kad.trace.sequences[row]] == pytest.approx(expected, abs=1e-4)
        kad.reset()


def test_a_decoding_method_that_skips_tokens_is_told(base, proxy):
    def two_at_once(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        for _ in range(2):
            scores = logits_processor(input_ids, model(input_ids).logits[:, -1])
            token = scores.argmax(-1, keepdim=True)
            input_ids = torch.cat([input_ids, token, token], dim=-1)
        return input_ids

    kad = KADLogitsProcessor(proxy, RULE)
    with pytest.raises(RuntimeError, match="went from 6 to 8 tokens in one step"):
        base.generate(PROMPT, logits_processor=[kad], custom_generate=two_at_once, **GREEDY)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_position_that_is_asked_for_twice_counts_once(base, proxy, rows):
    def asking_twice(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        for _ in range(6):
            logits = model(input_ids).logits[:, -1]
            logits_processor(input_ids, logits)
            token = logits_processor(input_ids, logits).argmax(-1, keepdim=True)
            input_ids = torch.cat([input_ids, token], dim=-1)
        return input_ids

    kad = KADLogitsProcessor(proxy, RULE)
    ids = base.generate(PROMPT.expand(rows, -1), logits_processor=[kad], custom_generate=asking_twice, **GREEDY)
    for row in ids[:, 6:].tolist():
        assert row == follow(base, proxy, PROMPT[0].tolist(), 6).tokens
