"""Random distributions and one rule of each kind, for the tests of the rules."""

from itertools import pairwise

import torch
from hypothesis import settings
from hypothesis import strategies as st

from transformers_kad import (
    BlendIn,
    CascadeDeferral,
    ConfidenceBetDeferral,
    DualDeferral,
    Ensemble,
    ExactDeferral,
    ImplicitReward,
    NudgingDeferral,
    PacedDeferral,
    PrimalDeferral,
)

# Sums and products of multiples of 1/64 with these are exact in float32: ties are ties in both implementations.
EIGHTHS = [i / 8 for i in range(9)]
VARIANTS = ["diff", "opt", "token_v2", "token_v3"]
ALL_RULES = [
    DualDeferral(0.2),
    PrimalDeferral(0.6),
    ExactDeferral(0.6, tolerance=0.02),  # to 1e-4, flat distributions take seconds
    NudgingDeferral(0.5),
    ConfidenceBetDeferral(0.1),
    *(CascadeDeferral(variant, 0.05) for variant in VARIANTS),
    PacedDeferral(0.3, threshold=0.2, largest_threshold=0.9),
    ImplicitReward(1.5),
    Ensemble(0.3),
    BlendIn(0.6),
]
deterministic = settings(derandomize=True, deadline=None, max_examples=100)


def random_logits(*shape, seed, spread=2.0):
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_rows(*shape, seed, spread=2.0):
    """Random distributions, float32, without zeros."""
    return random_logits(*shape, seed=seed, spread=spread).softmax(-1)


@st.composite
def even_distributions(draw, count=1, smallest=1, largest=10):
    """`count` lists of V multiples of 1/64 that sum to 1: zeros, ties and one-hot vectors are common."""
    size = draw(st.integers(smallest, largest))
    rows = []
    for _ in range(count):
        cuts = sorted(draw(st.lists(st.integers(0, 64), min_size=size - 1, max_size=size - 1)))
        rows.append([(high - low) / 64 for low, high in pairwise([0, *cuts, 64])])
    return rows


@st.composite
def distinct_distributions(draw, count=1, smallest=2, largest=10):
    """`count` float32 tensors of V probabilities, no two of them equal."""
    size = draw(st.integers(smallest, largest))
    rows = []
    for _ in range(count):
        weights = draw(st.lists(st.integers(1, 10_000), min_size=size, max_size=size, unique=True))
        rows.append(torch.tensor(weights, dtype=torch.float64).div(sum(weights)).float())
    return rows


def close(r, expected, tolerance=1e-6):
    return torch.allclose(r, torch.tensor(expected), rtol=0, atol=tolerance)


UNIT = 2.0**-40


def whole_units(size, total, seed):
    """An even number of whole numbers below 2^24 that add up to `total`."""
    numbers = torch.full((size,), total // size)
    offsets = torch.randint(
        -(total // size) + 1, total // size, (size // 2,), generator=torch.Generator().manual_seed(seed)
    )
    numbers[::2] += offsets
    numbers[1::2] -= offsets
    numbers[0] += total % size
    assert int(numbers.sum()) == total
    assert 0 < int(numbers.min()) <= int(numbers.max()) < 2**24
    return numbers


def forbidden(*args):
    raise AssertionError("this must not be called")
