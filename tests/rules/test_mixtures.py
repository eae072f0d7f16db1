"""The rules without a deferral mask."""

import re

import pytest
import reference
import torch
from rule_cases import ALL_RULES, close, random_rows

from transformers_kad import BlendIn, DeferralRule, Ensemble, ImplicitReward

WITHOUT_MASK = [rule for rule in ALL_RULES if not isinstance(rule, DeferralRule)]


def test_rules_without_a_mask_give_back_a_distribution_that_both_models_share():
    p = random_rows(20, 30, seed=1)
    for rule in WITHOUT_MASK:
        torch.testing.assert_close(rule(p, p, p), p, rtol=0, atol=1e-6)


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
