"""The rule that paces itself: its thresholds, its budget over a text, and the states of the texts of a batch."""

import math
import re

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_cases import close, deterministic, random_rows

from transformers_kad import DualDeferral, PacedDeferral, StatefulRule, make_rule


def follow(rule, p, q):
    """The steps of a rule along texts `(B, T, V)`: targets, masses `(B, T)`, and states `(B, T + 1)`."""
    state = rule.initial_state(len(p))
    targets, masses, states = [], [], [state]
    for at in range(p.shape[1]):
        target, mass, state = rule.step(p[:, at], q[:, at], state)
        targets.append(target)
        masses.append(mass)
        states.append(state)
    return torch.stack(targets, 1), torch.stack(masses, 1), torch.stack(states, 1)


def test_thresholds_and_targets_are_those_of_the_formulas():
    rule = PacedDeferral(budget=0.3, threshold=0.35, step_size=2.0, smallest_threshold=0.2, largest_threshold=0.5)
    p, q = random_rows(3, 12, 8, seed=1), random_rows(3, 12, 8, seed=2)
    targets, masses, states = follow(rule, p, q)
    reached = set()
    for row in range(3):
        multiplier = -math.log(0.35)
        for at in range(12):
            own, other = p[row, at].tolist(), q[row, at].tolist()
            assert float(states[row, at]) == pytest.approx(multiplier, abs=1e-5)
            deferred = [value < math.exp(-multiplier) for value in own]
            mass = reference.mass(own, deferred)
            assert float(masses[row, at]) == pytest.approx(mass, abs=1e-6)
            assert close(targets[row, at], reference.mix(own, other, deferred))
            moved = multiplier + 2.0 * (mass - 0.3)
            multiplier = min(max(moved, -math.log(0.5)), -math.log(0.2))
            reached.add(moved == multiplier)
    assert reached == {True, False}  # some steps reach a bound


def test_the_first_position_is_that_of_the_dual_rule():
    p, q = random_rows(4, 5, 9, seed=1), random_rows(4, 5, 9, seed=2)
    rule, dual = PacedDeferral(threshold=0.3), DualDeferral(0.3)
    assert torch.equal(rule.defer(p), dual.defer(p))
    assert torch.equal(rule(p, q), dual(p, q))


@given(
    seed=st.integers(0, 10**6),
    budget=st.floats(0.05, 0.9),
    step_size=st.floats(0.01, 1.0),
    spread=st.sampled_from([0.5, 2.0, 6.0]),
)
@settings(deterministic)
def test_the_mean_mass_of_a_text_is_the_budget_up_to_what_the_multiplier_moved(seed, budget, step_size, spread):
    rule = PacedDeferral(budget, 0.4, step_size, smallest_threshold=1e-30)
    p = random_rows(2, 60, 12, seed=seed, spread=spread)
    _, masses, states = follow(rule, p, p)
    moved = (states[:, -1] - states[:, 0]) / (step_size * masses.shape[1])
    below_the_budget = (states[:, 1:] == 0).any(-1)  # even the largest threshold, 1, defers no more
    gap = masses.mean(-1) - budget
    torch.testing.assert_close(gap[~below_the_budget], moved[~below_the_budget], rtol=0, atol=1e-4)
    assert bool((gap[below_the_budget] <= moved[below_the_budget] + 1e-4).all())


def test_texts_of_different_kinds_defer_the_same_on_average():
    sure, unsure = random_rows(1, 400, 30, seed=1, spread=6.0), random_rows(1, 400, 30, seed=2, spread=1.0)
    p = torch.cat([sure, unsure])
    _, masses, _ = follow(PacedDeferral(0.4, 0.3, step_size=0.5), p, p)
    assert masses.mean(-1).tolist() == pytest.approx([0.4, 0.4], abs=0.03)
    fixed = p.where(p < 0.3, torch.tensor(0.0)).sum(-1).mean(-1)
    assert abs(float(fixed[0] - fixed[1])) > 0.3


def test_every_text_has_a_state_of_its_own_which_no_step_writes_to():
    rule = PacedDeferral(step_size=1.0)
    p, q = random_rows(3, 6, 8, seed=1), random_rows(3, 6, 8, seed=2)
    together = follow(rule, p, q)
    for row in range(3):
        alone = follow(rule, p[row : row + 1], q[row : row + 1])
        for values, own in zip(together, alone, strict=True):
            assert torch.equal(values[row : row + 1], own)
    state = rule.initial_state(3)
    before = state.clone()
    _, _, after = rule.step(p[:, 0], q[:, 0], state)
    assert torch.equal(state, before)
    assert not torch.equal(after, before)


def test_it_is_a_rule_with_a_name():
    rule = make_rule("paced", budget=0.2, step_size=0.5)
    assert rule == PacedDeferral(budget=0.2, step_size=0.5)
    assert isinstance(rule, StatefulRule)
    assert not rule.needs_proxy


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"budget": 1.5}, "`PacedDeferral.budget` must lie in [0, 1], got 1.5."),
        ({"step_size": 0}, "`PacedDeferral.step_size` must lie in (0, inf), got 0."),
        ({"threshold": 0.005}, "`smallest_threshold` = 0.01 and `largest_threshold` = 1.0, got 0.005."),
        ({"largest_threshold": 0.3}, "`smallest_threshold` = 0.01 and `largest_threshold` = 0.3, got 0.4."),
    ],
)
def test_parameters_out_of_range_are_named(parameters, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PacedDeferral(**parameters)
