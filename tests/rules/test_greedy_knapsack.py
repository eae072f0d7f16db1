"""The greedy solution of the knapsack: what it promises, and its three ways in vocabularies of every size."""

import numpy as np
import pytest
import reference
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rule_cases import (
    EIGHTHS,
    UNIT,
    deterministic,
    distinct_distributions,
    even_distributions,
    forbidden,
    random_rows,
    whole_units,
)

from transformers_kad import DualDeferral, ExactDeferral, PrimalDeferral
from transformers_kad.rules import greedy_knapsack


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


@given(even_distributions(), st.floats(0, 1, exclude_max=True))
@deterministic
def test_primal_never_defers_the_likeliest_token_for_a_budget_below_one(rows, budget):
    mask = PrimalDeferral(budget).defer(torch.tensor(rows[0])).tolist()
    assert not mask[reference.density_order(rows[0])[-1]]


def test_primal_keeps_the_likeliest_token_though_the_sum_is_rounded_below_the_budget():
    p = torch.tensor([0.25, 0.25, 0.499999])
    assert PrimalDeferral(0.9999999).defer(p).tolist() == [True, True, False]


# --- The prefix of a large vocabulary --------------------------------------------------------------------------


@pytest.fixture
def small_is_large(monkeypatch):
    """Treat vocabularies as large that hypothesis can draw and the reference can check."""
    monkeypatch.setattr(greedy_knapsack, "SORTED_VOCABULARY", 2)
    monkeypatch.setattr(greedy_knapsack, "NUCLEUS", 2)
    monkeypatch.setattr(greedy_knapsack, "BLOCK", 2)
    monkeypatch.setattr(greedy_knapsack, "_prefix_by_sorting", forbidden)


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
    monkeypatch.setattr(greedy_knapsack, "_prefix_by_sorting", forbidden)
    monkeypatch.setattr(greedy_knapsack, "_prefix_by_counting", forbidden)
    mask = PrimalDeferral(0.3005).defer(p)
    assert (~mask).sum() == 64
    assert mask.tolist() == reference.primal(p.tolist(), None, 0.3005)


def test_a_nucleus_whose_edge_ties_with_what_is_outside_is_found_by_counting(monkeypatch):
    p = torch.full((LARGE,), 0.5 / (LARGE - 10))
    p[5:15] = 0.05
    expected = reference.primal(p.tolist(), None, 0.499)  # keeps the ten, and some of those that tie
    counted = []
    by_counting = greedy_knapsack._prefix_by_counting
    monkeypatch.setattr(greedy_knapsack, "_prefix_by_counting", lambda *args: counted.append(1) or by_counting(*args))
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
        ids = greedy_knapsack._likeliest(p, 65)
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


# --- Sums that decide a mask -----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["by sorting", "around the nucleus", "by counting"])
def test_the_primal_rule_tells_budgets_apart_that_differ_by_the_smallest_bit(way, monkeypatch):
    total = 3 * 2**38 + 1  # 0.75 and a unit, which is no number of float32
    tail = whole_units(100_000, total, seed=0)
    p = torch.cat([tail * UNIT, torch.tensor([0.13, 0.12])])
    if way == "by sorting":
        monkeypatch.setattr(greedy_knapsack, "SORTED_VOCABULARY", len(p))
    elif way == "by counting":
        monkeypatch.setattr(
            greedy_knapsack,
            "_prefix_around_nucleus",
            lambda p, _: (torch.ones_like(p, dtype=torch.bool), torch.zeros(len(p)) > 0),
        )
    else:
        monkeypatch.setattr(greedy_knapsack, "_prefix_by_counting", forbidden)
    assert (~PrimalDeferral(total * UNIT).defer(p)).nonzero().flatten().tolist() == [100_000, 100_001]
    below = (~PrimalDeferral(float(np.nextafter(total * UNIT, 0))).defer(p)).nonzero().flatten().tolist()
    heaviest = int((tail == tail.max()).nonzero()[-1])
    assert below == [heaviest, 100_000, 100_001]
