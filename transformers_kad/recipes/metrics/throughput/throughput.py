"""Tokens per second, as an `evaluate` module.

`evaluate.load` copies this file elsewhere: its imports are absolute, and one a line, or the loader misreads them.
"""

import math
from typing import Any

import datasets
import evaluate

from transformers_kad.recipes.metrics import KAD_CITATION
from transformers_kad.recipes.metrics.inputs import InMemory, whole_numbers

DESCRIPTION = """\
Throughput of a run: all tokens / all seconds.

Not the mean of the calls' own rates: that would let a call of two tokens weigh as much as one of a thousand, and would
not be the rate at which the run finished. The sum of tokens over the sum of seconds is.

Counted are emitted tokens, the end of sequence included, the prompt and padding not; drafted tokens that were refused
or cut off are not emitted. `seconds` is the wall clock of a call, prefill included. The texts of one batch share their
time: pass one entry a call, with the tokens of all its texts.
"""

INPUTS = """
Args:
    tokens: emitted tokens of each call, whole numbers >= 0.
    seconds: the time of each call, > 0.

Returns:
    tokens_per_second: sum of `tokens` / sum of `seconds`.
    tokens: sum of `tokens`.
    seconds: sum of `seconds`.

Raises:
    ValueError: no calls, lists of different length, or values out of range.

Example:
    >>> import evaluate
    >>> from transformers_kad.recipes.metrics import metric_path
    >>> throughput = evaluate.load(metric_path("throughput"))
    >>> throughput.compute(tokens=[100, 20], seconds=[2.0, 1.0])
    {'tokens_per_second': 40.0, 'tokens': 120, 'seconds': 3.0}
"""


class Throughput(InMemory, evaluate.Metric):
    """All tokens / all seconds."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=KAD_CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"tokens": datasets.Value("float64"), "seconds": datasets.Value("float64")}),
            reference_urls=["https://arxiv.org/abs/2510.27017"],
            license="Apache-2.0",
        )

    def _compute(self, *, tokens: list[float], seconds: list[float]) -> dict[str, Any]:
        counts = whole_numbers("tokens", tokens)
        if not counts:
            raise ValueError("Throughput needs at least one call, got `tokens=[]`.")
        for at, value in enumerate(seconds):
            if value is None or not 0 < value < math.inf:
                raise ValueError(f"`seconds` must be finite and > 0, got {value!r} at index {at}.")
        total = math.fsum(seconds)
        return {"tokens_per_second": sum(counts) / total, "tokens": sum(counts), "seconds": total}
