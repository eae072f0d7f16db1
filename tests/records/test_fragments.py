"""The parts of pages: that they are those of the trace page, and that what a model wrote is text in them."""

import re

import pytest
from made_traces import ATTACKS, Page, Strings, page_of, record, trace_of

from transformers_kad import KADTrace
from transformers_kad.records.fragments import (
    chart_fragment,
    legend_fragment,
    message_fragment,
    plain_text_fragment,
    styles,
    text_fragment,
    totals_fragment,
)


def without_details(page):
    return re.sub(r' (id="t\d+-\d+"|tabindex="-?\d+")', "", page)


def test_the_fragments_of_a_trace_are_parts_of_its_page():
    tokenizer = Strings("a", "<b>", "\n")
    trace = KADTrace(((record(0, 0.25), record(1, 1.0, mass=0.75, drafted=True), record(2)),))
    page = without_details(page_of(trace, tokenizer))
    for fragment in (
        text_fragment(trace, tokenizer),
        chart_fragment(trace, number=1),
        legend_fragment(has_shares=True),
        totals_fragment(3, None),
    ):
        assert fragment.strip()
        assert fragment.strip() in page


@pytest.mark.parametrize(
    "fragment",
    [
        text_fragment(trace_of(range(len(ATTACKS))), Strings(*ATTACKS)),
        plain_text_fragment("".join(ATTACKS)),
        message_fragment("".join(ATTACKS)),
        message_fragment("".join(ATTACKS), is_error=True),
    ],
    ids=["text", "plain", "note", "error"],
)
def test_what_a_model_or_a_visitor_wrote_is_text(fragment):
    page = Page(fragment)
    assert {tag for tag, _ in page.tags} <= {"div", "p", "span"}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert "".join(page.words.values()).replace("\n", "") == "".join(ATTACKS)


def test_a_rule_without_a_deferral_mass_has_no_chart_and_no_shade_in_the_legend():
    assert chart_fragment(trace_of([0], mass=None), number=1) == ""
    assert "shade" in legend_fragment(has_shares=True)
    assert "shade" not in legend_fragment(has_shares=False)


def test_errors_are_announced_and_notes_wait():
    assert 'role="alert"' in message_fragment("x", is_error=True)
    assert 'role="status"' in message_fragment("x")


def test_styles_name_their_scopes_and_every_colour_of_the_light_scheme_is_one_of_the_dark_too():
    light, dark = re.fullmatch(
        r"\.here \{(.*)\}\n\.dark \.here \{(.*?)\}", styles(".here", ".dark .here"), re.S
    ).groups()
    colours = re.findall(r"(--\w+):", light)
    assert len(colours) == 19
    assert re.findall(r"(--\w+):", dark) == colours
    used = set(re.findall(r"var\((--\w+)\)", light))
    assert used <= {*colours}
    assert "<" not in light + dark
