"""The quality of the texts of all methods on a task: figures with intervals, paired tests, and preferences."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

import evaluate

from ...integrations.loading.prompts import Prompt
from ...integrations.loading.thoughts import without_thoughts
from ..metrics import metric_path
from .kept_scores import PromptedText, Score
from .paired_tests import compare_figures, prefer, summarize_parts
from .task import Task
from .text_figures import FIGURES, Part, distinct, text_figures

Record = Mapping[str, Any]
ROUGE = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True)
class TextScores:
    """What models gave the texts of a task.

    Attributes:
        prompts: the prompt of each instance.
        judge: the scores of the judge by the keys of the texts.
        rewards: those of the reward model.
    """

    prompts: Mapping[str, Prompt]
    judge: Mapping[str, Score] = field(default_factory=dict)
    rewards: Mapping[str, Score] = field(default_factory=dict)

    def of(self, record: Record) -> Score:
        """All scores of a text; empty if it has none."""
        text = prompted_text(record, self.prompts)
        return {} if text is None else self.judge.get(text.key, {}) | self.rewards.get(text.key, {})


def prompted_text(record: Record, prompts: Mapping[str, Prompt]) -> PromptedText | None:
    """The answer in a record with its prompt, as models score it; None if there is none."""
    answer = answer_of(record)
    prompt = prompts.get(record["instance"])
    return None if answer is None or prompt is None else PromptedText(prompt, answer)


def answer_of(record: Record) -> str | None:
    """The text of a record after its thoughts; None if the answer failed or a thought is still open."""
    return without_thoughts(record["text"]) if record["error"] is None else None


def summarize_quality(
    task: Task, methods: Mapping[str, Sequence[Record]], scores: TextScores, reference: str | None = None
) -> dict[str, Any]:
    """The quality of the texts of each method on a task.

    Args:
        task: the task.
        methods: the records of each method.
        scores: what models gave the texts.
        reference: the method that preferences are measured against; None for all pairs.

    Returns:
        `rows`, `comparisons` and `preferences`, as JSON values.
    """
    parts = {method: _parts(task, records, scores) for method, records in methods.items()}
    comparisons, preferences = [], []
    for name in FIGURES:
        values = {
            method: {instance: total / weight for instance, (total, weight) in figures[name].items()}
            for method, figures in parts.items()
            if name in figures
        }
        if len(values) > 1:
            comparisons += [{"figure": name, **asdict(one)} for one in compare_figures(values)]
            if name == "reward":
                preferences = [asdict(one) for one in prefer(values, reference)]
    rows = [_row(method, records, parts[method], scores) for method, records in methods.items()]
    return {"rows": rows, "comparisons": comparisons, "preferences": preferences}


def _row(
    method: str, records: Sequence[Record], parts: Mapping[str, Mapping[str, Part]], scores: TextScores
) -> dict[str, Any]:
    figures = {}
    for name, figure in FIGURES.items():
        if name in parts:
            found = asdict(summarize_parts(list(parts[name].values()), is_share=figure.is_share))
            if figure.is_log:
                found |= {key: math.exp(found[key]) for key in ("value", "low", "high")}
            figures[name] = found
    judged = [scores.of(record) for record in records]
    texts = [answer for record in records if (answer := answer_of(record)) is not None]
    return {
        "method": method,
        "figures": figures,
        "distinct_2_all_texts": distinct(texts, 2),
        "texts": len(records),
        "without_perplexity": sum(score.get("nll") is None for score in judged) if scores.judge else None,
        "cut_by_judge": sum(score.get("cut", False) for score in judged) if scores.judge else None,
        "without_reward": sum(score.get("reward") is None for score in judged) if scores.rewards else None,
    }


def _parts(task: Task, records: Sequence[Record], scores: TextScores) -> dict[str, dict[str, Part]]:
    """For each figure, the total and the weight of each instance, over its samples."""
    found: dict[str, dict[str, Part]] = defaultdict(dict)
    for record, rouge in zip(records, _rouge(task, records), strict=True):
        figures = text_figures(task, record, answer_of(record), scores.of(record), rouge)
        for name, (total, weight) in figures.items():
            before = found[name].get(record["instance"], (0.0, 0.0))
            found[name][record["instance"]] = (before[0] + total, before[1] + weight)
    return found


@cache
def _rouge_metric() -> Any:
    return evaluate.load(metric_path("rouge"))


def _rouge(task: Task, records: Sequence[Record]) -> list[dict[str, float]]:
    """The ROUGE figures of each record of a task without right answers that has a reference and an answer."""
    pairs = [
        (at, answer, record["answer"])
        for at, record in enumerate(records)
        if not task.has_right_answers and record["answer"] and (answer := answer_of(record)) is not None
    ]
    figures: list[dict[str, float]] = [{} for _ in records]
    if pairs:
        indices, answers, references = zip(*pairs, strict=True)
        found = _rouge_metric().compute(
            predictions=list(answers),
            references=list(references),
            rouge_types=ROUGE,
            use_aggregator=False,
            use_stemmer=True,
        )
        for at, *values in zip(indices, *(found[name] for name in ROUGE), strict=True):
            figures[at] = dict(zip(ROUGE, values, strict=True))
    return figures
