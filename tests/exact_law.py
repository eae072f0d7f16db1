"""The law of generated texts, computed without generating: enumerate all texts, apply the rule by hand.

Everything here is plain Python and numpy in float64. Nothing is imported from the package: that is what makes the
comparison worth something.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import chi2
from transformers import PreTrainedModel

Text = tuple[int, ...]
Law = dict[Text, float]
PlainRule = Callable[[np.ndarray, np.ndarray, np.ndarray | None], np.ndarray]  # (p, q, q0) -> r, all (V,)

SMALLEST_EXPECTED_COUNT = 5


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def prefix_logits(model: PreTrainedModel, prompt: Text, length: int, vocabulary: int) -> dict[Text, np.ndarray]:
    """The model's logits after prompt + prefix, for all prefixes shorter than `length`. One batch, no cache."""
    texts = list(itertools.product(range(vocabulary), repeat=length - 1))
    ids = torch.tensor([prompt + text for text in texts])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[:, -length:].double().numpy()
    # Texts with the same prefix have the same logits there; the last one written stays.
    return {text[:n]: row[n] for text, row in zip(texts, logits, strict=True) for n in range(length)}


def law_of_texts(step: Callable[[Text], np.ndarray], length: int, eos: int | None = None) -> Law:
    """The law of texts of `length` tokens, or fewer where they end with `eos`; step(prefix) is the next token's."""
    law: Law = {}
    open_prefixes: Law = {(): 1.0}
    for n in range(length):
        longer: Law = {}
        for prefix, weight in open_prefixes.items():
            for token, prob in enumerate(step(prefix)):
                text = (*prefix, token)
                ends = token == eos or n == length - 1
                (law if ends else longer)[text] = weight * float(prob)
        open_prefixes = longer
    return law


def marginal_law(law: Law, positions: Sequence[int]) -> Law:
    """The joint law of the tokens at some positions, counted from 0. Texts must be of one length."""
    marginal: Law = {}
    for text, prob in law.items():
        part = tuple(text[at] for at in positions)
        marginal[part] = marginal.get(part, 0.0) + prob
    return marginal


def chi_square_p_value(texts: Sequence[Text], law: Law) -> float:
    """How probable a sample as far from the law, or farther, is under it. 0 for a text that the law rules out."""
    observed = Counter(texts)
    if any(law.get(text, 0.0) <= 0 for text in observed):
        return 0.0
    cells, pooled_expected, pooled_observed = [], 0.0, 0
    for text, prob in sorted(law.items(), key=lambda item: item[1]):
        expected = prob * len(texts)
        if pooled_expected < SMALLEST_EXPECTED_COUNT or expected < SMALLEST_EXPECTED_COUNT:
            pooled_expected, pooled_observed = pooled_expected + expected, pooled_observed + observed[text]
        else:
            cells.append((expected, observed[text]))
    cells.append((pooled_expected, pooled_observed))
    statistic = sum((count - expected) ** 2 / expected for expected, count in cells)
    return float(chi2.sf(statistic, len(cells) - 1))


# The rules by hand, one position each. p, q, q0: base, proxy, proxy before alignment.


def blend(p: np.ndarray, q: np.ndarray, deferred: set[int]) -> np.ndarray:
    """Draw v from p; if v is deferred, throw it away and draw from q."""
    r = np.zeros_like(p)
    for v, p_v in enumerate(p):
        if v in deferred:
            r += p_v * q
        else:
            r[v] += p_v
    return r


def dual(threshold: float) -> PlainRule:
    return lambda p, q, _: blend(p, q, {v for v, p_v in enumerate(p) if p_v < threshold})


@dataclass(frozen=True)
class Paced:
    """The dual rule with a multiplier for each text, which follows the mass that was deferred before."""

    budget: float
    threshold: float
    step_size: float
    smallest_threshold: float
    largest_threshold: float

    @property
    def start(self) -> float:
        return -math.log(self.threshold)

    def __call__(self, p: np.ndarray, q: np.ndarray, _: np.ndarray | None, multiplier: float) -> np.ndarray:
        return dual(math.exp(-multiplier))(p, q, None)

    def after(self, multiplier: float, p: np.ndarray) -> float:
        mass = sum(p_v for p_v in p if p_v < math.exp(-multiplier))
        moved = multiplier + self.step_size * (mass - self.budget)
        return min(max(moved, -math.log(self.largest_threshold)), -math.log(self.smallest_threshold))


def primal(budget: float) -> PlainRule:
    def rule(p: np.ndarray, q: np.ndarray, _: np.ndarray | None) -> np.ndarray:
        deferred, spent = set[int](), 0.0
        for v in sorted(range(len(p)), key=lambda v: (p[v], v)):
            spent += p[v]
            if spent > budget:
                break
            deferred.add(v)
        return blend(p, q, deferred)

    return rule


def exact(budget: float) -> PlainRule:
    def rule(p: np.ndarray, q: np.ndarray, _: np.ndarray | None) -> np.ndarray:
        tokens = [v for v in range(len(p)) if p[v] > 0]
        subsets = (set(s) for n in range(len(tokens) + 1) for s in itertools.combinations(tokens, n))
        affordable = [s for s in subsets if sum(p[v] for v in s) <= budget]
        return blend(p, q, max(affordable, key=lambda s: sum(-p[v] * np.log(p[v]) for v in s)))

    return rule


def all_if(unsure: Callable[[np.ndarray, np.ndarray], bool]) -> PlainRule:
    return lambda p, q, _: q if unsure(p, q) else p


def nudging(threshold: float) -> PlainRule:
    return all_if(lambda p, q: p.max() < threshold)


def confidence_bet(margin: float) -> PlainRule:
    return lambda p, q, _: blend(p, q, {v for v, p_v in enumerate(p) if p_v < q.max() - margin})


def cascade(variant: str, alpha: float) -> PlainRule:
    return {
        "diff": all_if(lambda p, q: p.max() < q.max() - alpha),
        "opt": all_if(lambda p, q: p.max() < q.max() - alpha * 0.5 * np.abs(p - q).sum()),
        "token_v2": lambda p, q, _: blend(p, q, {v for v, q_v in enumerate(q) if q_v < q.max() - alpha}),
        "token_v3": lambda p, q, _: blend(p, q, {v for v, q_v in enumerate(q) if q_v < (1 - alpha) * q.max()}),
    }[variant]


def implicit_reward(beta: float) -> PlainRule:
    def rule(p: np.ndarray, q: np.ndarray, q0: np.ndarray | None) -> np.ndarray:
        weights = p * (q / q0) ** beta
        return weights / weights.sum()

    return rule


def ensemble(weight: float) -> PlainRule:
    return lambda p, q, _: weight * p + (1 - weight) * q


def blend_in(threshold: float) -> PlainRule:
    def rule(p: np.ndarray, q: np.ndarray, _: np.ndarray | None) -> np.ndarray:
        if p.max() >= threshold:
            return p
        a = min(1.0, q.max() / (p.max() + q.max()) + 0.1 * p[q.argmax()])
        return a * q + (1 - a) * p

    return rule


def nucleus(probs: np.ndarray, top_p: float) -> np.ndarray:
    """Drop the least likely tokens as long as what is dropped weighs at most 1 - top_p."""
    kept, dropped = probs.copy(), 0.0
    for v in np.argsort(probs)[:-1]:
        dropped += probs[v]
        if dropped > 1 - top_p:
            break
        kept[v] = 0.0
    return kept / kept.sum()


def counted_p_values(threshold: float, most: int) -> Iterator[Callable[[float], None]]:
    """A check of p-values against a threshold, for a fixture of a module; at the end it counts them."""
    seen = []

    def one(p_value: float) -> None:
        seen.append(p_value)
        assert p_value >= threshold

    yield one
    assert len(seen) <= most, f"{len(seen)} p-values were computed: raise P_VALUES, the level is per module."
