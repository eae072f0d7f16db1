"""The verdicts on four pairs that the repository shows are right, and the page says what was measured."""

import json
import re
from pathlib import Path

import benchmark_check
import pytest

from transformers_kad.recipes.pair_check import measures, recommendation, verdict
from transformers_kad.recipes.pair_check.arguments import THRESHOLDS, CheckArguments
from transformers_kad.recipes.pair_check.prompts import NEUTRAL_PROMPTS
from transformers_kad.recipes.pair_check.texts import GENERATING

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "recipes" / "results" / "check_pair"
ROWS = json.loads((RESULTS / "checks.json").read_text())["rows"]
PAGE = (ROOT / "docs" / "check_pair.md").read_text()


def test_the_page_shows_the_results_of_its_command():
    shown, _, reasons = benchmark_check.table(ROWS).partition("\n\n")
    assert (RESULTS / "checks.md").read_text() == benchmark_check.table(ROWS)
    assert shown in PAGE
    assert [row["pair"] for row in ROWS] == list(benchmark_check.PAIRS)
    for row in ROWS:
        assert f"- {row['reasons'][0]}" in reasons
        assert row["reasons"][0] in re.sub(r"\s+", " ", PAGE)
        assert f"recipes/results/check_pair/{row['pair']}.svg" in PAGE
        assert (RESULTS / f"{row['pair']}.svg").is_file()


def test_the_verdicts_are_those_that_the_accuracies_ask_for():
    tiny, *bad = ROWS
    assert tiny["verdict"] == "doubtful"
    accuracy = tiny["accuracy"]
    assert accuracy["recommended"] >= accuracy["proxy"] + 0.4
    assert accuracy["recommended"] >= accuracy["best of the grid"] or tiny["p_value"] > 0.05
    for row in bad:
        assert row["verdict"] == "bad"
        assert row["accuracy"]["recommended"] <= 0.05


def test_the_page_names_the_limits_of_the_code():
    limits = {
        "share too little": (verdict.SHARED_TOKENS, verdict.SHARED_TOKENS),
        "tokens that the proxy does not have": (1 - verdict.SHARED_TOKENS, verdict.UNKNOWN_TO_PROXY),
        "beyond chance": (verdict.KNOWS_NOTHING, verdict.KNOWS_LITTLE),
        "the proxy's likeliest token is the same": (verdict.CONTRADICTS, verdict.DIFFERS),
        "mean deferral mass": (verdict.MOSTLY_PROXY, verdict.OFTEN_FAILS),
    }
    for words, expected in limits.items():
        (line,) = (line for line in PAGE.splitlines() if line.startswith("|") and words in line)
        assert [int(number) for number in re.findall(r"(\d+) %", line)] == [round(100 * limit) for limit in expected]
    text = re.sub(r"\s+", " ", PAGE)
    for sentence in (
        f"differ by less than {verdict.SAME_MODEL} on all texts",
        f"KAD changes less than {verdict.NO_EFFECT:.0%}".replace("%", " %"),
        f"Fewer than {verdict.FEWEST_PROMPTS} prompts, or texts of less than {verdict.SHORTEST_TEXT} tokens",
        f"sure of a token ({measures.SURE} or more)",
        f"{recommendation.EXTRA_REFUSALS} more refused tokens in a text",
        f"Of the thresholds {THRESHOLDS[0]} to {THRESHOLDS[-1]} below",
        f"{len(NEUTRAL_PROMPTS)} built-in questions",
        f"`--limit` prompts are used, {CheckArguments().limit} by default",
        f"`DualDeferral({GENERATING.parameters['threshold']})`",
    ):
        assert sentence in text, sentence


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--problems", "0"], "--problems must be at least 1, got 0"), (["--pair", "nowhere"], "No pair in 'nowhere'")],
)
def test_bad_input_is_one_clear_line(words, message, capsys):
    with pytest.raises(SystemExit):
        benchmark_check.main(words)
    assert message in capsys.readouterr().err
