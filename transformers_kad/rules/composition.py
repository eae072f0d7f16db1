"""From logits to the target: a rule is applied to the softmax of both models' logits, without banned tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .arithmetic import may_be_any, replace_rows
from .base import DeferralRule, Rule, StatefulRule, as_probabilities, mix_and_mass

# A score more than this many nats below the likeliest is a ban: the smallest number of float64 is exp(-744.4).
BANNED_BELOW = 746.0

# On the CPU a rule is applied to at most this many elements at a time: its intermediate results stay in the cache.
COMPOSED_AT_ONCE = 2**20


@dataclass(frozen=True)
class Composition:
    """The distributions of some positions, one position a row, and the target that a rule made of them.

    Attributes:
        base_probs: p, `(rows, V)`.
        proxy_probs: q, `(rows, V)`.
        target_probs: r, `(rows, V)`.
        deferral_mass: D, `(rows,)`; None for rules without a deferral mask.
        next_state: the rule's states behind these positions, `(rows, ...)`; None for rules without a memory.
    """

    base_probs: Tensor
    proxy_probs: Tensor
    target_probs: Tensor
    deferral_mass: Tensor | None
    next_state: Tensor | None = None

    def rows(self, part: slice) -> "Composition":
        """Some of the rows."""
        mass, state = (None if v is None else v[part] for v in (self.deferral_mass, self.next_state))
        return Composition(self.base_probs[part], self.proxy_probs[part], self.target_probs[part], mass, state)

    def probs_of(self, tokens: Tensor) -> Tensor:
        """p, q and r of one token in each row: ids `(rows,)` give `(rows, 3)`."""
        stacked = torch.stack([self.base_probs, self.proxy_probs, self.target_probs], dim=-1)
        return stacked[torch.arange(len(tokens), device=stacked.device), tokens.to(stacked.device)]

    def likeliest(self, count: int) -> tuple[Tensor, Tensor]:
        """The ids of the `count` likeliest tokens of p and of q, and their probabilities, both `(rows, 2, count)`.

        The likeliest comes first, ties are in the order of ids. A smaller vocabulary gives fewer than `count`.
        """
        probs = torch.stack([self.base_probs, self.proxy_probs], dim=1)
        last = probs.shape[-1] - 1
        # Floats that are not negative are in the order of their bits. With the bits in the upper half of an integer
        # and the reversed id in the lower, each token has a key of its own, and topk has no ties to break.
        keys = probs.view(torch.int32).long() << 32 | last - torch.arange(last + 1, device=probs.device)
        ids = last - (keys.topk(min(count, last + 1)).values & 0xFFFFFFFF)
        return ids, probs.gather(-1, ids)


def with_bans(scores: Tensor) -> Tensor:
    """The base's scores `(..., V)`, before any temperature, with every ban at -inf.

    A score is taken for a ban where it lies more than `BANNED_BELOW` = 746 nats below the likeliest of its row: its
    probability is 0 even in float64, so that p is the same with and without. The logits of models lie within a few
    hundred of each other. What processors write in place of -inf lies beyond: -1e3, -1e4, -1e9, and the smallest
    numbers of float16, bfloat16 and float32, the last of which `remove_invalid_values=True` puts in the place of every
    -inf. A token that is only unlikely, such as one at -120, whose p is 0 in float32, is not banned.
    """
    line = scores.amax(-1, keepdim=True) - BANNED_BELOW
    if not may_be_any(scores.amin(-1, keepdim=True) < line):
        return scores
    return scores.masked_fill(scores < line, -torch.inf)


def compose(
    rule: Rule,
    base_logits: Tensor,
    proxy_logits: Tensor,
    reference_logits: Tensor | None = None,
    *,
    proxy_probs: Tensor | None = None,
    state: Tensor | None = None,
) -> Composition:
    """Apply a rule to the logits `(rows, V)` of the models.

    Ids at -inf in `base_logits` are banned (:func:`with_bans` puts bans of other kinds there): they are removed from q
    and q0 as well before the rule is applied, see :func:`proxy_distribution`.

    Args:
        rule: the rule.
        base_logits: of the base.
        proxy_logits: of the proxy.
        reference_logits: of the proxy before alignment, for rules with `needs_reference`.
        proxy_probs: the proxy's next-token distribution where the caller has it already, the softmax of `proxy_logits`
            in float32, `(rows, V)`. It saves that softmax on the CPU where no token is banned. On other devices it is
            ignored, since whether a token is banned is not known there without waiting for the device.
        state: the states of a `StatefulRule` before these positions, `(rows, ...)`; None at the beginning of texts.
    """
    rows, vocabulary = base_logits.shape
    if proxy_probs is not None:
        proxy_probs = as_probabilities("proxy_probs", proxy_probs, like=base_logits)
    if isinstance(rule, StatefulRule) and state is None:
        state = rule.initial_state(rows, base_logits.device)
    at_once = max(COMPOSED_AT_ONCE // vocabulary, 1) if base_logits.device.type == "cpu" else rows
    if rows <= at_once:
        return _compose(rule, base_logits, proxy_logits, reference_logits, proxy_probs, state)
    p, q, r = (torch.empty(rows, vocabulary, device=base_logits.device) for _ in range(3))
    masses, states = [], []
    for begin in range(0, rows, at_once):
        some = slice(begin, begin + at_once)
        further = (None if given is None else given[some] for given in (reference_logits, proxy_probs, state))
        part = _compose(rule, base_logits[some], proxy_logits[some], *further)
        p[some], q[some], r[some] = part.base_probs, part.proxy_probs, part.target_probs
        if part.deferral_mass is not None:
            masses.append(part.deferral_mass)
        if part.next_state is not None:
            states.append(part.next_state)
    return Composition(p, q, r, *(torch.cat(parts) if parts else None for parts in (masses, states)))


def compose_positions(
    rule: Rule,
    base_logits: Tensor,
    proxy_logits: Tensor,
    reference_logits: Tensor | None = None,
    *,
    proxy_probs: Tensor | None = None,
    state: Tensor | None = None,
) -> Composition:
    """Apply a rule to n neighbouring positions of B texts: :func:`compose` of `B * n` rows, those of a text together.

    A rule with a memory is applied to one position after the other: each gets the states that the one before it leads
    to. A memory knows no tokens, only distributions, so that this holds for a draft before it is verified.

    Args:
        rule: the rule.
        base_logits: `(B, n, V)`, and so are `proxy_logits`, `reference_logits` and `proxy_probs`, see :func:`compose`.
        state: the states of a `StatefulRule` before the first of the positions, `(B, ...)`.
    """
    if not isinstance(rule, StatefulRule):
        reference, probs = (
            None if given is None else given.flatten(0, 1) for given in (reference_logits, proxy_probs)
        )
        return compose(rule, base_logits.flatten(0, 1), proxy_logits.flatten(0, 1), reference, proxy_probs=probs)
    parts = []
    for at in range(base_logits.shape[1]):
        reference, probs = (None if given is None else given[:, at] for given in (reference_logits, proxy_probs))
        base, proxy = base_logits[:, at], proxy_logits[:, at]
        parts.append(compose(rule, base, proxy, reference, proxy_probs=probs, state=state))
        state = parts[-1].next_state
    return _side_by_side(parts)


def _side_by_side(parts: Sequence[Composition]) -> Composition:
    """One composition of several positions, those of a row together, from one composition of all rows a position."""
    together: dict[str, Any] = {}
    for field in fields(Composition):
        values = [getattr(part, field.name) for part in parts]
        together[field.name] = None if values[0] is None else torch.stack(values, dim=1).flatten(0, 1)
    return Composition(**together)


def proxy_distribution(base_logits: Tensor, proxy_logits: Tensor, base_probs: Tensor) -> Tensor:
    """The proxy's next-token distribution q without the tokens that the base bans, `(rows, V)` float32.

    Ids at -inf in `base_logits` are removed and the rest is renormalised. A row in which no token is left is set to p.

    Args:
        base_logits: of the base, `(rows, V)`.
        proxy_logits: of the proxy, `(rows, V)`.
        base_probs: p, `(rows, V)` float32.
    """
    return _without_bans(proxy_logits, _bans(base_logits), base_probs)


def _compose(
    rule: Rule,
    base_logits: Tensor,
    proxy_logits: Tensor,
    reference_logits: Tensor | None,
    proxy_probs: Tensor | None,
    state: Tensor | None,
) -> Composition:
    """Apply :func:`compose` to as many rows as are handled at once."""
    p, bans = base_logits.float().softmax(-1), _bans(base_logits)
    q = _without_bans(proxy_logits, bans, p, proxy_probs)
    if isinstance(rule, DeferralRule) and not isinstance(rule, StatefulRule):
        return Composition(p, q, *mix_and_mass(p, q, rule.defer(p, q)))
    q0 = None if reference_logits is None else _without_bans(reference_logits, bans, p)
    if isinstance(rule, StatefulRule):
        assert state is not None
        return Composition(p, q, *rule.step(p, q, state, q0))
    return Composition(p, q, rule(p, q, q0), None)


def _bans(base_logits: Tensor) -> Tensor | None:
    """Which ids are at -inf, boolean `(rows, V)`; None where none can be."""
    return base_logits == -torch.inf if may_be_any(base_logits.amin(-1) == -torch.inf) else None


def _without_bans(logits: Tensor, bans: Tensor | None, p: Tensor, probs: Tensor | None = None) -> Tensor:
    """The softmax of logits `(rows, V)` without banned ids, see :func:`proxy_distribution`; `probs` if none can be."""
    logits = logits.to(p.device, torch.float32)
    if bans is not None:
        logits, probs = logits.masked_fill(bans, -torch.inf), None
    q = logits.softmax(-1) if probs is None else probs.to(logits)
    return replace_rows(q, logits.amax(-1) == -torch.inf, p)
