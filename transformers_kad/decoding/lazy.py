"""Token by token with few forwards of the proxy: it is asked only where the token drawn is a deferred one.

r_v = (1 - d_v) p_v + D q_v is the law of the following draw. Draw v ~ p; where d_v = 1, throw v away and draw from q
instead, so that q is drawn from with probability D, whatever v was. Where d does not depend on q, a token that is kept
costs no forward of the proxy.
"""

from dataclasses import dataclass

import torch

from ..models.model_errors import is_unusable
from ..records.recorders import StepRecorder
from ..rules.base import DeferralRule, StatefulDeferralRule, deferral_mass
from ..rules.composition import proxy_distribution
from .open_call import OpenCall
from .token_by_token import TokenStep
from .verification import draw


@dataclass(frozen=True)
class BaseDraw:
    """One token of each row, drawn from the base, and what the rule says of it.

    Attributes:
        tokens: v ~ p, `(rows,)`.
        deferred: d_v, whether the token is to be drawn again from q, `(rows,)` boolean.
        deferral_mass: D, `(rows,)`.
        base_probs: p, `(rows, V)`.
        next_state: of a rule with a memory, its states behind this position, `(rows, ...)`.
    """

    tokens: torch.Tensor
    deferred: torch.Tensor
    deferral_mass: torch.Tensor
    base_probs: torch.Tensor
    next_state: torch.Tensor | None = None


def draw_from_base(rule: DeferralRule, base_logits: torch.Tensor, state: torch.Tensor | None = None) -> BaseDraw:
    """Draw a token from each row of the base's tempered logits `(rows, V)`, for a rule that needs no q.

    `state` are the states `(rows, ...)` of a rule with a memory; None at the beginning of texts.
    """
    p = base_logits.float().softmax(-1)
    if isinstance(rule, StatefulDeferralRule):
        state = rule.initial_state(len(p), p.device) if state is None else state
        deferral = rule.defer_at(p, None, state)
    else:
        deferral = rule.defer(p)
    mass = deferral_mass(p, deferral)
    next_state = rule.advance(state, mass) if isinstance(rule, StatefulDeferralRule) and state is not None else None
    tokens = draw(p)
    return BaseDraw(tokens, deferral.gather(-1, tokens[:, None]).squeeze(-1), mass, p, next_state)


def draw_again(drawn: BaseDraw, base_logits: torch.Tensor, proxy_logits: torch.Tensor) -> torch.Tensor:
    """The tokens `(rows,)`, where they are deferred drawn anew from q.

    Both models' logits are tempered, `(rows, V)`. Ids at -inf in `base_logits` are banned from q, as in `compose`.
    """
    q = proxy_distribution(base_logits, proxy_logits, drawn.base_probs)
    return torch.where(drawn.deferred, draw(q), drawn.tokens)


def force(tokens: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Scores `(rows, vocabulary)` float32 that leave one token to each row: 0 there, -inf elsewhere."""
    scores = torch.full((len(tokens), vocabulary), -torch.inf, device=tokens.device)
    return scores.scatter_(-1, tokens[:, None], 0.0)


class LazyStep(TokenStep):
    """Draws the token itself, and asks the proxy only where a row that goes on draws a deferred one."""

    def __init__(self, call: OpenCall) -> None:
        super().__init__(call)
        self._forced: torch.Tensor | None = None  # (rows,): the tokens of the step before

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores that force a token drawn from r, for texts `(rows, L)` and the base's scores `(rows, V)`."""
        self._check_call()
        call, rule = self.call, self.call.settings.rule
        assert isinstance(rule, DeferralRule)
        base_logits = self._tempered_base(scores)
        drawn = draw_from_base(rule, base_logits, self._rule_states(input_ids))
        self._end_rule_step(input_ids, drawn.next_state)
        ended = call.ended(input_ids)
        replaced = torch.zeros_like(ended) if self._forced is None else input_ids[:, -1] != self._forced
        flags = torch.stack([drawn.deferred, is_unusable(scores), replaced.to(ended)]) & ~ended
        asks, unusable, replaced_rows = flags.tolist()
        self._check("base", unusable, input_ids.shape[1])
        if any(replaced_rows):
            raise RuntimeError(
                f"`lazy=True` drew another token at position {input_ids.shape[1] - 1} of sequence "
                f"{replaced_rows.index(True)} than was emitted: something after KAD chose it. Leave out `lazy`."
            )
        tokens = drawn.tokens
        if any(asks):
            texts = self._proxy_texts(input_ids)
            proxy_logits = texts.logits(call.models.proxy)
            tokens = draw_again(drawn, base_logits, self._in_base_vocabulary(proxy_logits, scores.shape[-1]))
            call.models.crop(texts.ids.shape[1])
            self._check("proxy", (is_unusable(proxy_logits).to(ended) & ~ended).tolist(), input_ids.shape[1])
        self._forced = tokens.to(input_ids.device)
        if isinstance(call.recorder, StepRecorder):
            call.recorder.record_mass(input_ids, drawn.deferral_mass, None)
            call.base_forwards += 1
        return force(tokens, scores.shape[-1])
