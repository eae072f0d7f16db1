"""The recorders: counts and records of a call, from rounds and steps that are made up by hand."""

import itertools
import re
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_rounds import SIZE, Round, finish, position, recorded, texts, with_mass

from transformers_kad import (
    ConfidenceBetDeferral,
    DualDeferral,
    Ensemble,
    KADLogitsProcessor,
    SequenceStatistics,
)
from transformers_kad.records.recorders import BatchRecorder, RoundRecorder, StepRecorder, UnmatchedSequencesError
from transformers_kad.rules.composition import Composition

deterministic = settings(derandomize=True, deadline=None, max_examples=100)


# --- Rounds ---------------------------------------------------------------------------------------------------


@given(texts())
@deterministic
def test_the_counts_of_a_text_are_those_of_its_rounds(rounds):
    statistics, _ = recorded(rounds)
    assert statistics.rounds == len(rounds)
    assert statistics.drafted == sum(one.drafted for one in rounds)
    assert statistics.accepted == sum(one.accepted for one in rounds)
    assert statistics.tokens == sum(one.tokens for one in rounds)
    counts = Counter(one.accepted for one in rounds)
    longest = max(one.drafted for one in rounds)
    assert statistics.acceptance_histogram == tuple(counts[k] for k in range(longest + 1))


@given(texts())
@deterministic
def test_the_documented_identities_hold(rounds):
    statistics, _ = recorded(rounds)
    endings = sum(one.ends for one in rounds)
    assert statistics.tokens == statistics.accepted + statistics.rounds - endings
    assert sum(statistics.acceptance_histogram) == statistics.rounds
    assert sum(k * count for k, count in enumerate(statistics.acceptance_histogram)) == statistics.accepted


@given(texts())
@deterministic
def test_the_deferral_mass_is_the_mean_over_emitted_positions(rounds):
    statistics, _ = recorded(rounds)
    masses = list(itertools.chain.from_iterable(one.masses for one in rounds))
    assert statistics.deferral_mass == pytest.approx(sum(masses) / len(masses), abs=1e-12)


def test_a_text_worked_out_by_hand():
    statistics, _ = recorded(
        [Round(5, 2, False, [0.5, 0.25, 1.0]), Round(5, 0, False, [0.0]), Round(3, 2, True, [1, 1])]
    )
    assert statistics == SequenceStatistics(
        tokens=6,
        rounds=3,
        drafted=13,
        accepted=4,
        deferral_mass=3.75 / 6,
        acceptance_histogram=(1, 0, 2, 0, 0, 0),
        deferral_masses=(0.5, 0.25, 1.0, 0.0, 1.0, 1.0),
    )
    assert statistics.acceptance_rate == 4 / 13
    assert statistics.tokens_per_round == 2


def test_nothing_drafted_means_no_acceptance_rate_and_no_round_no_tokens_per_round():
    statistics, _ = recorded([Round(0, 0, False, [0.5]), Round(0, 0, False, [0.5])])
    assert statistics.acceptance_rate is None
    assert statistics.tokens_per_round == 1
    empty, _ = recorded([])
    assert empty == SequenceStatistics()
    assert empty.acceptance_rate is empty.tokens_per_round is empty.deferral_mass is None
    assert empty.acceptance_histogram == ()


def test_drafts_that_are_all_refused_have_the_rate_zero():
    statistics, _ = recorded([Round(4, 0, False, [0.5])])
    assert statistics.acceptance_rate == 0
    assert statistics.acceptance_rate is not None


def test_a_rule_that_is_no_mask_has_no_deferral_mass():
    statistics, _ = recorded([Round(1, 1, False, [None, None])])
    assert statistics.deferral_mass is None
    assert statistics.tokens == 2


def test_equal_runs_have_equal_statistics_and_a_later_round_does_not_change_a_snapshot():
    rounds = [Round(3, 2, False, [0.5, 0.25, 0.125]), Round(2, 0, False, [1.0])]
    assert recorded(rounds, trace=True) == recorded(rounds, trace=True)
    recorder = RoundRecorder(trace=True)
    recorder.record(1, 0, [3], [with_mass(0.5)])
    before = finish(recorder)
    recorder.record(1, 1, [3, 4], [with_mass(0.5), with_mass(0.5)])
    assert before[0][0].tokens == len(before[1]) == 1
    assert finish(recorder)[0][0].tokens == 3


# --- The trace of rounds --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [DualDeferral(0.4), ConfidenceBetDeferral(0.0)], ids=repr)
def test_a_record_holds_p_q_r_and_the_share_owed_to_the_proxy(rule):
    recorder = RoundRecorder(trace=True)
    positions = [position(rule, seed) for seed in range(8)]
    tokens = [seed % SIZE for seed in range(8)]
    recorder.record(7, 7, tokens, positions)
    _, trace = finish(recorder)
    shares = []
    for record, token, at in zip(trace, tokens, positions, strict=True):
        p, q, r = (float(probs[0, token]) for probs in (at.base_probs, at.proxy_probs, at.target_probs))
        mass = float(at.deferral_mass)
        assert (record.token_id, record.base_prob, record.proxy_prob) == (token, p, q)
        assert (record.target_prob, record.deferral_mass) == (r, mass)
        assert record.proxy_share == pytest.approx(min(1.0, q * mass / r), abs=1e-6)
        assert 0 <= record.proxy_share <= 1
        deferred = bool(rule.defer(at.base_probs, at.proxy_probs)[0, token])
        assert (record.proxy_share > 1 - 1e-6) == (deferred or p == 0)  # what is deferred is owed to the proxy alone
        shares.append(deferred)
    assert set(shares) == {True, False}


def test_the_accepted_tokens_of_a_round_are_recorded_as_drafted_and_the_next_is_not():
    _, trace = recorded(
        [Round(4, 2, False, [0, 0, 0]), Round(3, 0, False, [0]), Round(3, 2, True, [0, 0])], trace=True
    )
    assert [record.drafted for record in trace] == [True, True, False, False, True, True]
    assert [record.token_id for record in trace] == [0, 1, 2, 0, 0, 1]


def test_a_record_of_a_rule_that_is_no_mask_has_no_mass_and_no_share():
    recorder = RoundRecorder(trace=True)
    at = position(Ensemble(0.5))
    recorder.record(0, 0, [2], [at])
    _, trace = finish(recorder)
    assert trace[0].deferral_mass is None
    assert trace[0].proxy_share is None
    assert trace[0].target_prob == float(at.target_probs[0, 2])


def test_a_token_that_the_target_rules_out_owes_nothing_to_the_proxy():
    recorder = RoundRecorder(trace=True)
    certain = torch.tensor([[1.0, 0, 0, 0, 0, 0]])
    recorder.record(0, 0, [3], [Composition(certain, certain, certain, torch.tensor([0.5]))])
    assert finish(recorder)[1][0].proxy_share == 0


def test_without_trace_there_is_none():
    assert recorded([Round(1, 1, False, [0.5, 0.5])])[1] is None


# --- Steps, token by token ------------------------------------------------------------------------------------

PROMPT = [8, 9]


def test_rows_that_decode_side_by_side_have_their_own_masses_lengths_and_records():
    """Two rows of three and two tokens; the second is padded with a zero."""
    recorder = StepRecorder(trace=True)
    ids = torch.tensor([[*PROMPT, 1, 2, 3], [*PROMPT, 4, 5, 0]])
    steps = [position(seed=seed, rows=2) for seed in range(3)]
    for at, step in enumerate(steps):
        recorder.record(ids[:, : 2 + at], step, None)
    statistics, trace = recorder.finish(ids, 2, [3, 2], [0, 1])
    masses = torch.stack([step.deferral_mass for step in steps])
    assert masses.unique().numel() > 3
    assert statistics[0].deferral_mass == pytest.approx(float(masses[:, 0].mean()), abs=1e-6)
    assert statistics[1].deferral_mass == pytest.approx(float(masses[:2, 1].mean()), abs=1e-6)
    assert [s.deferral_masses for s in statistics] == [tuple(masses[:, 0].tolist()), tuple(masses[:2, 1].tolist())]
    assert [(s.tokens, s.rounds, s.drafted, s.accepted) for s in statistics] == [(3, 3, 0, 0), (2, 2, 0, 0)]
    assert [s.acceptance_histogram for s in statistics] == [(3,), (2,)]
    assert all(s.acceptance_rate is None and s.tokens_per_round == 1 for s in statistics)
    assert [[record.token_id for record in records] for records in trace.sequences] == [[1, 2, 3], [4, 5]]
    for row, records in enumerate(trace.sequences):
        for step, record in zip(steps, records, strict=False):
            probs = (step.base_probs, step.proxy_probs, step.target_probs)
            expected = [float(x[row, record.token_id]) for x in probs]
            assert [record.base_prob, record.proxy_prob, record.target_prob] == expected
            assert record.deferral_mass == float(step.deferral_mass[row])
            assert record.drafted is False


def test_sequences_are_found_by_the_row_that_they_started_from():
    recorder = StepRecorder(trace=False)
    ids = torch.tensor([[*PROMPT, 1], [*PROMPT, 2], [*PROMPT, 3]])
    recorder.record(ids[:, :2], with_mass(0.125, 0.25, 0.5), None)
    statistics, trace = recorder.finish(ids[[2, 0]], 2, [1, 1], [2, 0])
    assert [s.deferral_mass for s in statistics] == [0.5, 0.125]
    assert trace is None


def test_steps_of_a_rule_that_is_no_mask_and_texts_without_tokens_have_no_mass():
    recorder = StepRecorder(trace=True)
    ids = torch.tensor([[*PROMPT, 1], [*PROMPT, 0]])
    recorder.record(ids[:, :2], position(Ensemble(0.5), rows=2), None)
    statistics, trace = recorder.finish(ids, 2, [1, 0], [0, 1])
    assert [s.deferral_mass for s in statistics] == [None, None]
    assert statistics[1] == SequenceStatistics()
    assert [len(records) for records in trace.sequences] == [1, 0]
    assert trace[0].proxy_share is None


def test_beams_are_followed_through_their_parents():
    """Three beams, four steps, one prompt. A row's text and the row before that it continues:

    step 0: P            P            P            masses  1/8   1/8   1/8
    step 1: P 1   (of 0) P 2   (of 0) P 3   (of 0)         1/16  2/16  3/16
    step 2: P 3 4 (of 2) P 1 4 (of 0) P 3 5 (of 2)         1/32  2/32  3/32
    step 3: P 1 4 6 (1)  P 3 5 6 (2)  P 3 4 7 (0)          1/64  2/64  3/64
    """
    recorder = StepRecorder(trace=False)
    texts = [[[], [], []], [[1], [2], [3]], [[3, 4], [1, 4], [3, 5]], [[1, 4, 6], [3, 5, 6], [3, 4, 7]]]
    parents = [[0, 1, 2], [0, 0, 0], [2, 0, 2], [1, 2, 0]]
    masses = [(8 / 64, 8 / 64, 8 / 64), (4 / 64, 8 / 64, 12 / 64), (2 / 64, 4 / 64, 6 / 64), (1 / 64, 2 / 64, 3 / 64)]
    for text, parent, mass in zip(texts, parents, masses, strict=True):
        recorder.record(torch.tensor([[*PROMPT, *row] for row in text]), with_mass(*mass), parent)

    returned = torch.tensor([[*PROMPT, 3, 5, 6, 1], [*PROMPT, 1, 4, 6, 2], [*PROMPT, 3, 4, 7, 9]])
    statistics, _ = recorder.finish(returned, 2, [4, 4, 4], [0, 0, 0])
    assert [s.deferral_mass for s in statistics] == [
        (8 + 12 + 6 + 2) / 64 / 4,  # rows 0, 2, 2, 1
        (8 + 4 + 4 + 1) / 64 / 4,  # rows 0, 0, 1, 0
        (8 + 12 + 2 + 3) / 64 / 4,  # rows 0, 2, 0, 2
    ]
    assert [s.tokens for s in statistics] == [4, 4, 4]


def test_a_beam_that_ended_early_counts_its_own_positions_only():
    recorder = StepRecorder(trace=False)
    recorder.record(torch.tensor([PROMPT, PROMPT]), with_mass(0.5, 0.5), [0, 1])
    recorder.record(torch.tensor([[*PROMPT, 1], [*PROMPT, 2]]), with_mass(0.25, 0.125), [0, 0])
    recorder.record(torch.tensor([[*PROMPT, 2, 3], [*PROMPT, 2, 4]]), with_mass(1.0, 0.0), [1, 1])
    # The first text ended with the token 7 after `P 1`, the second runs on.
    returned = torch.tensor([[*PROMPT, 1, 7, 0], [*PROMPT, 2, 4, 5]])
    statistics, _ = recorder.finish(returned, 2, [2, 3], [0, 0])
    assert statistics[0].deferral_mass == (0.5 + 0.25) / 2
    assert statistics[1].deferral_mass == (0.5 + 0.125 + 0.0) / 3
    assert statistics[0].tokens == 2


def test_beams_of_two_prompts_are_kept_apart():
    """Two prompts with two beams each; both prompts' beams emit the same tokens."""
    recorder = StepRecorder(trace=False)
    prompts = [[8, 9], [8, 9], [5, 6], [5, 6]]
    recorder.record(torch.tensor(prompts), with_mass(0.5, 0.5, 0.25, 0.25), [0, 1, 2, 3])
    first = torch.tensor([[8, 9, 1], [8, 9, 2], [5, 6, 2], [5, 6, 1]])
    recorder.record(first, with_mass(1.0, 0.0, 0.125, 0.75), [0, 0, 2, 2])
    returned = torch.tensor([[8, 9, 1, 3], [5, 6, 1, 3]])
    statistics, _ = recorder.finish(returned, 2, [2, 2], [0, 2])
    assert [s.deferral_mass for s in statistics] == [(0.5 + 1.0) / 2, (0.25 + 0.75) / 2]


# --- Alternatives, and what a trace knows of its call ---------------------------------------------------------


@given(st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=9), min_size=1, max_size=3))
@deterministic
def test_the_likeliest_ids_come_in_falling_order_and_ties_by_lower_id(weights):
    width = min(len(row) for row in weights)
    p = torch.tensor([row[:width] for row in weights]) / 64
    q = p.flip(-1).contiguous()
    ids, probs = Composition(p, q, p, None).likeliest(5)
    assert ids.shape == probs.shape == (len(weights), 2, min(width, 5))
    for row in range(len(weights)):
        for model, of in enumerate((p, q)):
            order = sorted(range(width), key=lambda v: (-float(of[row, v]), v))[:5]
            assert ids[row, model].tolist() == order
            assert probs[row, model].tolist() == of[row, order].tolist()


def ranked(probs):
    """The five likeliest ids of `(V,)` probabilities."""
    values, order = probs.sort(descending=True, stable=True)
    return order[:5].tolist(), values[:5].tolist()


def check_alternatives(trace, sequences, prompt_length, models):
    for records, ids in zip(trace.sequences, sequences, strict=True):
        assert [record.token_id for record in records] == ids[prompt_length:].tolist()
        for model, name in zip(models, ("base_alternatives", "proxy_alternatives"), strict=True):
            with torch.no_grad():
                probs = model(ids[None]).logits[0, prompt_length - 1 : -1].softmax(-1)
            for record, expected in zip(records, probs, strict=True):
                found, values = zip(*getattr(record, name), strict=True)
                order, likeliest = ranked(expected)
                assert list(found) == order
                assert list(values) == pytest.approx(likeliest, abs=1e-5)
                assert [type(value) for value in (*found, *values)] == [int] * 5 + [float] * 5


def test_alternatives_are_those_of_the_models_in_a_batch_decoded_token_by_token(base, proxy):
    kad = KADLogitsProcessor(proxy, DualDeferral(0.4), trace=True)
    prompts = torch.tensor([[5, 6, 7], [9, 8, 3]])
    torch.manual_seed(0)
    ids = base.generate(prompts, logits_processor=[kad], do_sample=True, top_k=0, max_new_tokens=9)
    assert [len(records) for records in kad.trace.sequences] == [9, 9]
    check_alternatives(kad.trace, ids, 3, (base, proxy))


def test_alternatives_are_those_of_the_models_in_speculative_decoding(base, proxy):
    kad = KADLogitsProcessor(proxy, DualDeferral(0.4), trace=True)
    torch.manual_seed(0)
    ids = base.generate(
        torch.tensor([[5, 6, 7]]),
        logits_processor=[kad],
        assistant_model=proxy,
        do_sample=True,
        top_k=0,
        max_new_tokens=30,
    )
    drafted = [record.drafted for record in kad.trace]
    assert len(drafted) == 30
    assert set(drafted) == {True, False}
    check_alternatives(kad.trace, ids, 3, (base, proxy))


def test_a_small_vocabulary_has_fewer_alternatives():
    recorder = RoundRecorder(trace=True)
    p, q = torch.tensor([[0.25, 0.5, 0.25]]), torch.tensor([[0.125, 0.125, 0.75]])
    recorder.record(0, 0, [1], [Composition(p, q, p, torch.tensor([0.0]))])
    (record,) = finish(recorder)[1]
    assert record.base_alternatives == ((1, 0.5), (0, 0.25), (2, 0.25))
    assert record.proxy_alternatives == ((2, 0.75), (0, 0.125), (1, 0.125))


def test_recording_reads_nothing_back_before_the_end(monkeypatch):
    recorders = RoundRecorder(trace=True), StepRecorder(trace=True)
    ids = torch.tensor([[*PROMPT, 1, 2], [*PROMPT, 3, 4]])
    of_round, of_steps = [position(seed=seed) for seed in range(3)], [position(seed=at, rows=2) for at in range(2)]
    with monkeypatch.context() as patch:
        for name in ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"):
            patch.setattr(torch.Tensor, name, lambda self, *_: pytest.fail("read back"))
        recorders[0].record(2, 2, [1, 2, 3], of_round)
        for at, step in enumerate(of_steps):
            recorders[1].record(ids[:, : 2 + at], step, None)
    assert len(finish(recorders[0])[1]) == 3
    assert len(recorders[1].finish(ids, 2, [2, 2], [0, 1])[1]) == 2


# --- Reading from the device ----------------------------------------------------------------------------------


def rounds_of(tokens):
    recorder = BatchRecorder(trace=True)
    for row in recorder.begin(2):
        for seed in range(tokens):
            row.record(1, 0, [seed % SIZE], [position(seed=seed)])
    return recorder.finish


def steps_of(tokens, parents=None):
    recorder = StepRecorder(trace=True)
    ids = torch.tensor([[*PROMPT, *(at % SIZE for at in range(tokens))]] * 2)
    for at in range(tokens):
        recorder.record(ids[:, : 2 + at], position(seed=at, rows=2), parents)
    return lambda: recorder.finish(ids, 2, recorder.beam_lengths(ids, 2, [0, 1]), [0, 1])


def beams_of(tokens):
    return steps_of(tokens, [0, 1])


@pytest.mark.parametrize("record", [rounds_of, steps_of, beams_of])
def test_more_tokens_are_read_from_the_device_in_no_more_transfers(monkeypatch, record):
    """Every read of a value counts, whether it is one number or a whole tensor."""
    counts = []
    for tokens in (5, 50):
        finish, reads = record(tokens), []
        with monkeypatch.context() as patch:
            for name in ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"):
                read = getattr(torch.Tensor, name)

                def counted(self, *arguments, read=read, reads=reads):
                    reads.append(read)
                    return read(self, *arguments)

                patch.setattr(torch.Tensor, name, counted)
            finish()
        counts.append(len(reads))
    assert 0 < counts[0] == counts[1]


# --- Decoding methods of the user's ---------------------------------------------------------------------------

ANSWERS = [[*PROMPT, 1, 2, 3], [7, 7, 4, 5, 3]]


def steps_of_two_rows(trace=False, lengths=(2, 3, 4), parents=((0, 1),) * 3):
    """Two rows with different prompts, recorded at some lengths of the texts."""
    recorder, ids = StepRecorder(trace), torch.tensor(ANSWERS)
    for length, own in zip(lengths, parents, strict=True):
        recorder.record(ids[:, :length], position(seed=length, rows=2), list(own))
    return recorder, ids


@pytest.mark.parametrize("trace", [False, True])
def test_several_tokens_a_step_are_counted_without_a_deferral_mass(trace, caplog):
    recorder, ids = steps_of_two_rows(trace, lengths=(2, 4), parents=((0, 1),) * 2)
    assert recorder.beam_lengths(ids, 2, [0, 1]) == [3, 3]
    with caplog.at_level("WARNING", logger="transformers_kad.records.recorders"):
        statistics, records = recorder.finish(ids, 2, [3, 3], [0, 1])
    assert [(s.tokens, s.deferral_mass, s.deferral_masses) for s in statistics] == [(3, None, None)] * 2
    assert records is None
    assert "for 1 of the 3 tokens" in caplog.text


@pytest.mark.parametrize("trace", [False, True])
def test_a_row_that_no_step_continues_has_no_mass_and_the_others_keep_theirs(trace, caplog):
    """The second step says that both rows continue the first: a decoding method merged them."""
    recorder, ids = steps_of_two_rows(trace, parents=((0, 1), (0, 0), (0, 1)))
    with caplog.at_level("WARNING", logger="transformers_kad.records.recorders"):
        statistics, records = recorder.finish(ids, 2, [3, 3], [0, 1])
    expected = [float(position(seed=length, rows=2).deferral_mass[0]) for length in (2, 3, 4)]
    assert statistics[0].deferral_masses == tuple(expected)
    assert statistics[1] == SequenceStatistics(tokens=3, rounds=3, acceptance_histogram=(3,))
    assert records is None
    assert "for 2 of the 3 tokens" in caplog.text


@pytest.mark.parametrize("trace", [False, True])
def test_fewer_sequences_than_rows_are_counted_if_they_begin_as_their_rows(trace):
    recorder, ids = steps_of_two_rows(trace)
    (statistics,), _ = recorder.finish(ids[:1], 2, [3], [0])
    expected = [float(position(seed=length, rows=2).deferral_mass[0]) for length in (2, 3, 4)]
    assert statistics.deferral_masses == tuple(expected)


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize(
    "returned",
    [
        ANSWERS * 2,  # more sequences than rows
        ANSWERS[1:],  # fewer, and another row than the first
        ANSWERS[::-1],  # in another order
        [row[2:] for row in ANSWERS],  # without the prompts
        [row[:1] for row in ANSWERS],  # shorter than the prompts
        ANSWERS[0],  # not a batch
    ],
    ids=["more", "another", "order", "no prompt", "short", "flat"],
)
def test_sequences_that_do_not_continue_the_rows_are_named_in_one_error(trace, returned):
    recorder, _ = steps_of_two_rows(trace)
    ids = torch.tensor(returned)
    lengths = [max(ids.shape[-1] - 2, 0)] * len(ids)
    shapes = rf"{re.escape(str(tuple(ids.shape)))}.* texts \(2, 2\)"
    with pytest.raises(UnmatchedSequencesError, match=shapes):
        recorder.finish(ids, 2, lengths, [*range(len(ids))])
    with pytest.raises(UnmatchedSequencesError, match=shapes):
        recorder.beam_lengths(ids, 2, [*range(len(ids))])
    assert issubclass(UnmatchedSequencesError, ValueError)


def test_a_processor_that_was_never_asked_knows_the_tokens_alone(caplog):
    with caplog.at_level("WARNING", logger="transformers_kad.records.recorders"):
        statistics, trace = StepRecorder(trace=True).finish(torch.tensor(ANSWERS), 2, [3, 2], [0, 1])
    assert [(s.tokens, s.deferral_mass) for s in statistics] == [(3, None), (2, None)]
    assert trace is None
    assert "for 3 of the 3 tokens" in caplog.text


def test_a_step_with_fewer_rows_than_before_leaves_the_mass_of_the_others_unknown(caplog):
    """Rows that have ended may be left out by a decoding method of the user's."""
    recorder, ids = StepRecorder(trace=True), torch.tensor(ANSWERS)
    recorder.record(ids[:, :2], position(rows=2), None)
    recorder.record(ids[:1, :3], position(), None)
    with caplog.at_level("WARNING", logger="transformers_kad.records.recorders"):
        statistics, trace = recorder.finish(ids[:, :4], 2, [2, 2], [0, 1])
    assert [s.deferral_masses is None for s in statistics] == [False, True]
    assert trace is None
