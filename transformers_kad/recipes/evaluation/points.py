"""Methods as points of accuracy and speed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """The measured accuracy and speed of a method.

    Attributes:
        label: the name of the method.
        accuracy: in [0, 1].
        low: lower end of the accuracy's 95 % interval.
        high: upper end of this interval.
        tokens_per_second: speed, > 0.
        group: the group that the method belongs to, for example a rule; "" for none.
        value: the value of the parameter that varies within the group; None for a method without one.

    Raises:
        ValueError: a value is out of range.
    """

    label: str
    accuracy: float
    low: float
    high: float
    tokens_per_second: float
    group: str = ""
    value: float | None = None

    def __post_init__(self) -> None:
        rounding = 1e-9
        if not -rounding <= self.low <= self.accuracy + rounding <= self.high + 2 * rounding <= 1 + 3 * rounding:
            raise ValueError(
                f"Point {self.label!r} needs 0 <= low <= accuracy <= high <= 1, got low={self.low!r}, "
                f"accuracy={self.accuracy!r}, high={self.high!r}."
            )
        if not 0 < self.tokens_per_second < math.inf:
            raise ValueError(
                f"`tokens_per_second` of point {self.label!r} must be finite and > 0, got {self.tokens_per_second!r}."
            )
        if self.value is not None and not math.isfinite(self.value):
            raise ValueError(f"`value` of point {self.label!r} must be finite or None, got {self.value!r}.")


def group_indices(points: Sequence[Point]) -> dict[str, int]:
    """The index of each group, which gives it the same style in every plot of these points."""
    return {group: at for at, group in enumerate(dict.fromkeys(p.group for p in points if p.group))}


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The Pareto front: the points for which no other is at least as accurate and as fast, and better in one of both.

    Returns:
        The front by rising tokens/s, and thus falling accuracy. Of equal points either all are on the front or none.
    """
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (-p.tokens_per_second, -p.accuracy)):
        best = front[-1] if front else None
        equal = best and (best.accuracy, best.tokens_per_second) == (point.accuracy, point.tokens_per_second)
        if best is None or equal or point.accuracy > best.accuracy:
            front.append(point)
    return front[::-1]
