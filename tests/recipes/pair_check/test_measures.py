"""The figures of a text, against their definitions computed position by position."""

import pytest
import torch

from transformers_kad import DualDeferral, Ensemble, PacedDeferral, PrimalDeferral
from transformers_kad.recipes.pair_check.measures import (
    BINS,
    measure_agreement,
    measure_prediction,
    measure_rules,
)
from transformers_kad.recipes.pair_check.reading import Positions

SIZE, LENGTH = 12, 40


def distributions(seed, sharpness):
    generator = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(LENGTH, SIZE, generator=generator)).softmax(-1)


P, Q = distributions(0, 2.5), distributions(1, 2.0)
TOKENS = torch.arange(LENGTH) % SIZE
NONE_UNKNOWN = torch.zeros(SIZE, dtype=torch.bool)


def blocks(size, p=P, q=Q, unknown=NONE_UNKNOWN):
    for start in range(0, LENGTH, size):
        part = slice(start, start + size)
        yield Positions(TOKENS[part], p[part], q[part], unknown)


@pytest.mark.parametrize("size", [1, 4, LENGTH])
def test_agreement_by_hand(size):
    found = measure_agreement(blocks(size))
    variation = sum(abs(float(a) - float(b)) for x, y in zip(P, Q, strict=True) for a, b in zip(x, y, strict=True)) / 2
    tops = [(int(x.argmax()), int(y.argmax()), float(x.max())) for x, y in zip(P, Q, strict=True)]
    assert found["tokens"] == LENGTH
    assert found["total_variation"] == pytest.approx(variation, rel=1e-5)
    assert found["agreements"] == sum(a == b for a, b, _ in tops)
    assert found["sure"] == sum(top >= 0.9 for *_, top in tops)
    assert found["sure_disagreements"] == sum(top >= 0.9 and a != b for a, b, top in tops)
    assert 0 < found["sure_disagreements"] < found["sure"] < LENGTH  # every kind of position is there
    assert found["unknown_mass"] == 0


def test_mass_on_tokens_that_the_proxy_lacks():
    unknown = NONE_UNKNOWN.clone()
    unknown[[2, 5]] = True
    assert measure_agreement(blocks(4, unknown=unknown))["unknown_mass"] == pytest.approx(float(P[:, [2, 5]].sum()))


RULES = [DualDeferral(0.4), PrimalDeferral(0.7), Ensemble(0.3), PacedDeferral(budget=0.1, step_size=2.0)]


def paced_by_hand(rule):
    """The targets and masses of a rule with a memory, from the first position of the text on."""
    state, targets, masses = rule.initial_state(1), [], []
    for p, q in zip(P, Q, strict=True):
        target, mass, state = rule.step(p[None], q[None], state)
        targets.append(target[0])
        masses.append(float(mass))
    return torch.stack(targets), sum(masses)


@pytest.mark.parametrize("size", [1, 4, LENGTH])
def test_rules_by_hand(size):
    found = measure_rules(blocks(size), RULES, draft_length=3)
    for rule, figures in zip(RULES, found["rules"], strict=True):
        if isinstance(rule, PacedDeferral):
            target, mass = paced_by_hand(rule)
            assert not torch.allclose(target, rule(P, Q))  # the memory matters on this text
        else:
            target = rule(P, Q)
            mass = None if isinstance(rule, Ensemble) else float((P * rule.defer(P, Q)).sum())
        assert figures["deferral_mass"] == (None if mass is None else pytest.approx(mass, rel=1e-5))
        assert figures["acceptance"] == pytest.approx(float(torch.minimum(Q, target).sum()), rel=1e-5)
        assert figures["kept_of_base"] == pytest.approx(float(torch.minimum(P, target).sum()), rel=1e-5)
        assert 1 <= figures["rounds"] <= LENGTH
    assert len({figures["rounds"] for figures in found["rules"]}) == len(RULES)


def test_the_histogram_holds_the_mass_of_the_base():
    histogram = measure_rules(blocks(4), RULES, draft_length=3)["histogram"]
    assert len(histogram) == BINS
    assert sum(histogram) == pytest.approx(LENGTH)
    assert sum(histogram[:40]) == pytest.approx(float(P[P < 0.4].sum()), rel=1e-5)


def test_prediction_leaves_out_tokens_that_the_proxy_lacks():
    unknown = NONE_UNKNOWN.clone()
    unknown[4] = True
    found = measure_prediction(blocks(4, unknown=unknown))
    kept = [(at, token) for at, token in enumerate(TOKENS.tolist()) if token != 4]
    assert (found["tokens"], found["unknown"]) == (len(kept), LENGTH - len(kept))
    assert found["base_nats"] == pytest.approx(-sum(float(P[at, token].log()) for at, token in kept), rel=1e-5)
    assert found["proxy_nats"] == pytest.approx(-sum(float(Q[at, token].log()) for at, token in kept), rel=1e-5)
