"""What docs/architectures.md says of every family as a proxy is what is found of it."""

import pytest
from architectures import PAGE, Entry, entries, read_page, verdicts_as


@pytest.fixture(scope="module")
def published():
    return read_page(PAGE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry.name)
def test_a_family_as_a_proxy_is_what_the_page_says(entry: Entry, published):
    expected = published[entry.name]
    assert verdicts_as("proxy", entry.build(), expected["own"]) == expected["proxy"]
