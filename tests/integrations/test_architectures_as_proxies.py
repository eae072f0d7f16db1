"""What docs/architectures.md says of every family as a proxy is what is found of it."""

import pytest
from architectures import IS_VERSION_OF_PAGE, PAGE, Entry, entries, own_verdicts, read_page, verdicts_as, wrong_in
from versions import skip_if_not_yet


@pytest.fixture(scope="module")
def published():
    return read_page(PAGE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry.name)
def test_a_family_as_a_proxy_is_what_the_page_says(entry: Entry, published):
    skip_if_not_yet(entry.family)
    model = entry.build()
    if IS_VERSION_OF_PAGE:
        expected = published[entry.name]
        assert verdicts_as("proxy", model, expected["own"]) == expected["proxy"]
    else:
        assert wrong_in(verdicts_as("proxy", model, own_verdicts(model))) == {}
