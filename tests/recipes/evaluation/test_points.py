"""Points of accuracy and speed: their ranges and the Pareto front."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plot_cases import deterministic

from transformers_kad.recipes.evaluation.points import Point, pareto_front
from transformers_kad.recipes.intervals import wilson_interval


def dominates(a, b):
    return (
        a.accuracy >= b.accuracy
        and a.tokens_per_second >= b.tokens_per_second
        and (a.accuracy, a.tokens_per_second) != (b.accuracy, b.tokens_per_second)
    )


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 6)), max_size=12))
@deterministic
def test_the_pareto_front_is_what_nothing_dominates(pairs):
    points = [Point(f"{at}", a / 6, 0, 1, speed) for at, (a, speed) in enumerate(pairs)]
    front = pareto_front(points)
    expected = [p for p in points if not any(dominates(other, p) for other in points)]
    assert sorted(front, key=lambda p: p.label) == sorted(expected, key=lambda p: p.label)
    speeds = [p.tokens_per_second for p in front]
    assert speeds == sorted(speeds)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((0.5, 0.6, 0.7, 20), "low=0.6, accuracy=0.5"),
        ((0.5, 0.4, 0.45, 20), "high=0.45"),
        ((0.5, -0.1, 0.6, 20), "low=-0.1"),
        ((50, 40, 60, 20), "low=40, accuracy=50, high=60"),
        ((math.nan, 0.4, 0.6, 20), "accuracy=nan"),
        ((0.5, 0.4, 0.6, 0), "`tokens_per_second` of point 'dual' must be finite and > 0, got 0"),
        ((0.5, 0.4, 0.6, math.inf), "got inf"),
        ((0.5, 0.4, 0.6, 20, "", math.nan), "`value` of point 'dual' must be finite or None, got nan"),
    ],
)
def test_a_point_out_of_range_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Point("dual", *fields)


def test_intervals_at_the_ends_are_no_error():
    for correct in (0, 7):
        Point("dual", correct / 7, *wilson_interval(correct, 7), 20)
