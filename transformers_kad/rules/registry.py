"""The table of all rules by name."""

import difflib
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from . import deferral, mixtures, paced
from .base import Rule

RULES: dict[str, type[Rule]] = {
    "dual": deferral.DualDeferral,
    "primal": deferral.PrimalDeferral,
    "exact": deferral.ExactDeferral,
    "nudging": deferral.NudgingDeferral,
    "confidence_bet": deferral.ConfidenceBetDeferral,
    "cascade": deferral.CascadeDeferral,
    "paced": paced.PacedDeferral,
    "implicit_reward": mixtures.ImplicitReward,
    "ensemble": mixtures.Ensemble,
    "blend_in": mixtures.BlendIn,
}


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


def unknown_name_message(kind: str, name: object, known: Iterable[str]) -> str:
    """An error message for a name that is not among those known: it echoes the name, and lists the nearest and all."""
    known = list(known)
    close = difflib.get_close_matches(str(name), known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"Unknown {kind} {name!r:.200}.{hint} Known: {', '.join(known) if known else 'none'}."
