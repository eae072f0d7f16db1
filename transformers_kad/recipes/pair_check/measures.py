"""The figures of one text: how base and proxy agree along it, and what every rule would do there."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from ...rules.base import DeferralRule, Rule, StatefulRule, mix_and_mass
from .reading import Positions
from .rounds import expected_rounds

SURE = 0.9  # a model is sure of a token to which it gives at least this probability
BINS = 100  # of the histogram of the base's probabilities


def agreement_of(positions: Iterable[Positions]) -> Iterator[tuple[Positions, dict[str, float]]]:
    """The positions again, each block with sums over it of how base and proxy agree.

    The sums are: `tokens`; `total_variation` of p and q; `agreements`, where both have the same likeliest token;
    `sure`, where the base is sure of a token; `sure_disagreements`, where in addition the proxy's likeliest token is
    another one; and `unknown_mass`, the base's probability of tokens that the proxy does not have.
    """
    for block in positions:
        p, q = block.base_probs, block.proxy_probs
        agrees = p.argmax(-1) == q.argmax(-1)
        sure = p.amax(-1) >= SURE
        sums = {
            "total_variation": (p - q).abs().sum() / 2,
            "agreements": agrees.sum(),
            "sure": sure.sum(),
            "sure_disagreements": (sure & ~agrees).sum(),
            "unknown_mass": p[:, block.unknown].sum(),
        }
        yield block, {"tokens": float(len(p)), **{name: float(value) for name, value in sums.items()}}


def measure_agreement(positions: Iterable[Positions]) -> dict[str, float]:
    """The sums of `agreement_of` over a whole text."""
    return _add_up(sums for _, sums in agreement_of(positions))


def measure_rules(positions: Iterable[Positions], rules: Sequence[Rule], draft_length: int) -> dict[str, Any]:
    """The sums of `agreement_of` over a text, and the figures of every rule on it.

    A rule with a memory follows the text from its first position on, as it does while it decodes.

    Returns:
        The sums; `histogram`, the base's probability mass on tokens whose probability lies in each of `BINS` equal
        parts of [0, 1]; and `rules`, for each rule `deferral_mass` (None without a mask), `acceptance` and
        `kept_of_base` (the sums over the positions of Σ min(q, r) and Σ min(p, r)), and the expected `rounds` and
        `bonus_steps`.
    """
    followers = [_RuleOnText(rule) for rule in rules]
    histogram, sums = torch.zeros(BINS, dtype=torch.float64), list[dict[str, float]]()
    for block, block_sums in agreement_of(positions):
        sums.append(block_sums)
        p = block.base_probs.flatten()
        bins = (p * BINS).long().clamp(max=BINS - 1)
        histogram += torch.bincount(bins, weights=p, minlength=BINS).cpu().double()
        for follower in followers:
            follower.read(block)
    acceptance = torch.stack([torch.cat(follower.acceptance) for follower in followers])
    expected = expected_rounds(acceptance, draft_length)
    figures = [
        {
            "deferral_mass": follower.mass,
            "acceptance": float(accepted.sum()),
            "kept_of_base": follower.kept_of_base,
            "rounds": float(rounds),
            "bonus_steps": float(bonus),
        }
        for follower, accepted, rounds, bonus in zip(followers, acceptance, *expected, strict=True)
    ]
    return {**_add_up(sums), "histogram": histogram.tolist(), "rules": figures}


class _RuleOnText:
    """A rule that is applied along one text.

    Attributes:
        acceptance: Σ min(q, r) at each position of the blocks that were read, float32 on the CPU.
        mass: the sum of D over the positions; None for rules without a mask.
        kept_of_base: the sum of Σ min(p, r) over the positions.
    """

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.acceptance: list[torch.Tensor] = []
        self.mass: float | None = None
        self.kept_of_base = 0.0
        self._state: torch.Tensor | None = None

    def read(self, block: Positions) -> None:
        """Apply the rule at the positions of the next block."""
        p, q = block.base_probs, block.proxy_probs
        if isinstance(self.rule, StatefulRule):
            target, mass = self._step(self.rule, p, q)
        elif isinstance(self.rule, DeferralRule):
            target, mass = mix_and_mass(p, q, self.rule.defer(p, q))
        else:
            target, mass = self.rule(p, q), None
        if mass is not None:
            self.mass = (self.mass or 0.0) + float(mass.sum())
        self.acceptance.append(torch.minimum(q, target).sum(-1).clamp(0, 1).cpu())
        self.kept_of_base += float(torch.minimum(p, target).sum())

    def _step(self, rule: StatefulRule, p: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        state = rule.initial_state(1, p.device) if self._state is None else self._state
        targets, masses = [], []
        for row in range(len(p)):
            target, mass, state = rule.step(p[row : row + 1], q[row : row + 1], state)
            targets.append(target)
            masses.append(mass)
        self._state = state
        known = [mass for mass in masses if mass is not None]
        return torch.cat(targets), torch.cat(known) if known else None


def measure_prediction(positions: Iterable[Positions]) -> dict[str, float]:
    """How well both models predict a text, as sums over its tokens that the proxy has.

    The sums are `tokens`, `base_nats` and `proxy_nats`, the negative log-probabilities of the tokens, and `unknown`,
    the number of tokens that the proxy does not have, which are not part of the others.
    """
    smallest = torch.finfo(torch.float32).tiny  # a probability that underflowed is no zero
    sums = []
    for block in positions:
        known = ~block.unknown[block.tokens]
        p, q = (
            probs.gather(-1, block.tokens[:, None])[:, 0][known].clamp(min=smallest)
            for probs in (block.base_probs, block.proxy_probs)
        )
        sums.append(
            {
                "tokens": float(len(p)),
                "base_nats": float(-p.log().sum()),
                "proxy_nats": float(-q.log().sum()),
                "unknown": float((~known).sum()),
            }
        )
    return _add_up(sums)


def _add_up(parts: Iterable[dict[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total
