"""What happened in a call of `generate`: counts per sequence and in all, and a record of every token."""

import html
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from transformers.utils import logging

from ..rules.composition import Composition
from ..utils.files import write_whole
from .trace_page import render_page

logger = logging.get_logger(__name__)

Alternatives: TypeAlias = tuple[tuple[int, float], ...]
ALTERNATIVES = 5  # how many of each model a record keeps


@dataclass(frozen=True)
class SequenceStatistics:
    """Counts of one sequence, or of several added up.

    A *round* is one forward of the base and what it yields: token by token a single token; speculatively the
    accepted part of a draft and, unless the text ends on a draft token, one more token.

    Attributes:
        tokens: emitted tokens, end of sequence included.
        rounds: rounds.
        drafted: tokens that the proxy proposed.
        accepted: draft tokens that were emitted.
        deferral_mass: mean of the deferral mass D over the emitted positions, in [0, 1]; None for rules that
            are no mask.
        acceptance_histogram: entry k is the number of rounds that emitted k draft tokens, for k up to the longest
            draft.
        deferral_masses: D at each emitted position of one sequence; None for rules that are no mask, without any
            token, and where several sequences are added up.

    Identities: tokens = accepted + rounds - rounds that end on a draft token; sum(histogram) = rounds;
    sum(k * histogram[k]) = accepted.
    """

    tokens: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    deferral_mass: float | None = None
    acceptance_histogram: tuple[int, ...] = ()
    deferral_masses: tuple[float, ...] | None = field(default=None, repr=False, kw_only=True)

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted / drafted, None when nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_per_round(self) -> float | None:
        """Emitted tokens per round, None when there was no round."""
        return self.tokens / self.rounds if self.rounds else None


@dataclass(frozen=True)
class KADStatistics(SequenceStatistics):
    """Statistics of one finished call: the counts of all its sequences, and each sequence's own.

    Attributes:
        base_forwards: forwards of the base. A prefill counts as one, however many chunks it has.
        proxy_forwards: forwards of the proxy, counted the same way; the reference's are not among them.
        sequences: one `SequenceStatistics` per returned sequence, in the order of the output.
    """

    base_forwards: int = 0
    proxy_forwards: int = 0
    sequences: tuple[SequenceStatistics, ...] = ()


@dataclass(frozen=True)
class TokenRecord:
    """One emitted token.

    Attributes:
        token_id: its id.
        base_prob: p, the base's probability of it.
        proxy_prob: q, the proxy's.
        target_prob: r, the target's, before what `generate` does to it (temperature, top-k, top-p).
        deferral_mass: D at its position, None for rules that are no mask.
        proxy_share: the share of the token owed to the proxy, q D / r, None for rules that are no mask.
        drafted: whether it was drafted by the proxy and accepted.
        base_alternatives: the five likeliest ids of p at its position and their probabilities, in falling order,
            ties by lower id.
        proxy_alternatives: the same of q.
    """

    token_id: int
    base_prob: float
    proxy_prob: float
    target_prob: float
    deferral_mass: float | None
    proxy_share: float | None
    drafted: bool
    base_alternatives: Alternatives = ()
    proxy_alternatives: Alternatives = ()


@dataclass(frozen=True)
class KADTrace(Sequence[TokenRecord]):
    """The records of a finished call. Indexing and iterating run through the first sequence.

    Attributes:
        sequences: the records of each returned sequence.
        statistics: the call's, for the page.
        tokenizer: the processor's `tokenizer`, for the page; None if it was given none.
        base: what the base is called, for the page: its class and where it was loaded from. None if it is not known.
        proxy: the same of the proxy.
        rule: the processor's rule, for the page.

    In a notebook a trace shows itself as the page that `to_html` writes.
    """

    sequences: tuple[tuple[TokenRecord, ...], ...] = ()
    statistics: KADStatistics | None = field(default=None, repr=False, compare=False)
    tokenizer: Any = field(default=None, repr=False, compare=False)
    base: str | None = field(default=None, repr=False, compare=False)
    proxy: str | None = field(default=None, repr=False, compare=False)
    rule: str | None = field(default=None, repr=False, compare=False)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        """Record(s) of the first sequence."""
        return self.sequences[0][index] if self.sequences else ()[index]

    def __len__(self) -> int:
        return len(self.sequences[0]) if self.sequences else 0

    def __iter__(self) -> Iterator[TokenRecord]:
        return iter(self.sequences[0] if self.sequences else ())

    def to_html(self, path: str | os.PathLike[str], tokenizer: Any = None, *, title: str | None = None) -> Path:
        """Write one page that shows the text, each token shaded by the share owed to the proxy.

        The page stands alone: it loads nothing, and what a model wrote is shown, never run.

        Args:
            path: the file to write. Missing folders are made; a file that is there is replaced, through a link too.
                A device or a pipe, such as `/dev/stdout`, is written into.
            tokenizer: what the ids are decoded with; by default the one that the processor was built with.
            title: the page's heading, in plain text.

        Returns:
            `path`.

        Raises:
            ValueError: no tokenizer is known.
            TypeError: `tokenizer` can't decode ids.
            OSError: `path` is a folder, or can't be written.
        """
        tokenizer = self.tokenizer if tokenizer is None else tokenizer
        if tokenizer is None:
            raise ValueError(
                f"`to_html({str(path)!r})` needs a tokenizer to show text, got None: pass `tokenizer=`, or build the "
                "processor with one, `KADLogitsProcessor(proxy, tokenizer=tokenizer)`."
            )
        if not hasattr(tokenizer, "decode") or not hasattr(tokenizer, "convert_ids_to_tokens"):
            raise TypeError(f"`tokenizer` must be a transformers tokenizer, got {tokenizer!r}.")
        path = Path(path)
        if path.is_dir():
            raise IsADirectoryError(f"`path` must be a file, got the folder {str(path)!r}.")
        page = self._page(tokenizer, title)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, page)
        return path

    def _page(self, tokenizer: Any, title: str | None) -> str:
        names = [("base", self.base), ("proxy", self.proxy), ("rule", self.rule)]
        known = [(role, name) for role, name in names if name is not None]
        return render_page(self.sequences, self.statistics, tokenizer, title, known)

    def _repr_html_(self) -> str:
        """The page in a frame of its own, so that neither styles nor scripts reach the notebook."""
        page = self._page(self.tokenizer, None)
        return (
            '<iframe title="KAD trace" sandbox="allow-scripts" width="100%" height="600" '
            f'style="border: 0" srcdoc="{html.escape(page)}"></iframe>'
        )


@dataclass
class _Step:
    """One step token by token: D, which row of the step before each row continues, and its newest token."""

    deferral_mass: torch.Tensor | None
    parents: list[int] | None
    newest: torch.Tensor  # (rows, 1)


class _Traced(NamedTuple):
    """What the trace keeps of some positions, one a row."""

    probs: torch.Tensor  # (rows, 3): p, q and r of the token emitted
    likeliest_ids: torch.Tensor  # (rows, 2, ALTERNATIVES): of p and of q
    likeliest_probs: torch.Tensor  # (rows, 2, ALTERNATIVES)

    @classmethod
    def of(cls, composition: Composition, tokens: torch.Tensor) -> "_Traced":
        return cls(composition.probs_of(tokens), *composition.likeliest(ALTERNATIVES))


def _read(traced: Iterable[_Traced]) -> list[tuple[list[float], Alternatives, Alternatives]]:
    """All their rows, fetched from the device: p, q and r of the token, and the alternatives of both models."""
    rows = []
    for probs, *likeliest in zip(*(torch.cat(parts).tolist() for parts in zip(*traced, strict=True)), strict=True):
        base, proxy = (tuple(zip(*model, strict=True)) for model in zip(*likeliest, strict=True))
        rows.append((probs, base, proxy))
    return rows


@dataclass
class StepRecorder:
    """Collects the steps of a call that decodes token by token, row by row or in beams.

    Nothing is read back from the device before the end.
    """

    trace: bool
    steps: dict[int, _Step] = field(default_factory=dict)  # by text length
    traced: dict[int, _Traced] = field(default_factory=dict)  # by text length
    pending: tuple[int, Composition] | None = None

    def record(self, input_ids: torch.Tensor, composition: Composition, parents: list[int] | None) -> None:
        """Note a step: the texts `(rows, L)`, what was computed for position L, and who continues whom.

        `parents` is None where row i continues row i.
        """
        self.record_mass(input_ids, composition.deferral_mass, parents)
        if self.trace:
            self.pending = (input_ids.shape[1], composition)

    def record_mass(
        self, input_ids: torch.Tensor, deferral_mass: torch.Tensor | None, parents: list[int] | None
    ) -> None:
        """Note a step of which nothing but D `(rows,)` is known; nothing for the trace."""
        self._settle(input_ids)
        # A copy: a view would keep the texts of all steps.
        self.steps[input_ids.shape[1]] = _Step(deferral_mass, parents, input_ids[:, -1:].clone())

    def _settle(self, input_ids: torch.Tensor) -> None:
        # The token that a position led to is seen one step later.
        if self.pending is not None and input_ids.shape[1] > self.pending[0]:
            length, composition = self.pending
            self.traced[length] = _Traced.of(composition, input_ids[:, length])
            self.pending = None

    def finish(
        self, sequences: torch.Tensor, prompt_length: int, lengths: list[int], rows: list[int]
    ) -> tuple[list[SequenceStatistics], KADTrace | None]:
        """Statistics and trace of the returned sequences.

        Args:
            sequences: the output of `generate`, `(N, L)`.
            prompt_length: where the generated part begins.
            lengths: how many tokens each sequence emitted.
            rows: the row of the first step that each sequence started from.

        A decoding method of the user's may emit tokens for which the processor was never asked: a warning says so,
        their deferral mass is unknown, and there is no trace.
        """
        if self.trace:
            self._settle(sequences)
        unasked = [at for at in range(max(lengths, default=0)) if prompt_length + at not in self.steps]
        if unasked:
            logger.warning(
                f"The decoding method did not run the KAD processor for {len(unasked)} of the {max(lengths)} tokens "
                "that it emitted: these are not guided by the proxy. Let it call `logits_processor` at every step."
            )
        masses = self._masses(sequences, prompt_length, lengths, rows)
        statistics = [
            SequenceStatistics(
                tokens=length,
                rounds=length,
                deferral_mass=mean_or_none(mass),
                acceptance_histogram=(length,) if length else (),
                deferral_masses=all_or_none(mass),
            )
            for length, mass in zip(lengths, masses, strict=True)
        ]
        if not self.trace or unasked:
            return statistics, None
        traced = {length: _read([step]) for length, step in self.traced.items()}
        records = []
        for row, (length, mass) in enumerate(zip(lengths, masses, strict=True)):
            ids = sequences[row, prompt_length : prompt_length + length].tolist()
            records.append(
                tuple(
                    make_record(token, *traced[prompt_length + at][row], mass[at], drafted=False)
                    for at, token in enumerate(ids)
                )
            )
        return statistics, KADTrace(tuple(records))

    def beam_lengths(self, sequences: torch.Tensor, prompt_length: int, rows: list[int]) -> list[int]:
        """How many tokens each of the returned sequences `(N, L)` emitted in beam search, see `finish`.

        A beam that has ended is continued in no later step, whatever it is filled up with.
        """
        longest = sequences.shape[1] - prompt_length
        return [len(path) for path in self._paths(sequences, prompt_length, [longest] * len(rows), rows)]

    def _masses(
        self, sequences: torch.Tensor, prompt_length: int, lengths: list[int], rows: list[int]
    ) -> list[list[float | None]]:
        """D of every emitted position."""
        table = {at: step.deferral_mass.tolist() for at, step in self.steps.items() if step.deferral_mass is not None}
        result = []
        for path in self._paths(sequences, prompt_length, lengths, rows):
            masses = [table.get(at) for at in range(prompt_length, prompt_length + len(path))]
            result.append([None if mass is None else mass[row] for mass, row in zip(masses, path, strict=True)])
        return result

    def _paths(
        self, sequences: torch.Tensor, prompt_length: int, lengths: list[int], rows: list[int]
    ) -> list[list[int]]:
        """The row that each sequence had in every step. Beams are followed from row to row through their parents."""
        newest = {at: step.newest.tolist() for at, step in self.steps.items() if step.parents is not None}
        ids = sequences.tolist()
        paths = []
        for sequence, (length, start) in enumerate(zip(lengths, rows, strict=True)):
            row, path = start, list[int]()
            for at in range(prompt_length, prompt_length + length):
                step = self.steps.get(at)
                parents = None if step is None else step.parents
                if parents is not None and at > prompt_length:
                    token = ids[sequence][at - 1]
                    row = next(
                        (r for r, parent in enumerate(parents) if parent == row and newest[at][r] == [token]),
                        -1,
                    )
                    if row < 0:  # the beam ended here: its last token was chosen, and never continued
                        break
                path.append(row)
            paths.append(path)
        return paths


@dataclass
class RoundRecorder:
    """Collects the rounds of one sequence that is decoded speculatively.

    Nothing is read back from the device before the end.
    """

    trace: bool
    drafted: list[int] = field(default_factory=list)  # per round
    accepted: list[int] = field(default_factory=list)  # per round
    tokens: list[int] = field(default_factory=list)
    from_draft: list[bool] = field(default_factory=list)  # per token
    masses: list[torch.Tensor | None] = field(default_factory=list)  # of some tokens each
    traced: list[_Traced] = field(default_factory=list)  # of some tokens each

    def record(self, drafted: int, accepted: int, tokens: list[int], positions: list[Composition]) -> None:
        """Note a round: its draft length, and for each emitted token its id and its position, a row of a piece."""
        self.drafted.append(drafted)
        self.accepted.append(accepted)
        self.tokens += tokens
        self.from_draft += [at < accepted for at in range(len(tokens))]
        self.masses += [piece.deferral_mass for piece in positions]
        if self.trace:
            of_pieces = torch.tensor(tokens, device="cpu").split([len(piece.target_probs) for piece in positions])
            self.traced += map(_Traced.of, positions, of_pieces)

    def finish(self) -> tuple[list[SequenceStatistics], KADTrace | None]:
        """Statistics and trace of the sequence."""
        histogram = [0] * (max(self.drafted, default=-1) + 1)
        for accepted in self.accepted:
            histogram[accepted] += 1
        known = [mass for mass in self.masses if mass is not None]
        masses: list[float | None] = [*torch.cat(known).tolist()] if known else [None] * len(self.tokens)
        statistics = SequenceStatistics(
            tokens=len(self.tokens),
            rounds=len(self.accepted),
            drafted=sum(self.drafted),
            accepted=sum(self.accepted),
            deferral_mass=mean_or_none(masses),
            acceptance_histogram=tuple(histogram),
            deferral_masses=all_or_none(masses),
        )
        if not self.trace:
            return [statistics], None
        records = [
            make_record(token, *row, mass, drafted=drafted)
            for token, row, mass, drafted in zip(self.tokens, _read(self.traced), masses, self.from_draft, strict=True)
        ]
        return [statistics], KADTrace((tuple(records),))


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
        statistics, traces = list[SequenceStatistics](), list[KADTrace]()
        for row in self.rows:
            (own,), trace = row.finish()
            statistics.append(own)
            traces += [trace] if trace is not None else []
        return statistics, KADTrace(tuple(trace.sequences[0] for trace in traces)) if self.trace else None


def make_record(
    token: int, probs: list[float], base: Alternatives, proxy: Alternatives, mass: float | None, *, drafted: bool
) -> TokenRecord:
    """A `TokenRecord` from a token's [p, q, r], the models' alternatives and the deferral mass at its position."""
    p, q, r = probs
    # r = 0 can only be emitted where a later processor put mass back; then nothing is owed to anyone.
    share = None if mass is None else min(q * mass / r, 1.0) if r > 0 else 0.0
    return TokenRecord(token, p, q, r, mass, share, drafted, base, proxy)


def all_or_none(values: Iterable[float | None]) -> tuple[float, ...] | None:
    """The same values, None if there are none or any is None."""
    listed = tuple(values)
    known = tuple(value for value in listed if value is not None)
    return known if known and len(known) == len(listed) else None


def mean_or_none(values: Iterable[float | None]) -> float | None:
    """Their mean, None if there are none or any is None."""
    known = all_or_none(values)
    return sum(known) / len(known) if known else None


def add_up(sequences: Sequence[SequenceStatistics], *, base_forwards: int, proxy_forwards: int) -> KADStatistics:
    """The statistics of a call from those of its sequences; means are weighted by tokens."""
    widest = max((len(s.acceptance_histogram) for s in sequences), default=0)
    histogram = [0] * widest
    for s in sequences:
        for k, count in enumerate(s.acceptance_histogram):
            histogram[k] += count
    tokens = sum(s.tokens for s in sequences)
    weighted = [None if s.deferral_mass is None else s.deferral_mass * s.tokens for s in sequences if s.tokens]
    mean = mean_or_none(weighted)
    return KADStatistics(
        tokens=tokens,
        rounds=sum(s.rounds for s in sequences),
        drafted=sum(s.drafted for s in sequences),
        accepted=sum(s.accepted for s in sequences),
        deferral_mass=None if mean is None else mean * len(weighted) / tokens,
        acceptance_histogram=tuple(histogram),
        base_forwards=base_forwards,
        proxy_forwards=proxy_forwards,
        sequences=tuple(sequences),
    )
