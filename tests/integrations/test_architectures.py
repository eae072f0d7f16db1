"""What docs/architectures.md says of every family is what is found of it, and no text is wrong.

Families as proxies have a file of their own, which another process can run at the same time.
"""

import pytest
from architectures import (
    DIFFERS,
    EQUAL,
    IS_VERSION_OF_PAGE,
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
    wrong_in,
)
from tiny_families import NOT_SURVEYED
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from versions import skip_if_not_yet


@pytest.fixture(scope="module")
def published():
    return read_page(PAGE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry.name)
def test_a_family_and_its_base_are_what_the_page_says(entry: Entry, published):
    skip_if_not_yet(entry.family)
    model = entry.build()
    own = own_verdicts(model)
    found = verdicts_as("base", model, own)
    assert wrong_in(found) == {}
    if IS_VERSION_OF_PAGE:
        assert own == published[entry.name]["own"]
        assert found == published[entry.name]["base"]


@pytest.mark.skipif(not IS_VERSION_OF_PAGE, reason="transformers is not of the version that the page was made with")
def test_the_page_lists_every_family_once(published):
    assert list(published) == [entry.name for entry in entries()]
    assert {entry.family for entry in entries()} | set(NOT_SURVEYED) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert page(published) == PAGE.read_text(encoding="utf-8")


def test_no_text_is_wrong_where_transformers_agrees_with_itself(published):
    wrong = {(name, role): wrong_in(found[role]) for name, found in published.items() for role in ROLES}
    assert {where: found for where, found in wrong.items() if found} == {}


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
