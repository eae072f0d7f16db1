"""95 % confidence intervals of scores and of differences between scores."""

import math
import statistics
from collections.abc import Sequence

Z = 1.959964  # the two-sided 95 % point of the normal distribution


def wilson_interval(successes: float, trials: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson, JASA 1927), as (low, high) in [0, 1].

    Args:
        successes: the number of trials that succeeded, in [0, trials]. It may be a fraction: a trial of several
            samples then counts with the share of samples that succeeded. The interval is never too narrow for that,
            however much the samples of a trial depend on each other.
        trials: the number of independent trials, at least 1.

    Raises:
        ValueError: fewer than one trial, or `successes` out of range.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"A proportion needs trials >= 1 and 0 <= successes <= trials, got {successes} of {trials}.")
    share = successes / trials
    centre = share + Z * Z / (2 * trials)
    spread = Z * math.sqrt(share * (1 - share) / trials + Z * Z / (4 * trials**2))
    low, high = (centre - spread) / (1 + Z * Z / trials), (centre + spread) / (1 + Z * Z / trials)
    return (low if successes > 0 else 0.0), (high if successes < trials else 1.0)


def paired_difference(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The mean difference of two methods' scores on the same problems, and half the width of its 95 % interval.

    The scores of a problem are averaged over the sampling seeds first, so the interval is one over problems.

    Args:
        a: the first method's scores: one sequence for each sampling seed, with one score for each problem.
        b: the second method's scores on the same problems, in the same order.
    """
    differences = [
        statistics.fmean(x) - statistics.fmean(y)
        for x, y in zip(zip(*a, strict=True), zip(*b, strict=True), strict=True)
    ]
    return statistics.fmean(differences), Z * statistics.stdev(differences) / math.sqrt(len(differences))
