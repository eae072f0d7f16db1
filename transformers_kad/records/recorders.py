"""Collect what happens in a call of `generate`, and turn it into statistics and a trace when the call is over.

While a call runs, the recorders keep tensors where they are. At the end every kind of value is read from the device
in one transfer, however many tokens were emitted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, islice, repeat
from typing import Any

import torch
from transformers.utils import logging

from ..rules.composition import Composition
from ..utils.transfers import send
from .statistics import SequenceStatistics, TokenRecord, count_rounds
from .trace import KADTrace

logger = logging.get_logger(__name__)

ALTERNATIVES = 5  # number of likeliest ids of each model that a record keeps


class UnmatchedSequencesError(ValueError):
    """The sequences that a call returned do not continue the texts that were recorded, so that nothing is known."""


@dataclass
class _Step:
    """One step of a call that decodes token by token."""

    deferral_mass: torch.Tensor | None  # (rows,)
    parents: list[int] | None  # the row of the step before that each row continues; None where row i continues row i
    newest: torch.Tensor  # (rows, 1): the last token of each text; (rows, 0) where the texts are still empty


@dataclass
class StepRecorder:
    """Collects the steps of a call that decodes token by token, row by row or in beams."""

    trace: bool
    steps: dict[int, _Step] = field(default_factory=dict)  # by the length of the texts
    traced: dict[int, tuple[torch.Tensor, ...]] = field(default_factory=dict)  # by the length of the texts
    first_texts: torch.Tensor | None = None  # (rows, L) of the first step
    untraced: tuple[int, Composition] | None = None  # the last step, whose tokens are seen one step later

    def record(self, input_ids: torch.Tensor, composition: Composition, parents: list[int] | None) -> None:
        """Record a step: the texts `(rows, L)`, what the rule computed for position L, and who continues whom.

        `parents` holds the row of the step before that each text continues; None where row i continues row i.
        """
        self.record_mass(input_ids, composition.deferral_mass, parents)
        if self.trace:
            self.untraced = (input_ids.shape[1], composition)

    def record_mass(
        self, input_ids: torch.Tensor, deferral_mass: torch.Tensor | None, parents: list[int] | None
    ) -> None:
        """Record a step of which only the deferral mass D `(rows,)` is known, for a call without a trace."""
        self._trace_tokens(input_ids)
        if self.first_texts is None:
            self.first_texts = input_ids.clone()
        # A copy, because a view would keep the texts of all steps in memory.
        self.steps[input_ids.shape[1]] = _Step(deferral_mass, parents, input_ids[:, -1:].clone())

    def _trace_tokens(self, texts: torch.Tensor) -> None:
        """Trace the last step, now that the texts `(rows, L)` hold the tokens that it led to."""
        if self.untraced is not None and texts.shape[1] > self.untraced[0]:
            (length, composition), self.untraced = self.untraced, None
            if len(texts) == len(composition.target_probs):
                self.traced[length] = _trace(composition, texts[:, length])

    def finish(
        self, sequences: torch.Tensor, prompt_length: int, lengths: list[int], rows: list[int]
    ) -> tuple[list[SequenceStatistics], KADTrace | None]:
        """Statistics and trace of the returned sequences.

        A decoding method of the user's may emit tokens for which the processor was never asked, or merge and reorder
        rows. A warning says so. The tokens are counted all the same, but the deferral mass of such a sequence is
        None, and there is no trace.

        Args:
            sequences: the output of `generate`, `(N, L)`.
            prompt_length: where the generated part begins.
            lengths: the number of tokens that each sequence emitted.
            rows: the row of the first step that each sequence started from.

        Raises:
            UnmatchedSequencesError: the sequences do not begin with the texts of these rows.
        """
        self._check(sequences, prompt_length, rows)
        self._trace_tokens(sequences)
        ids = sequences.tolist()
        places = [
            {at: row for at, row in place.items() if at in self.steps and row < len(self.steps[at].newest)}
            for place in self._places(ids, prompt_length, lengths, rows)
        ]
        unknown = max((length - len(place) for length, place in zip(lengths, places, strict=True)), default=0)
        if unknown:
            logger.warning(
                f"The decoding method did not run the KAD processor for {unknown} of the {max(lengths)} tokens that "
                "it emitted, or merged or reordered the rows of its batch: such tokens may not be guided by the "
                "proxy, and their deferral mass is unknown. Let it call `logits_processor` at every step."
            )
        with_mass = {at: (step.deferral_mass,) for at, step in self.steps.items() if step.deferral_mass is not None}
        masses = dict(zip(with_mass, _fetch([*with_mass.values()]), strict=True))
        statistics, records = [], []
        traced = dict(zip(self.traced, _fetch([*self.traced.values()]), strict=True))
        for row, (length, place) in enumerate(zip(lengths, places, strict=True)):
            own = [masses[at][r][0] for at, r in place.items() if at in masses]
            statistics.append(count_rounds([0] * length, [0] * length, length, own if len(own) == length else None))
            known = [(ids[row][at], traced[at][r]) for at, r in place.items() if at in traced and r == row]
            pairs = zip(known, own or repeat(None), strict=False)
            records.append(tuple(_make_record(*one, mass, drafted=False) for one, mass in pairs))
        is_complete = self.trace and [len(own) for own in records] == lengths
        return statistics, KADTrace(tuple(records)) if is_complete else None

    def beam_lengths(self, sequences: torch.Tensor, prompt_length: int, rows: list[int]) -> list[int]:
        """The number of tokens that each of the returned sequences `(N, L)` emitted in beam search.

        No later step continues a beam that has ended, whatever it is filled up with. `rows` is that of `finish`.
        """
        self._check(sequences, prompt_length, rows)
        longest = [sequences.shape[1] - prompt_length] * len(rows)
        return [len(place) for place in self._places(sequences.tolist(), prompt_length, longest, rows)]

    def _check(self, sequences: torch.Tensor, prompt_length: int, rows: list[int]) -> None:
        """Raise unless the sequences `(N, L)` begin with the texts of the rows that they started from."""
        fits = sequences.dim() == 2 and sequences.shape[1] >= prompt_length
        if fits and self.first_texts is not None:
            known = min(prompt_length, self.first_texts.shape[1])
            fits = max(rows, default=0) < len(self.first_texts) and torch.equal(
                sequences[:, :known], self.first_texts[rows, :known].to(sequences)
            )
        if not fits:
            began = "no texts" if self.first_texts is None else f"texts {tuple(self.first_texts.shape)}"
            raise UnmatchedSequencesError(
                f"The decoding method returned sequences {tuple(sequences.shape)} that do not continue, row by row, "
                f"the {began} for which it first ran the KAD processor."
            )

    def _places(
        self, ids: list[list[int]], prompt_length: int, lengths: list[int], rows: list[int]
    ) -> list[dict[int, int]]:
        """The row that each sequence had at each length of the texts, followed through the parents of the rows.

        It ends at the step in which no row continues the sequence. A step that was not recorded keeps the row.
        """
        moved = {at: s for at, s in self.steps.items() if s.parents is not None and at > prompt_length}
        newest = dict(zip(moved, _fetch([(step.newest,) for step in moved.values()]), strict=True))
        places = []
        for sequence, length, start in zip(ids, lengths, rows, strict=True):
            row, place = start, dict[int, int]()
            for at in range(prompt_length, prompt_length + length):
                if at in moved:
                    token = ([sequence[at - 1]],)
                    children = [r for r, parent in enumerate(moved[at].parents or ()) if parent == row]
                    row = next((r for r in children if newest[at][r] == token), -1)
                    if row < 0:
                        break
                place[at] = row
            places.append(place)
        return places


@dataclass
class RoundRecorder:
    """Collects the rounds of one sequence that is decoded speculatively."""

    trace: bool
    drafted: list[int] = field(default_factory=list)  # per round
    accepted: list[int] = field(default_factory=list)  # per round
    tokens: list[int] = field(default_factory=list)
    from_draft: list[bool] = field(default_factory=list)  # per token
    masses: list[tuple[torch.Tensor]] = field(default_factory=list)  # of some tokens each
    traced: list[tuple[torch.Tensor, ...]] = field(default_factory=list)  # of some tokens each

    def record(self, drafted: int, accepted: int, tokens: list[int], positions: list[Composition]) -> None:
        """Record a round: its draft length, how many draft tokens it emitted, its tokens, and their positions.

        `positions` holds what the rule computed for the position of each token, in pieces of one or more rows.
        """
        self.drafted.append(drafted)
        self.accepted.append(accepted)
        self.tokens += tokens
        self.from_draft += [at < accepted for at in range(len(tokens))]
        self.masses += [(piece.deferral_mass,) for piece in positions if piece.deferral_mass is not None]
        if self.trace:
            ids = send(tokens, positions[0].target_probs.device)
            self.traced += map(_trace, positions, torch.split(ids, [len(piece.target_probs) for piece in positions]))


@dataclass
class BatchRecorder:
    """Collects the rounds of all rows of a call that decodes speculatively."""

    trace: bool
    rows: list[RoundRecorder] = field(default_factory=list)

    def begin(self, rows: int) -> list[RoundRecorder]:
        """A recorder for each row."""
        self.rows = [RoundRecorder(self.trace) for _ in range(rows)]
        return self.rows

    def finish(self) -> tuple[list[SequenceStatistics], KADTrace | None]:
        """Statistics and trace of the sequences."""
        masses = chain.from_iterable(_fetch([part for row in self.rows for part in row.masses]))
        traced = chain.from_iterable(_fetch([part for row in self.rows for part in row.traced]))
        statistics, records = [], []
        for row in self.rows:
            count = len(row.tokens)
            own = [mass for (mass,) in islice(masses, count)] if row.masses else None
            statistics.append(count_rounds(row.drafted, row.accepted, count, own))
            known = zip(row.tokens, islice(traced, count), own or repeat(None), row.from_draft, strict=False)
            records.append(tuple(_make_record(*one, drafted=drafted) for *one, drafted in known))
        return statistics, KADTrace(tuple(records)) if self.trace else None


def _trace(composition: Composition, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What a trace keeps of some positions, given the token emitted at each.

    Returns:
        p, q and r of the token `(rows, 3)`; the likeliest ids of p and of q `(rows, 2, ALTERNATIVES)`; their
        probabilities.
    """
    return composition.probs_of(tokens), *composition.likeliest(ALTERNATIVES)


def _fetch(parts: Sequence[tuple[torch.Tensor, ...]]) -> list[list[tuple[Any, ...]]]:
    """The rows of each part, whose tensors are `(rows, ...)`, as Python values, read in one transfer a kind."""
    rows = zip(*(torch.cat(kind).tolist() for kind in zip(*parts, strict=True)), strict=True)
    return [list(islice(rows, len(part[0]))) for part in parts]


def _make_record(token: int, traced: tuple[Any, ...], mass: float | None, *, drafted: bool) -> TokenRecord:
    """The record of a token from a row of what `_trace` kept of its position."""
    (p, q, r), *likeliest = traced
    # A token with r = 0 is only emitted where a later processor put mass back; then nothing is owed to the proxy.
    share = None if mass is None else min(q * mass / r, 1.0) if r > 0 else 0.0
    base, proxy = (tuple(zip(*model, strict=True)) for model in zip(*likeliest, strict=True))
    return TokenRecord(token, p, q, r, mass, share, drafted, base, proxy)
