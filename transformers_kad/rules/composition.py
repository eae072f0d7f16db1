"""Rules that are no mask, and the table of all rules by name.

These rules return the target distribution r directly. For them the deferral mass and the share of a token
that is owed to the proxy are undefined.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeAlias

import torch

from .deferral import (
    CascadeDeferral,
    ConfidenceBetDeferral,
    DeferralRule,
    DualDeferral,
    ExactDeferral,
    NudgingDeferral,
    PrimalDeferral,
    as_probabilities,
    check_number,
    mix,  # noqa: F401, the package takes it from here
    mix_and_mass,
)

# A score this far below the likeliest is a ban, in nats: its probability is 0 even in float64, whose smallest number
# is exp(-744.4).
BANNED_BELOW = 746.0

# On the CPU a rule is applied to so many elements at a time that what it makes on the way stays in the cache.
COMPOSED_AT_ONCE = 2**20


@dataclass(frozen=True)
class ImplicitReward:
    """Reweigh the base by what alignment changed in the proxy: r ∝ p (q / q0)^beta.

    q0 is the proxy before alignment (for a LoRA proxy: its adapter switched off). Computed in log space.
    q_v = 0 gives r_v = 0 (for beta > 0); where that leaves no token, r = p.

    Papers: Liu et al., "Tuning Language Models by Proxy", COLM 2024; Mitchell et al., "An Emulator for
    Fine-tuning Large Language Models using Small Language Models", ICLR 2024.

    Args:
        beta: strength of the reward, >= 0.

    >>> p, q, q0 = torch.tensor([0.6, 0.4]), torch.tensor([0.2, 0.8]), torch.tensor([0.4, 0.6])
    >>> ImplicitReward(beta=1.0)(p, q, q0)
    tensor([0.3600, 0.6400])
    """

    needs_reference: ClassVar[bool] = True
    beta: float = 1.0

    def __post_init__(self) -> None:
        check_number(self, "beta", 0, float("inf"))

    def __call__(
        self,
        base_probs: torch.Tensor,
        proxy_probs: torch.Tensor,
        reference_probs: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The target distribution r, float32, all shapes `(..., V)`."""
        p = as_probabilities("base_probs", base_probs)
        q = as_probabilities("proxy_probs", proxy_probs, like=p)
        q0 = as_probabilities("reference_probs", reference_probs, like=p)
        if self.beta == 0:
            return p
        tiny = torch.finfo(torch.float32).tiny  # a reference probability that underflowed is not a zero
        reward = self.beta * (q.log() - q0.clamp(min=tiny).log())
        log_r = p.log() + reward.clamp(max=torch.finfo(torch.float32).max)  # a huge beta overflows
        return replace_rows(log_r.softmax(-1), log_r.amax(-1) == -torch.inf, p)


@dataclass(frozen=True)
class Ensemble:
    """A static mixture of the two models: r = weight p + (1 - weight) q.

    Args:
        weight: the base's share, in [0, 1].

    >>> Ensemble(weight=0.75)(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    tensor([0.7500, 0.2500])
    """

    needs_reference: ClassVar[bool] = False
    weight: float = 0.5

    def __post_init__(self) -> None:
        check_number(self, "weight", 0, 1)

    def __call__(
        self,
        base_probs: torch.Tensor,
        proxy_probs: torch.Tensor,
        reference_probs: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The target distribution r, float32, all shapes `(..., V)`; `reference_probs` is not used."""
        p = as_probabilities("base_probs", base_probs)
        q = as_probabilities("proxy_probs", proxy_probs, like=p)
        return self.weight * p + (1 - self.weight) * q


@dataclass(frozen=True)
class BlendIn:
    """Blend the proxy in where the base is unsure.

    If max p < threshold, r = a q + (1 - a) p with
    a = clip(max q / (max p + max q) + 0.1 p[argmax q], 0, 1); else r = p.

    Paper: arXiv 2606.11201.

    Args:
        threshold: in [0, 1].

    >>> BlendIn(threshold=0.6)(torch.tensor([0.5, 0.5]), torch.tensor([0.0, 1.0])).round(decimals=4)
    tensor([0.1417, 0.8583])
    """

    needs_reference: ClassVar[bool] = False
    threshold: float = 0.4

    def __post_init__(self) -> None:
        check_number(self, "threshold", 0, 1)

    def __call__(
        self,
        base_probs: torch.Tensor,
        proxy_probs: torch.Tensor,
        reference_probs: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The target distribution r, float32, all shapes `(..., V)`; `reference_probs` is not used."""
        p = as_probabilities("base_probs", base_probs)
        q = as_probabilities("proxy_probs", proxy_probs, like=p)
        p_max, q_max = p.amax(-1, keepdim=True), q.amax(-1, keepdim=True)
        # The lowest id among the likeliest: argmax leaves open which of several equal maxima it returns.
        q_best = (q == q_max).int().argmax(-1, keepdim=True)
        share = (q_max / (p_max + q_max) + 0.1 * p.gather(-1, q_best)).clamp(0, 1) * (p_max < self.threshold)
        return share * q + (1 - share) * p


Rule: TypeAlias = DeferralRule | ImplicitReward | Ensemble | BlendIn

RULES: dict[str, type[Rule]] = {
    "dual": DualDeferral,
    "primal": PrimalDeferral,
    "exact": ExactDeferral,
    "nudging": NudgingDeferral,
    "confidence_bet": ConfidenceBetDeferral,
    "cascade": CascadeDeferral,
    "implicit_reward": ImplicitReward,
    "ensemble": Ensemble,
    "blend_in": BlendIn,
}


def unknown_name_message(kind: str, name: object, known: Iterable[str]) -> str:
    """An error text for a name that is not in `known`: what was given, the nearest name, and the list."""
    known = list(known)
    close = difflib.get_close_matches(str(name), known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"Unknown {kind} {name!r}.{hint} Known: {', '.join(known) if known else 'none'}."


def make_rule(name: str, **parameters: Any) -> Rule:
    """Build a rule from its name in :data:`RULES` and its parameters.

    Raises:
        ValueError: for an unknown name, or a parameter out of range.
        TypeError: for a parameter that the rule does not have.

    >>> make_rule("primal", budget=0.8)
    PrimalDeferral(budget=0.8)
    """
    if not isinstance(name, str) or name not in RULES:
        raise ValueError(unknown_name_message("rule", name, RULES))
    known = [field.name for field in fields(RULES[name])]
    for parameter in parameters:
        if parameter not in known:
            raise TypeError(unknown_name_message(f"parameter of the rule {name!r}:", parameter, known))
    return RULES[name](**parameters)


@dataclass(frozen=True)
class Composition:
    """What a rule made of some positions, one a row.

    Attributes:
        base_probs: p, `(rows, V)`.
        proxy_probs: q, `(rows, V)`.
        target_probs: r, `(rows, V)`.
        deferral_mass: D, `(rows,)`; None for rules that are no mask.
    """

    base_probs: torch.Tensor
    proxy_probs: torch.Tensor
    target_probs: torch.Tensor
    deferral_mass: torch.Tensor | None

    def rows(self, part: slice) -> "Composition":
        """Some rows as a `Composition` of their own."""
        mass = None if self.deferral_mass is None else self.deferral_mass[part]
        return Composition(self.base_probs[part], self.proxy_probs[part], self.target_probs[part], mass)

    def probs_of(self, tokens: torch.Tensor) -> torch.Tensor:
        """p, q and r of one token a row, `(rows, 3)`."""
        stacked = torch.stack([self.base_probs, self.proxy_probs, self.target_probs], dim=-1)
        return stacked[torch.arange(len(tokens), device=stacked.device), tokens.to(stacked.device)]

    def likeliest(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The `count` likeliest ids of p and of q in falling order, ties by lower id, and their probabilities.

        Both `(rows, 2, count)`; fewer than `count` where the vocabulary is smaller.
        """
        probs = torch.stack([self.base_probs, self.proxy_probs], dim=1)
        last = probs.shape[-1] - 1
        # Floats that are not negative are ordered as their bits are: bits, then the id turned round, give each id
        # a key of its own, and topk has no ties to break.
        keys = probs.view(torch.int32).long() << 32 | last - torch.arange(last + 1, device=probs.device)
        ids = last - (keys.topk(min(count, last + 1)).values & 0xFFFFFFFF)
        return ids, probs.gather(-1, ids)


def with_bans(scores: torch.Tensor) -> torch.Tensor:
    """The base's scores `(..., V)`, before any temperature, with every ban at -inf.

    A score is taken for a ban where it lies more than `BANNED_BELOW` = 746 nats under the likeliest of its row. There
    a probability is 0 even in float64. The logits of models lie within a few hundred of each other, while -1e3, -1e4,
    -1e9 and the smallest numbers of float16, bfloat16 and float32, which processors write in place of -inf, lie
    beyond. `InfNanRemoveLogitsProcessor` (`remove_invalid_values=True`) is one of them: it turns every earlier -inf
    into the smallest float32. A token that is only unlikely, such as one at -120, whose p is 0 in float32, is no ban.
    p is the same with and without: it is 0 at a ban in either case.
    """
    line = scores.amax(-1, keepdim=True) - BANNED_BELOW
    if not may_be_any(scores.amin(-1, keepdim=True) < line):
        return scores
    return scores.masked_fill(scores < line, -torch.inf)


def compose(
    rule: Rule,
    base_logits: torch.Tensor,
    proxy_logits: torch.Tensor,
    reference_logits: torch.Tensor | None = None,
) -> Composition:
    """Apply a rule to logits `(rows, V)` of the models.

    Ids at -inf in `base_logits` are banned (:func:`with_bans` puts bans of other kinds there): they are removed
    from q (and q0) as well, which are renormalised before the rule. Where that leaves a row of q without any token,
    q is set to p.
    """
    rows, vocabulary = base_logits.shape
    at_once = max(COMPOSED_AT_ONCE // vocabulary, 1) if base_logits.device.type == "cpu" else rows
    if rows <= at_once:
        return _compose(rule, base_logits, proxy_logits, reference_logits)
    p, q, r = (torch.empty(rows, vocabulary, device=base_logits.device) for _ in range(3))
    masses = []
    for begin in range(0, rows, at_once):
        some = slice(begin, begin + at_once)
        reference = None if reference_logits is None else reference_logits[some]
        part = _compose(rule, base_logits[some], proxy_logits[some], reference)
        p[some], q[some], r[some] = part.base_probs, part.proxy_probs, part.target_probs
        if part.deferral_mass is not None:
            masses.append(part.deferral_mass)
    return Composition(p, q, r, torch.cat(masses) if masses else None)


def _compose(
    rule: Rule, base_logits: torch.Tensor, proxy_logits: torch.Tensor, reference_logits: torch.Tensor | None
) -> Composition:
    """:func:`compose` for as many rows as are handled at once."""
    p = base_logits.float().softmax(-1)
    banned = base_logits == -torch.inf if may_be_any(base_logits.amin(-1) == -torch.inf) else None

    def allowed(logits: torch.Tensor) -> torch.Tensor:
        logits = logits.to(p.device, torch.float32)
        if banned is not None:
            logits = logits.masked_fill(banned, -torch.inf)
        return replace_rows(logits.softmax(-1), logits.amax(-1) == -torch.inf, p)

    q = allowed(proxy_logits)
    if isinstance(rule, DeferralRule):
        return Composition(p, q, *mix_and_mass(p, q, rule.defer(p, q)))
    q0 = None if reference_logits is None else allowed(reference_logits)
    return Composition(p, q, rule(p, q, q0), None)


def may_be_any(flags: torch.Tensor) -> bool:
    """Whether any flag is set, as far as it costs nothing to know: only on the CPU is it looked up."""
    return flags.device.type != "cpu" or bool(flags.any())


def replace_rows(probs: torch.Tensor, flags: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """`probs` `(..., V)`, with the rows that are flagged, `(...)`, taken from `others`."""
    return torch.where(flags.unsqueeze(-1), others, probs) if may_be_any(flags) else probs
