"""Answer accuracy, as an `evaluate` module.

`evaluate.load` copies this file to another folder and parses its imports line by line. They therefore have to be
absolute, and each of them in a single line.
"""

from typing import Any

import datasets
import evaluate

from transformers_kad.recipes.evaluation.answers import answers_match
from transformers_kad.recipes.intervals import wilson_interval
from transformers_kad.recipes.metrics.inputs import InMemory

DESCRIPTION = """\
Share of answers that match their reference, with a 95 % interval.

Predictions are answers that were extracted from a model's text; None and "" (no answer was found) are wrong. With
several samples per instance the accuracy is the mean over all samples, but only the instances are independent: the
Wilson score interval is that of a proportion among total / samples instances. It is never too narrow, since samples of
one instance that are independent would allow a narrower interval.
"""

CITATION = """\
@article{wilson1927probable,
  title   = {Probable Inference, the Law of Succession, and Statistical Inference},
  author  = {Wilson, Edwin B.},
  journal = {Journal of the American Statistical Association},
  volume  = {22},
  pages   = {209--212},
  year    = {1927}
}
"""

INPUTS = """
Args:
    predictions: answers, each text or None.
    references: the right answer for each. The samples of one instance follow each other and repeat its reference.
    comparison: "text", "number" or "math", see `transformers_kad.recipes.evaluation.answers.answers_match`.
    samples: the number of samples of each instance.

Returns:
    accuracy: correct / total.
    low: lower end of the 95 % interval.
    high: upper end of the interval.
    correct: the number of predictions that match.
    total: the number of predictions.

Raises:
    ValueError: there are no predictions, the lists have different lengths, the comparison is unknown, or the samples
        of an instance are incomplete or have different references.

Example:
    >>> import evaluate
    >>> from transformers_kad.recipes.metrics import metric_path
    >>> answer_accuracy = evaluate.load(metric_path("answer_accuracy"))
    >>> result = answer_accuracy.compute(predictions=["7", None, "3"], references=["7", "2", "4"], comparison="number")
    >>> result["correct"], result["total"], round(result["low"], 3), round(result["high"], 3)
    (1, 3, 0.061, 0.792)
"""


class AnswerAccuracy(InMemory, evaluate.Metric):
    """Share of answers that match their reference, with a 95 % interval."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            # `evaluate` refuses a None that comes first in a column of type string.
            features=datasets.Features(
                {"predictions": datasets.Value("large_string"), "references": datasets.Value("string")}
            ),
            reference_urls=["https://doi.org/10.1080/01621459.1927.10502953", "https://arxiv.org/abs/2510.27017"],
            license="Apache-2.0",
        )

    def _compute(
        self, *, predictions: list[str | None], references: list[str], comparison: str = "text", samples: int = 1
    ) -> dict[str, Any]:
        if not isinstance(samples, int) or isinstance(samples, bool) or samples < 1:
            raise ValueError(f"`samples` must be an integer >= 1, got {samples!r}.")
        if not predictions or len(predictions) % samples:
            raise ValueError(f"`predictions` must be one or more rows of {samples} samples, got {len(predictions)}.")
        for at, reference in enumerate(references):
            if reference is None:
                raise ValueError(f"`references` must be texts, got None at index {at}.")
        for start in range(0, len(references), samples):
            row = references[start : start + samples]
            if len(set(row)) > 1:
                raise ValueError(
                    f"The {samples} samples of an instance must stand in a row and have one reference, got {row!r} "
                    f"from index {start} on."
                )
        correct = sum(
            answers_match(prediction or None, reference, comparison)
            for prediction, reference in zip(predictions, references, strict=True)
        )
        low, high = wilson_interval(correct / samples, len(predictions) // samples)
        return {
            "accuracy": correct / len(predictions),
            "low": low,
            "high": high,
            "correct": correct,
            "total": len(predictions),
        }
