"""The optimum of the knapsack against brute force, dynamic programming, and the greedy solution."""

import re
import warnings

import numpy as np
import pytest
import reference
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rule_cases import EIGHTHS, deterministic, even_distributions, random_rows

from transformers_kad import ExactDeferral, PrimalDeferral


def assert_solved(p, budget, tolerance=0.0):
    mask = ExactDeferral(budget, tolerance=tolerance).defer(torch.tensor(p)).tolist()
    assert reference.mass(p, mask) <= budget
    # 1e-12: the sums of the reference and of the solver are rounded differently
    assert reference.value(p, mask) >= reference.best_subset_value(p, budget) - tolerance - 1e-12


@pytest.mark.filterwarnings("error")
@given(even_distributions(largest=8), st.sampled_from([i / 64 for i in range(64)]))
@deterministic
def test_the_exact_rule_equals_brute_force_where_zeros_and_ties_abound(rows, budget):
    assert_solved(rows[0], budget)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("tolerance", [0.0, 1e-4, 0.05])
@pytest.mark.parametrize("budget", [0.05, 0.3, 0.5, 0.77, 0.95])
def test_the_exact_rule_equals_brute_force_on_random_distributions(budget, tolerance):
    for seed in range(4):
        for spread in (0.3, 1.0, 3.0):
            assert_solved(random_rows(10, seed=seed, spread=spread).tolist(), budget, tolerance)


def test_the_exact_rule_finds_solutions_that_greedy_misses():
    gains = []
    for p in random_rows(20, 10, seed=5, spread=0.5):
        exact, greedy = ExactDeferral(0.5, tolerance=0).defer(p), PrimalDeferral(0.5).defer(p)
        gains.append(reference.value(p.tolist(), exact.tolist()) - reference.value(p.tolist(), greedy.tolist()))
    assert min(gains) >= 0
    assert max(gains) > 0.05


def test_too_few_states_warn_with_a_true_bound_on_what_is_missing():
    warned = short = 0
    for seed in range(60):
        p = random_rows(10, seed=seed, spread=0.3)
        rule = ExactDeferral(0.5, tolerance=0, max_states=1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            mask = rule.defer(p).tolist()
        stated = 0.0
        if caught:
            assert caught[0].category is RuntimeWarning
            assert "max_states" in str(caught[0].message)
            stated = float(re.search(r"up to ([\d.e+-]+)\.", str(caught[0].message))[1])
        missing = reference.best_subset_value(p.tolist(), 0.5) - reference.value(p.tolist(), mask)
        assert reference.mass(p.tolist(), mask) <= 0.5
        assert missing <= stated * 1.005 + 1e-12  # it is printed with three digits
        warned += bool(caught)
        short += missing > 1e-9
    assert warned > 30
    assert short > 0


# Distributions on which the search has to do all it can: few heavy tokens among light ones, ties, values that are
# nearly the same, budgets at which a subset fits exactly or nearly.
@st.composite
def hard_knapsacks(draw):
    size = draw(st.integers(2, 9))
    exponents = draw(st.sampled_from([(-4.0, 0.0), (-6.0, -4.0), (-1.0, 0.0)]))
    heavy = draw(st.integers(0, 3))
    weights = [10 ** draw(st.floats(*((-1.0, 0.0) if v < heavy else exponents))) for v in range(size)]
    if draw(st.booleans()):
        weights = [weights[draw(st.integers(0, size - 1))] for _ in weights]
    p = torch.tensor(weights, dtype=torch.float64).div(sum(weights)).float()
    chosen = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    budget = reference.mass(p.tolist(), chosen) + draw(st.sampled_from([0.0, 1e-7, -1e-7, 1e-5, -1e-5, 0.1]))
    assume(0 <= budget < 1)
    return p, budget


@pytest.mark.filterwarnings("error")
@given(hard_knapsacks(), st.sampled_from([0.0, 1e-6, 1e-4, 1e-2, 0.3, 0.5]))
@settings(deterministic, max_examples=600)
def test_the_exact_rule_is_within_its_tolerance_of_brute_force_on_hard_knapsacks(problem, tolerance):
    p, budget = problem
    rows, mask = p.tolist(), ExactDeferral(budget, tolerance=tolerance).defer(p).tolist()
    assert reference.mass(rows, mask) <= budget + 1e-15  # sums of the same numbers in another order
    assert reference.value(rows, mask) >= reference.best_subset_value(rows, max(budget - 1e-15, 0)) - tolerance - 1e-12


def best_value_on_a_grid(weights, budget):
    """The optimum of a knapsack whose weights and budget are whole numbers of 1/512, by dynamic programming."""
    best = np.zeros(budget + 1)
    for weight in weights:
        if 0 < weight <= budget:
            with_it = best[: budget + 1 - weight] + reference.token_value(weight / 512)
            best[weight:] = np.maximum(best[weight:], with_it)
    return best[budget]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("tolerance", [0.0, 1e-3, 0.05])
@pytest.mark.parametrize("size", [20, 100, 400])
def test_the_exact_rule_equals_dynamic_programming(size, tolerance):
    generator = torch.Generator().manual_seed(size)
    for spread in (0.5, 2.0, 4.0):
        law = (spread * torch.randn(size, generator=generator)).softmax(-1)
        weights = torch.bincount(law.multinomial(512, replacement=True, generator=generator), minlength=size)
        for budget in (3, 101, 256, 460, 511):
            p = weights / 512
            mask = ExactDeferral(budget / 512, tolerance=tolerance).defer(p)
            assert int(weights[mask].sum()) <= budget
            value = reference.value(p.tolist(), mask.tolist())
            assert value >= best_value_on_a_grid(weights.tolist(), budget) - tolerance - 1e-12


def test_light_tokens_are_given_back_where_a_heavy_one_is_worth_it():
    light = torch.full((100_000,), 7e-6)  # each worth less than the tolerance of 1e-4
    p = torch.cat([light[:50_000], torch.tensor([0.3]), light[50_000:]])
    budget = float(p.double().sum()) - 2e-5  # without three of them
    mask = ExactDeferral(budget).defer(p)
    assert mask[50_000]
    assert (~mask).sum() == 3
    assert not mask[-3:].any()  # the highest ids
    assert not PrimalDeferral(budget).defer(p)[50_000]


def test_light_tokens_alone_are_deferred_greedily():
    p = torch.full((200_000,), 1 / 200_000)
    for rule in (ExactDeferral(0.5), ExactDeferral(0.123, tolerance=1e-3)):
        assert torch.equal(rule.defer(p), PrimalDeferral(rule.budget).defer(p))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 3.0, 6.0])
@pytest.mark.parametrize("budget", [0.05, 0.5, 0.95])
def test_a_large_vocabulary_is_solved_to_the_tolerance(spread, budget):
    p = random_rows(150_000, seed=7, spread=spread)
    mask = ExactDeferral(budget).defer(p)
    deferred, ordered = p[mask].double(), p.double().sort().values
    mass, value = ordered.cumsum(0), -torch.xlogy(ordered, ordered).cumsum(0)
    whole = int((mass <= budget).sum())
    greedy, critical = float(value[whole - 1]), float(ordered[whole])
    relaxed = greedy + (budget - float(mass[whole - 1])) * -np.log(critical)
    found = float(-torch.xlogy(deferred, deferred).sum())
    assert float(deferred.sum()) <= budget
    assert greedy - 1e-4 <= found <= relaxed + 1e-9

    # No token kept, in the place of one deferred or in addition, may gain more than the tolerance.
    kept = p[~mask].double().sort().values
    given_up = torch.cat([deferred, deferred.new_zeros(1)])
    heaviest = torch.searchsorted(kept, given_up + budget - float(deferred.sum()), right=True) - 1
    taken_up = kept[heaviest.clamp(min=0)].where(heaviest >= 0, 0.0)
    gain = torch.xlogy(given_up, given_up) - torch.xlogy(taken_up, taken_up)
    assert float(gain.max()) <= 1e-4 + 1e-12


@given(even_distributions(largest=8), st.sampled_from(EIGHTHS))
@deterministic
def test_exact_gains_at_most_the_critical_item_on_primal_where_ties_abound(rows, budget):
    p = rows[0]
    greedy = PrimalDeferral(budget).defer(torch.tensor(p)).tolist()
    exact = ExactDeferral(budget, tolerance=0).defer(torch.tensor(p)).tolist()
    gain = reference.value(p, exact) - reference.value(p, greedy)
    critical = reference.critical_item(p, greedy)
    assert -1e-12 <= gain <= (0 if critical is None else reference.token_value(p[critical])) + 1e-12
