"""Speed, acceptance and deferral of decoding runs, as an `evaluate` module.

`evaluate.load` copies this file to another folder and parses its imports line by line. They therefore have to be
absolute, and each of them in a single line.
"""

import math
from collections.abc import Iterable
from itertools import zip_longest
from typing import Any

import datasets
import evaluate

from transformers_kad.recipes.metrics.inputs import InMemory, whole_numbers

DESCRIPTION = """\
Speed, acceptance of drafts, and deferral of decoding runs. Each figure is computed if its inputs are given.

Speed is the sum of all tokens / the sum of all seconds. It is not the mean of the calls' own rates, in which a call of
two tokens would weigh as much as one of a thousand.

- Emitted tokens count, the end of sequence included; the prompt, padding and refused draft tokens don't.
- `seconds` is the wall-clock time of a call, prefill included. The texts of one batch share their time: pass one entry
  for each call, with the tokens of all its texts.

The acceptance rate is accepted / drafted tokens, both summed over all texts. A token is drafted if the proxy proposed
it, and accepted if it was proposed and emitted. At the end of a text this means:

- The proxy stops drafting at an end of sequence. Tokens that would have followed it are not drafted.
- Where a text ends in the middle of a draft (at a stop string, or by another stopping criterion), the rest of the
  draft counts as drafted and not accepted, even if verification had accepted it.
- The end of sequence counts like any other token: it is drafted, and accepted if it was emitted.

The rate is None if nothing was drafted, as in decoding token by token; 0 means that every draft was refused.

The acceptance length is the mean number of accepted draft tokens per round. A round is one forward pass of the base
with the tokens that it yields: the accepted part of a draft, followed by one token of the target unless the text ends
on a draft token. Entry k of a histogram h is the number of rounds with k accepted tokens, so sum(h) = rounds and
sum(k h_k) = accepted. A round whose draft was cut short, by the proxy's end of sequence or by the length limit, counts
with the k tokens that it emitted. The tokens of a text are

    tokens = accepted + rounds - rounds that end on a draft token

where the last term is 1 for a text that ended on an accepted end of sequence or was stopped within a draft, and 0
otherwise. `tokens_per_round`, which some papers call the acceptance length, therefore needs `tokens` as well as
`histograms`.
Token by token every round has one token: the histogram is [tokens] and the acceptance length 0.

The deferral mass is the share of the base's probability that was deferred to the proxy, as a mean over all emitted
positions. At one position D = sum_v d_v p_v is the base's probability of the deferred tokens. The mass of a text is
the mean of D over the positions that it emitted, the end of sequence included; positions of refused draft tokens do
not count. Texts are weighted by their tokens, so that every position weighs the same. Rules without a deferral mask
(implicit reward, ensemble, blend-in) have no D: their mass is None, and so is every mean that contains one of their
texts. A text without tokens has no position and does not count.
"""

CITATION = """\
@inproceedings{hammal2026kad,
  title     = {{KAD}: A Framework for Proxy-based Test-time Alignment with Knapsack Approximation Deferral},
  author    = {Hammal and Zweigenbaum and Corro},
  booktitle = {Proceedings of EACL},
  year      = {2026},
  note      = {arXiv:2510.27017}
}
@inproceedings{leviathan2023fast,
  title     = {Fast Inference from Transformers via Speculative Decoding},
  author    = {Leviathan, Yaniv and Kalman, Matan and Matias, Yossi},
  booktitle = {Proceedings of ICML},
  year      = {2023}
}
"""

INPUTS = """
Args:
    drafted: draft tokens of each text or call, whole numbers >= 0 (`kad.statistics.drafted`).
    accepted: draft tokens of each that were emitted, whole numbers <= `drafted` (`kad.statistics.accepted`).
    histograms: the histogram of each, lists of whole numbers >= 0 of any lengths
        (`kad.statistics.acceptance_histogram`).
    tokens: emitted tokens of each, whole numbers >= 0 (`kad.statistics.tokens`).
    seconds: the time of each call, > 0.
    masses: mean D of each, in [0, 1] or None (`kad.statistics.deferral_mass`).

Returns:
    tokens: sum of `tokens`. This and the next two need `tokens` and `seconds`; `tokens` alone come with `masses` too.
    seconds: sum of `seconds`.
    tokens_per_second: sum of `tokens` / sum of `seconds`.
    drafted: sum of `drafted`. This and `acceptance_rate` need `drafted` and `accepted`.
    acceptance_rate: sum of `accepted` / sum of `drafted`, None if nothing was drafted.
    accepted: sum of `accepted`; where only `histograms` are given, the accepted tokens of their rounds.
    acceptance_length: accepted / rounds, None if there was no round. This and the next four need `histograms`.
    histogram: the sum of all histograms, as long as the longest.
    rounds: the sum of this histogram.
    tokens_per_round: sum of `tokens` / rounds, None without `tokens` or rounds.
    draft_endings: rounds that end on a draft token, None without `tokens`.
    deferral_mass: mean D over all positions, None if a text with tokens has none, or if there are no tokens. It needs
        `masses` and `tokens`.

Raises:
    ValueError: inputs that no figure is computed from, lists of different length, no calls to compute a speed from,
        values out of range, or `tokens` that rounds with these histograms can't have emitted.

Example:
    >>> import evaluate
    >>> from transformers_kad.recipes.metrics import metric_path
    >>> decoding_statistics = evaluate.load(metric_path("decoding_statistics"))
    >>> decoding_statistics.compute(tokens=[100, 20], seconds=[2.0, 1.0])
    {'tokens': 120, 'seconds': 3.0, 'tokens_per_second': 40.0}
    >>> decoding_statistics.compute(drafted=[10, 30], accepted=[9, 15])
    {'drafted': 40, 'accepted': 24, 'acceptance_rate': 0.6}
    >>> result = decoding_statistics.compute(histograms=[[1, 0, 2], [0, 1]], tokens=[7, 1])
    >>> result["acceptance_length"], result["histogram"], result["tokens_per_round"], result["draft_endings"]
    (1.25, [1, 1, 2], 2.0, 1)
    >>> decoding_statistics.compute(masses=[0.5, 0.25], tokens=[10, 30])
    {'tokens': 40, 'deferral_mass': 0.3125}
"""

FIGURES = {
    "acceptance rate": ("drafted", "accepted"),
    "acceptance length": ("histograms",),
    "tokens per round": ("histograms", "tokens"),
    "speed": ("tokens", "seconds"),
    "deferral mass": ("masses", "tokens"),
}
ROUNDING = 1e-6  # D is a sum of float32 probabilities


class DecodingStatistics(InMemory, evaluate.Metric):
    """Tokens per second, acceptance rate, acceptance length and deferral mass."""

    _columns: list[str] | None = None  # the inputs that were given; None: none yet

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("float64")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {
                    "drafted": number,
                    "accepted": number,
                    "histograms": datasets.List(number),
                    "tokens": number,
                    "seconds": number,
                    "masses": number,
                }
            ),
            reference_urls=["https://arxiv.org/abs/2510.27017", "https://arxiv.org/abs/2211.17192"],
            license="Apache-2.0",
        )

    def _feature_names(self) -> list[str]:
        return self._columns or list(self.features)

    def _infer_feature_from_example(self, example: dict[str, Any]) -> datasets.Features:
        return datasets.Features({name: self.features[name] for name in example})

    _infer_feature_from_batch = _infer_feature_from_example

    def compute(self, **inputs: Any) -> dict[str, Any] | None:
        """Compute the figures from the inputs given here, or, without any, from those added before."""
        given = {name: values for name, values in inputs.items() if values is not None}
        if given or not len(self):
            self._choose_columns(given)
        return super().compute(**given)

    def add_batch(self, **inputs: Any) -> None:
        """Add the inputs of several texts or calls."""
        self._choose_columns(inputs)
        super().add_batch(**inputs)

    def add(self, **inputs: Any) -> None:
        """Add the inputs of one text or call, under the names that `compute` takes."""
        self._choose_columns(inputs)
        super().add(**inputs)

    def _choose_columns(self, names: Iterable[str]) -> None:
        """Restrict the inputs to those with these names. Each of them must belong to a complete set of FIGURES."""
        columns = [name for name in self.features if name in names]
        complete = [inputs for inputs in FIGURES.values() if set(inputs) <= set(columns)]
        if not columns or set(columns) != set().union(*complete):
            needs = "; ".join(f"{figure} from {list(inputs)}" for figure, inputs in FIGURES.items())
            raise ValueError(f"DecodingStatistics computes {needs}. These inputs are not enough: {columns}.")
        if columns != self._columns:
            if len(self):
                raise ValueError(f"The inputs added before were {self._columns}, so these can't follow: {columns}.")
            self.writer = None  # it has other columns, and no row yet
        self._columns = columns

    def _compute(self, **inputs: Any) -> dict[str, Any]:
        result: dict[str, Any] = {}
        tokens = whole_numbers("tokens", inputs["tokens"]) if "tokens" in inputs else None
        if tokens is not None and inputs.keys() & {"seconds", "masses"}:
            result["tokens"] = sum(tokens)
        if tokens is not None and "seconds" in inputs:
            result |= speed(tokens, inputs["seconds"])
        if "histograms" in inputs:
            result |= acceptance_length(inputs["histograms"], tokens)
        if "drafted" in inputs:
            result |= acceptance_rate(inputs["drafted"], inputs["accepted"])
        if tokens is not None and "masses" in inputs:
            result |= deferral_mass(inputs["masses"], tokens)
        return result


def speed(tokens: list[int], seconds: list[float | None]) -> dict[str, Any]:
    """The sum of all seconds, and the tokens per second."""
    if not tokens:
        raise ValueError("The speed needs at least one call, got `tokens=[]`.")
    for at, value in enumerate(seconds):
        if value is None or not 0 < value < math.inf:
            raise ValueError(f"`seconds` must be finite and > 0, got {value!r} at index {at}.")
    total = math.fsum(value for value in seconds if value is not None)
    return {"seconds": total, "tokens_per_second": sum(tokens) / total}


def acceptance_rate(drafted: list[float | None], accepted: list[float | None]) -> dict[str, Any]:
    """The drafted and the accepted tokens, and their ratio."""
    proposed, emitted = whole_numbers("drafted", drafted), whole_numbers("accepted", accepted)
    for at, (d, a) in enumerate(zip(proposed, emitted, strict=True)):
        if a > d:
            raise ValueError(f"`accepted` must not exceed `drafted`, got {a} of {d} at index {at}.")
    rate = sum(emitted) / sum(proposed) if sum(proposed) else None
    return {"drafted": sum(proposed), "accepted": sum(emitted), "acceptance_rate": rate}


def acceptance_length(histograms: list[list[float | None] | None], tokens: list[int] | None) -> dict[str, Any]:
    """The sum of the histograms, and the figures of the rounds."""
    counts = [whole_numbers(f"histograms[{at}]", histogram or []) for at, histogram in enumerate(histograms)]
    if tokens is not None:
        check_tokens(tokens, counts)
    total = [sum(column) for column in zip_longest(*counts, fillvalue=0)]
    rounds = sum(total)
    return {
        "accepted": accepted_tokens(total),
        "acceptance_length": accepted_tokens(total) / rounds if rounds else None,
        "histogram": total,
        "rounds": rounds,
        "tokens_per_round": sum(tokens) / rounds if tokens is not None and rounds else None,
        "draft_endings": None if tokens is None else accepted_tokens(total) + rounds - sum(tokens),
    }


def accepted_tokens(histogram: list[int]) -> int:
    """The accepted draft tokens of all rounds of a histogram."""
    return sum(k * count for k, count in enumerate(histogram))


def check_tokens(tokens: list[int], histograms: list[list[int]]) -> None:
    """Raise unless rounds with these histograms can have emitted these numbers of tokens."""
    for at, (count, histogram) in enumerate(zip(tokens, histograms, strict=True)):
        most = accepted_tokens(histogram) + sum(histogram)
        least = most - sum(histogram[1:])  # only a round with a draft token can end on one
        if not least <= count <= most:
            raise ValueError(
                f"Rounds with the histogram {histogram} emit {least} to {most} tokens, got {count} at index {at}."
            )


def deferral_mass(masses: list[float | None], tokens: list[int]) -> dict[str, Any]:
    """The mean deferral mass over all emitted positions."""
    for at, mass in enumerate(masses):
        if mass is not None and not 0 <= mass <= 1 + ROUNDING:
            raise ValueError(f"`masses` must be None or in [0, 1], got {mass!r} at index {at}.")
    weighted = [(mass, count) for mass, count in zip(masses, tokens, strict=True) if count]
    known = [mass * count for mass, count in weighted if mass is not None]
    mean = math.fsum(known) / sum(tokens) if weighted and len(known) == len(weighted) else None
    return {"deferral_mass": mean}
