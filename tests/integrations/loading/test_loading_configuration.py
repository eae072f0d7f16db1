"""Configurations from names: what a saved one gives, what is set beside it, and which models they name."""

from dataclasses import fields

import pytest

from transformers_kad import RULES, KADConfig
from transformers_kad.integrations.loading.configuration import (
    OWN_SETTINGS,
    RULE_PARAMETERS,
    config_from,
    split_settings,
    with_models,
)
from transformers_kad.recipes.arguments import RuleParameters

SAVED = KADConfig("primal", {"budget": 0.8}, component_temperature=0.7, base="some/base", proxy="some/proxy")


@pytest.fixture
def folder(tmp_path):
    SAVED.save_pretrained(tmp_path)
    return tmp_path


def test_without_anything_it_is_the_default():
    assert config_from() == KADConfig()


def test_a_saved_configuration_is_kept_where_nothing_else_is_set(folder):
    assert config_from(folder) == SAVED
    changed = config_from(folder, settings={"budget": 0.3, "num_assistant_tokens": "auto", "verification": "block"})
    assert (changed.rule, dict(changed.parameters)) == ("primal", {"budget": 0.3})
    assert (changed.component_temperature, changed.num_assistant_tokens) == (0.7, "auto")
    assert changed.verification == "block"


def test_another_rule_drops_the_saved_parameters_and_the_same_rule_keeps_them(folder):
    assert config_from(folder, "nudging").parameters == {}
    assert config_from(folder, "nudging").component_temperature == 0.7
    assert config_from(folder, "primal").parameters == {"budget": 0.8}


@pytest.mark.parametrize(("given", "expected"), [("3", 3), (3, 3), ("auto", "auto")])
def test_a_draft_length_may_be_text(given, expected):
    assert split_settings({"num_assistant_tokens": given}) == ({}, {"num_assistant_tokens": expected})


def test_a_parameter_of_another_rule_is_refused():
    with pytest.raises(TypeError, match="budget"):
        config_from(rule="dual", settings={"budget": 0.5})


def test_every_parameter_of_a_rule_is_known_and_has_an_option():
    assert set(RULE_PARAMETERS) == {field.name for rule in RULES.values() for field in fields(rule)}
    assert {field.name for field in fields(RuleParameters)} == {*RULE_PARAMETERS, *OWN_SETTINGS}


def test_models_that_are_given_take_precedence():
    named = with_models(SAVED, "other/base", None)
    assert (named.base, named.proxy, named.parameters) == ("other/base", "some/proxy", {"budget": 0.8})


def test_a_folder_with_an_adapter_is_the_proxy_that_is_not_there(folder):
    assert with_models(SAVED, None, None, folder).proxy == "some/proxy"
    (folder / "adapter_config.json").write_text("{}")
    assert with_models(SAVED, None, None, folder).proxy == str(folder)
    assert with_models(SAVED, None, "given/proxy", folder).proxy == "given/proxy"


def test_models_that_are_named_nowhere_are_missing():
    with pytest.raises(ValueError, match="got None and 'a/proxy'"):
        with_models(KADConfig(), None, "a/proxy")
