"""The table of the rules, and what an unknown name is told."""

import pytest

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
    PacedDeferral,
    PrimalDeferral,
    make_rule,
)

NEEDS_PROXY = {"confidence_bet", "cascade"}


def test_the_table_holds_all_rules():
    assert {
        "dual": DualDeferral,
        "primal": PrimalDeferral,
        "exact": ExactDeferral,
        "nudging": NudgingDeferral,
        "confidence_bet": ConfidenceBetDeferral,
        "cascade": CascadeDeferral,
        "paced": PacedDeferral,
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
