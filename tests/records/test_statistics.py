"""The counts of a call are those of its sequences."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_rounds import Round, recorded, texts

from transformers_kad import KADStatistics, SequenceStatistics
from transformers_kad.records.statistics import add_up

deterministic = settings(derandomize=True, deadline=None, max_examples=100)


@given(st.lists(texts(), min_size=1, max_size=4))
@deterministic
def test_a_calls_counts_are_the_sums_over_its_sequences(calls):
    sequences = [recorded(rounds)[0] for rounds in calls]
    together, _ = recorded([one for rounds in calls for one in rounds])
    total = add_up(sequences, base_forwards=17, proxy_forwards=23)
    for name in ("tokens", "rounds", "drafted", "accepted", "acceptance_histogram", "acceptance_rate"):
        assert getattr(total, name) == getattr(together, name), name
    assert total.tokens_per_round == together.tokens_per_round
    assert total.deferral_mass == pytest.approx(together.deferral_mass, abs=1e-12)
    assert (total.base_forwards, total.proxy_forwards) == (17, 23)
    assert total.sequences == tuple(sequences)


def test_the_deferral_mass_of_a_call_is_weighted_by_tokens_and_empty_texts_do_not_count():
    long = SequenceStatistics(tokens=30, rounds=30, deferral_mass=0.25, acceptance_histogram=(30,))
    short = SequenceStatistics(tokens=10, rounds=10, deferral_mass=0.75, acceptance_histogram=(10,))
    total = add_up([long, SequenceStatistics(), short], base_forwards=30, proxy_forwards=30)
    assert total.deferral_mass == pytest.approx(0.375, abs=1e-12)
    assert total.tokens == 40
    assert len(total.sequences) == 3


def test_a_call_of_a_rule_that_is_no_mask_and_an_empty_call_have_no_deferral_mass():
    some = SequenceStatistics(tokens=3, rounds=3)
    assert add_up([some, some], base_forwards=3, proxy_forwards=3).deferral_mass is None
    nothing = add_up([SequenceStatistics()], base_forwards=0, proxy_forwards=0)
    assert nothing.deferral_mass is None
    assert nothing.acceptance_rate is None
    assert add_up([], base_forwards=0, proxy_forwards=0) == KADStatistics()


def test_statistics_and_records_cannot_be_changed():
    statistics, trace = recorded([Round(1, 1, False, [0.5, 0.5])], trace=True)
    total = add_up([statistics], base_forwards=1, proxy_forwards=1)
    for frozen, name in [
        (statistics, "tokens"),
        (total, "base_forwards"),
        (total, "sequences"),
        (trace, "sequences"),
        (trace[0], "drafted"),
    ]:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(frozen, name, 0)
    assert isinstance(total.sequences, tuple)
    assert isinstance(total.acceptance_histogram, tuple)
