"""Progress of a long run: plain lines where nobody watches a bar."""

import io
import sys

import pytest

from transformers_kad.recipes import progress
from transformers_kad.recipes.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = [1000.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_lines_come_at_the_first_update_then_rarely_then_at_the_last(clock, capsys):
    with Progress(total=8, unit="answers", seconds_between_lines=10) as shown:
        for seconds in (4, 5, 5, 1, 1, 20, 1):
            clock[0] += seconds
            shown.update(note=f"accuracy {seconds}")
        clock[0] += 1
        shown.update()
    assert capsys.readouterr().err.splitlines() == [
        "1 of 8 answers (12%), 0:00:04 passed, about 0:00:28 left; accuracy 4",
        "3 of 8 answers (38%), 0:00:14 passed, about 0:00:23 left; accuracy 5",
        "6 of 8 answers (75%), 0:00:36 passed, about 0:00:12 left; accuracy 20",
        "8 of 8 answers (100%), 0:00:38 passed",
    ]


def test_what_an_earlier_run_did_does_not_count_as_fast(clock, capsys):
    shown = Progress(total=100, unit="steps", done=90)
    clock[0] += 3600
    shown.update(5)
    assert capsys.readouterr().err == "95 of 100 steps (95%), 1:00:00 passed, about 1:00:00 left\n"


def test_what_ends_soon_needs_no_lines(clock, capsys):
    for seconds, lines in ((9, []), (20, ["2 of 3 batches (67%), 0:00:40 passed, about 0:00:20 left"])):
        with Progress(total=3, unit="batches", patient=True) as shown:
            for _ in range(3):
                clock[0] += seconds
                shown.update()
        written = capsys.readouterr().err.splitlines()
        assert written[:1] == lines
    assert written[1:] == ["3 of 3 batches (100%), 0:01:00 passed"]


def test_nothing_is_written_by_the_other_processes(capsys):
    with Progress(total=1, unit="answers", shown=False) as shown:
        shown.update()
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_a_terminal_gets_a_bar(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(total=2, unit="answers") as shown:
        shown.update(2, "accuracy 0.500")
    assert "100%|" in terminal.getvalue()
    assert "accuracy 0.500" in terminal.getvalue()
    assert "passed" not in terminal.getvalue()
