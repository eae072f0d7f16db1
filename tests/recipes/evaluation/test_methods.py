"""Words of a command line become methods: names, parameters of their own, shared ones, grids."""

import pytest

from transformers_kad import RULES, KADConfig
from transformers_kad.recipes.evaluation.methods import PLAIN_METHODS, RULE_METHODS, Method, parse_methods


def labels(*words, **kwargs):
    return [method.label for method in parse_methods(words, **kwargs)]


def test_every_name_makes_a_method_with_its_own_label():
    names = [*PLAIN_METHODS, *RULE_METHODS]
    methods = parse_methods(names)
    assert [method.name for method in methods] == names
    assert len({method.label for method in methods}) == len(names)


def test_every_rule_can_be_evaluated():
    assert {rule for rule, _ in RULE_METHODS.values()} == set(RULES)


def test_values_of_a_word_of_the_options_and_the_defaults_in_this_order():
    shared = {"threshold": 0.7}
    assert labels("kad-dual:threshold=0.3", "nudging", "kad-primal", parameters=shared) == [
        "kad-dual threshold=0.3",
        "nudging threshold=0.7",
        f"kad-primal budget={RULES['primal']().budget:g}",
    ]


def test_several_values_make_several_methods_each_once():
    assert labels("kad-dual:threshold=0.3,0.5:num_assistant_tokens=3,5", "kad-dual:threshold=0.3", "base", "base") == [
        "kad-dual threshold=0.3 num_assistant_tokens=3",
        "kad-dual threshold=0.3",
        "kad-dual threshold=0.5 num_assistant_tokens=3",
        "kad-dual threshold=0.5",
        "base",
    ]


def test_values_that_differ_little_have_labels_that_differ():
    assert labels("kad-dual:threshold=0.12345678,0.1234567,0.9999999,1.0") == [
        f"kad-dual threshold={value}" for value in ("0.12345678", "0.1234567", "0.9999999", "1")
    ]


def test_a_name_that_settles_a_parameter():
    (method,) = parse_methods(["cascade-token-v3:alpha=0.25"])
    assert method.config.parameters == {"variant": "token_v3", "alpha": 0.25}
    assert method.label == "cascade-token-v3 alpha=0.25"
    with pytest.raises(TypeError, match="variant"):
        parse_methods(["cascade-opt:variant=diff"])


def test_settings_reach_every_rule_and_stock_speculative_decoding():
    settings = {"num_assistant_tokens": 3, "component_temperature": 0.5, "verification": "block"}
    dual, assisted, base = parse_methods(["kad-dual", "assisted", "base"], settings=settings)
    assert (dual.config.num_assistant_tokens, dual.config.component_temperature) == (3, 0.5)
    assert dual.config.verification == "block"
    assert assisted.num_assistant_tokens == 3
    assert assisted.label == "assisted num_assistant_tokens=3"
    assert base == Method("base")
    assert labels("assisted:num_assistant_tokens=2,5") == ["assisted num_assistant_tokens=2", "assisted"]


def test_the_rule_of_a_config():
    config = KADConfig("primal", {"budget": 0.9}, 1.0, 7, base="b", proxy="q", drafter="prompt_lookup", compile=True)
    (method,) = parse_methods(["config"], config=config)
    assert method.config == config
    assert method.label == "config primal budget=0.9 num_assistant_tokens=7"


@pytest.mark.parametrize(
    ("words", "kwargs", "error", "message"),
    [
        (["kad-duel"], {}, ValueError, "kad-duel.*Did you mean 'kad-dual'"),
        (["kad-dual:treshold=0.4"], {}, TypeError, "treshold.*Did you mean 'threshold'"),
        (["kad-dual:threshold=1.4"], {}, ValueError, "1.4"),
        (["kad-dual:threshold"], {}, ValueError, "name:parameter=value"),
        (["kad-dual:threshold="], {}, ValueError, "name:parameter=value"),
        (["base:threshold=0.4"], {}, TypeError, "threshold"),
        (["base", "kad-primal"], {"parameters": {"margin": 0.1}}, ValueError, "base, kad-primal.*margin"),
        (["config"], {}, ValueError, "--config"),
        (["base", "proxy"], {"settings": {"num_assistant_tokens": 3}}, ValueError, "num_assistant_tokens"),
        (["assisted:num_assistant_tokens=0"], {}, ValueError, 'positive integer or "auto", got 0'),
        (["assisted:num_assistant_tokens=auto"], {}, ValueError, "transformers' own decoding"),
        (["kad-dual:num_assistant_tokens=2.5"], {}, ValueError, "2.5"),
        (["kad-dual:verification=blok"], {}, ValueError, "verification 'blok'. Did you mean 'block'"),
        (["kad-dual:threshold=" + "1" * 5000], {}, ValueError, "The value '111.*can't be used"),
        (["kad-dual:threshold=" + "[" * 5000], {}, ValueError, "nested more than"),
        (["base"], {"settings": {"verification": "block"}}, ValueError, "verification"),
    ],
)
def test_what_can_not_be_meant_is_refused(words, kwargs, error, message):
    with pytest.raises(error, match=message):
        parse_methods(words, **kwargs)
