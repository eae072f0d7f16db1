"""Sampling that asks the proxy only where it is needed: draw from the base first.

    r_v = (1 - d_v) p_v + D q_v

Read as sampling: draw v ~ p; if d_v = 1, throw it away and draw from q instead. Where d does not depend on q, a
token that is kept costs no forward of the proxy.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch

from .composition import Ensemble, compose
from .deferral import DeferralRule, deferral_mass
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


class ForcedRows:
    """Which rows of a call of `generate` have ended, told from what became of the tokens forced on them.

    A row ends with an end of sequence. One that another stopping criterion ended shows it one step later: `generate`
    fills it up with padding, whatever is forced on it.

    Args:
        eos_token_ids: ids that end a text.
        pad_token_id: what finished rows are filled up with.
    """

    def __init__(self, eos_token_ids: Collection[int], pad_token_id: int | None) -> None:
        self.pad_token_id = pad_token_id
        self._eos = torch.tensor(sorted(eos_token_ids), dtype=torch.long, device="cpu")
        self._ended: torch.Tensor | None = None  # (rows,)
        self._forced: torch.Tensor | None = None  # (rows,)

    def follow(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Read the newest token of each text `(rows, L)`.

        Returns:
            Which rows have ended, and which go on with another token than was forced on them, `(rows,)` boolean.
        """
        if self._forced is None or self._ended is None:
            self._eos = self._eos.to(input_ids.device)
            self._ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
            return self._ended, self._ended
        newest = input_ids[:, -1]
        differs = ~self._ended & (newest != self._forced.to(newest))
        padded = torch.zeros_like(differs) if self.pad_token_id is None else newest == self.pad_token_id
        ends = torch.isin(newest, self._eos)
        self._ended = self._ended | ends | (differs & padded)
        return self._ended, differs & ~padded

    def forced(self, tokens: torch.Tensor) -> None:
        """Note the tokens `(rows,)` that are forced on the rows."""
        self._forced = tokens
