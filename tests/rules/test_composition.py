"""Targets of all rules against the slow reference, the table of rules, and bans."""

import copy
import dataclasses
import pickle
import re
from itertools import pairwise

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transformers_kad import (
    RULES,
    BlendIn,
    CascadeDeferral,
    ConfidenceBetDeferral,
    DeferralRule,
    DualDeferral,
    Ensemble,
    ExactDeferral,
    ImplicitReward,
    NudgingDeferral,
    PrimalDeferral,
    make_rule,
)
from transformers_kad.rules import composition
from transformers_kad.rules.composition import Composition, compose, may_be_any

GRID = [i / 8 for i in range(9)]
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
ONE_OF_EACH = [
    DualDeferral(0.2),
    PrimalDeferral(0.6),
    ExactDeferral(0.6, tolerance=0.02),  # to 1e-4, flat distributions take seconds
    NudgingDeferral(0.5),
    ConfidenceBetDeferral(0.1),
    *(CascadeDeferral(variant, 0.05) for variant in ("diff", "opt", "token_v2", "token_v3")),
    ImplicitReward(1.5),
    Ensemble(0.3),
    BlendIn(0.6),
]
NO_MASK = [rule for rule in ONE_OF_EACH if not isinstance(rule, DeferralRule)]
NEEDS_PROXY = {"confidence_bet", "cascade"}

deterministic = settings(derandomize=True, deadline=None, max_examples=100)


def random_logits(*shape, seed, spread=2.0):
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_rows(*shape, seed, spread=2.0):
    """Random distributions, float32, without zeros."""
    return random_logits(*shape, seed=seed, spread=spread).softmax(-1)


@st.composite
def even_distributions(draw, count):
    """`count` lists of V multiples of 1/64 that sum to 1: zeros, ties and one-hot vectors are common."""
    size = draw(st.integers(1, 10))
    rows = []
    for _ in range(count):
        cuts = sorted(draw(st.lists(st.integers(0, 64), min_size=size - 1, max_size=size - 1)))
        rows.append([(high - low) / 64 for low, high in pairwise([0, *cuts, 64])])
    return rows


def close(r, expected, tolerance=1e-6):
    return torch.allclose(r, torch.tensor(expected), rtol=0, atol=tolerance)


# --- Targets against the reference ----------------------------------------------------------------------------


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
        ("ensemble", "weight", GRID),
        ("blend_in", "threshold", GRID),
        ("dual", "threshold", GRID[1:]),
        ("primal", "budget", GRID),
        ("nudging", "threshold", GRID),
        ("confidence_bet", "margin", GRID),
        ("cascade", "alpha", GRID),
    ]:
        for x in values:
            parameters = {parameter: x} | ({"variant": "opt"} if name == "cascade" else {})
            r = make_rule(name, **parameters)(*tensors)
            # exp() turns the rounding of a logarithm of up to 2 * 87 into a relative error of 2e-5
            tolerance = 2e-5 if name == "implicit_reward" else 1e-6
            assert close(r, reference.target(name, parameters, p, q, q0), tolerance), (name, parameters)
            assert float(r.sum()) == pytest.approx(1, abs=1e-6)
            assert float(r.min()) >= 0


def test_rules_that_are_no_mask_give_back_a_distribution_that_both_models_share():
    p = random_rows(20, 30, seed=1)
    for rule in NO_MASK:
        torch.testing.assert_close(rule(p, p, p), p, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rule", ONE_OF_EACH, ids=repr)
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


# --- The rules that are no mask -------------------------------------------------------------------------------


def test_implicit_reward_never_emits_what_the_proxy_rules_out():
    p, q, q0 = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.0, 0.5, 0.5]), torch.tensor([0.5, 0.25, 0.25])
    assert ImplicitReward(1.0)(p, q, q0).tolist() == [0.0, 0.5, 0.5]


def test_implicit_reward_is_the_base_where_the_supports_are_disjoint():
    p, q, q0 = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.25, 0.25, 0.5])
    assert torch.equal(ImplicitReward(1.0)(p, q, q0), p)
    mixed = ImplicitReward(1.0)(torch.stack([p, q0]), torch.stack([q, q]), torch.stack([q0, q0]))
    assert mixed.tolist() == [[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]


def test_implicit_reward_is_the_base_for_beta_zero_also_where_the_proxy_is_zero():
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.0, 1.0, 0.0])
    assert torch.equal(ImplicitReward(0)(p, q, p), p)


def test_implicit_reward_survives_a_reference_that_underflowed():
    p, q, q0 = torch.tensor([0.5, 0.5]), torch.tensor([1e-3, 0.999]), torch.tensor([0.0, 1.0])
    for beta in (0.003, 0.01, 0.5, 1.0, 4.0):
        r = ImplicitReward(beta)(p, q, q0)
        assert close(r, reference.implicit_reward(p.tolist(), q.tolist(), q0.tolist(), beta), 2e-5)
        assert r[0] > (0.999 if beta >= 0.5 else 0.5)  # what alignment made possible is rewarded most


def test_implicit_reward_keeps_what_proxy_and_reference_both_rule_out_at_zero():
    p, q, q0 = torch.tensor([0.5, 0.5]), torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0])
    assert ImplicitReward(2.0)(p, q, q0).tolist() == [0.0, 1.0]


def test_implicit_reward_with_an_unchanged_proxy_is_the_base():
    p, q = random_rows(10, 30, seed=1), random_rows(10, 30, seed=2)
    torch.testing.assert_close(ImplicitReward(3.0)(p, q, q), p, rtol=0, atol=1e-6)


def test_implicit_reward_names_a_missing_or_ill_shaped_reference():
    p = random_rows(4, 9, seed=1)
    with pytest.raises(ValueError, match="reference_probs"):
        ImplicitReward()(p, p)
    with pytest.raises(ValueError, match=r"reference_probs.*\(3, 9\).*\(4, 9\)"):
        ImplicitReward()(p, p, p[:3])


def test_ensemble_is_the_proxy_at_weight_zero_and_the_base_at_one():
    p, q = random_rows(9, seed=1), random_rows(9, seed=2)
    assert torch.equal(Ensemble(0)(p, q), q)
    assert torch.equal(Ensemble(1)(p, q), p)


def test_blend_in_leaves_a_base_alone_that_is_as_sure_as_the_threshold():
    p, q = torch.tensor([0.75, 0.25]), torch.tensor([0.0, 1.0])
    assert torch.equal(BlendIn(0.75)(p, q), p)
    assert BlendIn(0.875)(p, q)[1] > 0.25


def test_blend_in_never_gives_the_proxy_more_than_all():
    p, q = torch.tensor([0.9, 0.1]), torch.tensor([1.0, 0.0])
    near = BlendIn(1.0)(p, q)  # share 1 / 1.9 + 0.09
    assert close(near, [0.9 + 0.1 * (1 / 1.9 + 0.09), 0.1 * (1 - 1 / 1.9 - 0.09)])
    flat = torch.full((1000,), 1e-3)
    sure = torch.zeros(1000)
    sure[3] = 1
    assert float(BlendIn(1.0)(flat, sure).min()) >= 0
    assert float(BlendIn(1.0)(flat, sure).sum()) == pytest.approx(1, abs=1e-6)


def test_blend_in_takes_the_lowest_id_of_equally_likely_proxy_tokens():
    p, q = torch.tensor([0.2, 0.1, 0.3, 0.4]), torch.tensor([0.0, 0.5, 0.5, 0.0])
    share = 0.5 / 0.9 + 0.1 * 0.1
    assert close(BlendIn(0.5)(p, q), (share * q + (1 - share) * p).tolist())


@pytest.mark.parametrize(
    ("rule_class", "name", "value"),
    [
        *((ImplicitReward, "beta", x) for x in (-1e-6, -1, float("nan"), float("inf"), float("-inf"))),
        *((Ensemble, "weight", x) for x in (-0.1, 1.1, float("nan"), float("inf"))),
        *((BlendIn, "threshold", x) for x in (-0.1, 1.1, float("nan"), float("inf"))),
    ],
)
def test_a_parameter_out_of_range_is_refused_and_echoed(rule_class, name, value):
    with pytest.raises(ValueError, match=rf"{rule_class.__name__}\.{name}.*{re.escape(repr(value))}"):
        rule_class(**{name: value})


@pytest.mark.parametrize(
    ("rule_class", "name"), [(ImplicitReward, "beta"), (Ensemble, "weight"), (BlendIn, "threshold")]
)
@pytest.mark.parametrize("value", [True, "0.5", None, [0.5]])
def test_a_parameter_that_is_no_number_is_refused_and_echoed(rule_class, name, value):
    with pytest.raises(TypeError, match=rf"{rule_class.__name__}\.{name}.*{re.escape(repr(value))}"):
        rule_class(**{name: value})


# --- The table ------------------------------------------------------------------------------------------------


def test_the_table_holds_the_nine_rules():
    assert {
        "dual": DualDeferral,
        "primal": PrimalDeferral,
        "exact": ExactDeferral,
        "nudging": NudgingDeferral,
        "confidence_bet": ConfidenceBetDeferral,
        "cascade": CascadeDeferral,
        "implicit_reward": ImplicitReward,
        "ensemble": Ensemble,
        "blend_in": BlendIn,
    } == RULES


def test_rules_say_what_they_need():
    for name, rule_class in RULES.items():
        rule = make_rule(name)
        assert type(rule) is rule_class
        assert rule.needs_reference is (name == "implicit_reward")
        if isinstance(rule, DeferralRule):
            assert rule.needs_proxy is (name in NEEDS_PROXY)


def test_parameters_reach_the_rule():
    assert make_rule("primal", budget=0.25).budget == 0.25
    assert make_rule("cascade", variant="token_v3", alpha=0.75) == CascadeDeferral("token_v3", 0.75)
    assert make_rule("exact", budget=0.5, tolerance=0, max_states=7) == ExactDeferral(0.5, 0, 7)


@pytest.mark.parametrize(
    ("given_name", "nearest"),
    [("duall", "dual"), ("Primal", "primal"), ("confidence-bet", "confidence_bet"), ("blendin", "blend_in")],
)
def test_an_unknown_rule_gets_the_nearest_name_and_the_list(given_name, nearest):
    with pytest.raises(ValueError, match=rf"{given_name}.*Did you mean '{nearest}'.*{', '.join(RULES)}"):
        make_rule(given_name)


def test_a_name_that_resembles_nothing_gets_the_list_alone():
    with pytest.raises(ValueError, match=r"'xyz'.*dual, primal, exact") as caught:
        make_rule("xyz")
    assert "mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "parameter", "says"),
    [
        ("dual", "treshold", "'treshold'.*Did you mean 'threshold'"),
        ("dual", "budget", "'dual'.*'budget'.*threshold"),
        ("exact", "max_state", "'max_state'.*Did you mean 'max_states'.*budget, tolerance, max_states"),
        ("implicit_reward", "needs_reference", "'needs_reference'.*beta"),
    ],
)
def test_an_unknown_parameter_gets_the_nearest_name_and_the_list(name, parameter, says):
    with pytest.raises(TypeError, match=says):
        make_rule(name, **{parameter: 0.5})


def test_a_parameter_out_of_range_is_refused_by_name_too():
    with pytest.raises(ValueError, match=r"budget.*1\.5"):
        make_rule("primal", budget=1.5)


# --- compose: logits in, and bans -----------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ONE_OF_EACH, ids=repr)
class TestComposition:
    def test_it_is_the_rule_on_the_softmax_of_the_logits(self, rule):
        logits = [random_logits(6, 20, seed=i) for i in range(3)]
        p, q, q0 = (x.softmax(-1) for x in logits)
        made = compose(rule, *logits)
        assert torch.equal(made.base_probs, p)
        assert torch.equal(made.proxy_probs, q)
        assert torch.equal(made.target_probs, rule(p, q, q0))

    def test_the_deferral_mass_is_that_of_the_mask_and_none_without_mask(self, rule):
        logits = [random_logits(6, 20, seed=i) for i in range(3)]
        made = compose(rule, *logits)
        if not isinstance(rule, DeferralRule):
            assert made.deferral_mass is None
            return
        p, q, _ = (x.softmax(-1) for x in logits)
        expected = [reference.mass(*row) for row in zip(p.tolist(), rule.defer(p, q).tolist(), strict=True)]
        assert len(set(expected)) > 1
        assert close(made.deferral_mass, expected)

    def test_bans_never_come_back_through_the_proxy(self, rule):
        base, proxy, before = (random_logits(40, 12, seed=i) for i in range(3))
        banned = random_logits(40, 12, seed=9) > 0
        banned[:, 5] = True
        banned[:, 6] = False
        proxy[:, 5] += 10  # the proxy wants nothing more than a banned token
        proxy[0::2, 6] -= 200  # and in every second row has nothing left but what underflows
        made = compose(rule, base.masked_fill(banned, -torch.inf), proxy, before)
        assert float(made.target_probs[banned].abs().max()) == 0
        assert float(made.proxy_probs[banned].abs().max()) == 0
        for probs in (made.base_probs, made.proxy_probs, made.target_probs):
            assert close(probs.sum(-1), [1.0] * 40)

    def test_the_rule_sees_the_renormalised_proxy(self, rule):
        base, proxy, before = (random_logits(30, 10, seed=i, spread=1.0) for i in range(3))
        proxy[:, :3] += 4  # without its banned tokens the proxy is another one, far surer of the others
        before[:, :3] += 4
        allowed = torch.tensor([False] * 3 + [True] * 7)
        made = compose(rule, base.masked_fill(~allowed, -torch.inf), proxy, before)
        short = rule(*(x[:, allowed].softmax(-1) for x in (base, proxy, before)))
        torch.testing.assert_close(made.target_probs[:, allowed], short, rtol=0, atol=1e-6)
        assert not torch.allclose(made.target_probs, compose(rule, base, proxy, before).target_probs, atol=1e-2)

    def test_a_proxy_without_any_allowed_token_is_taken_to_agree_with_the_base(self, rule):
        base, proxy, before = (random_logits(2, 6, seed=i) for i in range(3))
        base[:, :3] = -torch.inf
        proxy[0, 3:] = -torch.inf  # row 0: what is allowed to the one is forbidden by the other
        made = compose(rule, base, proxy, before)
        alone = compose(rule, base[1:], proxy[1:], before[1:])
        assert torch.equal(made.proxy_probs[0], made.base_probs[0])
        assert float(made.target_probs[0, :3].abs().max()) == 0
        assert float(made.target_probs[0].sum()) == pytest.approx(1, abs=1e-6)
        assert torch.equal(made.target_probs[1:], alone.target_probs)
        q0 = before[0].masked_fill(base[0] == -torch.inf, -torch.inf).softmax(-1)
        assert torch.equal(made.target_probs[0], rule(made.base_probs[0], made.base_probs[0], q0))

    def test_a_single_allowed_token_gets_everything(self, rule):
        logits = [random_logits(3, 6, seed=i) for i in range(3)]
        only = torch.full((3, 6), -torch.inf)
        only[:, 4] = logits[0][:, 4]
        assert close(compose(rule, only, *logits[1:]).target_probs, [[0.0, 0.0, 0.0, 0.0, 1.0, 0.0]] * 3)

    def test_half_precision_logits_mean_their_float32_values(self, rule):
        logits = [random_logits(3, 20, seed=i).bfloat16() for i in range(3)]
        made, full = compose(rule, *logits), compose(rule, *(x.float() for x in logits))
        assert made.target_probs.dtype == torch.float32
        assert torch.equal(made.target_probs, full.target_probs)

    def test_rows_and_tokens_are_found_again(self, rule):
        made = compose(rule, *(random_logits(5, 8, seed=i) for i in range(3)))
        row = made.rows(slice(3, 4))
        assert torch.equal(row.target_probs, made.target_probs[3:4])
        assert torch.equal(row.base_probs, made.base_probs[3:4])
        assert torch.equal(row.proxy_probs, made.proxy_probs[3:4])
        assert (row.deferral_mass is None) == (made.deferral_mass is None)
        if made.deferral_mass is not None:
            assert row.deferral_mass.tolist() == made.deferral_mass[3:4].tolist()
        tokens = [7, 0, 3, 3, 1]
        expected = [
            [float(x[i, v]) for x in (made.base_probs, made.proxy_probs, made.target_probs)]
            for i, v in enumerate(tokens)
        ]
        assert made.probs_of(torch.tensor(tokens)).tolist() == expected


def hard_logits(rows, vocabulary):
    """Base, proxy and reference: some rows with bans, some where these leave the proxy or the reference nothing."""
    base, proxy, before = (random_logits(rows, vocabulary, seed=i) for i in range(3))
    base[::3] = base[::3].masked_fill(random_logits(*base[::3].shape, seed=9) > 0.5, -torch.inf)
    proxy[6] = before[9] = -torch.inf
    return base, proxy, before


@pytest.mark.parametrize("rule", ONE_OF_EACH, ids=repr)
@pytest.mark.parametrize("at_once", [1, 40, 41, 100, 360])
def test_rows_are_composed_in_parts_as_they_are_at_once(rule, at_once, monkeypatch):
    logits = hard_logits(13, 40)
    whole = compose(rule, *logits)
    monkeypatch.setattr(composition, "COMPOSED_AT_ONCE", at_once)
    parts = compose(rule, *logits)
    for field in dataclasses.fields(Composition):
        one, other = getattr(parts, field.name), getattr(whole, field.name)
        assert (one is None) == (other is None)
        assert one is None or (torch.equal(one, other) and one.dtype == other.dtype)


@pytest.mark.parametrize("rule", ONE_OF_EACH, ids=repr)
def test_what_is_not_looked_up_is_computed_all_the_same(rule, monkeypatch):
    """Where looking would wait for the device, bans and empty rows are provided for whether there are any or not."""
    for logits in (hard_logits(13, 40), [random_logits(3, 40, seed=i) for i in range(3)]):
        looked = compose(rule, *logits)
        with monkeypatch.context() as patch:
            patch.setattr(composition, "may_be_any", lambda flags: True)
            computed = compose(rule, *logits)
        for probs in ("base_probs", "proxy_probs", "target_probs"):
            assert torch.equal(getattr(looked, probs), getattr(computed, probs))


def test_flags_are_looked_up_on_the_cpu_alone():
    assert not may_be_any(torch.tensor([False, False]))
    assert may_be_any(torch.tensor([False, True]))
    assert may_be_any(torch.zeros(2, dtype=torch.bool, device="meta"))


def test_no_rows_are_composed_to_no_rows():
    for rule in ONE_OF_EACH:
        made = compose(rule, *(torch.zeros(0, 7) for _ in range(3)))
        assert made.base_probs.shape == made.proxy_probs.shape == made.target_probs.shape == (0, 7)
        assert made.deferral_mass is None or made.deferral_mass.shape == (0,)


def test_a_base_that_bans_leaves_the_proxys_logits_as_they_were():
    base, proxy, _ = hard_logits(13, 40)
    before = base.clone(), proxy.clone()
    compose(DualDeferral(0.2), base, proxy)
    assert torch.equal(base, before[0])
    assert torch.equal(proxy, before[1])


def test_finite_adjustments_of_the_base_leave_the_proxy_alone():
    base, proxy = random_logits(4, 9, seed=1), random_logits(4, 9, seed=2)
    penalised = base.clone()
    penalised[:, 2] -= 50
    assert torch.equal(compose(Ensemble(0.5), penalised, proxy).proxy_probs, proxy.softmax(-1))


def test_a_reference_is_asked_for_by_name():
    with pytest.raises(ValueError, match="reference_probs"):
        compose(ImplicitReward(), random_logits(2, 5, seed=1), random_logits(2, 5, seed=2))
