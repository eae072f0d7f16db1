"""The quality of methods from records and scores: samples, thoughts, failures, and what the tables show."""

import math

import pytest

from transformers_kad.recipes.evaluation.quality_report import TextScores, prompted_text, summarize_quality
from transformers_kad.recipes.evaluation.quality_tables import quality_markdown
from transformers_kad.recipes.evaluation.tasks import get_task

TINY = get_task("tiny")
PROMPTS = {str(i): [{"role": "user", "content": f"Question {i}"}] for i in range(4)}


def record(instance, text, sample=0, **more):
    line = {"instance": str(instance), "sample": sample, "text": text, "answer": "1", "ended": True, "error": None}
    return {**line, "correct": True, "tokens": 10, **more}


def scores(records, nll, tokens, **more):
    """The same scores for the texts of all records."""
    found = (prompted_text(record, PROMPTS) for record in records)
    return {text.key: {"nll": nll, "tokens": tokens, **more} for text in found if text is not None}


def row_of(records, given=None):
    (row,) = summarize_quality(TINY, {"m": records}, given or TextScores(PROMPTS))["rows"]
    return row


def test_samples_of_a_question_count_as_one_instance():
    records = [record(0, "a b", tokens=2), record(0, "c d", 1, tokens=4), record(1, "e f", tokens=9)]
    records.append(record(1, "g h", 1, tokens=9))
    tokens = row_of(records)["figures"]["tokens"]
    assert (tokens["value"], tokens["instances"]) == (6, 2)


def test_the_perplexity_is_a_mean_over_tokens():
    short, long = [record(0, "a")], [record(1, "b c d")]
    judge = scores(short, 2.0, 1) | scores(long, 3.0, 9)
    row = row_of(short + long, TextScores(PROMPTS, judge))
    assert row["figures"]["perplexity"]["value"] == pytest.approx(math.exp(5 / 10))
    assert row["without_perplexity"] == row["cut_by_judge"] == 0


def test_comparisons_of_perplexity_are_of_the_means_of_single_texts():
    a = [record(i, "a") for i in range(3)]
    b = [record(i, "b") for i in range(3)]
    judge = scores(a, 6.0, 3) | scores(b, 5.0, 5)
    found = summarize_quality(TINY, {"a": a, "b": b}, TextScores(PROMPTS, judge))["comparisons"]
    (perplexity,) = (one for one in found if one["figure"] == "perplexity")
    assert perplexity["difference"] == pytest.approx(2 - 1)
    assert perplexity["p_value"] == 2 / 2**3


def test_thoughts_are_no_part_of_a_text_and_an_open_one_leaves_no_text():
    thought = [record(0, "<think>a a a a a a</think>b c"), record(1, "<think>a", ended=False)]
    row = row_of(thought)
    assert row["figures"]["distinct_1"] == {"value": 1, "low": 1, "high": 1, "instances": 1}
    assert row["figures"]["tokens"]["instances"] == 2
    assert prompted_text(thought[0], PROMPTS).text == "b c"
    assert prompted_text(thought[1], PROMPTS) is None


def test_texts_without_scores_are_counted_and_said():
    records = [record(0, "a"), record(1, ""), record(2, "", error="too long", ended=False), record(3, "b")]
    judge = scores(records[:1], 2.0, 1) | scores(records[1:2], None, 0) | scores(records[3:], 1.0, 1, cut=True)
    found = summarize_quality(TINY, {"m": records}, TextScores(PROMPTS, judge))
    (row,) = found["rows"]
    assert (row["texts"], row["without_perplexity"], row["cut_by_judge"], row["without_reward"]) == (4, 2, 1, None)
    about = {"judge": "j", "judge_is": None, "reward_model": None, "reference": "m"}
    text = "\n".join(quality_markdown({**about, **found}))
    assert "Note: 2 of 4 texts of m have no perplexity" in text
    assert "Note: 1 of 4 texts of m are longer than the judge's context" in text
    assert "reward" not in text


def test_the_table_of_differences_marks_those_that_are_significant_after_correction():
    many = {str(i): [{"role": "user", "content": str(i)}] for i in range(30)}
    good = [record(i, "The answer is 1.", tokens=10 + i % 2) for i in range(30)]
    bad = [record(i, "No idea.", tokens=10) for i in range(30)]
    found = summarize_quality(TINY, {"good": good, "bad": bad}, TextScores(many))
    about = {"judge": None, "judge_is": None, "reward_model": None, "reference": "good"}
    lines = "\n".join(quality_markdown({**about, **found})).splitlines()
    table = [line for line in lines if line.startswith(("| good minus", "| bad | 1.000"))]
    header, row = ([cell.strip() for cell in line.split("|")] for line in table)
    cells = dict(zip(header, row, strict=True))
    assert cells["in form"] == "1.000 ± 0.000*"
    assert cells["ended"] == "0.000 ± 0.000"
    assert cells["tokens"].startswith("0.500 ± 0.18") and cells["tokens"].endswith("*")
