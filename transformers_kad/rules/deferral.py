"""Deferral rules: which tokens of the base model's distribution are handed over to the proxy.

A rule looks at one position at a time: the base's next-token probabilities p and the proxy's q, both vectors
of length V on the probability simplex. A *deferral rule* answers with a mask d; :func:`mix` turns the mask
into the target distribution

    r_v = (1 - d_v) p_v + D q_v        with the deferral mass  D = sum_v d_v p_v

Read as sampling: draw v from p; if d_v = 1, throw it away and draw from q instead.

Choosing d is a 0-1 knapsack: deferring v avoids the expected loss -p_v log p_v (its value) and spends p_v
(its weight) of a budget b. The density value / weight is -log p_v, so the density order is rising p.

Paper: Hammal, Zweigenbaum, Corro, "KAD: A Framework for Proxy-based Test-time Alignment with Knapsack
Approximation Deferral", EACL 2026 (arXiv 2510.27017).

All rules take any leading dimensions; each position along them is a knapsack of its own. Whatever the dtype
of the input, they compute in float32, and in float64 where a sum decides a mask, so that masks do not depend
on the device. Ties are broken by token id, lower id first.
"""

import math
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar, Literal

import torch

from .knapsack import choose, longest_prefix, solve_knapsack, sum_in_float64


def as_float(number: Any) -> float:
    """A number as a float, infinite where it is an integer too large for one."""
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def check_number(owner: object, name: str, low: float, high: float, *, low_open: bool = False) -> None:
    """Raise unless the field `name` of `owner` is a finite number in [low, high] (or (low, high])."""
    value = getattr(owner, name)
    bounds = f"{'(' if low_open else '['}{low:g}, {high:g}{')' if high == math.inf else ']'}"
    label = f"{type(owner).__name__}.{name}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{label}` must be a number in {bounds}, got {value!r}.")
    number = as_float(value)
    if not (low < number if low_open else low <= number) or not number <= high or number == math.inf:
        raise ValueError(f"`{label}` must lie in {bounds}, got {value!r}.")


def as_probabilities(name: str, probs: torch.Tensor | None, like: torch.Tensor | None = None) -> torch.Tensor:
    """Return `probs` as float32 after checking that it is a floating tensor `(..., V)` shaped like `like`."""
    if probs is None:
        raise ValueError(f"This rule needs `{name}`, got None.")
    if not torch.is_tensor(probs) or not probs.is_floating_point() or probs.dim() == 0:
        got = f"{probs.dtype} of shape {tuple(probs.shape)}" if torch.is_tensor(probs) else type(probs).__name__
        raise TypeError(f"`{name}` must be a floating point tensor of shape (..., V), got {got}.")
    if like is not None and probs.shape != like.shape:
        raise ValueError(
            f"`{name}` must have the shape of `base_probs`, got {tuple(probs.shape)} and {tuple(like.shape)}."
        )
    return probs.float()


def deferral_mass(base_probs: torch.Tensor, deferral: torch.Tensor) -> torch.Tensor:
    """The deferral mass D = sum_v d_v p_v, shape `(...)`, summed in float64 and returned as float32."""
    return sum_in_float64(choose(base_probs, deferral)).float()


def mix(base_probs: torch.Tensor, proxy_probs: torch.Tensor, deferral: torch.Tensor) -> torch.Tensor:
    """Blend base and proxy by a deferral mask: r_v = (1 - d_v) p_v + D q_v with D = sum_v d_v p_v.

    Args:
        base_probs: p, shape `(..., V)`.
        proxy_probs: q, shape `(..., V)`.
        deferral: d, boolean mask, shape `(..., V)`.

    Returns:
        The target distribution r, float32, shape `(..., V)`. An empty mask gives p, a full mask gives q.

    >>> p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.0, 0.0, 1.0])
    >>> mix(p, q, torch.tensor([False, True, False]))
    tensor([0.5000, 0.0000, 0.5000])
    """
    return mix_and_mass(base_probs, proxy_probs, deferral)[0]


def mix_and_mass(
    base_probs: torch.Tensor, proxy_probs: torch.Tensor, deferral: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What :func:`mix` returns, and the :func:`deferral_mass`, for the price of one."""
    p = as_probabilities("base_probs", base_probs)
    q = as_probabilities("proxy_probs", proxy_probs, like=p)
    if deferral.dtype != torch.bool or deferral.shape != p.shape:
        raise ValueError(
            f"`deferral` must be a boolean mask of shape {tuple(p.shape)}, "
            f"got {deferral.dtype} of shape {tuple(deferral.shape)}."
        )
    deferred = choose(p, deferral)
    mass = sum_in_float64(deferred).float()
    return (mass.unsqueeze(-1) * q).add_(p - deferred), mass


@dataclass(frozen=True)
class DeferralRule(ABC):
    """A rule that answers with a mask. Subclasses are frozen dataclasses and implement :meth:`defer`.

    Attributes:
        needs_proxy: whether the mask depends on q.
        needs_reference: whether the rule needs the unaligned proxy's probabilities (no mask rule does).
    """

    needs_proxy: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False

    @abstractmethod
    def defer(self, base_probs: torch.Tensor, proxy_probs: torch.Tensor | None = None) -> torch.Tensor:
        """The deferral mask d, boolean, shape `(..., V)`. Rules that do not look at q accept it as None."""

    def __call__(
        self,
        base_probs: torch.Tensor,
        proxy_probs: torch.Tensor,
        reference_probs: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The target distribution r, float32, all shapes `(..., V)`; `reference_probs` is not used."""
        return mix(base_probs, proxy_probs, self.defer(base_probs, proxy_probs))


@dataclass(frozen=True)
class DualDeferral(DeferralRule):
    """Defer every token less likely than a threshold: d_v = 1 where p_v < threshold.

    The Lagrangian dual of the knapsack at the multiplier lambda = -log threshold (arXiv 2510.27017).

    Args:
        threshold: alpha in (0, 1]. Higher hands more over to the proxy.

    >>> DualDeferral(threshold=0.4).defer(torch.tensor([0.5, 0.3, 0.2]))
    tensor([False,  True,  True])
    """

    threshold: float = 0.4

    def __post_init__(self) -> None:
        check_number(self, "threshold", 0, 1, low_open=True)

    def defer(self, base_probs: torch.Tensor, proxy_probs: torch.Tensor | None = None) -> torch.Tensor:
        """See :meth:`DeferralRule.defer`."""
        return as_probabilities("base_probs", base_probs) < self.threshold


@dataclass(frozen=True)
class PrimalDeferral(DeferralRule):
    """Defer the least likely tokens while their mass fits into a budget (Dantzig's greedy).

    d_v = 1 where v is in the longest prefix, in the order of rising p, whose mass is at most the budget. What
    is kept is the nucleus of top-p with top_p = 1 - budget. For a budget below 1 the likeliest token is never
    deferred; a budget of 1 defers everything, a budget of 0 nothing that has mass (arXiv 2510.27017).

    Args:
        budget: b in [0, 1], the largest probability mass that may be deferred.

    >>> PrimalDeferral(budget=0.6).defer(torch.tensor([0.5, 0.3, 0.2]))
    tensor([False,  True,  True])
    """

    budget: float = 0.9

    def __post_init__(self) -> None:
        check_number(self, "budget", 0, 1)

    def defer(self, base_probs: torch.Tensor, proxy_probs: torch.Tensor | None = None) -> torch.Tensor:
        """See :meth:`DeferralRule.defer`."""
        p = as_probabilities("base_probs", base_probs)
        if self.budget == 1:
            return torch.ones_like(p, dtype=torch.bool)
        return longest_prefix(p.reshape(-1, p.shape[-1]), self.budget).view(p.shape)


@dataclass(frozen=True)
class ExactDeferral(DeferralRule):
    """Defer the optimum of the knapsack: the yardstick of the primal and the dual rule.

    Tokens of which each is worth at most the tolerance are deferred greedily; the others are searched, from the greedy
    solution's critical token outwards, for states of (mass, value) that nothing dominates and no upper bound rules
    out.

    Paper: Pisinger, "A minimal algorithm for the 0-1 knapsack problem", Operations Research 45(5), 1997.

    Args:
        budget: b in [0, 1], the largest probability mass that may be deferred.
        tolerance: the value (in nats) by which the answer may fall short of the optimum.
        max_states: how many states may be examined for one position. Where that is too few, the best solution
            found is used and a `RuntimeWarning` states the largest remaining gap to the optimum.

    Every position is solved on the CPU in float64, so the mask is the same wherever the model runs.

    >>> p = torch.tensor([0.4, 0.35, 0.25])
    >>> PrimalDeferral(budget=0.5).defer(p)  # value 0.35
    tensor([False, False,  True])
    >>> ExactDeferral(budget=0.5).defer(p)  # value 0.37
    tensor([False,  True, False])
    """

    budget: float = 0.9
    tolerance: float = 1e-4
    max_states: int = 500_000

    def __post_init__(self) -> None:
        check_number(self, "budget", 0, 1)
        check_number(self, "tolerance", 0, 1)
        if isinstance(self.max_states, bool) or not isinstance(self.max_states, int) or self.max_states < 1:
            raise ValueError(f"`ExactDeferral.max_states` must be a positive integer, got {self.max_states!r}.")

    def defer(self, base_probs: torch.Tensor, proxy_probs: torch.Tensor | None = None) -> torch.Tensor:
        """See :meth:`DeferralRule.defer`."""
        p = as_probabilities("base_probs", base_probs)
        if self.budget == 1:
            return torch.ones_like(p, dtype=torch.bool)
        rows = p.reshape(-1, p.shape[-1]).cpu()
        mask, largest_gap = torch.zeros_like(rows, dtype=torch.bool), 0.0
        for row, weights in enumerate(rows):
            mask[row], gap = solve_knapsack(weights, self.budget, self.tolerance, self.max_states)
            largest_gap = max(largest_gap, gap)
        if largest_gap > self.tolerance:
            warnings.warn(
                f"{self!r} could not be solved to its tolerance: the value may fall short of the optimum by up "
                f"to {largest_gap:.3g}. Raise `max_states` or `tolerance`.",
                RuntimeWarning,
                stacklevel=2,
            )
        return mask.view(p.shape).to(p.device)


@dataclass(frozen=True)
class NudgingDeferral(DeferralRule):
    """Defer the whole position where the base is unsure: d_v = 1 for all v if max p < threshold, else none.

    Paper: Fei et al., "Nudging: Inference-time Alignment of LLMs via Guided Decoding", ACL 2025.

    Args:
        threshold: alpha in [0, 1].

    >>> NudgingDeferral(threshold=0.6).defer(torch.tensor([0.5, 0.3, 0.2]))
    tensor([True, True, True])
    """

    threshold: float = 0.4

    def __post_init__(self) -> None:
        check_number(self, "threshold", 0, 1)

    def defer(self, base_probs: torch.Tensor, proxy_probs: torch.Tensor | None = None) -> torch.Tensor:
        """See :meth:`DeferralRule.defer`."""
        p = as_probabilities("base_probs", base_probs)
        return (p.amax(-1, keepdim=True) < self.threshold).expand_as(p)


@dataclass(frozen=True)
class ConfidenceBetDeferral(DeferralRule):
    """Defer the tokens that the base trusts less than the proxy its best one: d_v = 1 where p_v < max q - margin.

    Paper: "On the Rejection Criterion for Proxy-based Test-time Alignment", ACL 2026 (arXiv 2604.16146). It is
    Token V1 of speculative cascades with the roles of the models swapped.

    Args:
        margin: lambda in [0, 1]. Higher keeps more of the base.

    >>> p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.1, 0.5, 0.4])
    >>> ConfidenceBetDeferral(margin=0.1).defer(p, q)
    tensor([False,  True,  True])
    """

    needs_proxy: ClassVar[bool] = True
    margin: float = 0.1

    def __post_init__(self) -> None:
        check_number(self, "margin", 0, 1)

    def defer(self, base_probs: torch.Tensor, proxy_probs: torch.Tensor | None = None) -> torch.Tensor:
        """See :meth:`DeferralRule.defer`; q is needed."""
        p = as_probabilities("base_probs", base_probs)
        q = as_probabilities("proxy_probs", proxy_probs, like=p)
        return p < q.amax(-1, keepdim=True) - self.margin


CascadeVariant = Literal["diff", "opt", "token_v2", "token_v3"]
CASCADE_VARIANTS: tuple[str, ...] = ("diff", "opt", "token_v2", "token_v3")


@dataclass(frozen=True)
class CascadeDeferral(DeferralRule):
    """Speculative cascades with the roles swapped: keep p, fall back to q.

    - `diff`: all v if max p < max q - alpha, else none.
    - `opt`: all v if max p < max q - alpha TV(p, q), else none, with TV(p, q) = sum_v max(0, p_v - q_v).
    - `token_v2`: d_v = 1 where q_v < max q - alpha.
    - `token_v3`: d_v = 1 where q_v < (1 - alpha) max q.

    Paper: Narasimhan et al., "Faster Cascades via Speculative Decoding", ICLR 2025.

    Args:
        variant: one of the four above.
        alpha: in [0, 1]. Higher keeps more of the base.

    >>> p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.1, 0.5, 0.4])
    >>> CascadeDeferral(variant="token_v2", alpha=0.2).defer(p, q)
    tensor([ True, False, False])
    """

    needs_proxy: ClassVar[bool] = True
    variant: CascadeVariant = "diff"
    alpha: float = 0.1

    def __post_init__(self) -> None:
        if self.variant not in CASCADE_VARIANTS:
            raise ValueError(
                f"`CascadeDeferral.variant` must be one of {', '.join(CASCADE_VARIANTS)}, got {self.variant!r}."
            )
        check_number(self, "alpha", 0, 1)

    def defer(self, base_probs: torch.Tensor, proxy_probs: torch.Tensor | None = None) -> torch.Tensor:
        """See :meth:`DeferralRule.defer`; q is needed."""
        p = as_probabilities("base_probs", base_probs)
        q = as_probabilities("proxy_probs", proxy_probs, like=p)
        q_max = q.amax(-1, keepdim=True)
        if self.variant == "token_v2":
            return q < q_max - self.alpha
        if self.variant == "token_v3":
            return q < (1 - self.alpha) * q_max
        slack: torch.Tensor | float = self.alpha
        if self.variant == "opt":
            # Where p and q are equal these are sums of the same numbers in the same order.
            variation = sum_in_float64(torch.maximum(p, q)) - sum_in_float64(q)
            slack = self.alpha * variation.unsqueeze(-1)
        return (p.amax(-1, keepdim=True) < q_max - slack).expand_as(p)
