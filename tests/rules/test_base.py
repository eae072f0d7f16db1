"""The targets of all rules against the slow reference, the checks that all rules share, and the mixture by a mask."""

import copy
import dataclasses
import pickle
import re

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from rule_cases import (
    ALL_RULES,
    EIGHTHS,
    UNIT,
    close,
    deterministic,
    distinct_distributions,
    even_distributions,
    random_rows,
    whole_units,
)

from transformers_kad import DeferralRule, DualDeferral, ImplicitReward, make_rule, mix
from transformers_kad.rules.base import Rule, as_float, deferral_mass, number

# Off the eighths, so that random distributions meet no threshold exactly.
CASES = [
    *(("dual", {"threshold": x}) for x in (0.01, 0.1, 0.4, 1.0)),
    *(("primal", {"budget": x}) for x in (0.0, 0.1, 0.5, 0.9, 1.0)),
    *(("nudging", {"threshold": x}) for x in (0.0, 0.2, 0.4, 1.0)),
    *(("confidence_bet", {"margin": x}) for x in (0.0, 0.1, 0.3, 1.0)),
    *(
        ("cascade", {"variant": variant, "alpha": x})
        for variant in ("diff", "opt", "token_v2", "token_v3")
        for x in (0.0, 0.1, 0.3, 1.0)
    ),
    *(("implicit_reward", {"beta": x}) for x in (0, 0.3, 1.0, 2.5)),
    *(("ensemble", {"weight": x}) for x in (0, 0.25, 0.77, 1)),
    *(("blend_in", {"threshold": x}) for x in (0.0, 0.2, 0.4, 1.0)),
]


@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_targets_of_random_distributions_equal_the_reference(name, parameters):
    for size in (2, 5, 50):
        p, q, q0 = (random_rows(8, size, seed=size + i) for i in range(3))
        r = make_rule(name, **parameters)(p, q, q0)
        rows = zip(p.tolist(), q.tolist(), q0.tolist(), strict=True)
        assert close(r, [reference.target(name, parameters, *row) for row in rows])
        assert r.dtype == torch.float32
        assert close(r.sum(-1), [1.0] * 8)


@given(even_distributions(count=3))
@deterministic
def test_targets_equal_the_reference_where_zeros_and_ties_abound(rows):
    p, q, q0 = rows
    tensors = [torch.tensor(row) for row in rows]
    for name, parameter, values in [
        ("implicit_reward", "beta", [0, 0.5, 1, 2]),
        ("ensemble", "weight", EIGHTHS),
        ("blend_in", "threshold", EIGHTHS),
        ("dual", "threshold", EIGHTHS[1:]),
        ("primal", "budget", EIGHTHS),
        ("nudging", "threshold", EIGHTHS),
        ("confidence_bet", "margin", EIGHTHS),
        ("cascade", "alpha", EIGHTHS),
    ]:
        for x in values:
            parameters = {parameter: x} | ({"variant": "opt"} if name == "cascade" else {})
            r = make_rule(name, **parameters)(*tensors)
            # exp() turns the rounding of a logarithm of up to 2 * 87 into a relative error of 2e-5
            tolerance = 2e-5 if name == "implicit_reward" else 1e-6
            assert close(r, reference.target(name, parameters, p, q, q0), tolerance), (name, parameters)
            assert float(r.sum()) == pytest.approx(1, abs=1e-6)
            assert float(r.min()) >= 0


@pytest.mark.parametrize("rule", ALL_RULES, ids=repr)
class TestEveryRule:
    @pytest.mark.parametrize("size", [7, 50, 1000])
    def test_every_position_of_a_batch_of_windows_is_a_problem_of_its_own(self, rule, size):
        spread = torch.linspace(0.3, 5, 12).view(3, 4, 1)  # positions of a window differ in how sure they are
        p, q, q0 = (random_rows(3, 4, size, seed=size + i, spread=spread) for i in range(3))
        r = rule(p, q, q0)
        assert not torch.equal(r, p)
        for b in range(3):
            for w in range(4):
                assert torch.equal(r[b, w], rule(p[b, w], q[b, w], q0[b, w]))

    @pytest.mark.parametrize("shape", [(9,), (4, 9), (2, 3, 9), (2, 3, 4, 9), (0, 9)])
    def test_any_number_of_leading_dimensions_is_kept(self, rule, shape):
        r = rule(*(random_rows(*shape, seed=i) for i in range(3)))
        assert r.shape == shape
        assert r.dtype == torch.float32

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
    def test_other_dtypes_mean_their_float32_values_and_give_float32(self, rule, dtype):
        rows = [random_rows(5, 40, seed=i).to(dtype) for i in range(3)]
        r = rule(*rows)
        assert r.dtype == torch.float32
        assert torch.equal(r, rule(*(row.float() for row in rows)))

    def test_renaming_the_tokens_renames_the_target(self, rule):
        p, q, q0 = (random_rows(20, 12, seed=i) for i in range(3))
        order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
        renamed = rule(*(row[:, order] for row in (p, q, q0)))
        torch.testing.assert_close(renamed, rule(p, q, q0)[:, order], rtol=0, atol=1e-6)

    def test_a_missing_or_ill_shaped_proxy_is_named(self, rule):
        p = random_rows(4, 9, seed=1)
        with pytest.raises(ValueError, match="proxy_probs"):
            rule(p, None, p)
        with pytest.raises(ValueError, match=r"proxy_probs.*\(4, 8\).*\(4, 9\)"):
            rule(p, p[:, :8], p)
        with pytest.raises(TypeError, match=r"base_probs.*\(\)"):
            rule(p[0, 0], p[0, 0], p[0, 0])
        with pytest.raises(TypeError, match=r"base_probs.*torch\.int64"):
            rule(p.long(), p, p)

    def test_a_rule_is_frozen_and_is_its_parameters(self, rule):
        name = dataclasses.fields(rule)[-1].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(rule, name, 0.5)
        same, other = copy.deepcopy(rule), dataclasses.replace(rule, **{name: 1})
        assert same == rule
        assert hash(same) == hash(rule)
        assert pickle.loads(pickle.dumps(rule)) == rule
        assert other != rule
        assert len({rule, same, other}) == 2
        assert eval(repr(rule), {type(rule).__name__: type(rule)}) == rule


# --- mix -------------------------------------------------------------------------------------------------------


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


def test_the_deferral_mass_is_summed_in_float64():
    p = torch.stack([whole_units(100_000, 3 * 2**38, seed=seed) for seed in range(3)]) * UNIT
    mask = torch.ones_like(p, dtype=torch.bool)
    assert deferral_mass(p, mask).tolist() == [0.75] * 3
    mask[:, 5] = False
    expected = [np.float32(reference.mass(*row)) for row in zip(p.tolist(), mask.tolist(), strict=True)]
    assert deferral_mass(p, mask).tolist() == expected


# --- Parameters ------------------------------------------------------------------------------------------------


def test_numbers_of_numpy_are_numbers():
    assert DualDeferral(np.float32(0.25)) == DualDeferral(0.25)


@pytest.mark.parametrize("value", [10**400, -(10**400)])
def test_an_integer_too_large_for_a_float_is_out_of_every_range(value):
    assert as_float(value) == (float("inf") if value > 0 else float("-inf"))
    with pytest.raises(ValueError, match=rf"ImplicitReward\.beta.*\[0, inf\).*{str(value)[:200]}\.$"):
        ImplicitReward(value)


# --- Rules of one's own ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class DeferRank(DeferralRule):
    """Defer all but the base's k likeliest tokens."""

    k: int = 3

    def defer(self, base_probs, proxy_probs=None):
        assert base_probs.dtype == torch.float32
        assert proxy_probs is None or proxy_probs.dtype == torch.float32
        return base_probs < base_probs.topk(self.k).values[..., -1:]


@dataclasses.dataclass(frozen=True)
class Closest(Rule):
    """The proxy where its likeliest token has at least a share of the base's probability."""

    share: float = number(0.5, 0, 2, low_open=True)

    def target(self, p, q, q0):
        assert q0 is None
        return torch.where(q.amax(-1, keepdim=True) >= self.share, q, p)


def test_a_rule_of_ones_own_gets_checked_inputs():
    p, q = random_rows(4, 9, seed=1), random_rows(4, 9, seed=2)
    rule = DeferRank(k=2)
    mask = rule.defer(p)
    assert (~mask).sum(-1).tolist() == [2] * 4
    assert torch.equal(rule(p, q), mix(p, q, mask))
    assert torch.equal(rule.defer(base_probs=p.double(), proxy_probs=q.bfloat16()), mask)
    assert torch.equal(rule(p.double(), q.double()), rule(p, q))
    with pytest.raises(TypeError, match=r"base_probs.*torch\.int64"):
        rule.defer(p.long())
    with pytest.raises(ValueError, match=r"proxy_probs.*\(4, 8\).*\(4, 9\)"):
        rule.defer(p, q[:, :8])
    with pytest.raises(ValueError, match=r"proxy_probs.*None"):
        rule(p, None)


def test_a_rule_of_ones_own_that_needs_the_proxy_is_not_called_without():
    class Own(DeferralRule):
        needs_proxy = True

        def defer(self, base_probs, proxy_probs=None):
            return base_probs < proxy_probs

    p, q = random_rows(4, 9, seed=1), random_rows(4, 9, seed=2)
    assert torch.equal(Own().defer(p, q), p < q)
    with pytest.raises(ValueError, match=r"proxy_probs.*None"):
        Own().defer(p)


def test_a_rule_of_ones_own_inherits_the_mask_of_another_or_builds_on_it():
    class Inverse(DualDeferral):
        def defer(self, base_probs, proxy_probs=None):
            return ~super().defer(base_probs, proxy_probs)

    class Renamed(DualDeferral):
        pass

    p = random_rows(4, 9, seed=1)
    assert torch.equal(Inverse(0.1).defer(p), p >= 0.1)
    assert torch.equal(Renamed(0.1).defer(p), p < 0.1)
    with pytest.raises(ValueError, match=r"Renamed\.threshold.*\(0, 1\].*2"):
        Renamed(2)


def test_a_rule_of_ones_own_without_a_mask_has_checks_and_ranges_too():
    p, q = random_rows(4, 9, seed=1), random_rows(4, 9, seed=2)
    assert torch.equal(Closest(1.5)(p.double(), q, p), p)
    assert torch.equal(Closest(1e-6)(p, q), q)
    with pytest.raises(ValueError, match=r"proxy_probs.*None"):
        Closest()(p, None)
    with pytest.raises(ValueError, match=r"`Closest\.share` must lie in \(0, 2\], got 0"):
        Closest(0)


@pytest.mark.parametrize("kind", [Rule, DeferralRule])
def test_a_rule_without_a_formula_cannot_be_made(kind):
    class Empty(kind):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Empty()
