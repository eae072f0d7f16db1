"""The base classes of all rules: they check parameters and inputs, so that a rule itself is its formula."""

import functools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from .arithmetic import sum_precisely, zero_outside


def number(default: float, low: float, high: float, *, low_open: bool = False) -> Any:
    """A parameter of a rule that must be a finite number in [low, high], or in (low, high] where `low_open`."""
    return field(default=default, metadata={"range": (low, high, low_open)})


def _check_number(name: str, value: Any, low: float, high: float, low_open: bool) -> None:
    bounds = f"{'(' if low_open else '['}{low:g}, {high:g}{')' if high == math.inf else ']'}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}` must be a number in {bounds}, got {value!r:.200}.")
    size = as_float(value)
    if not (low < size if low_open else low <= size) or not size <= high or size == math.inf:
        raise ValueError(f"`{name}` must lie in {bounds}, got {value!r:.200}.")


def as_float(value: Any) -> float:
    """A number as a float, infinite where it is an integer too large for one."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def as_probabilities(name: str, probs: Tensor | None, like: Tensor | None = None) -> Tensor:
    """Return `probs` as float32 after checking that it is a floating tensor `(..., V)` shaped like `like`."""
    if probs is None:
        raise ValueError(f"This rule needs `{name}`, got None.")
    if not torch.is_tensor(probs) or not probs.is_floating_point() or probs.dim() == 0:
        got = f"{probs.dtype} of shape {tuple(probs.shape)}" if torch.is_tensor(probs) else type(probs).__name__
        raise TypeError(f"`{name}` must be a floating point tensor of shape (..., V), got {got}.")
    if like is not None and probs.shape != like.shape:
        shapes = f"{tuple(probs.shape)} and {tuple(like.shape)}"
        raise ValueError(f"`{name}` must have the shape of `base_probs`, got {shapes}.")
    return probs.float()


def deferral_mass(base_probs: Tensor, deferral: Tensor) -> Tensor:
    """The deferral mass D = sum_v d_v p_v, shape `(...)`, summed in float64 and returned as float32."""
    return sum_precisely(zero_outside(deferral, base_probs))


def mix(base_probs: Tensor, proxy_probs: Tensor, deferral: Tensor) -> Tensor:
    """Blend base and proxy by a deferral mask: r_v = (1 - d_v) p_v + D q_v with D = sum_v d_v p_v.

    Args:
        base_probs: p, shape `(..., V)`.
        proxy_probs: q, shape `(..., V)`.
        deferral: d, boolean mask, shape `(..., V)`.

    Returns:
        The target distribution r, float32, shape `(..., V)`. An empty mask gives p, a full mask gives q.

    Raises:
        TypeError, ValueError: for what is no floating point tensor or no boolean mask, or for shapes that differ.

    >>> p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.0, 0.0, 1.0])
    >>> mix(p, q, torch.tensor([False, True, False]))
    tensor([0.5000, 0.0000, 0.5000])
    """
    return mix_and_mass(base_probs, proxy_probs, deferral)[0]


def mix_and_mass(base_probs: Tensor, proxy_probs: Tensor, deferral: Tensor) -> tuple[Tensor, Tensor]:
    """The target r of :func:`mix`, and the deferral mass D, `(...)`, which is computed on the way."""
    p = as_probabilities("base_probs", base_probs)
    q = as_probabilities("proxy_probs", proxy_probs, like=p)
    if deferral.dtype != torch.bool or deferral.shape != p.shape:
        got = f"{deferral.dtype} of shape {tuple(deferral.shape)}"
        raise ValueError(f"`deferral` must be a boolean mask of shape {tuple(p.shape)}, got {got}.")
    deferred = zero_outside(deferral, p)
    mass = sum_precisely(deferred)
    return (mass.unsqueeze(-1) * q).add_(p - deferred), mass


@dataclass(frozen=True)
class Rule(ABC):
    """A rule. Subclasses are frozen dataclasses; those without a deferral mask implement :meth:`target`.

    Attributes:
        needs_reference: whether the rule needs q0, the proxy's distribution before alignment.
    """

    needs_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for own in fields(self):
            if "range" in own.metadata:
                _check_number(f"{type(self).__name__}.{own.name}", getattr(self, own.name), *own.metadata["range"])

    def __call__(self, base_probs: Tensor, proxy_probs: Tensor, reference_probs: Tensor | None = None) -> Tensor:
        """The target distribution r, float32, all shapes `(..., V)`.

        Args:
            base_probs: p.
            proxy_probs: q.
            reference_probs: q0, which only a rule with `needs_reference` looks at.

        Raises:
            TypeError, ValueError: for what is no floating point tensor, is missing, or has another shape than p.
        """
        p = as_probabilities("base_probs", base_probs)
        q = as_probabilities("proxy_probs", proxy_probs, like=p)
        q0 = as_probabilities("reference_probs", reference_probs, like=p) if self.needs_reference else None
        return self.target(p, q, q0)

    @abstractmethod
    def target(self, p: Tensor, q: Tensor, q0: Tensor | None) -> Tensor:
        """The formula of r, for float32 distributions of one shape; q0 is None unless the rule needs it."""


@dataclass(frozen=True)
class DeferralRule(Rule):
    """A rule with a deferral mask. Subclasses are frozen dataclasses and implement :meth:`defer`.

    Attributes:
        needs_proxy: whether the mask depends on q.
    """

    needs_proxy: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Put the checks of the inputs before the `defer` that a subclass defines."""
        super().__init_subclass__(**kwargs)
        if "defer" not in vars(cls):
            return
        own_defer = cls.defer

        @functools.wraps(own_defer)
        def defer(self: DeferralRule, base_probs: Tensor, proxy_probs: Tensor | None = None) -> Tensor:
            p = as_probabilities("base_probs", base_probs)
            if self.needs_proxy or proxy_probs is not None:
                proxy_probs = as_probabilities("proxy_probs", proxy_probs, like=p)
            return own_defer(self, p, proxy_probs)

        cls.defer = defer  # type: ignore[method-assign]

    @abstractmethod
    def defer(self, base_probs: Tensor, proxy_probs: Tensor | None = None) -> Tensor:
        """The deferral mask d, boolean, shape `(..., V)`.

        Inputs are checked as by :meth:`Rule.__call__`, and an implementation gets them as float32.

        Args:
            base_probs: p, shape `(..., V)`.
            proxy_probs: q, shape `(..., V)`; may be left out unless `needs_proxy`.
        """

    def target(self, p: Tensor, q: Tensor, q0: Tensor | None) -> Tensor:
        """Mix p and q by the deferral mask, see :func:`mix`."""
        return mix(p, q, self.defer(p, q))


class StatefulRule(Rule):
    """A rule with a memory: r of a position also depends on the positions before it in the text.

    The memory of a text is a state, which :meth:`step` moves on by one emitted position. It must depend on nothing but
    the distributions at the positions before, so that it is known along a draft before its tokens are accepted:
    speculative decoding stays exact. Tokens that were drafted and refused leave no trace in it. Beams take their
    states along, and a call whose prompt continues a text of the call before goes on with the state of that text.

    Called without a state, a rule is applied as at the first position of a text.
    """

    @abstractmethod
    def initial_state(self, batch: int, device: torch.device | str | None = None) -> Tensor:
        """The states of `batch` texts before their first emitted token, `(batch, ...)`."""

    @abstractmethod
    def step(
        self, base_probs: Tensor, proxy_probs: Tensor, state: Tensor, reference_probs: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Apply the rule to one position of some texts.

        Args:
            base_probs: p, shape `(batch, V)`, float32.
            proxy_probs: q, shape `(batch, V)`, float32.
            state: of each text before this position, `(batch, ...)`.
            reference_probs: q0, shape `(batch, V)`, for a rule with `needs_reference`.

        Returns:
            The target r, `(batch, V)`; the deferral mass D, `(batch,)`, or None for a rule without one; and the state
            of each text behind this position. The tensor `state` is not changed.
        """

    def target(self, p: Tensor, q: Tensor, q0: Tensor | None) -> Tensor:
        """The target r at the first position of a text, for distributions `(..., V)`."""
        rows = [None if probs is None else probs.reshape(-1, p.shape[-1]) for probs in (p, q, q0)]
        assert rows[0] is not None and rows[1] is not None
        state = self.initial_state(len(rows[0]), p.device)
        return self.step(rows[0], rows[1], state, rows[2])[0].view(p.shape)


class StatefulDeferralRule(StatefulRule, DeferralRule):
    """A rule with a deferral mask and a memory. Subclasses are frozen dataclasses.

    :meth:`defer` gives the masks at the first position of a text.
    """

    def defer(self, base_probs: Tensor, proxy_probs: Tensor | None = None) -> Tensor:
        size = base_probs.shape[-1]
        p, q = (None if probs is None else probs.reshape(-1, size) for probs in (base_probs, proxy_probs))
        assert p is not None
        return self.defer_at(p, q, self.initial_state(len(p), p.device)).view(base_probs.shape)

    @abstractmethod
    def defer_at(self, base_probs: Tensor, proxy_probs: Tensor | None, state: Tensor) -> Tensor:
        """The deferral masks d of some texts, boolean, shape `(batch, V)`, for float32 distributions of that shape.

        Args:
            base_probs: p, shape `(batch, V)`.
            proxy_probs: q, shape `(batch, V)`; may be None unless `needs_proxy`.
            state: of each text before this position, `(batch, ...)`.
        """

    @abstractmethod
    def advance(self, state: Tensor, mass: Tensor) -> Tensor:
        """The states `(batch, ...)` behind a position whose deferral mass D was `mass` `(batch,)`."""

    def step(
        self, base_probs: Tensor, proxy_probs: Tensor, state: Tensor, reference_probs: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Mix p and q by the deferral mask, see :func:`mix`."""
        target, mass = mix_and_mass(base_probs, proxy_probs, self.defer_at(base_probs, proxy_probs, state))
        return target, mass, self.advance(state, mass)
