"""The documents and the strict score of the tasks beside this file."""

from typing import Any

from datasets import Dataset

from transformers_kad.recipes.word_problems import EOS, Problem, is_correct, is_correct_lenient, make_problems


def load(problems: int = 12, **_: Any) -> dict[str, Dataset]:
    """Held-out problems; the harness passes model arguments and metadata along."""
    rows = []
    for problem in make_problems("test", problems):
        endings = [f"= {n}. The answer is {n}." for n in (problem.answer, problem.answer + 1, problem.answer + 10)]
        choices = [problem.solution.replace(endings[0], ending) for ending in endings]
        rows.append(
            {
                "question": problem.question,
                "solution": problem.solution,
                "answer": problem.answer,
                "choices": [*choices[1:], choices[0]],
            }
        )
    return {"test": Dataset.from_list(rows)}


def score(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Strict and lenient score of one answer.

    The harness hands over an answer without special tokens, cut where its text ended. The strict score asks for the
    end, so it is put back: an answer that the limit of 48 tokens stopped right behind its number counts as ended.
    """
    problem = Problem(document["question"], document["solution"], document["answer"], ())
    text = results[0] + EOS
    return {"strict": float(is_correct(text, problem)), "lenient": float(is_correct_lenient(text, problem))}
