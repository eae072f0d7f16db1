"""Verdicts: which figure leads to which finding, and what decides."""

import copy

import pytest

from transformers_kad.recipes.pair_check.verdict import Finding, find, verdict_of

TEXT = {
    "tokens_per_text": 60.0,
    "ended": 0.9,
    "total_variation": 0.2,
    "agreement": 0.85,
    "sure": 0.6,
    "sure_and_contradicted": 0.02,
    "agreement_where_sure": 0.97,
    "unknown_mass": 0.0,
}
COMPATIBILITY = {
    "vocabulary": {"difference": None, "shares": 1.0, "refusal": None, "report": None},
    "templates": {"base": True, "proxy": True, "prompts_equal": True},
    "ends": {"of_call": [2], "proxy": 1, "proxy_shared": 1},
    "parameters": {"base": 1000, "proxy": 100},
    "chat": "auto",
    "proxy_chat": "same",
}
FIGURES = {
    "prompts": 40,
    "failed": 0,
    "texts": {name: dict(TEXT) for name in ("kad", "base", "proxy")},
    "prompts_predicted": {"proxy_knows": 0.8},
}
RECOMMENDED = {"deferral_mass": 0.1, "deferral_mass_interval": [0.08, 0.12], "kept_of_base": 0.8, "speed_up": 1.7}


def findings(**changes):
    """The findings of a good pair with some figures changed, each given by the keys that lead to it."""
    parts = copy.deepcopy({"compatibility": COMPATIBILITY, "figures": FIGURES, "recommended": RECOMMENDED})
    for path, value in changes.items():
        place = parts
        *keys, last = path.split("__")
        for key in keys:
            place = place[key]
        place[last] = value
    return find(parts["compatibility"], parts["figures"], parts["recommended"])


def test_nothing_speaks_against_a_good_pair():
    assert findings() == []
    assert verdict_of([]) == "good"


KAD, VOCABULARY = "figures__texts__kad__", "compatibility__vocabulary__"
CASES = [
    ({f"figures__texts__{name}__total_variation": 0.004 for name in FIGURES["texts"]}, "same_model", "bad"),
    ({"figures__prompts_predicted__proxy_knows": 0.01}, "proxy_knows", "bad"),
    ({"figures__prompts_predicted__proxy_knows": -0.9}, "proxy_knows", "bad"),
    ({"figures__prompts_predicted__proxy_knows": 0.4}, "proxy_knows", "doubtful"),
    ({KAD + "agreement_where_sure": 0.2}, "contradicts", "bad"),
    ({KAD + "agreement_where_sure": 0.7}, "contradicts", "doubtful"),
    ({KAD + "unknown_mass": 0.3}, "unknown_tokens", "bad"),
    ({KAD + "unknown_mass": 0.1}, "unknown_tokens", "doubtful"),
    ({"compatibility__parameters__proxy": 1000}, "proxy_is_large", "doubtful"),
    ({"recommended__kept_of_base": 0.99}, "no_effect", "doubtful"),
    ({"recommended__deferral_mass": 0.41}, "takes_over", "doubtful"),
    ({"recommended__deferral_mass": 0.6}, "takes_over", "bad"),
    ({"figures__prompts": 1}, "few_prompts", "doubtful"),
    ({"figures__failed": 3}, "failed_prompts", "note"),
    ({"figures__failed": 40}, "failed_prompts", "doubtful"),
    ({KAD + "tokens_per_text": 1.0}, "short_texts", "doubtful"),
    ({"compatibility__ends__of_call": []}, "no_end", "doubtful"),
    ({"compatibility__ends__proxy_shared": 0}, "end_not_shared", "doubtful"),
    ({KAD + "ended": 0.3}, "kad_does_not_end", "doubtful"),
    ({"figures__texts__proxy__ended": 0}, "proxy_does_not_end", "note"),
    ({"compatibility__templates__proxy": False}, "no_proxy_template", "doubtful"),
    ({"compatibility__templates__prompts_equal": False}, "templates_differ", "doubtful"),
    ({"compatibility__chat": "no"}, "proxy_reads_plain_text", "doubtful"),
    ({"compatibility__proxy_chat": "no"}, "proxy_reads_plain_text", "doubtful"),
    ({"compatibility__templates__base": False}, "base_reads_proxy_template", "note"),
    ({VOCABULARY + "difference": "ids differ", VOCABULARY + "shares": 0.9}, "vocabulary_aligned", "doubtful"),
    ({VOCABULARY + "difference": "ids differ", VOCABULARY + "shares": 0.7}, "vocabulary", "bad"),
    (
        {VOCABULARY + "difference": "x", VOCABULARY + "refusal": "WordPiece.", VOCABULARY + "shares": 0},
        "vocabulary",
        "bad",
    ),
    ({"recommended__speed_up": 0.7}, "slow", "note"),
]


@pytest.mark.parametrize("changes, name, level", CASES)
def test_each_figure_is_found_alone(changes, name, level):
    (finding,) = findings(**changes)
    assert (finding.name, finding.level) == (name, level)
    assert finding.text.endswith(".")
    assert verdict_of([finding]) == ("good" if level == "note" else level)


def test_one_bad_finding_decides_and_stands_first():
    found = findings(figures__prompts=3, recommended__speed_up=0.5, figures__prompts_predicted__proxy_knows=0.1)
    assert [finding.level for finding in found] == ["bad", "doubtful", "note"]
    assert verdict_of(found) == "bad"


def test_a_share_of_the_proxy_is_named_with_its_interval():
    (finding,) = findings(recommended__deferral_mass=0.41, recommended__deferral_mass_interval=[0.38, 0.44])
    assert "takes over 41% of the tokens (38% to 44%): pairs above about 20% often fail" in finding.text


def test_texts_that_were_cut_are_not_called_short():
    assert (
        findings(**{KAD + "tokens_per_text": 2.0, KAD + "ended": 0.0, "figures__texts__proxy__ended": 0.0})[0].level
        == "note"
    )


def test_a_base_that_is_never_sure_is_not_contradicted():
    assert findings(figures__texts__kad__agreement_where_sure=None) == []


def test_prompts_of_the_proxy_s_own_may_differ_from_the_base_s():
    assert findings(compatibility__templates__prompts_equal=False, compatibility__proxy_chat="yes") == []
    plain = {"compatibility__chat": "no", "compatibility__proxy_chat": "yes", "compatibility__templates__base": False}
    assert findings(**plain) == []


def test_plain_text_is_right_for_a_proxy_without_a_template():
    plain = {"base": False, "proxy": False, "prompts_equal": None}
    assert findings(compatibility__templates=plain, compatibility__chat="no") == []


def test_the_same_model_twice_is_one_reason():
    same = {f"figures__texts__{name}__total_variation": 0.0 for name in FIGURES["texts"]}
    found = findings(**same, recommended__deferral_mass=0.6, recommended__kept_of_base=0.999)
    assert [finding.name for finding in found] == ["same_model"]


def test_without_texts_the_tokenizers_are_the_reason():
    vocabulary = {"difference": "ids differ", "shares": 0.3, "refusal": "too little", "report": None}
    (finding,) = find({**COMPATIBILITY, "vocabulary": vocabulary}, None, None)
    assert isinstance(finding, Finding)
    assert "can't be aligned. too little" in finding.text
    (finding,) = find({**COMPATIBILITY, "vocabulary": {**vocabulary, "report": {"shared": 7}}}, None, None)
    assert "share only 30% of the tokens" in finding.text
