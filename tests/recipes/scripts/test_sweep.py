"""The sweep: a grid is measured and plotted, and a finer one only measures what is new."""

import json
from pathlib import Path

import pytest
import sweep

ROOT = Path(__file__).resolve().parents[3]
GRID = ("--method", "base", "kad-dual:threshold=0.2,0.6", "nudging:threshold=0.6")


@pytest.mark.slow
def test_a_grid_is_measured_and_plotted_and_made_finer(tmp_path, capsys):
    arguments = ["--limit", "12", "--output", str(tmp_path), "--draft_lengths", "3", "5"]
    assert sweep.main([*arguments, *GRID]) == 0
    rows = json.loads((tmp_path / "summary.json").read_text())["rows"]
    assert [row["method"] for row in rows] == [
        "base",
        *(f"kad-dual threshold={t}{draft}" for t in (0.2, 0.6) for draft in ("", " num_assistant_tokens=3")),
        *(f"nudging threshold=0.6{draft}" for draft in ("", " num_assistant_tokens=3")),
    ]
    names = ("accuracy_speed", "accuracy_parameter", "acceptance_lengths", "deferral_positions")
    written = {path.name for path in (tmp_path / "plots").iterdir()}
    assert written == {f"tiny_{name}.{kind}" for name in names for kind in ("png", "svg")}
    drawing = (tmp_path / "plots" / "tiny_accuracy_speed.svg").read_text()
    assert all(word in drawing for row in rows for word in row["method"].split())
    before = (tmp_path / "results.jsonl").read_text().splitlines()
    capsys.readouterr()
    assert sweep.main([*arguments, *GRID, "kad-dual:threshold=0.4"]) == 0
    assert "84 of 108 batches are already done." in capsys.readouterr().err
    after = (tmp_path / "results.jsonl").read_text().splitlines()
    assert [line for line in after if "threshold=0.4" not in line] == before


def test_a_draft_length_must_be_positive(capsys):
    with pytest.raises(SystemExit):
        sweep.main(["--draft_lengths", "0"])
    assert "--draft_lengths must be at least 1, got 0" in capsys.readouterr().err


def test_a_draft_length_of_a_word_is_its_own(tmp_path):
    grid = sweep.GridArguments(method=["base", "nudging", "kad-dual:num_assistant_tokens=2"], draft_lengths=[3, 7])
    assert [method.num_assistant_tokens for method in grid.methods()[1:]] == [3, 7, 2]


def test_draft_lengths_need_drafts(tmp_path, capsys):
    assert sweep.main(["--draft_lengths", "3", "--no_speculative", "--output", str(tmp_path)]) == 2
    assert "--draft_lengths [3] have no effect" in capsys.readouterr().err
