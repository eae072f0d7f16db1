"""A rule that paces itself: the dual threshold moves so that a text defers a given share of the mass on average.

The primal rule keeps every position within a budget, and the dual rule has one threshold for all positions, by which
some texts defer much and others little. Here the budget is that of a whole text, and its multiplier is learnt while
the text is decoded, by dual ascent: the rule at each position is the dual rule of KAD at the current multiplier.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import StatefulDeferralRule, number


@dataclass(frozen=True)
class PacedDeferral(StatefulDeferralRule):
    """Defer by a threshold that follows a budget of deferral mass per token of the text.

    At position t every token less likely than alpha_t = exp(-lambda_t) is deferred, as by `DualDeferral`. With D_t the
    deferral mass there, online dual ascent moves the multiplier between the bounds:

        lambda_{t+1} = clip(lambda_t + step_size (D_t - budget), -log largest_threshold, -log smallest_threshold)

    While no bound is reached, the sum telescopes: over T tokens the mean deferral mass differs from the budget by
    |lambda_{T+1} - lambda_1| / (step_size T), so that texts of any kind spend the same on average. At the bounds a
    text spends less than the budget where even the largest threshold defers no more, and more than the budget where
    even the smallest one does.

    Papers: the dual rule is that of KAD (arXiv 2510.27017). Dual descent for the budget of a sequence of decisions is
    from Balseiro, Lu, Mirrokni, "The Best of Many Worlds: Dual Mirror Descent for Online Allocation Problems" (arXiv
    2011.10124).

    Args:
        budget: B in [0, 1], the mean deferral mass of a text.
        threshold: alpha_1 in (0, 1], the threshold at the first token of a text.
        step_size: how fast the multiplier moves, in nats for each unit of deferral mass above or below the budget.
        smallest_threshold: the lower bound of the threshold, in (0, 1].
        largest_threshold: the upper bound of the threshold, in (0, 1].

    Raises:
        ValueError: a parameter out of its range, or a threshold that is not between the bounds.

    >>> rule = PacedDeferral(budget=0.3, threshold=0.5, step_size=1.0)
    >>> p, q = torch.tensor([[0.6, 0.4]]), torch.tensor([[0.1, 0.9]])
    >>> target, mass, state = rule.step(p, q, rule.initial_state(1))
    >>> target, mass
    (tensor([[0.6400, 0.3600]]), tensor([0.4000]))
    >>> rule.threshold_of(state)  # 0.1 nats lower, since 0.4 was deferred
    tensor([0.4524])
    """

    budget: float = number(0.3, 0, 1)
    threshold: float = number(0.4, 0, 1, low_open=True)
    step_size: float = number(0.1, 0, math.inf, low_open=True)
    smallest_threshold: float = number(0.01, 0, 1, low_open=True)
    largest_threshold: float = number(1.0, 0, 1, low_open=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.smallest_threshold <= self.threshold <= self.largest_threshold:
            raise ValueError(
                f"`PacedDeferral.threshold` must lie between `smallest_threshold` = {self.smallest_threshold!r} and "
                f"`largest_threshold` = {self.largest_threshold!r}, got {self.threshold!r}."
            )

    def initial_state(self, batch: int, device: torch.device | str | None = None) -> Tensor:
        """The multipliers lambda_1 of `batch` texts, `(batch,)` float32."""
        return torch.full((batch,), -math.log(self.threshold), dtype=torch.float32, device=device)

    def threshold_of(self, state: Tensor) -> Tensor:
        """The thresholds alpha of texts with these states, `(batch,)`."""
        return (-state).exp()

    def defer_at(self, base_probs: Tensor, proxy_probs: Tensor | None, state: Tensor) -> Tensor:
        return base_probs < self.threshold_of(state).unsqueeze(-1)

    def advance(self, state: Tensor, mass: Tensor) -> Tensor:
        moved = state + self.step_size * (mass - self.budget)
        return moved.clamp(-math.log(self.largest_threshold), -math.log(self.smallest_threshold))
