"""The threshold that is recommended, on distributions of which the right answer is known."""

import pytest

from transformers_kad.recipes.pair_check.recommendation import choose_threshold, split_confidence


def otsu(histogram):
    """The thresholds with the largest variance between the two groups, by its definition."""
    count, variances = len(histogram), {}
    for border in range(1, count):
        groups = [range(border), range(border, count)]
        weights = [sum(histogram[at] for at in group) for group in groups]
        if min(weights) > 0:
            means = [
                sum((at + 0.5) * histogram[at] for at in group) / weight
                for group, weight in zip(groups, weights, strict=True)
            ]
            variances[border / count] = weights[0] * weights[1] * (means[0] - means[1]) ** 2
    best = max(variances.values())
    return [border for border, variance in variances.items() if variance >= best * (1 - 1e-9)]


@pytest.mark.parametrize(
    "histogram",
    [[5.0, 3.0, 1.0, 0.5, 0.2, 0.1, 0.3, 1.0, 2.0, 9.0], [1.0] * 10, [9.0, 0, 0, 0, 1.0, 0, 0, 0, 0, 3.0]],
)
def test_the_split_is_that_of_otsu(histogram):
    borders = otsu(histogram)
    assert split_confidence(histogram) == pytest.approx((borders[0] + borders[-1]) / 2)


def test_the_split_lies_in_the_middle_of_an_empty_gap():
    assert split_confidence([1.0, 1.0, 0, 0, 0, 0, 0, 0, 1.0, 1.0]) == 0.5


@pytest.mark.parametrize("histogram", [[0.0] * 9 + [4.0], [4.0] + [0.0] * 9])
def test_a_base_that_is_always_equally_sure_has_a_split_all_the_same(histogram):
    assert 0 < split_confidence(histogram) < 1


ACCEPTANCE = {0.1: 0.80, 0.3: 0.93, 0.4: 0.96, 0.5: 0.961, 0.7: 0.99}


def test_the_smallest_threshold_is_chosen_that_serves_as_well():
    assert choose_threshold(ACCEPTANCE, split=0.6, tokens_per_text=25) == 0.4


def test_in_longer_texts_small_differences_count():
    assert choose_threshold(ACCEPTANCE, split=0.6, tokens_per_text=500) == 0.5


def test_nothing_above_the_split_is_chosen():
    assert choose_threshold(ACCEPTANCE, split=0.35, tokens_per_text=500) == 0.3
    assert choose_threshold(ACCEPTANCE, split=0.05, tokens_per_text=25) == 0.1
