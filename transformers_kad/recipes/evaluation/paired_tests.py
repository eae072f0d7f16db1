"""Figures of methods with intervals, and paired tests of their differences, for figures that are not only 0 and 1."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import bootstrap, permutation_test

from ..intervals import paired_difference, wilson_interval
from .comparison import Comparison, holm_adjusted, sign_flip_p_value
from .text_figures import Part

SEED = 0
RESAMPLES = 9999


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval over instances; both ends are the figure itself for a single instance."""

    value: float
    low: float
    high: float
    instances: int


def summarize_parts(parts: Sequence[Part], *, is_share: bool) -> Interval:
    """The figure of a method: the sum of the totals by the sum of the weights, over instances.

    The interval is Wilson's for shares, and otherwise that of a percentile bootstrap over instances
    (`scipy.stats.bootstrap`, with a fixed seed).

    Args:
        parts: the total and the weight of each instance, at least one.
        is_share: whether single texts are 0 or 1, and the figure is a share.
    """
    totals, weights = (np.array(column, dtype=float) for column in zip(*parts, strict=True))
    value = float(totals.sum() / weights.sum())
    if is_share:
        return Interval(value, *wilson_interval(value * len(parts), len(parts)), len(parts))
    if len(parts) == 1 or np.ptp(totals / weights) == 0:
        return Interval(value, value, value, len(parts))
    result = bootstrap(
        (totals, weights),
        lambda total, weight, axis: total.sum(axis=axis) / weight.sum(axis=axis),
        paired=True,
        n_resamples=RESAMPLES,
        batch=1000,
        method="percentile",
        rng=np.random.default_rng(SEED),
    )
    low, high = map(float, result.confidence_interval)
    return Interval(value, low, high, len(parts))


def compare_figures(values: Mapping[str, Mapping[str, float]]) -> list[Comparison]:
    """Compare every pair of methods on the instances for which both have a figure.

    The test is that of accuracy: if two methods are equally good, the difference of an instance is as likely as its
    negative. The p-value is exact if all differences are -1, 0 or 1 (McNemar's test), and otherwise that of
    `scipy.stats.permutation_test`, from all 2^n choices of signs if there are at most `RESAMPLES` and else from so
    many random ones, with a fixed seed.

    Args:
        values: for each method, the figure of each instance that has one.

    Returns:
        One comparison for each pair that has instances in common.
    """
    pairs = []
    for a, b in itertools.combinations(values, 2):
        common = [instance for instance in values[a] if instance in values[b]]
        if common:
            pairs.append((a, b, [values[a][one] for one in common], [values[b][one] for one in common]))
    p_values = paired_p_values([np.array(of_a) - np.array(of_b) for _, _, of_a, of_b in pairs])
    adjusted = holm_adjusted(p_values)
    differences = []
    for (a, b, of_a, of_b), p, adjusted_p in zip(pairs, p_values, adjusted, strict=True):
        half_width = paired_difference([of_a], [of_b])[1] if len(of_a) > 1 else None
        mean = float(np.mean(np.array(of_a) - np.array(of_b)))
        differences.append(Comparison(a, b, mean, half_width, p, adjusted_p, len(of_a)))
    return differences


def paired_p_values(samples: Sequence[np.ndarray]) -> list[float]:
    """The p-value of a two-sided sign-flip test for each sample of differences, see `compare_figures`.

    Samples of one size are tested in one call, which is several times faster than a call for each.
    """
    p_values = [1.0] * len(samples)
    by_size: dict[int, list[int]] = {}
    for at, sample in enumerate(samples):
        if set(np.unique(sample)) <= {-1.0, 0.0, 1.0}:
            p_values[at] = sign_flip_p_value(sample.astype(int).tolist())
        elif len(sample) > 1:  # the sign of a single difference is no evidence
            by_size.setdefault(len(sample), []).append(at)
    for size, indices in by_size.items():
        result = permutation_test(
            (np.stack([samples[at] for at in indices]),),
            lambda sample, axis: sample.mean(axis=axis),
            permutation_type="samples",
            n_resamples=RESAMPLES,
            batch=max(1, 10_000_000 // (size * len(indices))),
            axis=-1,
            rng=np.random.default_rng(SEED),
        )
        for at, p in zip(indices, result.pvalue.tolist(), strict=True):
            p_values[at] = p
    return p_values


@dataclass(frozen=True)
class Preference:
    """How often a model prefers the answers of method a to those of method b to the same prompts.

    Attributes:
        method_a: the first method.
        method_b: the second.
        wins: the prompts whose answer by a has the higher reward.
        ties: the prompts whose answers have equal rewards.
        losses: the other prompts.
        win_rate: (wins + ties / 2) / prompts.
        low: lower end of its 95 % interval.
        high: upper end of this interval.
        p_value: p-value of the exact two-sided sign test, in which ties have no part.
        adjusted_p_value: the p-value after Holm's correction for all pairs of the call.
    """

    method_a: str
    method_b: str
    wins: int
    ties: int
    losses: int
    win_rate: float
    low: float
    high: float
    p_value: float
    adjusted_p_value: float


def prefer(rewards: Mapping[str, Mapping[str, float]], reference: str | None = None) -> list[Preference]:
    """Compare the rewards of methods on the instances that both have.

    Args:
        rewards: for each method, the reward of each instance.
        reference: compare all other methods with this one alone; None to compare all pairs.
    """
    if reference is None:
        pairs = list(itertools.combinations(rewards, 2))
    else:
        pairs = [(method, reference) for method in rewards if method != reference]
    preferences = []
    for a, b in pairs:
        signs = [
            int(math.copysign(1, difference)) if (difference := reward - rewards[b][instance]) else 0
            for instance, reward in rewards[a].items()
            if instance in rewards[b]
        ]
        if signs:
            wins, ties, losses = (signs.count(sign) for sign in (1, 0, -1))
            score = wins + ties / 2
            low, high = wilson_interval(score, len(signs))
            p = sign_flip_p_value(signs)
            preferences.append(Preference(a, b, wins, ties, losses, score / len(signs), low, high, p, p))
    adjusted = holm_adjusted([one.p_value for one in preferences])
    return [replace(one, adjusted_p_value=p) for one, p in zip(preferences, adjusted, strict=True)]
