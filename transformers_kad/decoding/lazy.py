"""Sampling that asks the proxy only where it is needed: draw from the base first.

    r_v = (1 - d_v) p_v + D q_v

Read as sampling: draw v ~ p; if d_v = 1, throw it away and draw from q instead. Where d does not depend on q, a
token that is kept costs no forward of the proxy.
"""

from dataclasses import dataclass

import torch

from ..rules.composition import Ensemble, compose
from ..rules.deferral import DeferralRule, deferral_mass
from .verification import draw

PROXY_ALONE = Ensemble(weight=0.0)  # r = q


@dataclass(frozen=True)
class BaseDraw:
    """One token of each row, drawn from the base, and what the rule says of it.

    Attributes:
        tokens: v ~ p, `(rows,)`.
        deferred: d_v, whether the token is to be drawn again from q, `(rows,)` boolean.
        deferral_mass: D, `(rows,)`.
    """

    tokens: torch.Tensor
    deferred: torch.Tensor
    deferral_mass: torch.Tensor


def draw_from_base(rule: DeferralRule, base_logits: torch.Tensor) -> BaseDraw:
    """Draw a token from each row of the base's tempered logits `(rows, V)`, for a rule that needs no q."""
    p = base_logits.float().softmax(-1)
    deferral = rule.defer(p)
    tokens = draw(p)
    return BaseDraw(tokens, deferral.gather(-1, tokens[:, None]).squeeze(-1), deferral_mass(p, deferral))


def draw_again(drawn: BaseDraw, base_logits: torch.Tensor, proxy_logits: torch.Tensor) -> torch.Tensor:
    """The tokens `(rows,)`, where they are deferred drawn anew from q.

    Both models' logits are tempered, `(rows, V)`. Ids at -inf in `base_logits` are banned from q, as in `compose`.
    """
    q = compose(PROXY_ALONE, base_logits, proxy_logits).proxy_probs
    return torch.where(drawn.deferred, draw(q), drawn.tokens)


def force(tokens: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Scores `(rows, vocabulary)` float32 that leave one token to each row: 0 there, -inf elsewhere."""
    scores = torch.full((len(tokens), vocabulary), -torch.inf, device=tokens.device)
    return scores.scatter_(-1, tokens[:, None], 0.0)
