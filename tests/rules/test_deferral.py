"""The deferral rules against the slow reference, recorded results, and what the mathematics promises."""

import json
import re
import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from transformers_kad import (
    CascadeDeferral,
    ConfidenceBetDeferral,
    DualDeferral,
    ExactDeferral,
    NudgingDeferral,
    PrimalDeferral,
    make_rule,
    mix,
)
from transformers_kad.rules import knapsack
from transformers_kad.rules.deferral import deferral_mass

GOLDEN = json.loads((Path(__file__).resolve().parents[1] / "golden" / "deferral.json").read_text())
GOLDEN_PARAMETER = {"dual": "threshold", "nudging": "threshold", "primal": "budget", "confidence_bet": "margin"}

# Sums and products of multiples of 1/64 with these are exact in float32: ties are ties in both implementations.
EIGHTHS = [i / 8 for i in range(9)]
VARIANTS = ["diff", "opt", "token_v2", "token_v3"]
MASK_CASES = [
    *(("dual", {"threshold": x}) for x in EIGHTHS if x > 0),
    *(("primal", {"budget": x}) for x in EIGHTHS),
    *(("nudging", {"threshold": x}) for x in EIGHTHS),
    *(("confidence_bet", {"margin": x}) for x in EIGHTHS),
    *(("cascade", {"variant": variant, "alpha": x}) for variant in VARIANTS for x in EIGHTHS),
]
# Off that grid, for random distributions, on which nothing ties.
UNEVEN_CASES = [
    *(("dual", {"threshold": x}) for x in (1e-6, 0.003, 0.04, 0.4, 0.99)),
    *(("primal", {"budget": x}) for x in (1e-6, 0.05, 0.3, 0.9, 0.999)),
    *(("nudging", {"threshold": x}) for x in (0.04, 0.2, 0.4, 0.7)),
    *(("confidence_bet", {"margin": x}) for x in (0.03, 0.1, 0.3)),
    *(("cascade", {"variant": variant, "alpha": x}) for variant in VARIANTS for x in (0.03, 0.1, 0.3, 0.77)),
]
# One of each kind, for properties that hold for all.
ONE_OF_EACH = [
    DualDeferral(0.1),
    PrimalDeferral(0.6),
    ExactDeferral(0.6, tolerance=0.02),  # to 1e-4, flat distributions take seconds
    NudgingDeferral(0.5),
    ConfidenceBetDeferral(0.1),
    *(CascadeDeferral(variant, 0.1) for variant in VARIANTS),
]

deterministic = settings(derandomize=True, deadline=None, max_examples=100)


def random_rows(*shape, seed, spread=2.0):
    """Random distributions, float32, without zeros."""
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(*shape, generator=generator)).softmax(-1)


@st.composite
def even_distributions(draw, count=1, smallest=1, largest=10):
    """`count` lists of V multiples of 1/64 that sum to 1: zeros, ties and one-hot vectors are common."""
    size = draw(st.integers(smallest, largest))
    rows = []
    for _ in range(count):
        cuts = sorted(draw(st.lists(st.integers(0, 64), min_size=size - 1, max_size=size - 1)))
        rows.append([(high - low) / 64 for low, high in pairwise([0, *cuts, 64])])
    return rows


@st.composite
def distinct_distributions(draw, count=1, smallest=2, largest=10):
    """`count` float32 tensors of V probabilities, no two of them equal."""
    size = draw(st.integers(smallest, largest))
    rows = []
    for _ in range(count):
        weights = draw(st.lists(st.integers(1, 10_000), min_size=size, max_size=size, unique=True))
        rows.append(torch.tensor(weights, dtype=torch.float64).div(sum(weights)).float())
    return rows


# --- Recorded results -----------------------------------------------------------------------------------------


def golden_case(case):
    rule = make_rule(case["rule"], **{GOLDEN_PARAMETER[case["rule"]]: case["value"]})
    return rule, torch.tensor(case["base_probs"]), torch.tensor(case["proxy_probs"])


def test_the_golden_file_holds_sixty_cases_of_four_rules():
    assert len(GOLDEN) == 60
    assert {case["rule"] for case in GOLDEN} == set(GOLDEN_PARAMETER)


@pytest.mark.parametrize("case", GOLDEN, ids=[f"{i}-{case['rule']}" for i, case in enumerate(GOLDEN)])
def test_masks_targets_and_acceptance_equal_the_golden_ones(case):
    rule, p, q = golden_case(case)
    assert rule.defer(p, q).int().tolist() == case["deferral"]
    r = rule(p, q)
    torch.testing.assert_close(r, torch.tensor(case["target_probs"]), rtol=0, atol=1e-6)
    acceptance = reference.acceptance_probability(r.tolist(), case["proxy_probs"])
    assert acceptance == pytest.approx(case["acceptance"], abs=1e-6)
    assert acceptance >= reference.mass(case["base_probs"], case["deferral"]) - 1e-6  # at least D


# --- Masks against the reference ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 5, 50, 1000])
def test_masks_of_random_distributions_equal_the_reference(size):
    p, q = random_rows(6, size, seed=size), random_rows(6, size, seed=size + 1)
    kinds = set()
    for name, parameters in UNEVEN_CASES:
        mask = make_rule(name, **parameters).defer(p, q).tolist()
        expected = [reference.MASKS[name](*rows, **parameters) for rows in zip(p.tolist(), q.tolist(), strict=True)]
        assert mask == expected, (name, parameters)
        kinds |= {(name, any(row), all(row)) for row in mask}
    assert {kind[1:] for kind in kinds} >= {(False, False), (True, True)}  # the grid reaches both ends


@given(even_distributions(count=2))
@deterministic
def test_masks_equal_the_reference_exactly_where_zeros_and_ties_abound(rows):
    p, q = rows
    for name, parameters in MASK_CASES:
        mask = make_rule(name, **parameters).defer(torch.tensor(p), torch.tensor(q)).tolist()
        assert mask == reference.MASKS[name](p, q, **parameters), (name, parameters)


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.4, 0.7])
def test_a_token_exactly_at_the_threshold_is_kept(threshold):
    p = torch.tensor([threshold, 1 - threshold])
    just_above = float(torch.nextafter(p[0], torch.tensor(1.0)))
    assert not DualDeferral(threshold).defer(p)[0]
    assert DualDeferral(just_above).defer(p)[0]


# --- The knapsack ---------------------------------------------------------------------------------------------


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


@given(even_distributions(), st.sampled_from([i / 64 for i in range(64)]))
@deterministic
def test_primal_stays_within_the_budget_and_no_next_token_fits(rows, budget):
    p = rows[0]
    mask = PrimalDeferral(budget).defer(torch.tensor(p)).tolist()
    order = reference.density_order(p)
    count = sum(mask)
    assert set(order[:count]) == {v for v, deferred in enumerate(mask) if deferred}  # a prefix
    assert reference.mass(p, mask) <= budget
    assert count == len(p) - 1 or reference.mass(p, mask) + p[order[count]] > budget


@given(distinct_distributions(), st.floats(0, 0.999))
@deterministic
def test_primal_equals_dual_at_the_critical_item_where_nothing_ties(rows, budget):
    (p,) = rows
    mask = PrimalDeferral(budget).defer(p)
    critical = reference.critical_item(p.tolist(), mask.tolist())
    assert torch.equal(DualDeferral(float(p[critical])).defer(p), mask)


@given(even_distributions(), st.sampled_from(EIGHTHS[:-1]))
@deterministic
def test_primal_keeps_the_smallest_nucleus_of_the_remaining_mass(rows, budget):
    p = rows[0]
    mask = PrimalDeferral(budget).defer(torch.tensor(p)).tolist()
    kept = [v for v, deferred in enumerate(mask) if not deferred]
    nucleus_mass = sum(p[v] for v in kept)
    assert nucleus_mass >= 1 - budget
    assert len(kept) == 1 or nucleus_mass - min(p[v] for v in kept) < 1 - budget


@pytest.mark.parametrize("rule_class", [PrimalDeferral, ExactDeferral])
class TestBudgets:
    @given(rows=even_distributions())
    @deterministic
    def test_a_budget_of_one_defers_everything(self, rule_class, rows):
        assert rule_class(1.0).defer(torch.tensor(rows[0])).all()

    def test_a_budget_of_one_defers_everything_whatever_the_sum_is_rounded_to(self, rule_class):
        p = torch.full((1, 3000), 1 / 3000) * torch.tensor([[0.9999], [1.0], [1.0001]])
        assert rule_class(1).defer(p).all()

    @given(rows=even_distributions())
    @deterministic
    def test_a_budget_of_zero_defers_nothing_that_has_mass(self, rule_class, rows):
        p = torch.tensor(rows[0])
        assert float(p[rule_class(0.0).defer(p)].sum()) == 0
        assert torch.equal(rule_class(0.0)(p, p.flip(0)), p)

    def test_ties_are_broken_by_token_id(self, rule_class):
        p = torch.full((8,), 1 / 8)
        for count in range(8):
            assert rule_class(count / 8).defer(p).tolist() == [v < count for v in range(8)]

    def test_ties_are_broken_by_token_id_in_a_large_vocabulary(self, rule_class):
        p = torch.full((2, 4096), 1 / 4096)
        mask = rule_class(0.5).defer(p)
        assert mask[:, :2048].all()
        assert not mask[:, 2048:].any()

    @given(rows=even_distributions(), budget=st.sampled_from(EIGHTHS))
    @deterministic
    def test_of_equally_likely_tokens_the_lowest_ids_are_deferred(self, rule_class, rows, budget):
        p = rows[0]
        mask = rule_class(budget).defer(torch.tensor(p)).tolist()
        for low in range(len(p)):
            for high in range(low + 1, len(p)):
                assert p[low] != p[high] or mask[low] >= mask[high]

    def test_values_that_float32_cannot_tell_apart_are_ties(self, rule_class):
        nearly = torch.tensor([0.25 + 3e-12, 0.25 + 2e-12, 0.25 + 1e-12, 0.25 - 6e-12], dtype=torch.float64)
        assert rule_class(0.5).defer(nearly).tolist() == [True, True, False, False]


@given(even_distributions(), st.floats(0, 1, exclude_max=True))
@deterministic
def test_primal_never_defers_the_likeliest_token_for_a_budget_below_one(rows, budget):
    mask = PrimalDeferral(budget).defer(torch.tensor(rows[0])).tolist()
    assert not mask[reference.density_order(rows[0])[-1]]


def test_primal_keeps_the_likeliest_token_though_the_sum_is_rounded_below_the_budget():
    p = torch.tensor([0.25, 0.25, 0.499999])
    assert PrimalDeferral(0.9999999).defer(p).tolist() == [True, True, False]


# --- The prefix of a large vocabulary -------------------------------------------------------------------------


@pytest.fixture
def small_is_large(monkeypatch):
    """Treat vocabularies as large that hypothesis can draw and the reference can check."""
    monkeypatch.setattr(knapsack, "SORTED_VOCABULARY", 2)
    monkeypatch.setattr(knapsack, "NUCLEUS", 2)
    monkeypatch.setattr(knapsack, "BLOCK", 2)
    monkeypatch.setattr(knapsack, "_prefix_by_sorting", forbidden)


def forbidden(*args):
    raise AssertionError("this must not be called")


@pytest.mark.usefixtures("small_is_large")
class TestPrefixWithoutSorting:
    @given(rows=even_distributions(count=3, smallest=3, largest=12), budget=st.sampled_from(EIGHTHS))
    @settings(deterministic, max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_it_equals_the_reference_where_zeros_and_ties_abound(self, rows, budget):
        mask = PrimalDeferral(budget).defer(torch.tensor(rows)).tolist()
        assert mask == [reference.primal(p, None, budget) for p in rows]

    @given(rows=distinct_distributions(smallest=3, largest=12), budget=st.floats(0, 0.999))
    @settings(deterministic, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_it_equals_the_reference_where_nothing_ties(self, rows, budget):
        p = rows[0]
        assert PrimalDeferral(budget).defer(p).tolist() == reference.primal(p.tolist(), None, budget)

    @pytest.mark.parametrize("budget", [0.0, 1e-9, 0.3, 0.9999999])
    def test_the_last_token_is_kept_though_the_sum_is_within_the_budget(self, budget):
        for p in ([0.25, 0.25, 0.25, 0.2], [0.0] * 5, [0.1] * 5, [1e-3, 0.5, 0.3, 0.1]):
            scaled = torch.tensor(p) * (0.9 * max(budget, 1e-3))
            assert PrimalDeferral(budget).defer(scaled).tolist() == reference.primal(scaled.tolist(), None, budget)

    def test_negative_zeros_are_zeros(self):
        p = torch.tensor([-0.0, 0.5, 0.0, 0.25, -0.0, 0.25])
        for budget in EIGHTHS:
            assert torch.equal(PrimalDeferral(budget).defer(p), PrimalDeferral(budget).defer(p.abs()))


LARGE = 20_000


@pytest.mark.parametrize("spread", [0.0, 1e-4, 0.1, 1.0, 3.0, 8.0, 40.0])
def test_a_large_vocabulary_has_the_prefix_of_the_reference(spread):
    p = random_rows(2, LARGE, seed=3, spread=spread)
    p[1, :: LARGE // 50] = p[1, 0]  # some ties
    for budget in (0.0, 1e-12, 1e-5, 0.1, 0.5, 0.9, 0.9999):
        mask = PrimalDeferral(budget).defer(p)
        assert mask.tolist() == [reference.primal(row, None, budget) for row in p.tolist()]


def test_a_nucleus_of_64_tokens_is_found_without_looking_at_the_rest(monkeypatch):
    tail = random_rows(LARGE - 64, seed=1) * 0.3
    p = torch.cat([tail, torch.linspace(0.5, 1.5, 64) * 0.7 / 64])
    monkeypatch.setattr(knapsack, "_prefix_by_sorting", forbidden)
    monkeypatch.setattr(knapsack, "_prefix_by_counting", forbidden)
    mask = PrimalDeferral(0.3005).defer(p)
    assert (~mask).sum() == 64
    assert mask.tolist() == reference.primal(p.tolist(), None, 0.3005)


def test_a_nucleus_whose_edge_ties_with_what_is_outside_is_found_by_counting(monkeypatch):
    p = torch.full((LARGE,), 0.5 / (LARGE - 10))
    p[5:15] = 0.05
    expected = reference.primal(p.tolist(), None, 0.499)  # keeps the ten, and some of those that tie
    counted = []
    by_counting = knapsack._prefix_by_counting
    monkeypatch.setattr(knapsack, "_prefix_by_counting", lambda *args: counted.append(1) or by_counting(*args))
    assert PrimalDeferral(0.499).defer(p).tolist() == expected
    assert counted == [1]
    assert 10 < expected.count(False) < 64


@pytest.mark.parametrize("size", [100, 128, 200, 128 * 65, 128 * 66 + 5, LARGE])
def test_the_likeliest_tokens_are_those_of_topk(size):
    generator = torch.Generator().manual_seed(size)
    for p in (
        random_rows(3, size, seed=size),
        random_rows(3, size, seed=size).sort().values,  # all of them in the last blocks, and behind these
        torch.randint(0, 5, (3, size), generator=generator).float(),
    ):
        ids = knapsack._likeliest(p, 65)
        assert all(len(set(row)) == 65 for row in ids.tolist())
        assert torch.equal(p.gather(-1, ids).sort().values, p.topk(65).values.flip(-1))


def test_ties_among_the_likeliest_are_in_the_order_of_ids():
    generator = torch.Generator().manual_seed(0)
    p = torch.full((LARGE,), 0.25 / LARGE)
    p[torch.randperm(LARGE, generator=generator)[:48]] = torch.tensor([1.0, 2.0, 3.0, 4.0]).repeat(12) / 160
    for budget in np.linspace(0.26, 0.99, 40):
        assert PrimalDeferral(budget).defer(p).tolist() == reference.primal(p.tolist(), None, budget)


def test_rows_are_found_each_in_its_own_way():
    spread = torch.tensor([[0.0], [9.0], [1.0], [12.0], [0.5]])
    p = random_rows(5, LARGE, seed=2, spread=spread)
    mask = PrimalDeferral(0.4).defer(p)
    for row in range(5):
        assert torch.equal(mask[row], PrimalDeferral(0.4).defer(p[row]))
    assert mask.tolist() == [reference.primal(row, None, 0.4) for row in p.tolist()]


@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf")])
def test_a_row_without_a_distribution_leaves_the_others_as_they_are(bad):
    p = random_rows(4, LARGE, seed=4, spread=torch.tensor([[1.0], [1.0], [9.0], [9.0]]))
    expected = PrimalDeferral(0.5).defer(p)
    p[1, 7], p[3] = bad, bad
    mask = PrimalDeferral(0.5).defer(p)
    assert torch.equal(mask[[0, 2]], expected[[0, 2]])
    ExactDeferral(0.5).defer(p[1])


# --- Sums that decide a mask ----------------------------------------------------------------------------------
# Numbers of 2^-40 below 2^-16 are exact in float32, and their sums in float64. Float32 sums of as many are not.

UNIT = 2.0**-40


def whole_units(size, total, seed):
    """An even number of whole numbers below 2^24 that add up to `total`."""
    numbers = torch.full((size,), total // size)
    offsets = torch.randint(
        -(total // size) + 1, total // size, (size // 2,), generator=torch.Generator().manual_seed(seed)
    )
    numbers[::2] += offsets
    numbers[1::2] -= offsets
    numbers[0] += total % size
    assert int(numbers.sum()) == total
    assert 0 < int(numbers.min()) <= int(numbers.max()) < 2**24
    return numbers


@pytest.mark.parametrize("way", ["by sorting", "around the nucleus", "by counting"])
def test_the_primal_rule_tells_budgets_apart_that_differ_by_the_smallest_bit(way, monkeypatch):
    total = 3 * 2**38 + 1  # 0.75 and a unit, which is no number of float32
    tail = whole_units(100_000, total, seed=0)
    p = torch.cat([tail * UNIT, torch.tensor([0.13, 0.12])])
    if way == "by sorting":
        monkeypatch.setattr(knapsack, "SORTED_VOCABULARY", len(p))
    elif way == "by counting":
        monkeypatch.setattr(
            knapsack,
            "_prefix_around_nucleus",
            lambda p, _: (torch.ones_like(p, dtype=torch.bool), torch.zeros(len(p)) > 0),
        )
    else:
        monkeypatch.setattr(knapsack, "_prefix_by_counting", forbidden)
    assert (~PrimalDeferral(total * UNIT).defer(p)).nonzero().flatten().tolist() == [100_000, 100_001]
    below = (~PrimalDeferral(float(np.nextafter(total * UNIT, 0))).defer(p)).nonzero().flatten().tolist()
    heaviest = int((tail == tail.max()).nonzero()[-1])
    assert below == [heaviest, 100_000, 100_001]


def test_total_variation_is_summed_in_float64():
    p_tail = whole_units(100_000, 3 * 2**38, seed=1)  # 0.75
    less = p_tail // 3
    less[: 2**38 - int(less.sum())] += 1  # 0.25
    p = torch.cat([torch.tensor([0.25]), p_tail * UNIT])
    for extra, deferred in [(0, False), (1, True)]:  # TV = 0.25, and a unit less
        q_tail = p_tail - less
        q_tail[0] += extra
        q = torch.cat([torch.tensor([0.5]), q_tail * UNIT])
        assert CascadeDeferral("opt", 1.0).defer(p, q).all() == deferred
        assert CascadeDeferral("opt", 1.0).defer(p, q).any() == deferred


def test_the_deferral_mass_is_summed_in_float64():
    p = torch.stack([whole_units(100_000, 3 * 2**38, seed=seed) for seed in range(3)]) * UNIT
    mask = torch.ones_like(p, dtype=torch.bool)
    assert deferral_mass(p, mask).tolist() == [0.75] * 3
    mask[:, 5] = False
    expected = [np.float32(reference.mass(*row)) for row in zip(p.tolist(), mask.tolist(), strict=True)]
    assert deferral_mass(p, mask).tolist() == expected


# --- Properties of every mask rule ----------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ONE_OF_EACH, ids=repr)
class TestEveryMaskRule:
    @given(rows=distinct_distributions(count=2), data=st.data())
    @deterministic
    def test_renaming_the_tokens_renames_mask_and_target(self, rule, rows, data):
        p, q = rows
        order = torch.tensor(data.draw(st.permutations(range(len(p)))))
        assert torch.equal(rule.defer(p[order], q[order]), rule.defer(p, q)[order])
        torch.testing.assert_close(rule(p[order], q[order]), rule(p, q)[order], rtol=0, atol=1e-6)

    @pytest.mark.parametrize("size", [7, 50, 1000])
    def test_every_position_of_a_batch_of_windows_is_a_problem_of_its_own(self, rule, size):
        spread = torch.linspace(0.5, 6, 12).view(3, 4, 1)  # positions of a window differ in how sure they are
        p, q = (random_rows(3, 4, size, seed=size + i, spread=spread) for i in range(2))
        mask, r = rule.defer(p, q), rule(p, q)
        assert len({tuple(row) for row in mask.reshape(12, size).tolist()}) > 1
        for b in range(3):
            for w in range(4):
                assert torch.equal(mask[b, w], rule.defer(p[b, w], q[b, w]))
                assert torch.equal(r[b, w], rule(p[b, w], q[b, w]))

    @pytest.mark.parametrize("shape", [(9,), (1, 9), (4, 9), (2, 3, 9), (2, 3, 4, 9), (0, 9), (2, 0, 9)])
    def test_any_number_of_leading_dimensions_is_kept(self, rule, shape):
        p, q = random_rows(*shape, seed=1), random_rows(*shape, seed=2)
        mask, r = rule.defer(p, q), rule(p, q)
        assert mask.shape == r.shape == shape
        assert mask.dtype == torch.bool
        assert r.dtype == torch.float32

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
    def test_other_dtypes_mean_their_float32_values_and_give_float32(self, rule, dtype):
        p, q = random_rows(5, 40, seed=3).to(dtype), random_rows(5, 40, seed=4).to(dtype)
        r = rule(p, q)
        assert r.dtype == torch.float32
        assert torch.equal(rule.defer(p, q), rule.defer(p.float(), q.float()))
        assert torch.equal(r, rule(p.float(), q.float()))

    def test_the_inputs_stay_as_they_were(self, rule):
        p, q = random_rows(3, 9, seed=1), random_rows(3, 9, seed=2)
        before = p.clone(), q.clone()
        rule(p, q).fill_(-1)
        assert torch.equal(p, before[0])
        assert torch.equal(q, before[1])

    def test_memory_order_plays_no_part(self, rule):
        p, q = random_rows(30, 6, seed=1), random_rows(30, 6, seed=2)
        strided = p.t().contiguous().t(), q.t().contiguous().t()
        assert torch.equal(rule.defer(*strided), rule.defer(p, q))

    def test_a_missing_proxy_is_named_where_the_mask_needs_it_and_ignored_where_not(self, rule):
        p, q = random_rows(9, seed=1), random_rows(9, seed=2)
        if rule.needs_proxy:
            with pytest.raises(ValueError, match="proxy_probs"):
                rule.defer(p)
        else:
            assert torch.equal(rule.defer(p), rule.defer(p, q))
        with pytest.raises(ValueError, match="proxy_probs"):
            rule(p, None)

    @pytest.mark.parametrize(
        ("wrong", "says"),
        [
            (torch.tensor(0.5), r"base_probs.*\(\)"),
            (torch.tensor([1, 0]), r"base_probs.*torch\.int64"),
            (torch.tensor([True, False]), r"base_probs.*torch\.bool"),
            ([0.5, 0.5], r"base_probs.*list"),
            (0.5, r"base_probs.*float"),
        ],
    )
    def test_what_is_no_floating_tensor_with_a_vocabulary_is_refused(self, rule, wrong, says):
        with pytest.raises(TypeError, match=says):
            rule.defer(wrong, torch.tensor([0.5, 0.5]))

    @pytest.mark.parametrize("shape", [(9,), (4, 8), (5, 9), (1, 9), (4, 1)])
    def test_a_proxy_of_another_shape_is_refused_and_both_shapes_are_named(self, rule, shape):
        p, q = random_rows(4, 9, seed=1), random_rows(*shape, seed=2)
        with pytest.raises(ValueError, match=rf"proxy_probs.*{re.escape(str(shape))}.*{re.escape('(4, 9)')}"):
            rule(p, q)


def test_needs_proxy_says_whether_the_mask_depends_on_the_proxy():
    p, q, other = random_rows(20, 6, seed=1), random_rows(20, 6, seed=2), random_rows(20, 6, seed=3, spread=5.0)
    for rule in ONE_OF_EACH:
        assert rule.needs_proxy == (not torch.equal(rule.defer(p, q), rule.defer(p, other))), rule
        assert rule.needs_reference is False


# --- mix ------------------------------------------------------------------------------------------------------


@given(even_distributions(count=2), st.data())
@deterministic
def test_mix_equals_the_reference_and_sums_to_one(rows, data):
    p, q = rows
    mask = data.draw(st.lists(st.booleans(), min_size=len(p), max_size=len(p)))
    r = mix(torch.tensor(p), torch.tensor(q), torch.tensor(mask))
    assert r.tolist() == reference.mix(p, q, mask)  # exact: multiples of 1/64
    assert float(r.sum()) == 1


@given(distinct_distributions(count=2))
@deterministic
def test_mix_gives_the_base_for_an_empty_mask_and_the_proxy_for_a_full_one(rows):
    p, q = rows
    assert torch.equal(mix(p, q, torch.zeros(len(p), dtype=torch.bool)), p)
    torch.testing.assert_close(mix(p, q, torch.ones(len(p), dtype=torch.bool)), q, rtol=1e-6, atol=0)


@given(distinct_distributions(count=2), st.data())
@deterministic
def test_a_target_accepts_the_proxys_draft_with_at_least_the_deferral_mass(rows, data):
    p, q = rows
    mask = data.draw(st.lists(st.booleans(), min_size=len(p), max_size=len(p)))
    r = mix(p, q, torch.tensor(mask))
    acceptance = reference.acceptance_probability(r.tolist(), q.tolist())
    assert acceptance >= reference.mass(p.tolist(), mask) - 1e-6
    assert float(r.sum()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("mask", [torch.zeros(3), torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.bool)])
def test_mix_refuses_what_is_no_mask_of_the_vocabulary_and_echoes_it(mask):
    p = torch.tensor([0.5, 0.25, 0.25])
    with pytest.raises(
        ValueError, match=rf"deferral.*{re.escape(str(mask.dtype))}.*{re.escape(str(tuple(mask.shape)))}"
    ):
        mix(p, p, mask)


# --- Parameters -----------------------------------------------------------------------------------------------

FIELDS = [
    (DualDeferral, "threshold", [-0.1, 0, 0.0, 1.1]),
    (PrimalDeferral, "budget", [-1e-9, 1.0000001, 2]),
    (ExactDeferral, "budget", [-0.1, 1.1]),
    (ExactDeferral, "tolerance", [-1e-4, 1.5]),
    (NudgingDeferral, "threshold", [-0.1, 1.1]),
    (ConfidenceBetDeferral, "margin", [-0.1, 1.1]),
    (CascadeDeferral, "alpha", [-0.1, 1.1]),
]
INFINITIES = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize(
    ("rule_class", "name", "value"), [(c, name, v) for c, name, values in FIELDS for v in values + INFINITIES]
)
def test_a_parameter_out_of_range_is_refused_and_echoed(rule_class, name, value):
    with pytest.raises(ValueError, match=rf"{rule_class.__name__}\.{name}.*{re.escape(repr(value))}"):
        rule_class(**{name: value})


@pytest.mark.parametrize(("rule_class", "name"), [(c, name) for c, name, _ in FIELDS])
@pytest.mark.parametrize("value", [True, False, "0.5", None, [0.5], 1j])
def test_a_parameter_that_is_no_number_is_refused_and_echoed(rule_class, name, value):
    with pytest.raises(TypeError, match=rf"{rule_class.__name__}\.{name}.*{re.escape(repr(value))}"):
        rule_class(**{name: value})


@pytest.mark.parametrize("value", [0, -5, True, 1.5, "10", None, float("nan")])
def test_max_states_must_be_a_positive_integer(value):
    with pytest.raises((TypeError, ValueError), match=rf"max_states.*{re.escape(repr(value))}"):
        ExactDeferral(max_states=value)


@pytest.mark.parametrize("value", ["token_v1", "Diff", "", None, 3, ["diff"]])
def test_an_unknown_cascade_is_refused_with_the_list(value):
    with pytest.raises((TypeError, ValueError), match=rf"diff, opt, token_v2, token_v3.*{re.escape(repr(value))}"):
        CascadeDeferral(variant=value)


def test_the_ends_of_every_range_are_allowed_as_integers_too():
    for rule_class, name, _ in FIELDS:
        assert rule_class(**{name: 1}) == rule_class(**{name: 1.0})
        if rule_class is not DualDeferral:
            assert rule_class(**{name: 0}) == rule_class(**{name: 0.0})


def test_a_threshold_of_one_defers_all_but_certainty():
    for rule in (DualDeferral(1.0), NudgingDeferral(1.0)):
        assert rule.defer(torch.tensor([0.5, 0.25, 0.25])).all()
    assert DualDeferral(1.0).defer(torch.tensor([1.0, 0.0, 0.0])).tolist() == [False, True, True]
    assert not NudgingDeferral(1.0).defer(torch.tensor([1.0, 0.0, 0.0])).any()


@given(distinct_distributions(count=2))
@deterministic
def test_raising_a_parameter_moves_every_mask_one_way(rows):
    p, q = rows
    assume(len(p) > 2)
    for make, sign in [
        (DualDeferral, 1),
        (PrimalDeferral, 1),
        (NudgingDeferral, 1),
        (ConfidenceBetDeferral, -1),
        *((lambda x, variant=variant: CascadeDeferral(variant, x), -1) for variant in VARIANTS),
    ]:
        counts = [sign * int(make(x).defer(p, q).sum()) for x in (0.01, 0.1, 0.3, 0.6, 1.0)]
        assert counts == sorted(counts)


def test_numbers_of_numpy_are_numbers():
    assert DualDeferral(np.float32(0.25)) == DualDeferral(0.25)
