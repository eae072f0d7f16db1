"""Bounds, forward times and exponents, against numbers made by hand."""

import pytest

from transformers_kad.recipes.benchmarking.bounds import (
    ForwardTimes,
    Shape,
    fit_exponent,
    quartiles,
    speculative_bound,
)


def test_the_bound_of_speculation():
    bound = speculative_bound(
        tokens_per_round=4.2, drafted=5, bonus_steps=0.6, base_one=0.08, base_draft=0.1, proxy_step=0.01
    )
    assert bound == pytest.approx(0.336 / 0.156)


def test_token_by_token_is_a_draft_of_length_zero():
    bound = speculative_bound(
        tokens_per_round=1, drafted=0, bonus_steps=1, base_one=0.08, base_draft=0.08, proxy_step=0.02
    )
    assert bound == pytest.approx(0.8)


def test_forwards_that_were_measured_take_their_median_and_others_the_line_between():
    times = ForwardTimes(
        {
            Shape("base", 1, 1): [5.0, 1.0, 2.0],
            Shape("base", 2, 3): [8.0],
            Shape("base", 1, 6): [4.0, 4.0],
            Shape("base", 4, 4): [26.0],
            Shape("proxy", 1, 1): [0.5],
        }
    )
    assert times.of(Shape("base", 1, 1)) == 2.0
    assert times.of(Shape("base", 2, 3)) == 8.0
    assert times.of(Shape("base", 3, 2)) == 6.0  # six tokens, between the two ways that were measured
    assert times.of(Shape("base", 11, 1)) == 16.0  # half way from six tokens to sixteen
    assert times.of(Shape("base", 1, 400)) == 26.0
    assert times.of(Shape("proxy", 7, 7)) == 0.5
    assert times.total({Shape("base", 1, 1): 3, Shape("proxy", 1, 1): 4}) == 8.0
    unknown = Shape("reference", 1, 1)
    with pytest.raises(KeyError):
        times.of(unknown)
    assert times.covers({Shape("base", 9, 9): 1})
    assert not times.covers({Shape("base", 9, 9): 1, unknown: 1})


def test_counted_forwards_give_the_same_bound_where_all_rounds_are_alike():
    times = ForwardTimes({Shape("base", 1, 1): [0.08], Shape("base", 1, 6): [0.1], Shape("proxy", 1, 1): [0.01]})
    alone = times.total({Shape("base", 1, 1): 420})
    speculative = times.total({Shape("base", 1, 6): 100, Shape("proxy", 1, 1): 560})
    bound = speculative_bound(
        tokens_per_round=4.2, drafted=5, bonus_steps=0.6, base_one=0.08, base_draft=0.1, proxy_step=0.01
    )
    assert alone / speculative == pytest.approx(bound)


def test_exponents_are_fitted_over_the_upper_half():
    sizes = [1, 2, 4, 8, 16]
    assert fit_exponent(sizes, [100, 100, 1, 8, 64]) == pytest.approx(3)
    assert fit_exponent(sizes[::-1], [64, 8, 1, 100, 100]) == pytest.approx(3)
    assert fit_exponent([10, 20, 40], [7, 5, 10]) == pytest.approx(1)  # two of three
    assert fit_exponent([2, 4, 8], [4, 16, 8]) == pytest.approx(-1)
    # Least squares by hand: through (1, 2), (2, 4), (3, 3), logarithms to base 2, the slope is 1/2.
    assert fit_exponent([1, 1, 1, 2, 4, 8], [9, 9, 9, 4, 16, 8]) == pytest.approx(0.5)


def test_no_exponent_without_points_or_costs():
    assert fit_exponent([5], [1]) is None
    assert fit_exponent([], []) is None
    assert fit_exponent([1, 2, 4, 8], [1, 1, 1, 0]) is None
    assert fit_exponent([1, 2, 4, 8], [0, 0, 2, 4]) == pytest.approx(1)


def test_quartiles():
    assert quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert quartiles([1.0, 2.0]) == (1.25, 1.5, 1.75)
    assert quartiles([4.0, 1.0, 2.0, 3.0, 5.0]) == (2.0, 3.0, 4.0)
