"""What a call of the fuzz returned, and what must hold of it whatever the models are."""

from dataclasses import dataclass
from typing import Any

import torch
from fuzz_models import PADDING, VOCABULARY
from fuzz_sessions import Call

from transformers_kad import KADLogitsProcessor


@dataclass
class Result:
    """What a call returned."""

    call: Call
    prompts: list[list[int]]
    inputs: torch.Tensor
    ids: torch.Tensor
    statistics: Any
    output: Any

    @property
    def prompts_of_rows(self) -> list[list[int]]:
        """The prompt of each returned sequence."""
        return [prompt for prompt in self.prompts for _ in range(self.call.returned)]

    @property
    def tokens(self) -> list[list[int]]:
        """The tokens that each sequence emitted, by the statistics."""
        new = self.ids[:, self.inputs.shape[1] :].tolist()
        return [own[: row.tokens] for own, row in zip(new, self.statistics.sequences, strict=True)]

    def check_shape(self, speculative: bool) -> None:
        """The prompts come first, then at most so many tokens, then padding."""
        rows, length = len(self.prompts) * self.call.returned, self.inputs.shape[1]
        assert self.ids.shape[0] == rows
        assert torch.equal(self.ids[:, :length], self.inputs.repeat_interleave(self.call.returned, 0))
        counts = [row.tokens for row in self.statistics.sequences]
        assert len(counts) == rows
        assert max(counts) == self.ids.shape[1] - length <= self.call.limit
        assert min(counts) >= 1
        settings = dict(self.call.settings)
        least = settings.get("min_new_tokens", settings.get("min_length", 0) - length)
        if not self.call.criteria and "stop_strings" not in settings and not self.call.after:
            assert min(counts) >= min(least, self.call.limit)
        if speculative:
            for own, count in zip(self.ids[:, length:].tolist(), counts, strict=True):
                assert own[count:] == [PADDING] * (len(own) - count)
        for name in ("scores", "logits"):
            kept = getattr(self.output, name, None)
            if kept is not None and self.call.beams == 1:
                assert len(kept) == max(counts)
                assert {tuple(step.shape) for step in kept} == {(rows, VOCABULARY)}


def check_statistics(statistics: Any, call: Call, settings: dict[str, Any], speculative: bool) -> None:
    """The identities that `SequenceStatistics` states, of each sequence and of all together."""
    for one in (*statistics.sequences, statistics):
        assert one.tokens >= one.rounds >= 1
        assert 0 <= one.accepted <= one.drafted
        assert 0 <= one.tokens - one.accepted <= one.rounds
        histogram = one.acceptance_histogram
        assert sum(histogram) == one.rounds
        assert sum(k * count for k, count in enumerate(histogram)) == one.accepted
        assert one.acceptance_rate is None or 0 <= one.acceptance_rate <= 1
        assert (one.acceptance_rate is None) == (one.drafted == 0)
        assert one.tokens_per_round == one.tokens / one.rounds
        assert one.deferral_mass is None or -1e-6 <= one.deferral_mass <= 1 + 1e-6
    for one in statistics.sequences:
        if not speculative:
            assert (one.rounds, one.drafted, one.accepted) == (one.tokens, 0, 0)
        if isinstance(settings.get("num_assistant_tokens"), int):
            assert one.drafted <= settings["num_assistant_tokens"] * one.rounds
        # Only the last round can end on a draft token, where the rows do not go in step.
        if len(statistics.sequences) == 1:
            assert one.tokens - one.accepted >= one.rounds - 1
        if one.deferral_masses is not None:
            assert len(one.deferral_masses) == one.tokens
            assert abs(sum(one.deferral_masses) / one.tokens - one.deferral_mass) < 1e-6
    for name in ("tokens", "rounds", "drafted", "accepted"):
        assert getattr(statistics, name) == sum(getattr(one, name) for one in statistics.sequences)
    rounds = max(one.rounds for one in statistics.sequences)
    assert statistics.base_forwards >= rounds or call.beams > 1
    assert statistics.proxy_forwards <= statistics.base_forwards * 40
    if settings.get("lazy"):
        assert statistics.proxy_forwards <= statistics.base_forwards


def check_trace(kad: KADLogitsProcessor, result: Result) -> None:
    """The trace has a record for each token that the statistics count, and agrees with them."""
    assert (kad.trace is None) == (not kad.settings.trace)
    if kad.trace is None:
        return
    for records, one, tokens in zip(kad.trace.sequences, kad.statistics.sequences, result.tokens, strict=True):
        assert [record.token_id for record in records] == tokens
        assert sum(record.drafted for record in records) == one.accepted
        masses = one.deferral_masses
        wanted = [None] * one.tokens if masses is None else list(masses)
        assert [record.deferral_mass for record in records] == wanted
        for record in records:
            probs = record.base_prob, record.proxy_prob, record.target_prob
            assert all(-1e-6 <= prob <= 1 + 1e-6 for prob in probs)
            assert record.proxy_share is None or 0 <= record.proxy_share <= 1
            for alternatives in (record.base_alternatives, record.proxy_alternatives):
                values = [prob for _, prob in alternatives]
                assert values == sorted(values, reverse=True)
                assert len({token for token, _ in alternatives}) == len(alternatives) == 5


def same(one: Any, other: Any) -> bool:
    """Whether two nested values are equal, tensors included."""
    if torch.is_tensor(one):
        return torch.is_tensor(other) and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return isinstance(other, list | tuple) and len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def difference(one: Any, other: Any) -> str:
    """The first value at which two nested values differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        names = [name for name in {**one, **other} if not same(one.get(name), other.get(name))]
        return f"{names[0]}: {difference(one.get(names[0]), other.get(names[0]))}" if names else "the keys"
    if isinstance(one, list) and isinstance(other, list) and len(one) != len(other):
        return f"what is in only one: {[value for value in (*one, *other) if one.count(value) != other.count(value)]}"
    if isinstance(one, list) and isinstance(other, list):
        return next(difference(a, b) for a, b in zip(one, other, strict=True) if not same(a, b))
    return f"{one!r:.200} to {other!r:.200}"
