"""The evaluation of the tiny pair: its arithmetic, a small run, and the figures that the README shows."""

import json
from pathlib import Path

import evaluate_tiny_pair
import pytest

from transformers_kad.word_problems import make_problems

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "recipes" / "results" / "tiny_pair.json"


@pytest.mark.slow
def test_a_small_run_writes_every_method(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        evaluate_tiny_pair, "GRID", {"dual": ("threshold", [0.01, 0.5]), "nudging": ("threshold", [0.7])}
    )
    out = tmp_path / "made" / "figures.json"
    sizes = ["--problems", "12", "--validation_problems", "12", "--seeds", "2", "--max_new_tokens", "32"]
    evaluate_tiny_pair.main([*sizes, "--out", str(out)])
    result = json.loads(out.read_text())
    assert list(result["test"]) == ["base", "proxy", "dual", "nudging"]
    assert result["test"]["dual"]["parameters"] == {"threshold": 0.5}  # 0.01 keeps the base's style: near 0
    assert result["validation"]["dual"]["0.01"] < result["validation"]["dual"]["0.5"]
    assert evaluate_tiny_pair.table(result) in capsys.readouterr().out


def test_equal_seeds_give_equal_scores():
    arguments = evaluate_tiny_pair.EvaluationArguments(batch_size=4, max_new_tokens=16)
    evaluation = evaluate_tiny_pair.Evaluation(arguments)
    problems = make_problems("validation", 8)
    runs = [evaluation.score("dual", problems, seed=3, threshold=0.5) for _ in range(2)]
    assert runs[0][:2] == runs[1][:2]
    assert runs[0][2] == pytest.approx(runs[1][2])


def test_the_margins_that_the_pair_is_made_for():
    """Of the committed figures, 500 test problems; the README shows the same table."""
    result = json.loads(RESULTS.read_text())
    assert result["settings"]["problems"] == 500
    rows, difference = result["test"], result["dual_minus_nudging"]
    dual = rows["dual"]["strict"]
    assert dual >= 0.80
    assert dual - rows["proxy"]["strict"] >= 0.40
    assert dual - max(rows["base"]["strict"], rows["base"]["lenient"]) >= 0.40
    assert difference["mean"] - difference["half_width_95"] > 0
    assert evaluate_tiny_pair.table(result) in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", ["problems", "validation_problems", "seeds", "batch_size", "max_new_tokens"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"--{name} must be at least 1, got 0"):
        evaluate_tiny_pair.EvaluationArguments(**{name: 0})
