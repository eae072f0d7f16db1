"""Pairwise comparison of methods on the same instances, with an exact paired test."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..intervals import paired_difference

Scores = Mapping[str, Sequence[bool]]  # instance id -> whether each sample is correct


@dataclass(frozen=True)
class Comparison:
    """Method a against method b on the same instances.

    Attributes:
        method_a: the first method.
        method_b: the second.
        difference: the figure of a minus that of b: of accuracies in [-1, 1].
        half_width: half the width of the 95 % normal interval of the difference, over instances; None for a single
            instance. The interval is an approximation, and has no width if all differences are equal. The test of
            accuracies is exact.
        p_value: p-value of the two-sided sign-flip test for this pair alone.
        adjusted_p_value: the p-value after Holm's correction for all pairs of the call. If a difference is claimed
            only where it is below 0.05, the probability of any false claim is at most 5 %.
        instances: the number of instances that both were scored on.
    """

    method_a: str
    method_b: str
    difference: float
    half_width: float | None
    p_value: float
    adjusted_p_value: float
    instances: int


def compare_methods(scores: Mapping[str, Scores]) -> list[Comparison]:
    """Compare every pair of methods on the instances that both were scored on.

    The test is a sign-flip test. If two methods answer an instance equally well, their two sets of samples could be
    swapped, so the difference of their means is as likely as its negative. The p-value is the share of all 2^n choices
    of signs for the instances' differences whose sum is at least as far from 0 as the observed one. The samples of an
    instance are not independent and get one sign. With one sample per instance this is McNemar's exact test.

    Holm's correction: Holm, "A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian Journal of
    Statistics 1979.

    Args:
        scores: for each method, for each instance, whether each of its samples is correct.

    Returns:
        One `Comparison` for each pair, in the order of `itertools.combinations`.

    Raises:
        ValueError: there are fewer than two methods or no instances, methods were scored on different instances,
            the numbers of samples differ (the test would not be exact), or scores are not true or false.

    >>> better, worse = {"1": [True], "2": [True], "3": [True]}, {"1": [False], "2": [False], "3": [True]}
    >>> compare_methods({"kad": better, "base": worse})[0].p_value
    0.5
    """
    if len(scores) < 2:
        raise ValueError(f"`scores` must hold at least two methods to compare, got {list(scores)}.")
    samples = _check_samples(scores)
    comparisons = []
    for a, b in itertools.combinations(scores, 2):
        different = scores[a].keys() ^ scores[b].keys()
        if different:
            raise ValueError(
                f"Methods can be compared on the same instances only: {a!r} has {len(scores[a])}, {b!r} has "
                f"{len(scores[b])}, and {len(different)} are in one only, such as {min(different, key=str)!r}. "
                "Score the missing ones, or pass the instances that both have."
            )
        comparisons.append(_compare(a, b, scores[a], scores[b], samples))
    adjusted = holm_adjusted([comparison.p_value for comparison in comparisons])
    return [replace(one, adjusted_p_value=p) for one, p in zip(comparisons, adjusted, strict=True)]


def _check_samples(scores: Mapping[str, Scores]) -> int:
    """The number of samples per instance, which must be the same for all methods and instances."""
    counts: dict[int, str] = {}
    for method, instances in scores.items():
        if not instances:
            raise ValueError(f"Method {method!r} has no instances: leave it out, or score it.")
        for instance, samples in instances.items():
            if any(sample not in (False, True) for sample in samples):
                raise ValueError(
                    f"Scores must be true or false, got {list(samples)!r} of method {method!r}, instance {instance!r}."
                )
            counts.setdefault(len(samples), f"method {method!r}, instance {instance!r}")
    if len(counts) > 1 or 0 in counts:
        found = ", ".join(f"{count} ({where})" for count, where in sorted(counts.items()))
        raise ValueError(
            f"Every instance of every method needs the same number of samples, at least 1, got {found}. Draw the "
            "missing ones, or pass the first few of each."
        )
    return next(iter(counts))


def _compare(a: str, b: str, scores_a: Scores, scores_b: Scores, samples: int) -> Comparison:
    pairs = [(scores_a[instance], scores_b[instance]) for instance in scores_a]
    differences = [sum(map(bool, x)) - sum(map(bool, y)) for x, y in pairs]
    half_width = None
    if len(pairs) > 1:
        by_sample = (list(zip(*method, strict=True)) for method in zip(*pairs, strict=True))
        _, half_width = paired_difference(*by_sample)
    p = sign_flip_p_value(differences)
    return Comparison(a, b, sum(differences) / (samples * len(pairs)), half_width, p, p, len(pairs))


def sign_flip_p_value(differences: Sequence[int]) -> float:
    """The exact two-sided p-value of a sum of differences with random signs.

    The c_m differences of size m contribute m (2 B_m - c_m) with B_m binomial(c_m, 1/2), so the distribution of the
    sum is a convolution of one binomial for each size. All terms are positive, so small p-values keep their relative
    precision, down to about 1e-300.

    Args:
        differences: one integer for each instance. Their scale does not change the p-value, but memory grows with the
            sum of their sizes.

    Returns:
        P(|sum of flipped differences| >= |sum of differences|), in (0, 1]; 1 if all are 0 or there are none.

    >>> sign_flip_p_value([1, 1, 1, 1, 0, -1])
    0.375
    """
    sizes, counts = np.unique(np.abs(np.asarray(differences, dtype=np.int64)), return_counts=True)
    positive = np.ones(1)  # P(the sum of the differences with positive sign = index)
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        if size == 0:
            continue
        spread = np.zeros(len(positive) + size * count)
        for residue in range(min(size, len(positive))):  # steps of `size` never leave their residue class
            spread[residue::size][: len(positive[residue::size]) + count] = np.convolve(
                positive[residue::size], _fair_coin(count)
            )
        positive = spread
    total = len(positive) - 1
    sums = 2 * np.arange(total + 1) - total
    return min(1.0, float(positive[np.abs(sums) >= abs(sum(differences))].sum()))


def _fair_coin(flips: int) -> np.ndarray:
    """P(k heads) for k = 0 ... flips."""
    all_ways, ways, probs = 2**flips, 1, []
    for heads in range(flips + 1):
        probs.append(ways / all_ways)  # exact integers, rounded once
        ways = ways * (flips - heads) // (heads + 1)
    return np.array(probs)


def holm_adjusted(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given.

    >>> holm_adjusted([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, at in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[at]))
        adjusted[at] = highest
    return adjusted
