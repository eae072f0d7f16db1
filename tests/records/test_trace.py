"""A trace is a sequence of records, knows its call, and writes its page."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from made_traces import ATTACKS, Page, Strings, page_of, trace_of

from transformers_kad import DualDeferral, KADLogitsProcessor, KADTrace, TokenRecord


def test_a_trace_is_a_sequence_of_the_first_texts_records():
    first, second = ([TokenRecord(v, 0.1, 0.2, 0.3, None, None, False) for v in ids] for ids in ([4, 5, 6], [7]))
    trace = KADTrace((tuple(first), tuple(second)))
    assert isinstance(trace, Sequence)
    assert list(trace) == first
    assert len(trace) == 3
    assert (trace[0], trace[-1]) == (first[0], first[2])
    assert list(trace[1:]) == first[1:]
    assert first[1] in trace
    assert second[0] not in trace
    assert trace.index(first[2]) == 2
    assert list(reversed(trace)) == first[::-1]
    assert trace.sequences[1] == tuple(second)
    with pytest.raises(IndexError):
        trace[3]


def test_an_empty_trace_is_empty():
    for trace in (KADTrace(), KADTrace(((),))):
        assert len(trace) == 0
        assert list(trace) == []
        with pytest.raises(IndexError):
            trace[0]


def test_records_made_by_hand_need_no_alternatives():
    record = TokenRecord(4, 0.1, 0.2, 0.3, None, None, False)
    assert record.base_alternatives == record.proxy_alternatives == ()


@pytest.mark.parametrize("speculative", [False, True])
def test_a_trace_knows_the_statistics_and_the_tokenizer_of_its_call(base, proxy, speculative):
    tokenizer = object()
    kad = KADLogitsProcessor(proxy, DualDeferral(0.4), trace=True, tokenizer=tokenizer)
    assistant = {"assistant_model": proxy} if speculative else {}
    base.generate(torch.tensor([[5, 6, 7]]), logits_processor=[kad], max_new_tokens=6, do_sample=False, **assistant)
    first = kad.trace
    assert first.statistics is kad.statistics
    assert first.statistics.tokens == len(first) == 6
    assert first.tokenizer is tokenizer
    assert type(base).__name__ in first.base
    assert type(proxy).__name__ in first.proxy
    assert first.rule == "DualDeferral(threshold=0.4)"
    base.generate(torch.tensor([[5, 6, 7]]), logits_processor=[kad], max_new_tokens=2, do_sample=False, **assistant)
    assert first.statistics.tokens == 6
    assert kad.trace.statistics.tokens == 2
    plain = KADTrace(first.sequences)
    assert plain.statistics is plain.tokenizer is None
    assert (plain, hash(plain), repr(plain)) == (first, hash(first), repr(first))


def test_without_trace_a_call_leaves_none(base, proxy):
    kad = KADLogitsProcessor(proxy, tokenizer=object())
    base.generate(torch.tensor([[5, 6, 7]]), logits_processor=[kad], max_new_tokens=2, do_sample=False)
    assert kad.trace is None


# --- The page -------------------------------------------------------------------------------------------------


def test_the_page_is_written_where_it_was_asked_for(tmp_path):
    trace = trace_of([0, 1])
    path = tmp_path / "some" / "where" / "page.html"
    assert trace.to_html(path, Strings("a", "é")) == path
    assert path.read_text("utf-8") == page_of(trace, Strings("a", "é"))
    assert trace.to_html(str(path), Strings("x", "y"), title="A & B") == path
    assert path.read_text("utf-8") == page_of(trace, Strings("x", "y"), "A & B")
    assert "<h1>A &amp; B</h1>" in path.read_text("utf-8")
    assert [entry.name for entry in path.parent.iterdir()] == ["page.html"]


def test_a_trace_that_knows_a_tokenizer_needs_none(tmp_path):
    trace = KADTrace(trace_of([0]).sequences, tokenizer=Strings("own"))
    assert Page(trace.to_html(tmp_path / "a.html").read_text("utf-8")).text() == "own"
    assert Page(trace.to_html(tmp_path / "b.html", Strings("other")).read_text("utf-8")).text() == "other"


def test_what_cannot_be_written_is_refused_with_its_value(tmp_path):
    trace = trace_of([0])
    with pytest.raises(ValueError, match=r"page\.html.*needs a tokenizer.*None"):
        trace.to_html(tmp_path / "page.html")
    with pytest.raises(TypeError, match="'gpt2'"):
        trace.to_html(tmp_path / "page.html", "gpt2")
    with pytest.raises(IsADirectoryError, match=re.escape(str(tmp_path))):
        trace.to_html(tmp_path, Strings("a"))
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_the_old_page_and_nothing_else(tmp_path, monkeypatch):
    path = trace_of([0]).to_html(tmp_path / "page.html", Strings("old"))
    before = path.read_text("utf-8")

    def fail(self, target):
        raise OSError("no")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no"):
        trace_of([0]).to_html(path, Strings("new"))
    assert path.read_text("utf-8") == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_notebook_shows_the_page_in_a_sandboxed_frame_of_its_own():
    known = KADTrace(trace_of(range(len(ATTACKS))).sequences, tokenizer=Strings(*ATTACKS))
    frame = Page(known._repr_html_())
    ((tag, attributes),) = frame.tags
    assert (tag, attributes["sandbox"]) == ("iframe", "allow-scripts")
    assert attributes["srcdoc"] == page_of(known, known.tokenizer)


def test_without_a_tokenizer_a_notebook_shows_ids_and_how_to_get_text():
    ((_, attributes),) = Page(trace_of([17, 4])._repr_html_()).tags
    page = Page(attributes["srcdoc"])
    assert page.text() == "17 4 "
    assert "No tokenizer is known" in page.source
    assert "trace.to_html(path, tokenizer)" in page.source
    assert "No tokenizer is known" not in page_of(trace_of([0]), Strings("a"))
