"""Accepted draft tokens a round, as an `evaluate` module.

`evaluate.load` copies this file elsewhere: its imports are absolute, and one a line, or the loader misreads them.
"""

from itertools import zip_longest
from typing import Any

import datasets
import evaluate

from transformers_kad.recipes.metrics.inputs import InMemory, whole_numbers

DESCRIPTION = """\
Acceptance length of speculative decoding: the mean number of draft tokens that a round emitted, and its histogram.

A round is one forward of the base and what it yields: the accepted part of a draft, and after it one token of the
base's own, unless the text ends on a draft token. Entry k of a histogram h is the number of rounds that emitted k
draft tokens, so sum(h) = rounds and sum(k h_k) = accepted. A round whose draft was cut short, by the proxy's end of
sequence or by the length limit, is a round like any other, with the k that it emitted.

Rounds and accepted tokens alone do not tell how many tokens a round yields:

    tokens = accepted + rounds - rounds that end on a draft token

The last term is 1 for a text that ended on an accepted end of sequence (or was stopped within a draft), else 0. So
`tokens_per_round`, which some papers call the acceptance length, is given only where `tokens` are.

Token by token a round is one token: the histogram is [tokens], the acceptance length 0.
"""

CITATION = """\
@inproceedings{leviathan2023fast,
  title     = {Fast Inference from Transformers via Speculative Decoding},
  author    = {Leviathan, Yaniv and Kalman, Matan and Matias, Yossi},
  booktitle = {Proceedings of ICML},
  year      = {2023}
}
"""

INPUTS = """
Args:
    histograms: the histogram of each text or call, lists of whole numbers >= 0 of any lengths
        (`kad.statistics.acceptance_histogram`).
    tokens: emitted tokens of each, in the same order, or None. An argument of `compute` only, not of `add`.

Returns:
    acceptance_length: accepted / rounds, None if there was no round.
    histogram: the sum of all histograms, as long as the longest.
    rounds: its sum.
    accepted: accepted draft tokens.
    tokens_per_round: sum of `tokens` / rounds, None without `tokens` or rounds.
    draft_endings: rounds that end on a draft token, None without `tokens`.

Raises:
    ValueError: lists of different length, values out of range, or `tokens` that no such rounds can have emitted.

Example:
    >>> import evaluate
    >>> from transformers_kad.recipes.metrics import metric_path
    >>> acceptance_length = evaluate.load(metric_path("acceptance_length"))
    >>> result = acceptance_length.compute(histograms=[[1, 0, 2], [0, 1]], tokens=[7, 1])
    >>> result["acceptance_length"], result["histogram"], result["tokens_per_round"], result["draft_endings"]
    (1.25, [1, 1, 2], 2.0, 1)
"""


class AcceptanceLength(InMemory, evaluate.Metric):
    """Accepted draft tokens a round, and their histogram."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"histograms": datasets.List(datasets.Value("float64"))}),
            reference_urls=["https://arxiv.org/abs/2211.17192", "https://arxiv.org/abs/2510.27017"],
            license="Apache-2.0",
        )

    def _compute(self, *, histograms: list[list[float]], tokens: list[int] | None = None) -> dict[str, Any]:
        counts = [whole_numbers(f"histograms[{at}]", histogram or []) for at, histogram in enumerate(histograms)]
        histogram = [sum(column) for column in zip_longest(*counts, fillvalue=0)]
        rounds, accepted = sum(histogram), _accepted(histogram)
        result = {
            "acceptance_length": accepted / rounds if rounds else None,
            "histogram": histogram,
            "rounds": rounds,
            "accepted": accepted,
            "tokens_per_round": None,
            "draft_endings": None,
        }
        if tokens is not None:
            emitted = whole_numbers("tokens", tokens)
            _check_tokens(emitted, counts)
            result["tokens_per_round"] = sum(emitted) / rounds if rounds else None
            result["draft_endings"] = accepted + rounds - sum(emitted)
        return result


def _accepted(histogram: list[int]) -> int:
    return sum(k * count for k, count in enumerate(histogram))


def _check_tokens(tokens: list[int], histograms: list[list[int]]) -> None:
    if len(tokens) != len(histograms):
        raise ValueError(f"Mismatch in the number of histograms ({len(histograms)}) and tokens ({len(tokens)}).")
    for at, (count, histogram) in enumerate(zip(tokens, histograms, strict=True)):
        most = _accepted(histogram) + sum(histogram)
        least = most - sum(histogram[1:])  # only a round with a draft token can end on one
        if not least <= count <= most:
            raise ValueError(
                f"Rounds with the histogram {histogram} emit {least} to {most} tokens, got {count} at index {at}."
            )
