"""Every parameter of every rule has a control whose values the rule takes."""

from dataclasses import fields

import pytest

from transformers_kad.recipes.playground.controls import make_controls, parameters_of
from transformers_kad.rules.registry import RULES, make_rule

CONTROLS = make_controls()


def test_every_parameter_has_a_control_but_the_limit_of_the_search():
    expected = [(rule, field.name) for rule, cls in RULES.items() for field in fields(cls)]
    expected.remove(("exact", "max_states"))
    assert [(control.rule, control.name) for control in CONTROLS] == expected


@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: f"{control.rule}-{control.name}")
def test_a_rule_takes_all_that_its_control_offers(control):
    others = {"smallest_threshold": 0.01, "largest_threshold": 1.0}
    others = others if control.rule == "paced" and control.name == "threshold" else {}
    if control.name == "smallest_threshold":
        others = {"threshold": 1.0}
    if control.name == "largest_threshold":
        others = {"threshold": 0.01}
    values = control.choices or (control.low, control.low + control.step, control.high)
    for value in values:
        make_rule(control.rule, **others, **{control.name: value})
    assert make_rule(control.rule) == make_rule(control.rule, **{control.name: control.default})


@pytest.mark.parametrize("control", [c for c in CONTROLS if not c.choices], ids=lambda c: f"{c.rule}-{c.name}")
def test_the_default_is_a_value_of_the_slider(control):
    steps = (control.default - control.low) / control.step
    assert control.low <= control.default <= control.high
    assert abs(steps - round(steps)) < 1e-6
    assert (control.high - control.low) / control.step >= 99


def test_the_parameters_of_a_rule_are_picked_from_the_values_of_all():
    values = [f"{control.rule}.{control.name}" for control in CONTROLS]
    assert parameters_of("dual", CONTROLS, values) == {"threshold": "dual.threshold"}
    assert parameters_of("cascade", CONTROLS, values) == {"variant": "cascade.variant", "alpha": "cascade.alpha"}
