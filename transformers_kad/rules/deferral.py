"""Rules with a deferral mask: which tokens of the base's distribution are handed over to the proxy.

Choosing the mask d is a 0-1 knapsack: deferring v avoids the base's expected loss -p_v log p_v (the item's value) and
spends p_v (its weight) of a budget b. The density value / weight is -log p_v, so the density order is rising p.

Paper: Hammal, Zweigenbaum, Corro, "KAD: A Framework for Proxy-based Test-time Alignment with Knapsack Approximation
Deferral", EACL 2026 (arXiv 2510.27017).
"""

import warnings
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from .arithmetic import sum_in_float64
from .base import DeferralRule, number
from .exact_knapsack import solve_knapsack
from .greedy_knapsack import longest_prefix


@dataclass(frozen=True)
class DualDeferral(DeferralRule):
    """Defer every token less likely than a threshold: d_v = 1 where p_v < threshold.

    The Lagrangian dual of the knapsack at the multiplier lambda = -log threshold (arXiv 2510.27017).

    Args:
        threshold: alpha in (0, 1]. A higher threshold hands more over to the proxy.

    >>> DualDeferral(threshold=0.4).defer(torch.tensor([0.5, 0.3, 0.2]))
    tensor([False,  True,  True])
    """

    threshold: float = number(0.4, 0, 1, low_open=True)

    def defer(self, base_probs: Tensor, proxy_probs: Tensor | None = None) -> Tensor:
        return base_probs < self.threshold


@dataclass(frozen=True)
class PrimalDeferral(DeferralRule):
    """Defer the least likely tokens while their mass fits into a budget (Dantzig's greedy).

    d_v = 1 where v is in the longest prefix, in the order of rising p, whose mass is at most the budget. What is kept
    is the nucleus of top-p with top_p = 1 - budget. For a budget below 1 the likeliest token is never deferred; a
    budget of 1 defers everything, a budget of 0 nothing that has mass (arXiv 2510.27017).

    Args:
        budget: b in [0, 1], the largest probability mass that may be deferred.

    >>> PrimalDeferral(budget=0.6).defer(torch.tensor([0.5, 0.3, 0.2]))
    tensor([False,  True,  True])
    """

    budget: float = number(0.9, 0, 1)

    def defer(self, base_probs: Tensor, proxy_probs: Tensor | None = None) -> Tensor:
        if self.budget == 1:
            return torch.ones_like(base_probs, dtype=torch.bool)
        return longest_prefix(base_probs.reshape(-1, base_probs.shape[-1]), self.budget).view(base_probs.shape)


@dataclass(frozen=True)
class ExactDeferral(DeferralRule):
    """Defer the optimum of the knapsack, with which the primal and the dual rule can be compared.

    Tokens worth at most the tolerance are deferred greedily. The others are searched for the best subset, from the
    greedy solution outwards. Every position is solved on the CPU in float64, so the mask is the same on every device.

    Paper: Pisinger, "A minimal algorithm for the 0-1 knapsack problem", Operations Research 45(5), 1997.

    Args:
        budget: b in [0, 1], the largest probability mass that may be deferred.
        tolerance: in [0, 1], the value in nats by which the solution may fall short of the optimum.
        max_states: how many states the search may examine for one position. Where that is too few, the best solution
            found is used and a `RuntimeWarning` states the largest remaining gap to the optimum.

    >>> p = torch.tensor([0.4, 0.35, 0.25])
    >>> PrimalDeferral(budget=0.5).defer(p)  # value 0.35
    tensor([False, False,  True])
    >>> ExactDeferral(budget=0.5).defer(p)  # value 0.37
    tensor([False,  True, False])
    """

    budget: float = number(0.9, 0, 1)
    tolerance: float = number(1e-4, 0, 1)
    max_states: int = 500_000

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.max_states, bool) or not isinstance(self.max_states, int) or self.max_states < 1:
            raise ValueError(f"`ExactDeferral.max_states` must be a positive integer, got {self.max_states!r:.200}.")

    def defer(self, base_probs: Tensor, proxy_probs: Tensor | None = None) -> Tensor:
        if self.budget == 1:
            return torch.ones_like(base_probs, dtype=torch.bool)
        rows = base_probs.reshape(-1, base_probs.shape[-1]).cpu()
        mask, largest_gap = torch.zeros_like(rows, dtype=torch.bool), 0.0
        for row, weights in enumerate(rows):
            mask[row], gap = solve_knapsack(weights, self.budget, self.tolerance, self.max_states)
            largest_gap = max(largest_gap, gap)
        if largest_gap > self.tolerance:
            gap_text = f"the value may fall short of the optimum by up to {largest_gap:.3g}"
            message = f"{self!r} could not be solved to its tolerance: {gap_text}. Raise `max_states` or `tolerance`."
            warnings.warn(message, RuntimeWarning, stacklevel=3)  # 1 is `defer`, 2 the check of its inputs
        return mask.view(base_probs.shape).to(base_probs.device)


@dataclass(frozen=True)
class NudgingDeferral(DeferralRule):
    """Defer the whole position where the base is unsure: d_v = 1 for all v if max p < threshold, else for none.

    Paper: Fei et al., "Nudging: Inference-time Alignment of LLMs via Guided Decoding", ACL 2025.

    Args:
        threshold: alpha in [0, 1].

    >>> NudgingDeferral(threshold=0.6).defer(torch.tensor([0.5, 0.3, 0.2]))
    tensor([True, True, True])
    """

    threshold: float = number(0.4, 0, 1)

    def defer(self, base_probs: Tensor, proxy_probs: Tensor | None = None) -> Tensor:
        return (base_probs.amax(-1, keepdim=True) < self.threshold).expand_as(base_probs)


@dataclass(frozen=True)
class ConfidenceBetDeferral(DeferralRule):
    """Defer what the base trusts less than the proxy trusts its best token: d_v = 1 where p_v < max q - margin.

    Paper: "On the Rejection Criterion for Proxy-based Test-time Alignment", ACL 2026 (arXiv 2604.16146). The rule is
    Token V1 of speculative cascades with the roles of the models swapped.

    Args:
        margin: lambda in [0, 1]. A higher margin keeps more of the base.

    >>> p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.1, 0.5, 0.4])
    >>> ConfidenceBetDeferral(margin=0.1).defer(p, q)
    tensor([False,  True,  True])
    """

    needs_proxy: ClassVar[bool] = True
    margin: float = number(0.1, 0, 1)

    def defer(self, base_probs: Tensor, proxy_probs: Tensor | None = None) -> Tensor:
        assert proxy_probs is not None
        return base_probs < proxy_probs.amax(-1, keepdim=True) - self.margin


CascadeVariant = Literal["diff", "opt", "token_v2", "token_v3"]


@dataclass(frozen=True)
class CascadeDeferral(DeferralRule):
    """Speculative cascades with the roles of the models swapped: keep p, and fall back to q.

    - `diff`: d_v = 1 for all v if max p < max q - alpha, else for none.
    - `opt`: d_v = 1 for all v if max p < max q - alpha TV(p, q), else for none; TV(p, q) = sum_v max(0, p_v - q_v).
    - `token_v2`: d_v = 1 where q_v < max q - alpha.
    - `token_v3`: d_v = 1 where q_v < (1 - alpha) max q.

    Paper: Narasimhan et al., "Faster Cascades via Speculative Decoding", ICLR 2025.

    Args:
        variant: one of the four above.
        alpha: in [0, 1]. A higher alpha keeps more of the base.

    >>> p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.1, 0.5, 0.4])
    >>> CascadeDeferral(variant="token_v2", alpha=0.2).defer(p, q)
    tensor([ True, False, False])
    """

    needs_proxy: ClassVar[bool] = True
    variant: CascadeVariant = "diff"
    alpha: float = number(0.1, 0, 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        known = get_args(CascadeVariant)
        if self.variant not in known:
            raise ValueError(
                f"`CascadeDeferral.variant` must be one of {', '.join(known)}, got {self.variant!r:.200}."
            )

    def defer(self, base_probs: Tensor, proxy_probs: Tensor | None = None) -> Tensor:
        p, q = base_probs, proxy_probs
        assert q is not None
        q_max = q.amax(-1, keepdim=True)
        if self.variant == "token_v2":
            return q < q_max - self.alpha
        if self.variant == "token_v3":
            return q < (1 - self.alpha) * q_max
        if self.variant == "opt":
            # Where p and q are equal, these are sums of the same numbers in the same order, and their difference is 0.
            variation = sum_in_float64(torch.maximum(p, q)) - sum_in_float64(q)
            slack = self.alpha * variation.unsqueeze(-1)
            is_deferred = p.amax(-1, keepdim=True).to(slack) < q_max.to(slack) - slack
            return is_deferred.to(p.device).expand_as(p)
        return (p.amax(-1, keepdim=True) < q_max - self.alpha).expand_as(p)
