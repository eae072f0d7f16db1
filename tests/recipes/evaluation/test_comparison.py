"""The paired test against scipy, against all sign flips written out, and under a true null hypothesis."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from transformers_kad.recipes.evaluation.comparison import compare_methods, holm_adjusted, sign_flip_p_value
from transformers_kad.recipes.intervals import paired_difference

deterministic = settings(derandomize=True, deadline=None, max_examples=100)


def numbered(rows):
    """Scores of one method by instance, from one sequence of samples an instance."""
    return {f"instance {at}": [bool(sample) for sample in row] for at, row in enumerate(rows)}


def enumerated_p_value(differences):
    """By the definition: every way to sign the differences, one after the other."""
    seen = abs(sum(differences))
    sums = [
        sum(s * d for s, d in zip(signs, differences, strict=True))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    return Fraction(sum(abs(total) >= seen for total in sums), len(sums))


# --- The test -------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(-3, 3), max_size=10))
@deterministic
def test_three_samples_agree_with_all_sign_flips(differences):
    assert sign_flip_p_value(differences) == pytest.approx(float(enumerated_p_value(differences)), rel=1e-12)


@given(st.lists(st.sampled_from((-12, -7, -5, 0, 4, 5, 12)), max_size=9))
@deterministic
def test_many_samples_agree_with_all_sign_flips(differences):
    assert sign_flip_p_value(differences) == pytest.approx(float(enumerated_p_value(differences)), rel=1e-12)


@given(st.integers(0, 400), st.integers(0, 400), st.integers(0, 20))
@deterministic
def test_one_sample_is_mcnemars_exact_test(better, worse, equal):
    expected = binomtest(better, better + worse).pvalue if better + worse else 1.0
    differences = [1] * better + [0] * equal + [-1] * worse
    assert sign_flip_p_value(differences) == pytest.approx(expected, rel=1e-9)


def test_fifteen_thousand_instances():
    assert sign_flip_p_value([1] * 7000 + [-1] * 6500 + [0] * 1500) == pytest.approx(
        binomtest(7000, 13500).pvalue, rel=1e-9
    )


def test_a_thousand_instances_with_three_samples_agree_with_exact_integers():
    """The product of 1 + x^|d| at x = 2^1024 has the number of sign flips of each sum as its digits."""
    rng = np.random.default_rng(0)
    differences = (rng.binomial(3, 0.55, 1000) - rng.binomial(3, 0.5, 1000)).tolist()
    product, digit = 1, 1024
    for d in differences:
        product += product << digit * abs(d)
    total, seen, ways = sum(map(abs, differences)), abs(sum(differences)), 0
    for positive in range(total + 1):
        count = (product >> digit * positive) % 2**digit
        ways += count * (abs(2 * positive - total) >= seen)
    expected = float(Fraction(ways, 2 ** len(differences)))
    assert 1e-9 < expected < 1e-2
    assert sign_flip_p_value(differences) == pytest.approx(expected, rel=1e-9)


def test_small_p_values_keep_their_precision():
    assert sign_flip_p_value([2] * 200) == pytest.approx(2.0**-199, rel=1e-9)
    assert sign_flip_p_value([1] * 100 + [3] * 100) == pytest.approx(2.0**-199, rel=1e-9)


def test_the_scale_and_the_direction_do_not_matter():
    differences = [1, 1, 2, 0, -1, 2, 2]
    expected = sign_flip_p_value(differences)
    assert sign_flip_p_value([-d for d in differences]) == expected
    assert sign_flip_p_value([5 * d for d in differences]) == pytest.approx(expected, rel=1e-12)


def test_no_difference_at_all_has_the_p_value_one():
    assert sign_flip_p_value([]) == sign_flip_p_value([0, 0]) == 1
    same = numbered([[1, 0, 1], [0, 0, 0]])
    (comparison,) = compare_methods({"a": same, "b": same})
    assert (comparison.difference, comparison.p_value, comparison.adjusted_p_value) == (0, 1, 1)


SIMULATIONS = 1000


@pytest.fixture(scope="module")
def null_p_values():
    """Of methods that answer alike: 1,000 instances of a difficulty of their own, 3 samples of each method."""
    rng = np.random.default_rng(0)
    p_values = []
    for _ in range(SIMULATIONS):
        difficulty = rng.random(1000)
        difference = rng.binomial(3, difficulty) - rng.binomial(3, difficulty)
        p_values.append(sign_flip_p_value(difference.tolist()))
    return np.array(p_values)


@pytest.mark.parametrize("level", [0.05, 0.2, 0.5])
def test_the_false_alarm_rate_is_the_level(null_p_values, level):
    """A correct test fails here with a chance of at most 1e-6 on either side.

    The rate of an exact test is at most the level. It is below it because the sum moves in steps of 2, its standard
    deviation being about 32: by half a step on average, 7 %, 6 % and 4 % of these levels.
    """
    alarms = (null_p_values <= level).sum()
    assert alarms <= binom.isf(1e-6, SIMULATIONS, level)
    assert alarms >= binom.ppf(1e-6, SIMULATIONS, 0.9 * level)


def test_samples_of_an_instance_do_not_count_as_independent():
    """Three equal samples an instance are one sample."""
    once = [[1], [1], [1], [0], [1]], [[0], [0], [1], [1], [0]]
    thrice = [[row * 3 for row in method] for method in once]
    one, three = (
        compare_methods({name: numbered(rows) for name, rows in zip("ab", methods, strict=True)})[0]
        for methods in (once, thrice)
    )
    assert one == three
    assert one.p_value == binomtest(3, 4).pvalue


# --- Pairs ----------------------------------------------------------------------------------------------------


def test_a_comparison_worked_out_by_hand():
    """Means of two samples: a has 1, 1, 0.5, 0; b has 0.5, 0, 0.5, 0.5. Differences 0.5, 1, 0, -0.5; sum 1.

    Of the 8 ways to sign 1, 2 and 1 (in halves) the sums are 4, 2, 2, 0 and their negatives: 6 of 8 reach 2.
    """
    a = numbered([[1, 1], [1, 1], [0, 1], [0, 0]])
    b = numbered([[0, 1], [0, 0], [1, 0], [1, 0]])
    (comparison,) = compare_methods({"a": a, "b": b})
    assert (comparison.method_a, comparison.method_b, comparison.instances) == ("a", "b", 4)
    assert comparison.difference == 0.25
    assert comparison.p_value == comparison.adjusted_p_value == 0.75
    assert comparison.half_width == pytest.approx(1.959964 * 0.6454972 / 2, rel=1e-6)


def test_the_interval_is_that_of_the_paired_difference():
    rng = np.random.default_rng(1)
    a, b = (rng.random((40, 3)) < 0.5 for _ in range(2))
    (comparison,) = compare_methods({"a": numbered(a), "b": numbered(b)})
    assert (comparison.difference, comparison.half_width) == pytest.approx(
        paired_difference(a.T.tolist(), b.T.tolist())
    )


def test_instances_are_matched_by_their_id_and_not_by_their_order():
    a = numbered([[1], [0], [1], [1]])
    backwards = dict(reversed(a.items()))
    (comparison,) = compare_methods({"a": a, "b": backwards})
    assert (comparison.difference, comparison.p_value, comparison.half_width) == (0, 1, 0)


def test_all_pairs_in_the_order_given_with_holms_correction():
    """Of 8 instances a is right on 8, b on 1, c on 0: p = 2/2^7, 2/2^8 and 1."""
    scores = {name: numbered([[at < right] for at in range(8)]) for name, right in (("a", 8), ("b", 1), ("c", 0))}
    comparisons = compare_methods(scores)
    assert [(c.method_a, c.method_b) for c in comparisons] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [c.p_value for c in comparisons] == pytest.approx([1 / 64, 1 / 128, 1])
    assert [c.adjusted_p_value for c in comparisons] == pytest.approx([2 / 64, 3 / 128, 1])
    assert [c.difference for c in comparisons] == [7 / 8, 1, 1 / 8]


def test_a_single_instance_has_no_interval():
    (comparison,) = compare_methods({"a": numbered([[1]]), "b": numbered([[0]])})
    assert (comparison.difference, comparison.half_width, comparison.p_value) == (1, None, 1)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"a": numbered([[1]])}, r"at least two methods.*\['a'\]"),
        ({"a": numbered([[1], [0]]), "b": numbered([[1], [0], [0], [0]])}, "'a' has 2, 'b' has 4, and 2 are in one"),
        ({"a": {"x": [True]}, "b": {"y": [True]}}, "2 are in one only, such as 'x'"),
        ({"a": {}, "b": {}}, "'a' has no instances"),
        ({"a": numbered([[1]]), "b": numbered([[1, 0]])}, r"1 \(method 'a'.*2 \(method 'b'"),
        (
            {"a": numbered([[1, 0], [1]]), "b": numbered([[1, 0], [1]])},
            r"got 1 \(method .a., instance .instance 1.\), 2",
        ),
        ({"a": {"x": []}, "b": {"x": []}}, r"at least 1, got 0 \(method 'a', instance 'x'\)"),
        ({"a": {"x": [0.5]}, "b": {"x": [True]}}, r"got \[0.5\] of method 'a', instance 'x'"),
    ],
)
def test_scores_that_cannot_be_compared_are_refused(scores, message):
    with pytest.raises(ValueError, match=message):
        compare_methods(scores)


# --- Holm's correction ----------------------------------------------------------------------------------------


def holm_by_definition(p_values):
    """The smallest level at which the step-down procedure rejects each hypothesis."""

    def rejects(level):
        rejected = set()
        for rank, at in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
            if p_values[at] > level / (len(p_values) - rank):
                break
            rejected.add(at)
        return rejected

    levels = sorted({min(1, p * k) for p in p_values for k in range(1, len(p_values) + 1)} | {Fraction(1)})
    return [next((level for level in levels if at in rejects(level)), 1) for at in range(len(p_values))]


@given(st.lists(st.fractions(0, 1, max_denominator=50), min_size=1, max_size=6))
@deterministic
def test_holms_correction_is_the_least_level_that_rejects(p_values):
    assert holm_adjusted(p_values) == holm_by_definition(p_values)
