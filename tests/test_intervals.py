"""95 % intervals against scipy and by hand."""

import pytest
from scipy.stats import binomtest

from transformers_kad.intervals import paired_difference, wilson_interval


def test_the_wilson_interval():
    """Against the values of scipy.stats.binomtest(...).proportion_ci(method="wilson")."""
    for successes, trials in ((0, 10), (3, 10), (95, 200), (200, 200)):
        expected = binomtest(successes, trials).proportion_ci(method="wilson")
        assert wilson_interval(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_the_paired_difference():
    """Differences of the problems' means over two seeds: 0.5, 0, 1, -0.5."""
    a = [[True, False, True, False], [True, True, True, False]]
    b = [[False, True, False, False], [True, False, False, True]]
    mean, half_width = paired_difference(a, b)
    assert mean == pytest.approx(0.25)
    assert half_width == pytest.approx(1.959964 * 0.6454972 / 2, rel=1e-6)
