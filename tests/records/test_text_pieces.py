"""The pieces of a text by themselves. On the page of a trace: tests/records/test_trace_page.py."""

from made_traces import Strings, trace_of

from transformers_kad.records.text_pieces import cut_marks, split_text


def test_marks_are_cut_out_of_a_text():
    assert cut_marks("a\n b\u202e") == [("", "a"), ("newline", "\n"), ("", " b"), ("control", "U+202E")]
    assert cut_marks(" \t") == [("blank", " "), ("tab", "\t")]
    assert cut_marks("") == []


def test_pieces_know_their_place_and_without_a_tokenizer_each_token_is_one():
    trace = trace_of(range(3))
    pieces = split_text(trace, Strings("a", "b\n", ""))
    assert [(piece.start, piece.text, piece.parts) for piece in pieces] == [
        (0, "a", [("", "a")]),
        (1, "b\n", [("", "b"), ("newline", "\n")]),
        (2, "", []),
    ]
    assert [(piece.start, piece.text) for piece in split_text(trace, None)] == [(0, ""), (1, ""), (2, "")]
    assert [record for piece in pieces for record in piece.records] == [*trace]
