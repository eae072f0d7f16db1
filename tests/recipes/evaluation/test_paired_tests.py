"""Intervals, paired tests and preferences, against figures worked out in another way."""

import itertools
import math

import numpy as np
import pytest

from transformers_kad.recipes.evaluation.comparison import compare_methods
from transformers_kad.recipes.evaluation.paired_tests import (
    compare_figures,
    paired_p_values,
    prefer,
    summarize_parts,
)
from transformers_kad.recipes.intervals import Z, wilson_interval


def test_a_mean_over_tokens_weighs_long_texts_more():
    found = summarize_parts([(2.0, 1), (2.0, 4), (3.0, 5)], is_share=False)
    assert found.value == pytest.approx(7 / 10)
    assert found.low < found.value < found.high
    assert found.instances == 3


def test_the_interval_of_a_mean_is_near_the_normal_one():
    values = np.random.default_rng(3).normal(5, 2, size=400)
    found = summarize_parts([(value, 1) for value in values], is_share=False)
    half = Z * values.std(ddof=1) / math.sqrt(400)
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)


def test_the_interval_of_a_ratio_is_near_that_of_its_linearization():
    rng = np.random.default_rng(4)
    weights = rng.integers(1, 30, size=500).astype(float)
    totals = weights * 0.5 + rng.normal(0, 3, size=500)
    found = summarize_parts(list(zip(totals, weights, strict=True)), is_share=False)
    residuals = (totals - found.value * weights) / weights.mean()
    half = Z * residuals.std(ddof=1) / math.sqrt(500)
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half), abs=0.02)


def test_shares_have_wilson_s_interval():
    found = summarize_parts([(True, 1), (False, 1), (False, 1), (False, 1)], is_share=True)
    assert (found.value, found.low, found.high) == (0.25, *wilson_interval(1, 4))


@pytest.mark.parametrize("parts", [[(3.0, 2)], [(3.0, 2), (6.0, 4)]])
def test_equal_figures_have_an_interval_without_width(parts):
    found = summarize_parts(parts, is_share=False)
    assert found.value == found.low == found.high == 1.5


def test_few_differences_have_the_exact_p_value_of_all_signs():
    differences = np.array([0.5, 1.25, -0.25, 2.0, 0.75, 1.0, -0.1])
    sums = [abs(np.dot(signs, differences)) for signs in itertools.product((1, -1), repeat=7)]
    exact = np.mean([one >= abs(differences.sum()) - 1e-9 for one in sums])
    assert paired_p_values([differences])[0] == pytest.approx(exact)


def test_differences_of_one_sign_or_another_are_tested_as_accuracy_is():
    a = {str(i): [i % 3 > 0] for i in range(60)}
    b = {str(i): [i % 2 > 0] for i in range(60)}
    (accuracy,) = compare_methods({"a": a, "b": b})
    figures = {name: {i: float(x[0]) for i, x in of.items()} for name, of in (("a", a), ("b", b))}
    (found,) = compare_figures(figures)
    assert found.p_value == accuracy.p_value
    assert (found.difference, found.half_width) == pytest.approx((accuracy.difference, accuracy.half_width))


def test_many_differences_have_a_uniform_p_value_without_an_effect_and_a_small_one_with():
    rng = np.random.default_rng(5)
    none = paired_p_values([rng.normal(0, 1, size=40) for _ in range(200)])
    assert 0.02 <= np.mean([p < 0.1 for p in none]) <= 0.2
    assert 0.4 <= np.mean(none) <= 0.6
    assert paired_p_values([rng.normal(1, 1, size=40)])[0] < 0.001


def test_samples_of_any_sizes_are_tested_together():
    rng = np.random.default_rng(8)
    samples = [rng.normal(0.3, 1, size=size) for size in (30, 1, 8, 30)] + [np.array([1.0, 1.0, -1.0, 1.0, 0.0])]
    together = paired_p_values(samples)
    alone = [paired_p_values([sample])[0] for sample in samples]
    assert together == pytest.approx(alone, abs=0.03)
    assert together[1] == 1.0
    assert together[2] == alone[2]  # all 2^8 choices of signs
    assert together[4] == 10 / 16  # sums of four signs: 6/16 are 0


def test_a_seed_makes_p_values_and_intervals_repeatable():
    values = np.random.default_rng(6).normal(0.2, 1, size=50)
    assert paired_p_values([values]) == paired_p_values([values])
    parts = [(value, 1) for value in values]
    assert summarize_parts(parts, is_share=False) == summarize_parts(parts, is_share=False)


def test_methods_are_compared_where_both_have_a_figure_with_holm_s_correction():
    rng = np.random.default_rng(7)
    a = {str(i): float(x) for i, x in enumerate(rng.normal(0, 1, size=30))}
    b = {i: x + 1 for i, x in a.items() if i != "0"}
    c = {i: x + float(y) for (i, x), y in zip(a.items(), rng.normal(0, 1, size=30), strict=True)}
    found = {(one.method_a, one.method_b): one for one in compare_figures({"a": a, "b": b, "c": c, "d": {}})}
    assert list(found) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert found["a", "b"].instances == 29
    assert found["a", "b"].difference == pytest.approx(-1)
    assert found["a", "b"].adjusted_p_value == pytest.approx(3 * found["a", "b"].p_value)


REWARDS = {
    "a": {str(i): float(i) for i in range(10)},
    "b": {str(i): float(i) + (1 if i < 2 else 0 if i < 3 else -1) for i in range(10)},
    "c": {"0": 5.0, "99": 1.0},
}


def test_preferences_by_hand():
    first, second, third = prefer(REWARDS)
    assert (first.method_a, first.method_b, first.wins, first.ties, first.losses) == ("a", "b", 7, 1, 2)
    assert first.win_rate == pytest.approx(7.5 / 10)
    assert (first.low, first.high) == wilson_interval(7.5, 10)
    assert first.p_value == pytest.approx(2 * sum(math.comb(9, k) for k in (0, 1, 2)) / 2**9)
    assert first.adjusted_p_value == pytest.approx(3 * first.p_value)
    assert (second.wins, second.ties, second.losses, second.p_value) == (0, 0, 1, 1.0)  # on one common instance
    assert third.win_rate == 0.0


def test_preferences_against_a_reference_are_corrected_for_these_pairs_alone():
    (first, second) = prefer(REWARDS, "b")
    assert [(one.method_a, one.method_b) for one in (first, second)] == [("a", "b"), ("c", "b")]
    assert first.adjusted_p_value == pytest.approx(2 * first.p_value)


def test_equal_rewards_are_ties_and_no_evidence():
    (found,) = prefer({"a": {"1": 0.5, "2": 0.5}, "b": {"1": 0.5, "2": 0.5}})
    assert (found.ties, found.win_rate, found.p_value) == (2, 0.5, 1.0)
