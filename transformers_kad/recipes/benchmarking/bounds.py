"""What a decoding method could reach at most, and how a cost grows. Numbers in, numbers out."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Shape(NamedTuple):
    """A kind of forward.

    Attributes:
        model: "base", "proxy", or one of these and " compiled".
        rows: texts in the batch.
        tokens: new tokens of each text. What the cache holds before them is not part of the shape.
    """

    model: str
    rows: int
    tokens: int


class ForwardTimes:
    """Median seconds of every kind of forward that was measured, and in between.

    A shape that was not measured takes the time of its number of tokens, rows * tokens, on the straight line between
    the measured numbers of tokens around it; beyond them the time of the nearest.

    Args:
        seconds: the times measured of each shape.
    """

    def __init__(self, seconds: Mapping[Shape, Sequence[float]]) -> None:
        self.medians = {shape: statistics.median(times) for shape, times in seconds.items()}
        sizes: dict[str, dict[int, list[float]]] = {}
        for shape, median in self.medians.items():
            sizes.setdefault(shape.model, {}).setdefault(shape.rows * shape.tokens, []).append(median)
        self._curves = {
            model: sorted((size, statistics.fmean(medians)) for size, medians in curve.items())
            for model, curve in sizes.items()
        }

    def of(self, shape: Shape) -> float:
        """Seconds of one forward.

        Raises:
            KeyError: no forward of this model was measured.
        """
        if shape in self.medians:
            return self.medians[shape]
        curve, size = self._curves[shape.model], shape.rows * shape.tokens
        for (left, low), (right, high) in itertools.pairwise(curve):
            if left <= size <= right:
                return low + (high - low) * (size - left) / (right - left)
        return curve[0][1] if size < curve[0][0] else curve[-1][1]

    def covers(self, counts: Mapping[Shape, int]) -> bool:
        """Whether forwards of all these models were measured."""
        return all(shape.model in self._curves for shape in counts)

    def total(self, counts: Mapping[Shape, int]) -> float:
        """Seconds of many forwards: what a method takes in which nothing but its forwards costs time."""
        return sum(count * self.of(shape) for shape, count in counts.items())


def speculative_bound(
    *,
    tokens_per_round: float,
    drafted: float,
    bonus_steps: float,
    base_one: float,
    base_draft: float,
    proxy_step: float,
) -> float:
    """How many times as fast as the base alone a method that drafts can be, prompts left aside.

        E[tokens per round] t_b(1) / ((γ + a) t_q + t_b(γ + 1))

    Args:
        tokens_per_round: E, tokens that each text of the batch gains by a round.
        drafted: γ, the proxy's steps that draft in a round.
        bonus_steps: a, the proxy's further steps in a round. Token by token: γ = 0 and a = 1, or with `lazy` the
            proxy's forwards per token.
        base_one: t_b(1), seconds of a forward of the base over one token of each text.
        base_draft: t_b(γ + 1).
        proxy_step: t_q.

    >>> speculative_bound(
    ...     tokens_per_round=4.5, drafted=5, bonus_steps=1, base_one=0.5, base_draft=0.75, proxy_step=0.125
    ... )
    1.5
    """
    return tokens_per_round * base_one / ((drafted + bonus_steps) * proxy_step + base_draft)


def fit_exponent(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """The power of the size that a cost grows with: the slope of log value over log size, by least squares.

    Fitted over the upper half of the points by size, at least two, since small sizes show fixed costs. None with less
    than two points, or where a value there is not positive.

    >>> round(fit_exponent([1, 2, 4, 8], [9, 3, 12, 48]), 6)
    2.0
    """
    points = sorted(zip(sizes, values, strict=True))
    points = points[-max(2, math.ceil(len(points) / 2)) :]
    if len(points) < 2 or any(value <= 0 for _, value in points):
        return None
    return statistics.linear_regression(*zip(*((math.log(x), math.log(y)) for x, y in points), strict=True)).slope


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile.

    >>> quartiles([4.0, 1.0, 2.0, 3.0, 5.0])
    (2.0, 3.0, 4.0)
    """
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
