"""The controls of a page that offers every rule: one for each parameter, made from the fields of the rules."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_origin

from ...rules.registry import RULES

STEPS = 100  # of a slider, at least
UNBOUNDED_TIMES = 4  # where a parameter has no upper bound, its slider ends at so many times the default


@dataclass(frozen=True)
class Control:
    """The control of one parameter of a rule: a slider, or a choice.

    Attributes:
        rule: the name of the rule.
        name: the name of the parameter.
        default: its default.
        choices: the values to choose from; empty for a slider.
        low: where the slider begins.
        high: where the slider ends.
        step: the distance of neighbouring values.
    """

    rule: str
    name: str
    default: Any
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 1.0
    step: float = 0.01


def make_controls() -> tuple[Control, ...]:
    """The controls of all rules in `RULES`, in the order of the registry.

    A parameter has one if its field states a range, or if its type is a `Literal`. `max_states` of the exact rule has
    none: it limits the work, and is not for visitors to raise.
    """
    found = []
    for rule, cls in RULES.items():
        for field in fields(cls):
            default: Any = field.default
            if get_origin(field.type) is Literal:
                found.append(Control(rule, field.name, default, choices=get_args(field.type)))
            elif "range" in field.metadata:
                low, high, low_open = field.metadata["range"]
                high = UNBOUNDED_TIMES * default if high == math.inf else high
                step = min((high - low) / STEPS, default or math.inf)
                found.append(Control(rule, field.name, default, (), low + step if low_open else low, high, step))
    return tuple(found)


def parameters_of(rule: str, controls: Sequence[Control], values: Sequence[Any]) -> Mapping[str, Any]:
    """The parameters of one rule, from the values of all controls."""
    return {c.name: value for c, value in zip(controls, values, strict=True) if c.rule == rule}
