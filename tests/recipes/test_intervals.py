"""95 % intervals against scipy and by hand."""

import pytest
from scipy.stats import binomtest

from transformers_kad.recipes.intervals import paired_difference, wilson_interval


def test_the_wilson_interval():
    """Against the values of scipy.stats.binomtest(...).proportion_ci(method="wilson")."""
    for successes, trials in ((0, 10), (3, 10), (95, 200), (200, 200)):
        expected = binomtest(successes, trials).proportion_ci(method="wilson")
        assert wilson_interval(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_the_wilson_interval_of_a_fraction_lies_between_its_neighbours():
    """6 trials and 2 of the 3 samples of another. At an end p of the interval |x/n - p| = z sqrt(p (1 - p) / n)."""
    low, high = wilson_interval(6 + 2 / 3, 10)
    for end in (low, high):
        assert abs(2 / 3 - end) == pytest.approx(1.959964 * (end * (1 - end) / 10) ** 0.5, rel=1e-9)
    assert wilson_interval(6, 10) < (low, high) < wilson_interval(7, 10)


def test_the_wilson_interval_ends_at_nothing_and_at_everything():
    for trials in range(1, 60):
        low, high = wilson_interval(0, trials)
        assert low == 0 < high < 1
        assert wilson_interval(trials, trials) == pytest.approx((1 - high, 1))
        assert wilson_interval(trials, trials)[1] == 1


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (-1, 3), (4, 3), (float("nan"), 3)])
def test_what_is_no_proportion_is_refused(successes, trials):
    with pytest.raises(ValueError, match=f"got {successes} of {trials}"):
        wilson_interval(successes, trials)


def test_the_paired_difference():
    """Differences of the problems' means over two seeds: 0.5, 0, 1, -0.5."""
    a = [[True, False, True, False], [True, True, True, False]]
    b = [[False, True, False, False], [True, False, False, True]]
    mean, half_width = paired_difference(a, b)
    assert mean == pytest.approx(0.25)
    assert half_width == pytest.approx(1.959964 * 0.6454972 / 2, rel=1e-6)
