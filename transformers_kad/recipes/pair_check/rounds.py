"""How many rounds speculative decoding is expected to need for a text, from the acceptance at each position."""

from typing import NamedTuple

import torch


class ExpectedRounds(NamedTuple):
    """Expected numbers for one text, `(n,)` float64 each, one for each rule.

    Attributes:
        rounds: the number of rounds, each of which is one forward of the base.
        bonus_steps: the number of rounds whose whole draft is accepted, so that the proxy takes one more step.
    """

    rounds: torch.Tensor
    bonus_steps: torch.Tensor


def expected_rounds(acceptance: torch.Tensor, draft_length: int) -> ExpectedRounds:
    """The expected number of rounds that decode a text of T tokens, and how many of them accept a whole draft.

    A round that begins at position t accepts k draft tokens and refuses the next one with probability
    a_t ... a_{t+k-1} (1 - a_{t+k}). It emits the accepted tokens and one more, and the next round begins behind them.
    The last round ends with the text.

    Args:
        acceptance: the probability a_t that a token drafted at position t is accepted, `(n, T)`, one row for each
            rule. The events at different positions count as independent.
        draft_length: γ, the number of drafted tokens of a round, at least 1.

    >>> expected_rounds(torch.tensor([[1.0] * 6, [0.0] * 6]), draft_length=2).rounds.tolist()
    [2.0, 6.0]
    """
    acceptance = acceptance.double()
    rules, length = acceptance.shape
    rounds = acceptance.new_zeros(rules, length + draft_length + 1)
    bonus = torch.zeros_like(rounds)
    for start in reversed(range(length)):
        reached = acceptance.new_ones(rules)  # the probability that all draft tokens so far are accepted
        rounds[:, start] = 1
        for at in range(start, min(start + draft_length, length)):
            ends_here = reached * (1 - acceptance[:, at])
            rounds[:, start] += ends_here * rounds[:, at + 1]
            bonus[:, start] += ends_here * bonus[:, at + 1]
            reached = reached * acceptance[:, at]
        if start + draft_length < length:
            behind = start + draft_length + 1
            rounds[:, start] += reached * rounds[:, behind]
            bonus[:, start] += reached * (1 + bonus[:, behind])
    return ExpectedRounds(rounds[:, 0], bonus[:, 0])
