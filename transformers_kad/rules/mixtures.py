"""Rules without a deferral mask: they compute the target r directly, and have no deferral mass.

The share of a token that is owed to the proxy is undefined for them too.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .arithmetic import replace_rows
from .base import Rule, number


@dataclass(frozen=True)
class ImplicitReward(Rule):
    """Reweigh the base by what alignment changed in the proxy: r ∝ p (q / q0)^beta.

    q0 is the proxy before alignment (for a LoRA proxy: with its adapter switched off). Computed in log space. A token
    with q_v = 0 gets r_v = 0 (for beta > 0); where that leaves no token, r = p.

    Papers: Liu et al., "Tuning Language Models by Proxy", COLM 2024; Mitchell et al., "An Emulator for Fine-tuning
    Large Language Models using Small Language Models", ICLR 2024.

    Args:
        beta: strength of the reward, at least 0.

    >>> p, q, q0 = torch.tensor([0.6, 0.4]), torch.tensor([0.2, 0.8]), torch.tensor([0.4, 0.6])
    >>> ImplicitReward(beta=1.0)(p, q, q0)
    tensor([0.3600, 0.6400])
    """

    needs_reference: ClassVar[bool] = True
    beta: float = number(1.0, 0, float("inf"))

    def target(self, p: Tensor, q: Tensor, q0: Tensor | None) -> Tensor:
        assert q0 is not None
        if self.beta == 0:
            return p
        limits = torch.finfo(torch.float32)
        # A reference probability that underflowed is no zero, and a large beta may overflow.
        reward = self.beta * (q.log() - q0.clamp(min=limits.tiny).log())
        log_r = p.log() + reward.clamp(max=limits.max)
        return replace_rows(log_r.softmax(-1), log_r.amax(-1) == -torch.inf, p)


@dataclass(frozen=True)
class Ensemble(Rule):
    """A fixed mixture of the two models: r = weight p + (1 - weight) q.

    Args:
        weight: the base's share, in [0, 1].

    >>> Ensemble(weight=0.75)(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    tensor([0.7500, 0.2500])
    """

    weight: float = number(0.5, 0, 1)

    def target(self, p: Tensor, q: Tensor, q0: Tensor | None) -> Tensor:
        return self.weight * p + (1 - self.weight) * q


@dataclass(frozen=True)
class BlendIn(Rule):
    """Blend the proxy in where the base is unsure.

    Where max p < threshold, r = a q + (1 - a) p with a = clip(max q / (max p + max q) + 0.1 p[argmax q], 0, 1);
    elsewhere r = p.

    Paper: arXiv 2606.11201.

    Args:
        threshold: in [0, 1].

    >>> BlendIn(threshold=0.6)(torch.tensor([0.5, 0.5]), torch.tensor([0.0, 1.0])).round(decimals=4)
    tensor([0.1417, 0.8583])
    """

    threshold: float = number(0.4, 0, 1)

    def target(self, p: Tensor, q: Tensor, q0: Tensor | None) -> Tensor:
        p_max, q_max = p.amax(-1, keepdim=True), q.amax(-1, keepdim=True)
        # The lowest id among the likeliest: which of several equal maxima `argmax` returns is not specified.
        q_best = (q == q_max).int().argmax(-1, keepdim=True)
        share = (q_max / (p_max + q_max) + 0.1 * p.gather(-1, q_best)).clamp(0, 1) * (p_max < self.threshold)
        return share * q + (1 - share) * p
