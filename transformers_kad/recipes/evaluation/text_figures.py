"""The figures of quality, of single texts and of all texts of a method.

Every figure of a text is a total and a weight, and the figure of a method is the sum of its totals by the sum of its
weights: a mean over texts where the weights are 1, and a mean over tokens for the perplexity.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .task import Task

Part = tuple[float, float]  # total and weight

_WORD = re.compile(r"\w+|[^\w\s]")
REPEATED = 4  # words in the n-grams of the repetition


@dataclass(frozen=True)
class Figure:
    """A figure of quality.

    Attributes:
        heading: the column of the table.
        digits: digits after the point.
        is_share: whether the figure of a single text is false or true.
        is_log: whether the figures of texts are logarithms of what the table shows.
    """

    heading: str
    digits: int = 3
    is_share: bool = False
    is_log: bool = False


# In the order of the table.
FIGURES: Mapping[str, Figure] = {
    "perplexity": Figure("perplexity", 2, is_log=True),
    "reward": Figure("reward", 2),
    "rouge1": Figure("ROUGE-1"),
    "rouge2": Figure("ROUGE-2"),
    "rougeL": Figure("ROUGE-L"),
    "instructions": Figure("instructions"),
    "in_form": Figure("in form", is_share=True),
    "ended": Figure("ended", is_share=True),
    "tokens": Figure("tokens", 1),
    "distinct_1": Figure("distinct-1"),
    "distinct_2": Figure("distinct-2"),
    "distinct_3": Figure("distinct-3"),
    "repetition": Figure("repetition"),
}


def words(text: str) -> list[str]:
    """The words and punctuation marks of a text, in lower case.

    >>> words("It's 5 + 3.")
    ['it', "'", 's', '5', '+', '3', '.']
    """
    return _WORD.findall(text.lower())


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """All sequences of n words of a text, in their order."""
    of = words(text)
    return [tuple(of[start : start + n]) for start in range(len(of) - n + 1)]


def distinct(texts: Sequence[str], n: int) -> float | None:
    """distinct-n (Li et al., arXiv 1510.03055): the share of different ones among all n-grams of some texts.

    It is None if the texts have no n-grams.

    >>> distinct(["a b a b"], 1), distinct(["a b a b"], 2)
    (0.5, 0.6666666666666666)
    """
    found = [ngram for text in texts for ngram in ngrams(text, n)]
    return len(set(found)) / len(found) if found else None


def text_figures(
    task: Task, record: Mapping[str, Any], answer: str | None, scores: Mapping[str, Any], rouge: Mapping[str, float]
) -> dict[str, Part]:
    """The figures of one text. A figure that it does not have is left out.

    Args:
        task: the task.
        record: its line of `results.jsonl`.
        answer: the text without thoughts; None if it failed or a thought was not closed.
        scores: what models gave it: `nll` and `tokens`, `reward`.
        rouge: its ROUGE figures.
    """
    failed = record["error"] is not None
    figures: dict[str, Part] = {name: (value, 1) for name, value in rouge.items()}
    if scores.get("nll") is not None:
        figures["perplexity"] = (scores["nll"], scores["tokens"])
    if scores.get("reward") is not None:
        figures["reward"] = (scores["reward"], 1)
    if "followed" in record:
        figures["instructions"] = (sum(record["followed"]), len(record["followed"]))
    if task.form is not None:
        figures["in_form"] = (not failed and task.form(record["text"], record["ended"]), 1)
    if not failed:
        figures |= {"ended": (record["ended"], 1), "tokens": (record["tokens"], 1)}
    if answer is not None:
        for n in (1, 2, 3):
            if (share := distinct([answer], n)) is not None:
                figures[f"distinct_{n}"] = (share, 1)
        if (share := distinct([answer], REPEATED)) is not None:
            figures["repetition"] = (1 - share, 1)
    return figures
