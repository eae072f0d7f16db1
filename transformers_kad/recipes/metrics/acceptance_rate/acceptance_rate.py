"""Accepted / drafted tokens, as an `evaluate` module.

`evaluate.load` copies this file elsewhere: its imports are absolute, and one a line, or the loader misreads them.
"""

from typing import Any

import datasets
import evaluate

from transformers_kad.recipes.metrics.inputs import InMemory, whole_numbers

DESCRIPTION = """\
Acceptance rate of speculative decoding: accepted / drafted, both summed over all texts.

A token counts as drafted when the proxy proposed it, and as accepted when it was proposed and emitted. What happens at
the end of a text:

- The proxy stops drafting at an end of sequence. What it would have proposed after it is not drafted.
- Where the text ends in the middle of a draft (a stop string, another stopping criterion), the rest of the draft is
  drafted and not accepted, although verification may have passed it.
- The end of sequence itself is a token like any other: drafted, and accepted if it was emitted.

`drafted` and `accepted` are those of `KADLogitsProcessor.statistics`, one entry a text or a call. Token by token
nothing is drafted, and the rate is None, not 0: 0 says that every draft was refused.
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
    drafted: draft tokens of each text, whole numbers >= 0.
    accepted: draft tokens that were emitted of each text, whole numbers <= `drafted`.

Returns:
    acceptance_rate: sum of `accepted` / sum of `drafted`, None if nothing was drafted.
    drafted: sum of `drafted`.
    accepted: sum of `accepted`.

Raises:
    ValueError: lists of different length, or values out of range.

Example:
    >>> import evaluate
    >>> from transformers_kad.recipes.metrics import metric_path
    >>> acceptance_rate = evaluate.load(metric_path("acceptance_rate"))
    >>> acceptance_rate.compute(drafted=[10, 30], accepted=[9, 15])
    {'acceptance_rate': 0.6, 'drafted': 40, 'accepted': 24}
"""


class AcceptanceRate(InMemory, evaluate.Metric):
    """Accepted / drafted tokens."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"drafted": datasets.Value("float64"), "accepted": datasets.Value("float64")}),
            reference_urls=["https://arxiv.org/abs/2211.17192", "https://arxiv.org/abs/2510.27017"],
            license="Apache-2.0",
        )

    def _compute(self, *, drafted: list[float], accepted: list[float]) -> dict[str, Any]:
        proposed, emitted = whole_numbers("drafted", drafted), whole_numbers("accepted", accepted)
        for at, (d, a) in enumerate(zip(proposed, emitted, strict=True)):
            if a > d:
                raise ValueError(f"`accepted` must not exceed `drafted`, got {a} of {d} at index {at}.")
        rate = sum(emitted) / sum(proposed) if sum(proposed) else None
        return {"acceptance_rate": rate, "drafted": sum(proposed), "accepted": sum(emitted)}
