"""Mean deferral mass D, as an `evaluate` module.

`evaluate.load` copies this file elsewhere: its imports are absolute, and one a line, or the loader misreads them.
"""

import math
from typing import Any

import datasets
import evaluate

from transformers_kad.recipes.metrics import KAD_CITATION
from transformers_kad.recipes.metrics.inputs import InMemory, whole_numbers

DESCRIPTION = """\
Mean deferral mass: how much of the base's probability was handed to the proxy, over all emitted positions.

At one position D = sum_v d_v p_v is the base's probability of the deferred tokens. A text's mass is the mean of D over
the positions that it emitted, the end of sequence included; positions of refused or cut-off draft tokens do not count.
The mean over texts is weighted by their tokens, so that every position weighs the same.

Rules that are no mask (implicit reward, ensemble, blend-in) have no D: their texts' mass is None, and so is the mean
over any texts of which one has none. A text without tokens has no position, and does not count.
"""

INPUTS = """
Args:
    masses: mean D of each text or call, in [0, 1] or None (`kad.statistics.deferral_mass`).
    tokens: emitted tokens of each, whole numbers >= 0.

Returns:
    deferral_mass: mean D over all positions, None if a text with tokens has none, or if there are no tokens.
    tokens: sum of `tokens`.

Raises:
    ValueError: lists of different length, or values out of range.

Example:
    >>> import evaluate
    >>> from transformers_kad.recipes.metrics import metric_path
    >>> deferral_mass = evaluate.load(metric_path("deferral_mass"))
    >>> deferral_mass.compute(masses=[0.5, 0.25], tokens=[10, 30])
    {'deferral_mass': 0.3125, 'tokens': 40}
"""

ROUNDING = 1e-6  # D is a sum of float32 probabilities


class DeferralMass(InMemory, evaluate.Metric):
    """Mean deferral mass D over emitted positions."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=KAD_CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"masses": datasets.Value("float64"), "tokens": datasets.Value("float64")}),
            reference_urls=["https://arxiv.org/abs/2510.27017"],
            license="Apache-2.0",
        )

    def _compute(self, *, masses: list[float | None], tokens: list[float]) -> dict[str, Any]:
        counts = whole_numbers("tokens", tokens)
        for at, mass in enumerate(masses):
            if mass is not None and not 0 <= mass <= 1 + ROUNDING:
                raise ValueError(f"`masses` must be None or in [0, 1], got {mass!r} at index {at}.")
        positions = sum(counts)
        weighted = [(mass, count) for mass, count in zip(masses, counts, strict=True) if count]
        known = [mass * count for mass, count in weighted if mass is not None]
        mean = math.fsum(known) / positions if positions and len(known) == len(weighted) else None
        return {"deferral_mass": mean, "tokens": positions}
