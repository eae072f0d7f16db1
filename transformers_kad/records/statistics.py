"""What happened in a call of `generate`: the counts of each sequence and of all, and what is known of one token."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TypeAlias

Alternatives: TypeAlias = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class SequenceStatistics:
    """Counts of one sequence, or of several added up.

    A *round* is one forward of the base and the tokens that it leads to. Token by token that is a single token.
    In speculative decoding it is the accepted part of a draft and, unless the text ends on a draft token, one more
    token.

    Attributes:
        tokens: number of emitted tokens, the end of sequence included.
        rounds: number of rounds.
        drafted: number of tokens that the drafter proposed.
        accepted: number of draft tokens that were emitted.
        deferral_mass: mean of the deferral mass D over the emitted positions, in [0, 1]; None for rules without a
            deferral mask.
        acceptance_histogram: entry k is the number of rounds that emitted k draft tokens, for k up to the longest
            draft.
        deferral_masses: D at each emitted position of one sequence. None for rules without a deferral mask, for a
            sequence without tokens, and where several sequences are added up.

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
    """Statistics of one finished call: the counts of all its sequences together, and those of each sequence.

    Attributes:
        base_forwards: number of forwards of the base. A prefill counts as one, however many chunks it has.
        proxy_forwards: number of forwards of the proxy, counted the same way, without those of the reference.
        sequences: one `SequenceStatistics` per returned sequence, in the order of the output.
    """

    base_forwards: int = 0
    proxy_forwards: int = 0
    sequences: tuple[SequenceStatistics, ...] = ()


@dataclass(frozen=True)
class TokenRecord:
    """One emitted token. All probabilities are those at its position.

    Attributes:
        token_id: its id.
        base_prob: p, its probability by the base.
        proxy_prob: q, its probability by the proxy.
        target_prob: r, its probability by the target, before `generate` applies temperature, top-k or top-p.
        deferral_mass: the deferral mass D, None for rules without a deferral mask.
        proxy_share: the share of r that is owed to the proxy, q D / r; None for rules without a deferral mask.
        drafted: whether it is a draft token that was accepted.
        base_alternatives: the five likeliest ids of p and their probabilities, in falling order, ties by lower id.
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


def count_rounds(
    drafted: Sequence[int], accepted: Sequence[int], tokens: int, masses: Sequence[float] | None
) -> SequenceStatistics:
    """The statistics of one sequence: draft length and emitted draft tokens of each round, D of each position."""
    histogram = [0] * (max(drafted, default=-1) + 1)
    for count in accepted:
        histogram[count] += 1
    return SequenceStatistics(
        tokens=tokens,
        rounds=len(accepted),
        drafted=sum(drafted),
        accepted=sum(accepted),
        deferral_mass=sum(masses) / len(masses) if masses else None,
        acceptance_histogram=tuple(histogram),
        deferral_masses=tuple(masses) if masses else None,
    )


def add_up(sequences: Sequence[SequenceStatistics], *, base_forwards: int, proxy_forwards: int) -> KADStatistics:
    """The statistics of a call from those of its sequences. The mean deferral mass is weighted by tokens."""
    emitted = sum(s.tokens for s in sequences)
    weighted = [s.deferral_mass * s.tokens for s in sequences if s.tokens and s.deferral_mass is not None]
    is_known = len(weighted) == sum(s.tokens > 0 for s in sequences) > 0
    histograms = zip_longest(*(s.acceptance_histogram for s in sequences), fillvalue=0)
    return KADStatistics(
        tokens=emitted,
        rounds=sum(s.rounds for s in sequences),
        drafted=sum(s.drafted for s in sequences),
        accepted=sum(s.accepted for s in sequences),
        deferral_mass=sum(weighted) / emitted if is_known else None,
        acceptance_histogram=tuple(map(sum, histograms)),
        base_forwards=base_forwards,
        proxy_forwards=proxy_forwards,
        sequences=tuple(sequences),
    )
