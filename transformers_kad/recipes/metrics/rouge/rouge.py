"""ROUGE by the package rouge_score, as an `evaluate` module.

`evaluate.load` copies this file to another folder and parses its imports line by line. They therefore have to be
absolute, and each of them in a single line.
"""

from statistics import fmean
from typing import Any

import datasets
import evaluate
from rouge_score import rouge_scorer

from transformers_kad.recipes.metrics.inputs import InMemory

DESCRIPTION = """\
ROUGE F1 of texts against one reference each, by Google's package rouge_score.

The figures are those of `evaluate.load("rouge")`, which wraps the same package, but whose script has to be downloaded
from the Hub. Texts are split into words of ASCII letters and digits in lower case, so ROUGE is 0 for texts in other
scripts.
"""

CITATION = """\
@inproceedings{lin2004rouge,
  title     = {{ROUGE}: A Package for Automatic Evaluation of Summaries},
  author    = {Lin, Chin-Yew},
  booktitle = {Text Summarization Branches Out},
  pages     = {74--81},
  year      = {2004}
}
"""

INPUTS = """
Args:
    predictions: texts.
    references: a reference for each.
    rouge_types: the figures. Default: rouge1 (words), rouge2 (pairs of words), rougeL (longest common subsequence) and
        rougeLsum (the same, line by line).
    use_aggregator: return the mean over all texts instead of a list with the figure of each text.
    use_stemmer: compare English words without their endings (Porter's stemmer).

Returns:
    each figure of rouge_types, in [0, 1].

Raises:
    ValueError: there are no texts.

Example:
    >>> import evaluate
    >>> from transformers_kad.recipes.metrics import metric_path
    >>> rouge = evaluate.load(metric_path("rouge"))
    >>> result = rouge.compute(predictions=["the cat sat"], references=["the cat sat down"])
    >>> round(result["rouge1"], 3), round(result["rouge2"], 3)
    (0.857, 0.8)
"""


class Rouge(InMemory, evaluate.Metric):
    """ROUGE F1 of texts against one reference each."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
            reference_urls=["https://aclanthology.org/W04-1013", "https://arxiv.org/abs/2510.27017"],
            license="Apache-2.0",
        )

    def _compute(
        self,
        *,
        predictions: list[str],
        references: list[str],
        rouge_types: tuple[str, ...] = ("rouge1", "rouge2", "rougeL", "rougeLsum"),
        use_aggregator: bool = True,
        use_stemmer: bool = False,
    ) -> dict[str, Any]:
        if not predictions:
            raise ValueError("`predictions` is empty: there is nothing to compare.")
        scorer = rouge_scorer.RougeScorer(list(rouge_types), use_stemmer=use_stemmer)
        scores = [scorer.score(of, text) for text, of in zip(predictions, references, strict=True)]
        each = {name: [score[name].fmeasure for score in scores] for name in rouge_types}
        return {name: fmean(values) for name, values in each.items()} if use_aggregator else each
