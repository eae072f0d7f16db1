"""95 % intervals of scores, so that nobody reads noise as progress."""

import math
import statistics
from collections.abc import Sequence

Z = 1.959964  # the two-sided 95 % point of the normal distribution


def wilson_interval(successes: float, trials: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson, JASA 1927), as (low, high) in [0, 1].

    Args:
        successes: how many trials succeeded, in [0, trials]. A fraction where a trial is several samples and counts
            for the share of them that succeeded; then the interval is not too narrow, however alike the samples are.
        trials: independent trials, at least 1.

    Raises:
        ValueError: for anything else.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"A proportion needs trials >= 1 and 0 <= successes <= trials, got {successes} of {trials}.")
    share = successes / trials
    centre = share + Z * Z / (2 * trials)
    spread = Z * math.sqrt(share * (1 - share) / trials + Z * Z / (4 * trials**2))
    low, high = (centre - spread) / (1 + Z * Z / trials), (centre + spread) / (1 + Z * Z / trials)
    return (low if successes > 0 else 0.0), (high if successes < trials else 1.0)


def paired_difference(a: Sequence[Sequence[bool]], b: Sequence[Sequence[bool]]) -> tuple[float, float]:
    """Mean difference of two methods over the same problems, and its 95 % half-width.

    Args:
        a: the first method's scores, one sequence a sampling seed, one score a problem.
        b: the second method's, on the same problems in the same order.

    Scores are averaged over seeds first, so that the problems are what varies.
    """
    differences = [
        statistics.fmean(x) - statistics.fmean(y)
        for x, y in zip(zip(*a, strict=True), zip(*b, strict=True), strict=True)
    ]
    return statistics.fmean(differences), Z * statistics.stdev(differences) / math.sqrt(len(differences))
