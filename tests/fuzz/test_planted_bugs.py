"""Faults that are planted into the library: the fuzz finds each of them, so that it can find others."""

from dataclasses import replace
from itertools import count

import pytest
import torch
from fuzz import fuzz
from hypothesis import Phase

from transformers_kad.decoding import speculative, speculative_round, speculative_rows
from transformers_kad.decoding.call_arguments import CallArguments
from transformers_kad.decoding.rule_memory import RuleMemory
from transformers_kad.models import cached_forwards
from transformers_kad.models.cached_model import CachedModel
from transformers_kad.records import recorders

EXAMPLES = 400


def cache_keeps_a_refused_token(monkeypatch):
    take_back = CachedModel.take_back
    monkeypatch.setattr(
        CachedModel, "take_back", lambda self, tokens: take_back(self, [max(count - 1, 0) for count in tokens])
    )


def accepted_tokens_are_counted_twice(monkeypatch):
    count_rounds = recorders.count_rounds

    def counted(*args):
        statistics = count_rounds(*args)
        return replace(statistics, accepted=2 * statistics.accepted)

    monkeypatch.setattr(recorders, "count_rounds", counted)


def rows_share_the_state_of_the_rule(monkeypatch):
    end_round = RuleMemory.end_round

    def end(self, *args):
        end_round(self, *args)
        self.current = self.current[:1].expand_as(self.current)

    monkeypatch.setattr(RuleMemory, "end_round", end)


def bonus_token_is_drawn_from_q(monkeypatch):
    compose = speculative_round.compose_positions

    def composed(*args, proxy_probs, **settings):
        result = compose(*args, proxy_probs=proxy_probs, **settings)
        return result if proxy_probs is not None else replace(result, target_probs=result.proxy_probs)

    monkeypatch.setattr(speculative_round, "compose_positions", composed)


def processors_with_a_state_run_ahead(monkeypatch):
    monkeypatch.setattr(speculative_round, "can_run_ahead", lambda processors: True)


def changed_weights_are_not_seen(monkeypatch):
    monkeypatch.setattr(cached_forwards, "fingerprint", lambda model: 0)


def a_text_is_one_token_too_long(monkeypatch):
    def ends(self, rows, texts):
        longest = float("inf") if self._max_length is None else self._max_length
        return [texts.lengths[row.number] > longest or row.last_token in self._eos_token_ids for row in rows]

    monkeypatch.setattr(speculative_rows.Criteria, "_known_ends", ends)


def padding_is_read_as_text(monkeypatch):
    monkeypatch.setattr(CallArguments, "attention_mask", lambda self: None)


def greedy_decoding_draws_a_number(monkeypatch):
    draw_next = speculative_round.draw_next
    monkeypatch.setattr(
        speculative_round, "draw_next", lambda *args, **settings: (torch.rand(1), draw_next(*args, **settings))[1]
    )


def the_trace_swaps_the_models(monkeypatch):
    make = recorders._make_record

    def swapped(token, traced, mass, *, drafted):
        (p, q, r), *likeliest = traced
        return make(token, ((q, p, r), *likeliest), mass, drafted=drafted)

    monkeypatch.setattr(recorders, "_make_record", swapped)


def the_configuration_of_the_base_is_written_to(monkeypatch):
    make, times = speculative._make_readers, count(3600)

    def readers(model, *args):
        monkeypatch.setattr(model.generation_config, "max_time", float(next(times)))
        return make(model, *args)

    monkeypatch.setattr(speculative, "_make_readers", readers)


FAULTS = [
    cache_keeps_a_refused_token,
    accepted_tokens_are_counted_twice,
    rows_share_the_state_of_the_rule,
    bonus_token_is_drawn_from_q,
    processors_with_a_state_run_ahead,
    changed_weights_are_not_seen,
    a_text_is_one_token_too_long,
    padding_is_read_as_text,
    greedy_decoding_draws_a_number,
    the_trace_swaps_the_models,
    the_configuration_of_the_base_is_written_to,
]


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_the_fuzz_finds(fault, monkeypatch):
    fault(monkeypatch)
    with pytest.raises(AssertionError) as caught:
        fuzz("full", EXAMPLES, 0, phases=[Phase.generate])
    assert hasattr(caught.value, "account")  # it is not the assertion of a test that something is raised
    print(caught.value.account.counts["sessions: all"], "sessions")
