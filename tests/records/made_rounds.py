"""Rounds and positions made up by hand, for the tests of what is recorded of a call."""

import dataclasses

import torch
from hypothesis import strategies as st

from transformers_kad import DualDeferral
from transformers_kad.records.recorders import BatchRecorder, RoundRecorder
from transformers_kad.rules.composition import Composition, compose

SIZE = 6  # of the vocabulary


def position(rule=None, seed=0, rows=1):
    """A position as a rule sees it."""
    generator = torch.Generator().manual_seed(seed)
    logits = (2 * torch.randn(rows, SIZE, generator=generator) for _ in range(2))
    return compose(DualDeferral(0.4) if rule is None else rule, *logits)


def with_mass(*masses):
    """Positions, one a row, whose deferral mass is given and whose probabilities are all the same."""
    flat = torch.full((len(masses), SIZE), 1 / SIZE)
    return Composition(flat, flat, flat, None if None in masses else torch.tensor(masses))


@dataclasses.dataclass
class Round:
    """A round as the loop reports it: `ends` where the text ends on a draft token, without a token after it."""

    drafted: int
    accepted: int
    ends: bool
    masses: list[float]

    @property
    def tokens(self):
        return self.accepted + (not self.ends)


@st.composite
def texts(draw):
    """Rounds of one text; only the last may end on a draft token."""
    rounds = []
    for last in [*draw(st.lists(st.just(False), max_size=8)), True]:
        drafted = draw(st.integers(0, 5))
        accepted = draw(st.integers(0, drafted))
        ends = last and accepted > 0 and draw(st.booleans())
        masses = draw(st.lists(st.integers(0, 64), min_size=accepted + 1, max_size=accepted + 1))
        rounds.append(Round(drafted, accepted, ends, [m / 64 for m in masses][: accepted + (not ends)]))
    return rounds


def finish(recorder):
    """Statistics and trace of a batch with this row alone."""
    return BatchRecorder(recorder.trace, [recorder]).finish()


def recorded(rounds, trace=False):
    recorder = RoundRecorder(trace)
    for one in rounds:
        recorder.record(one.drafted, one.accepted, list(range(one.tokens)), [with_mass(m) for m in one.masses])
    (statistics,), records = finish(recorder)
    return statistics, records
