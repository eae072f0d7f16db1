"""From logits to the target: bans, rows in parts, and a distribution of the proxy that is known already."""

import dataclasses

import pytest
import reference
import torch
from rule_cases import ALL_RULES, close, random_logits

from transformers_kad import DeferralRule, DualDeferral, Ensemble, ImplicitReward
from transformers_kad.rules import arithmetic, composition
from transformers_kad.rules.composition import Composition, compose, proxy_distribution


@pytest.mark.parametrize("rule", ALL_RULES, ids=repr)
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


@pytest.mark.parametrize("rule", ALL_RULES, ids=repr)
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


@pytest.mark.parametrize("rule", ALL_RULES, ids=repr)
def test_what_is_not_looked_up_is_computed_all_the_same(rule, monkeypatch):
    """Where looking would wait for the device, bans and empty rows are provided for whether there are any or not."""
    for logits in (hard_logits(13, 40), [random_logits(3, 40, seed=i) for i in range(3)]):
        looked = compose(rule, *logits)
        with monkeypatch.context() as patch:
            for module in (composition, arithmetic):
                patch.setattr(module, "may_be_any", lambda flags: True)
            computed = compose(rule, *logits)
        for probs in ("base_probs", "proxy_probs", "target_probs"):
            assert torch.equal(getattr(looked, probs), getattr(computed, probs))


def test_no_rows_are_composed_to_no_rows():
    for rule in ALL_RULES:
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


# --- A distribution of the proxy that is known already --------------------------------------------------------------


FIELDS = [field.name for field in dataclasses.fields(Composition)]


def assert_equal(one, other):
    for name in FIELDS:
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("rule", ALL_RULES, ids=repr)
@pytest.mark.parametrize("at_once", [40, 2**20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_known_distribution_of_the_proxy_changes_no_bit(rule, at_once, dtype, monkeypatch):
    monkeypatch.setattr(composition, "COMPOSED_AT_ONCE", at_once)
    without_bans = [random_logits(13, 40, seed=i).to(dtype) for i in range(3)]
    empty_row = [x.clone() for x in without_bans]
    empty_row[1][4] = -torch.inf
    for logits in (without_bans, empty_row, [x.to(dtype) for x in hard_logits(13, 40)]):
        known = logits[1].float().softmax(-1)
        assert_equal(compose(rule, *logits, proxy_probs=known), compose(rule, *logits))


def test_a_known_distribution_of_the_proxy_is_used_where_no_token_is_banned_and_only_there(monkeypatch):
    base, proxy, other = (random_logits(3, 40, seed=i) for i in range(3))
    known = other.softmax(-1)  # of other logits, so that it shows where it is used
    assert torch.equal(compose(DualDeferral(0.2), base, proxy, proxy_probs=known).proxy_probs, known)
    banned = base.clone()
    banned[0, 7] = -torch.inf
    assert_equal(
        compose(DualDeferral(0.2), banned, proxy, proxy_probs=known), compose(DualDeferral(0.2), banned, proxy)
    )
    for module in (composition, arithmetic):
        monkeypatch.setattr(module, "may_be_any", lambda flags: True)  # as on other devices
    assert torch.equal(compose(DualDeferral(0.2), base, proxy, proxy_probs=known).proxy_probs, proxy.softmax(-1))


def test_a_known_distribution_of_another_shape_is_refused_and_both_shapes_are_named():
    base, proxy = random_logits(4, 9, seed=1), random_logits(4, 9, seed=2)
    with pytest.raises(ValueError, match=r"proxy_probs.*\(1, 9\).*\(4, 9\)"):
        compose(DualDeferral(0.2), base, proxy, proxy_probs=proxy[:1].softmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_distribution_of_the_proxy_is_that_of_the_composition(dtype):
    for logits in (hard_logits(13, 40), [random_logits(3, 40, seed=i) for i in range(3)]):
        base, proxy = (x.to(dtype) for x in logits[:2])
        q = proxy_distribution(base, proxy, base.float().softmax(-1))
        assert q.dtype == torch.float32
        assert torch.equal(q, compose(Ensemble(0.5), base, proxy).proxy_probs)
        assert float(q[base == -torch.inf].sum()) == 0
        assert close(q.sum(-1), [1.0] * len(q))
