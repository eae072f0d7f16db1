"""The threshold to start from, chosen without labels.

The figures of a pair tell where the base is unsure and what a rule changes there. They can't tell which answers are
right. Therefore the rule is always the dual one, whose threshold has this meaning, and the choice is between its
thresholds, in two steps:

1. The base's probabilities, weighted by themselves, usually form two groups: tokens that it is sure of, and the
   rest. Otsu's method finds the threshold between them. Tokens below it are what the base is unsure of.
2. A smaller threshold keeps more of the base. The smallest one is chosen that follows the proxy as far as the
   threshold of the first step does: as many drafted tokens are accepted, up to `EXTRA_REFUSALS` in a text.
"""

from collections.abc import Mapping, Sequence

# The expected number of further refused tokens in a text: at most about one text in ten then differs.
EXTRA_REFUSALS = 0.1


def split_confidence(histogram: Sequence[float]) -> float:
    """The threshold in (0, 1) that separates unsure from sure tokens best.

    It maximises the variance between the two groups of Otsu, "A Threshold Selection Method from Gray-Level
    Histograms", 1979, and lies in the middle of all thresholds that do.

    Args:
        histogram: the mass of the tokens whose probability lies in each of n equal parts of [0, 1].

    >>> split_confidence([4.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 4.0])
    0.5
    """
    total, count = sum(histogram), len(histogram)
    centres = [(at + 0.5) / count for at in range(count)]
    mean = sum(centre * mass for centre, mass in zip(centres, histogram, strict=True))
    below = below_mean = 0.0
    variances = []
    for centre, mass in zip(centres[:-1], histogram, strict=False):
        below, below_mean = below + mass, below_mean + centre * mass
        above = total - below
        apart = below_mean / below - (mean - below_mean) / above if below > 0 and above > 1e-12 * total else 0.0
        variances.append(below * above * apart**2)
    best = max(variances)
    places = [at + 1 for at, variance in enumerate(variances) if variance >= best * (1 - 1e-9)]
    return (places[0] + places[-1]) / 2 / count


def choose_threshold(acceptance: Mapping[float, float], split: float, tokens_per_text: float) -> float:
    """The smallest threshold that follows the proxy as far as the largest one below the split.

    Args:
        acceptance: the mean acceptance of the dual rule at each threshold that may be chosen.
        split: the threshold of `split_confidence`.
        tokens_per_text: the mean length of a text.

    >>> choose_threshold({0.2: 0.80, 0.4: 0.95, 0.6: 0.951, 0.8: 0.99}, split=0.65, tokens_per_text=20)
    0.4
    """
    below = sorted(threshold for threshold in acceptance if threshold <= split) or [min(acceptance)]
    wanted = acceptance[below[-1]] - EXTRA_REFUSALS / max(tokens_per_text, 1)
    return next(threshold for threshold in below if acceptance[threshold] >= wanted)
