"""The figures of single texts, by hand."""

from dataclasses import replace

import pytest

from transformers_kad.recipes.evaluation.tasks import get_task
from transformers_kad.recipes.evaluation.text_figures import FIGURES, distinct, text_figures

RECORD = {"error": None, "ended": True, "tokens": 7, "text": "a b a b a b"}


def figures(text, task="tiny", scores=None, **changes):
    record = {**RECORD, "text": text, **changes}
    return text_figures(get_task(task), record, text if record["error"] is None else None, scores or {}, {})


def test_distinct_ngrams():
    assert distinct(["a b a b a b"], 1) == pytest.approx(2 / 6)
    assert distinct(["a b a b a b"], 2) == pytest.approx(2 / 5)
    assert distinct(["a b a b a b"], 3) == pytest.approx(2 / 4)
    assert distinct(["One, two.", "one two"], 1) == pytest.approx(4 / 6)
    assert distinct(["One, two.", "one two"], 2) == pytest.approx(1.0)  # no pair reaches from one text to the next
    assert distinct(["a"], 2) is None
    assert distinct([], 1) is None


def test_the_repetition_is_the_share_of_sequences_of_four_words_that_were_there_before():
    assert figures("a b a b a b")["repetition"] == (pytest.approx(1 / 3), 1)  # abab, baba, abab
    assert figures("a b c d e f")["repetition"] == (0, 1)
    assert "repetition" not in figures("a b c")


def test_a_text_has_the_figures_that_are_defined_for_it():
    assert figures("The answer is 5.") | {} == {
        "in_form": (True, 1),
        "ended": (True, 1),
        "tokens": (7, 1),
        "distinct_1": (1, 1),
        "distinct_2": (1, 1),
        "distinct_3": (1, 1),
        "repetition": (0, 1),
    }
    assert figures("The answer is 5.", ended=False)["in_form"] == (False, 1)
    assert figures("", tokens=1) == {"in_form": (False, 1), "ended": (True, 1), "tokens": (1, 1)}
    assert figures("", error="too long", ended=False, tokens=0) == {"in_form": (False, 1)}
    assert "in_form" not in figures("Hello.", "chat")


def test_what_models_gave_a_text():
    scores = {"nll": 6.0, "tokens": 4, "reward": -1.5}
    found = figures("Hello.", "chat", scores)
    assert found["perplexity"] == (6.0, 4)
    assert found["reward"] == (-1.5, 1)
    without = figures("", "chat", {"nll": None, "tokens": 0, "reward": None})
    assert not {"perplexity", "reward"} & without.keys()


def test_instructions_count_each():
    found = figures("Hello.", "instructions", followed=[True, False, True])
    assert found["instructions"] == (2, 3)


def test_every_figure_is_declared():
    everything = text_figures(
        replace(get_task("tiny"), name="all"),
        RECORD | {"followed": [True]},
        RECORD["text"],
        {"nll": 1.0, "tokens": 1, "reward": 1.0},
        {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0},
    )
    assert everything.keys() == FIGURES.keys()
