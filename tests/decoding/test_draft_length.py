"""num_assistant_tokens="auto": which draft length is chosen, and that the choice changes no distribution."""

import itertools

import exact_law
import pytest
import torch
from pretended_mps import PretendedMPS
from test_distribution import COMMON, PLAIN, PROMPT, SPECULATIVE, Setting, make_kad, models, new_tokens
from tiny_models import tiny_model

from transformers_kad import KADConfig, KADLogitsProcessor
from transformers_kad.decoding.draft_length import (
    FIRST_DRAFTS,
    FIRST_DRAFTS_OF_MANY_ROWS,
    LONGEST_DRAFT,
    MANY_ROWS,
    DraftLength,
    Stopwatch,
)
from transformers_kad.rules.registry import make_rule


def settled(step, rest, acceptance, rows=1, rounds=200, bonus_at_once=False):
    """The choice after some rounds in a world of given costs and one chance of acceptance."""
    lengths, chosen = DraftLength(bonus_at_once), []
    for _ in range(rounds):
        length = lengths.choose(rows)
        chosen.append(length)
        lengths.timed(rows, length, step, rest(rows * (length + 1)))
        for row in range(rows):
            lengths.accepted(row, [acceptance] * (length + 1))
    return chosen


def best(step, rest, acceptance, rows=1, bonus_at_once=False):
    """The best length and the rates of all, worked out by hand."""
    rates = []
    for length in range(LONGEST_DRAFT + 1):
        tokens = sum(acceptance**k for k in range(length + 1))
        bonus = 1 if bonus_at_once or length == 0 else 1 - (1 - acceptance**length) ** rows
        rates.append(tokens / ((length + bonus) * step + rest(rows * (length + 1))))
    return rates


WORLDS = [
    (0.01, lambda n: 0.07 + 0.005 * n, 0.9),  # memory-bound base, good drafts
    (0.01, lambda n: 0.07 + 0.005 * n, 0.5),
    (0.03, lambda n: 0.04 + 0.001 * n, 0.7),  # a proxy that is hardly cheaper
    (0.01, lambda n: 0.02 * n, 0.6),  # compute-bound base: drafting never pays
    (0.001, lambda n: 0.07 + 0.001 * n, 0.98),
    (0.01, lambda n: 0.07 + (0.03 if n > 4 else 0.0) + 0.002 * n, 0.8),  # a step in the cost
]


@pytest.mark.parametrize("bonus_at_once", [False, True])
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("world", range(len(WORLDS)))
def test_the_choice_settles_at_the_best_or_as_good_as_that(world, rows, bonus_at_once):
    step, rest, acceptance = WORLDS[world]
    rates = best(step, rest, acceptance, rows, bonus_at_once)
    chosen = settled(step, rest, acceptance, rows, bonus_at_once=bonus_at_once)
    assert rates[chosen[-1]] >= 0.99 * max(rates)
    # Trying others out costs little: over all rounds the tokens per second are near the best.
    expected = [sum(acceptance**k for k in range(length + 1)) for length in chosen]
    seconds = sum(tokens / rates[length] for tokens, length in zip(expected, chosen, strict=True))
    assert sum(expected) / seconds >= 0.95 * max(rates)


def test_the_worlds_differ_in_what_is_best():
    chosen = {max(range(LONGEST_DRAFT + 1), key=best(*world).__getitem__) for world in WORLDS}
    assert 0 in chosen
    assert len(chosen) >= 4


def test_it_follows_a_text_that_gets_harder():
    lengths = DraftLength()
    for acceptance in (0.95, 0.2):
        for _ in range(100):
            length = lengths.choose(1)
            lengths.timed(1, length, 0.01, 0.07 + 0.002 * length)
            lengths.accepted(0, [acceptance] * 3)
        if acceptance == 0.95:
            assert length > 6
    assert length <= 2


def test_chances_in_a_row_are_averages_over_the_text():
    """Easy and hard tokens in turn: a mean of 0.5 squared would be far from what two tokens in a row have."""
    lengths = DraftLength()
    lengths.timed(1, 5, 0.01, 0.07)
    for chance in [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0] * 100:
        lengths.accepted(0, [chance])
    in_a_row = lengths._in_a_row()
    assert in_a_row[:5] == pytest.approx([4 / 8, 3 / 8, 2 / 8, 1 / 8, 0], abs=0.03)


@pytest.mark.parametrize(
    ("rows", "first"), [(1, FIRST_DRAFTS), (MANY_ROWS - 1, FIRST_DRAFTS), (MANY_ROWS, FIRST_DRAFTS_OF_MANY_ROWS)]
)
def test_the_first_drafts_have_fixed_lengths(rows, first):
    """The first round, which has the prompt in it, is not timed."""
    lengths, chosen = DraftLength(), []
    for timed in (False, *(True for _ in first)):
        chosen.append(lengths.choose(rows))
        if timed:
            lengths.timed(rows, chosen[-1], 0.01, 0.07)
        lengths.accepted(0, [0.5] * 3)
    assert chosen == [first[0], *first]


@pytest.mark.parametrize("rows", [1, 16])
def test_no_draft_is_more_than_about_twice_as_long_as_the_longest_before(rows):
    chosen = settled(0.001, lambda tokens: 0.07, 0.98, rows=rows)
    for before, length in itertools.pairwise(itertools.accumulate(chosen, max)):
        assert length <= 2 * before + 2
    assert chosen[-1] == LONGEST_DRAFT


def test_one_slow_measurement_does_not_keep_a_large_batch_drafting():
    """Without drafts a token costs 0.14 s, with one draft token 0.16 s; the first round without drafts takes twice."""
    lengths, chosen = DraftLength(), []
    for _ in range(30):
        length = lengths.choose(16)
        slow = 2.0 if length == 0 and 0 not in chosen else 1.0
        chosen.append(length)
        lengths.timed(16, length, 0.02, slow * (0.0084 * 16 * (length + 1) - 0.014))
        for row in range(16):
            lengths.accepted(row, [0.84] * (length + 1))
    assert set(chosen[-10:]) == {0}


def test_a_large_batch_tries_no_long_draft_where_a_forward_costs_by_the_token():
    assert max(settled(0.02, lambda tokens: 0.04 + 0.007 * tokens, 0.84, rows=16)) <= 2


def test_a_stopwatch_adds_blocks_up_and_starts_again(monkeypatch):
    times = iter([0.0, 1.0, 10.0, 12.5, 20.0, 20.25])
    monkeypatch.setattr("transformers_kad.decoding.draft_length.time.perf_counter", lambda: next(times))
    stopwatch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with stopwatch.running():
            pass
    assert stopwatch.read() == (3.5, 2)
    with stopwatch.running():
        pass
    assert stopwatch.read() == (0.25, 1)


def test_a_stopwatch_asks_a_device_that_computes_by_itself():
    with PretendedMPS():
        stopwatch = Stopwatch(torch.device("mps"))
        for _ in range(3):
            with stopwatch.running():
                pass
        assert stopwatch.read() == (pytest.approx(0.006), 3)
        assert stopwatch.read() == (0.0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 500])
def test_the_distribution_does_not_change(monkeypatch, rows):
    """Whatever the times say; chi-square over the last three of five tokens, false alarm 1e-6."""
    turn = itertools.cycle([0, 3, 1, 5, 2, 0, 4])
    monkeypatch.setattr(DraftLength, "choose", lambda self, rows, in_step: next(turn))
    setting, chosen = Setting(), models()
    kad = make_kad(chosen, make_rule("dual", **SPECULATIVE["dual"]), setting, drafts="auto")
    torch.manual_seed(3)
    arguments = setting.arguments(kad) | COMMON
    texts = []
    for _ in range(300 if rows == 1 else 20):
        sequences = chosen.base.generate(
            torch.tensor([PROMPT]), assistant_model=kad.proxy, max_new_tokens=5, num_return_sequences=rows, **arguments
        )
        texts += [text[-3:] for text in new_tokens(sequences, len(PROMPT), None)]
    law = exact_law.marginal_law(setting.law(PLAIN["dual"], chosen, 5), range(2, 5))
    assert exact_law.chi_square_p_value(texts, law) > 1e-6


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("do_sample", [False, True])
def test_auto_runs_by_its_own_measurements(base, proxy, rows, do_sample):
    kad = KADLogitsProcessor(proxy, "dual", threshold=0.6, num_assistant_tokens="auto")
    prompt = torch.tensor([[3, 14, 15, 9]]).repeat(rows, 1)
    settings = {"logits_processor": [kad], "do_sample": do_sample, "max_new_tokens": 60, "top_k": 0}
    ids = base.generate(prompt, assistant_model=proxy, **settings)
    assert ids.shape == (rows, 64)
    assert kad.statistics.tokens == 60 * rows
    if not do_sample:
        kad.reset()
        assert torch.equal(ids, base.generate(prompt, **settings))


def test_the_chances_that_are_noted_are_those_of_acceptance(base, monkeypatch):
    """Over a long text as many drafts are accepted as the chances say (5 standard deviations)."""
    noted = []
    monkeypatch.setattr(DraftLength, "accepted", lambda self, row, chances, ratios: noted.append(chances))
    monkeypatch.setattr(DraftLength, "choose", lambda self, rows, in_step: 1)
    kad = KADLogitsProcessor(tiny_model(seed=2), "dual", threshold=0.6, num_assistant_tokens="auto")
    torch.manual_seed(0)
    base.generate(
        torch.tensor([[3, 14, 15, 9]]),
        logits_processor=[kad],
        assistant_model=kad.proxy,
        max_new_tokens=400,
        do_sample=True,
        top_k=0,
    )
    first = [chances[0] for chances in noted]
    expected, variance = sum(first), sum(chance * (1 - chance) for chance in first)
    assert abs(kad.statistics.accepted - expected) < 5 * variance**0.5
    assert len(first) == kad.statistics.rounds


@pytest.mark.parametrize("value", ["automatic", 0, -1, 2.5, True, None])
def test_other_values_are_refused(proxy, value):
    with pytest.raises(ValueError, match='positive integer or "auto", got'):
        KADLogitsProcessor(proxy, num_assistant_tokens=value)


def test_auto_is_a_setting_of_a_config(proxy, tmp_path):
    KADConfig(num_assistant_tokens="auto").save_pretrained(tmp_path)
    kad = KADLogitsProcessor.from_config(proxy, KADConfig.from_pretrained(tmp_path))
    assert kad.num_assistant_tokens == "auto"
    assert "num_assistant_tokens='auto'" in repr(kad)
