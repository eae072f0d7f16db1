"""Upper bounds of the speed of decoding methods, and how costs grow. Pure functions of numbers."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Shape(NamedTuple):
    """The shape of a forward pass.

    Attributes:
        model: "base", "proxy", or one of these and " compiled".
        rows: the number of texts in the batch.
        tokens: the number of new tokens of each text. The tokens in the cache are not part of the shape.
    """

    model: str
    rows: int
    tokens: int


class ForwardTimes:
    """Median times of forward passes, interpolated for shapes that were not measured.

    The time of such a shape is interpolated linearly in its number of tokens, rows * tokens, between the nearest
    measured numbers. Below and above all of them it is the time of the nearest.

    Args:
        seconds: the measured times of each shape, in seconds.
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
        """The time of one forward pass, in seconds.

        Raises:
            KeyError: no forward pass of this model was measured.
        """
        if shape in self.medians:
            return self.medians[shape]
        curve, size = self._curves[shape.model], shape.rows * shape.tokens
        for (left, low), (right, high) in itertools.pairwise(curve):
            if left <= size <= right:
                return low + (high - low) * (size - left) / (right - left)
        return curve[0][1] if size < curve[0][0] else curve[-1][1]

    def covers(self, counts: Mapping[Shape, int]) -> bool:
        """Whether forward passes of all these models were measured."""
        return all(shape.model in self._curves for shape in counts)

    def total(self, counts: Mapping[Shape, int]) -> float:
        """The time of many forward passes in seconds: that of a method without any other cost."""
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
    """The highest possible speed of a method that drafts, relative to the base alone, without the prompts.

        E[tokens per round] t_b(1) / ((γ + a) t_q + t_b(γ + 1))

    Args:
        tokens_per_round: E, the number of tokens that a round adds to each text of the batch.
        drafted: γ, the number of proxy steps in a round that draft.
        bonus_steps: a, the number of further proxy steps in a round. Token by token γ is 0 and a is 1, or with `lazy`
            the number of proxy forward passes per token.
        base_one: t_b(1), the time of a forward pass of the base over one token of each text, in seconds.
        base_draft: t_b(γ + 1), in seconds.
        proxy_step: t_q, in seconds.

    >>> speculative_bound(
    ...     tokens_per_round=4.5, drafted=5, bonus_steps=1, base_one=0.5, base_draft=0.75, proxy_step=0.125
    ... )
    1.5
    """
    return tokens_per_round * base_one / ((drafted + bonus_steps) * proxy_step + base_draft)


def fit_exponent(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """The exponent with which a cost grows with the size: the slope of log value over log size, by least squares.

    It is fitted to the larger half of the sizes, at least two, since fixed costs dominate at small sizes. It is None
    with less than two points, or if one of these values is not positive.

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
