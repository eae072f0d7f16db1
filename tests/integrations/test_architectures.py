"""What docs/architectures.md says of every family is what is found of it, and no text is wrong.

Families as proxies have a file of their own, which another process can run at the same time.
"""

import pytest
from architectures import (
    DIFFERS,
    EQUAL,
    OWN_DIFFER,
    PAGE,
    ROLES,
    Entry,
    entries,
    judged,
    own_verdicts,
    page,
    read_page,
    reason,
    verdicts_as,
)
from tiny_families import NOT_SURVEYED
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


@pytest.fixture(scope="module")
def published():
    return read_page(PAGE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry.name)
def test_a_family_and_its_base_are_what_the_page_says(entry: Entry, published):
    model, expected = entry.build(), published[entry.name]
    own = own_verdicts(model)
    assert own == expected["own"]
    assert verdicts_as("base", model, own) == expected["base"]


def test_the_page_lists_every_family_once(published):
    assert list(published) == [entry.name for entry in entries()]
    assert {entry.family for entry in entries()} | set(NOT_SURVEYED) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert page(published) == PAGE.read_text(encoding="utf-8")


def test_no_text_is_wrong_where_transformers_agrees_with_itself(published):
    wrong = {
        (name, role, check): verdict
        for name, found in published.items()
        for role in ROLES
        for check, verdict in found[role].items()
        if verdict not in (EQUAL, OWN_DIFFER) and not verdict.startswith("refused: ")
    }
    assert wrong == {}


def test_nothing_is_said_where_transformers_disagrees_with_itself():
    verdicts = {"token by token": DIFFERS, "batch": DIFFERS, "beams": "error: ValueError", "speculative": EQUAL}
    own = {"alone": EQUAL, "batch": EQUAL, "beams": EQUAL}
    assert judged(verdicts, own) == verdicts
    assert judged(verdicts, own | {"batch": DIFFERS}) == verdicts | {"batch": OWN_DIFFER}
    assert judged(verdicts, own | {"beams": "error: ValueError"}) == verdicts | {"beams": OWN_DIFFER}
    alone = judged(verdicts, own | {"alone": DIFFERS})
    assert alone == dict.fromkeys(verdicts, OWN_DIFFER) | {"speculative": EQUAL}


def test_a_reason_has_no_values():
    message = "The base Gemma2ForCausalLM (unnamed) has a window of 8 tokens, got 3 rows. Generate one at a time."
    assert reason(message) == "The base M has a window of N tokens"
