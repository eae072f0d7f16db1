"""On a device without float64 (MPS), masks are those of the CPU, and sums are as precise."""

from fractions import Fraction
from itertools import accumulate

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pretended_mps import PretendedMPS
from rule_cases import (
    ALL_RULES,
    EIGHTHS,
    UNIT,
    deterministic,
    distinct_distributions,
    even_distributions,
    random_rows,
    whole_units,
)

from transformers_kad import CascadeDeferral, DualDeferral, ExactDeferral, PrimalDeferral
from transformers_kad.rules.arithmetic import LIMB, has_float64, sum_in_float64, sum_precisely, sums_within, to_limbs
from transformers_kad.rules.base import DeferralRule, deferral_mass

LARGE = 150_000


def on_mps(function, *args):
    """What a function of tensors gives on MPS, on the CPU."""
    with PretendedMPS():
        result = function(*(arg.to("mps") if isinstance(arg, torch.Tensor) else arg for arg in args))
        assert result.device.type == "mps"
        return result.cpu()


def mask_on_mps(rule, p, q=None):
    return on_mps(rule.defer, p, *([] if q is None else [q]))


def test_the_pretended_device_has_no_float64_and_mixes_with_no_other():
    with PretendedMPS():
        x = torch.rand(3, device="mps")
        assert not has_float64(x.device)
        with pytest.raises(TypeError, match="float64"):
            x.double()
        with pytest.raises(TypeError, match="float64"):
            torch.rand(3, dtype=torch.float64, device="mps")
        with pytest.raises(TypeError, match="float64"):
            x.cumsum(-1, dtype=torch.float64)
        with pytest.raises(RuntimeError, match="on mps and on cpu"):
            _ = x + torch.rand(3)
        assert x.cpu().double().device.type == "cpu"
        assert (2 * x).view(torch.int32).device.type == "mps"
    assert has_float64(torch.rand(3).device)


@pytest.mark.parametrize("rule", ALL_RULES, ids=str)
@pytest.mark.parametrize("spread", [0.5, 3.0, 12.0])
def test_every_rule_gives_the_target_of_the_cpu(rule, spread):
    p, q, q0 = (random_rows(2, 3, 40, seed=seed, spread=spread) for seed in range(3))
    assert torch.allclose(on_mps(rule, p, q, q0), rule(p, q, q0), rtol=1e-6, atol=1e-9)
    if isinstance(rule, DeferralRule):
        mask = rule.defer(p, q)
        assert torch.equal(mask_on_mps(rule, p, q), mask)
        assert torch.allclose(on_mps(deferral_mass, p, mask), deferral_mass(p, mask), rtol=3e-7, atol=0)


@given(rows=even_distributions(count=4, largest=12), budget=st.sampled_from(EIGHTHS))
@settings(deterministic, max_examples=300)
def test_masks_are_those_of_the_cpu_where_zeros_and_ties_abound(rows, budget):
    p, q = torch.tensor(rows[:2]), torch.tensor(rows[2:])
    for rule in (PrimalDeferral(budget), ExactDeferral(budget), CascadeDeferral("opt", budget)):
        assert torch.equal(mask_on_mps(rule, p, q), rule.defer(p, q))


@given(rows=distinct_distributions(), budget=st.floats(0, 1), bits=st.integers(-1, 1))
@settings(deterministic, max_examples=300)
def test_masks_are_those_of_the_cpu_where_a_mass_is_the_budget(rows, budget, bits):
    (p,) = rows
    masses = p.sort().values.double().cumsum(0)  # exact: a few numbers with 24 bits each, of similar size
    near = float(masses[min(int(budget * len(p)), len(p) - 1)])
    near = min(float(np.nextafter(near, bits)) if bits else near, 1.0)
    for own in (near, budget):
        rule = PrimalDeferral(own)
        assert torch.equal(mask_on_mps(rule, p), rule.defer(p))


@pytest.mark.parametrize("spread", [0.0, 1e-4, 1.0, 3.0, 8.0, 40.0])
def test_masks_of_a_large_vocabulary_are_those_of_the_cpu(spread):
    p = random_rows(2, LARGE, seed=3, spread=spread)
    p[1, :: LARGE // 50] = p[1, 0]  # some ties
    for budget in (0.0, 1e-12, 1e-5, 0.1, 0.5, 0.9, 0.9999, 1.0):
        rule = PrimalDeferral(budget)
        assert torch.equal(mask_on_mps(rule, p), rule.defer(p)), budget


def test_masks_of_bfloat16_logits_with_many_ties_are_those_of_the_cpu():
    logits = 3 * torch.randn(3, LARGE, generator=torch.Generator().manual_seed(0))
    p = logits.bfloat16().float().softmax(-1)
    assert len(p[0].unique()) < LARGE // 50
    for budget in np.linspace(0.01, 0.99, 15):
        rule = PrimalDeferral(float(budget))
        assert torch.equal(mask_on_mps(rule, p), rule.defer(p)), budget


def test_budgets_that_differ_by_the_smallest_bit_are_told_apart():
    total = 3 * 2**38 + 1  # 0.75 and a unit, which is no number of float32
    p = torch.cat([whole_units(100_000, total, seed=0) * UNIT, torch.tensor([0.13, 0.12])])
    for budget in (total * UNIT, float(np.nextafter(total * UNIT, 0)), float(np.nextafter(total * UNIT, 1))):
        rule = PrimalDeferral(budget)
        assert torch.equal(mask_on_mps(rule, p), rule.defer(p))
    masks = [mask_on_mps(PrimalDeferral(budget), p).sum() for budget in (total * UNIT, np.nextafter(total * UNIT, 0))]
    assert masks[0] == masks[1] + 1


def test_cascades_decide_alike_where_the_slack_is_met_exactly():
    p, q = torch.tensor([[0.375, 0.375, 0.25]]), torch.tensor([[0.5, 0.25, 0.25]])
    for alpha in (0.9999999999999999, 1.0, np.nextafter(1.0, 0)):  # TV = 0.125, max q - max p = 0.125
        rule = CascadeDeferral("opt", float(alpha))
        assert torch.equal(mask_on_mps(rule, p, q), rule.defer(p, q))
    assert mask_on_mps(CascadeDeferral("opt", 0.9999999), p, q).all()
    assert not mask_on_mps(CascadeDeferral("opt", 1.0), p, q).any()


def test_thresholds_are_compared_alike():
    p = torch.tensor([0.1, 0.3, 0.6])
    for threshold in (0.1, float(np.nextafter(0.1, 1)), 0.3, float(p[1]), 0.6):
        assert torch.equal(mask_on_mps(DualDeferral(threshold), p), DualDeferral(threshold).defer(p))


# --- Limbs -----------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1.5, width=32, allow_subnormal=False), min_size=1, max_size=4))
@deterministic
def test_limbs_hold_every_float32(numbers):
    limbs = to_limbs(torch.tensor(numbers))
    exact = [Fraction(0)] * len(numbers)
    for place, limb in enumerate(limbs.tolist(), start=1):
        exact = [total + Fraction(own, LIMB**place) for total, own in zip(exact, limb, strict=True)]
    assert exact == [Fraction(number) for number in numbers]
    assert 0 <= int(limbs[1:].min()) <= int(limbs[1:].max()) < LIMB


@given(
    numbers=st.lists(st.floats(0, 0.25, width=32, allow_subnormal=False), min_size=1, max_size=6),
    place=st.integers(0, 5),
    bits=st.integers(-1, 1),
    budget=st.floats(0, 1),
)
@settings(deterministic, max_examples=300)
def test_sums_are_compared_with_a_budget_as_exact_numbers_are(numbers, place, bits, budget):
    sums = list(accumulate(map(Fraction, numbers)))
    near = float(sums[min(place, len(sums) - 1)])
    near = max(float(np.nextafter(near, bits)) if bits else near, 0.0)
    for own in (near, budget):
        within = on_mps(sums_within, torch.tensor(numbers), own)
        assert within.tolist() == [total <= Fraction(own) for total in sums]


def test_sums_of_a_large_vocabulary_are_exact():
    units = torch.stack([whole_units(LARGE, 2**39 + i, seed=i) for i in range(4)]).view(2, 2, LARGE)
    exact = units.sum(-1).double() * UNIT
    with PretendedMPS():
        sums, rounded = (f((units * UNIT).to("mps")) for f in (sum_in_float64, sum_precisely))
    assert sums.device.type == "cpu"
    assert torch.equal(sums, exact)
    assert torch.equal(rounded.cpu(), exact.float())
