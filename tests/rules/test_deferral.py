"""The rules with a deferral mask against the slow reference, recorded results, and what the mathematics promises."""

import json
import re
from pathlib import Path

import pytest
import reference
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from rule_cases import (
    EIGHTHS,
    UNIT,
    VARIANTS,
    deterministic,
    distinct_distributions,
    even_distributions,
    random_rows,
    whole_units,
)

from transformers_kad import (
    CascadeDeferral,
    ConfidenceBetDeferral,
    DualDeferral,
    ExactDeferral,
    NudgingDeferral,
    PrimalDeferral,
    make_rule,
)

GOLDEN = json.loads((Path(__file__).resolve().parents[1] / "golden" / "deferral.json").read_text())
GOLDEN_PARAMETER = {"dual": "threshold", "nudging": "threshold", "primal": "budget", "confidence_bet": "margin"}
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


# --- Recorded results ------------------------------------------------------------------------------------------


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


# --- Masks against the reference -------------------------------------------------------------------------------


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


# --- Budgets ---------------------------------------------------------------------------------------------------


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


# --- Properties of every rule with a mask ----------------------------------------------------------------------


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


# --- Parameters ------------------------------------------------------------------------------------------------


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
