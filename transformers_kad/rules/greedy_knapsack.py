"""The greedy solution of a knapsack: the longest prefix, in the order of rising p, whose mass is within the budget.

Ties are in the order of ids, and sums are in float64. Three ways lead to the same prefix and differ in speed. Sorting
is the fastest for a small vocabulary, and outside the CPU, where it never waits for the device. In a large vocabulary
usually few tokens are left out, which are found among the likeliest. Where these are too many, the prefix is found by
counting the mass of classes of tokens.
"""

import torch
from torch import Tensor

from .arithmetic import sum_in_float64, sums_within, zero_outside

SORTED_VOCABULARY = 4096  # the largest vocabulary that is sorted
NUCLEUS = 64  # the most tokens that are left out where the prefix is found among the likeliest
BLOCK = 128  # how many neighbouring tokens are represented by their maximum when the likeliest are looked for


def longest_prefix(probs: Tensor, budget: float) -> Tensor:
    """The mask of the prefix of each row of p, float32: `(rows, V)` boolean.

    The last token of the order is left out even where the sum of all is within the budget. Outside the CPU nothing is
    read back from the device.
    """
    if probs.device.type != "cpu" or probs.shape[-1] <= SORTED_VOCABULARY:
        return _prefix_by_sorting(probs, budget)
    mask, found = _prefix_around_nucleus(probs, budget)
    for row in (~found).nonzero().squeeze(1).tolist():
        mask[row] = _prefix_by_counting(probs[row], budget)
    return mask


def _prefix_by_sorting(probs: Tensor, budget: float) -> Tensor:
    ordered = probs.sort(dim=-1).values
    fits = sums_within(ordered, budget)
    fits[:, -1] = False
    count = fits.sum(-1, keepdim=True)
    # As many tokens of exactly the first value that does not fit are taken as fit, those of the lowest ids.
    critical = ordered.gather(-1, count)
    lighter, same = probs < critical, probs == critical
    room = count - lighter.sum(-1, keepdim=True)
    return lighter | (same & (same.cumsum(-1, dtype=torch.int32) <= room))


def _prefix_around_nucleus(probs: Tensor, budget: float) -> tuple[Tensor, Tensor]:
    """The prefixes of rows that leave out at most `NUCLEUS` tokens, found by sorting only the likeliest ones.

    Returns:
        The masks `(rows, V)`, and which of them are right, `(rows,)`: those that leave out only tokens that are among
        the `NUCLEUS + 1` likeliest, and likelier than the last of these.
    """
    ids = _likeliest(probs, NUCLEUS + 1).sort().values
    ordered, order = probs.gather(-1, ids).sort(stable=True)
    rest = sum_in_float64(probs.scatter(-1, ids, 0.0))
    fits = rest.unsqueeze(-1) + ordered.double().cumsum(-1) <= budget
    fits[:, -1] = False
    mask = torch.ones_like(probs, dtype=torch.bool).scatter_(-1, ids.gather(-1, order), fits)
    return mask, (fits | (ordered > ordered[:, :1])).all(-1)


def _likeliest(probs: Tensor, count: int) -> Tensor:
    """Ids `(rows, count)` of the likeliest tokens of `(rows, V)` on the CPU, in any order and with any ties.

    They are in the `count` blocks with the largest maxima, or after the last whole block, since every token elsewhere
    is at most as likely as each of these maxima.
    """
    blocked = probs.shape[-1] // BLOCK * BLOCK
    maxima = torch.unflatten(probs[:, :blocked], -1, (-1, BLOCK)).amax(-1)
    blocks = maxima.topk(min(count, maxima.shape[-1]), sorted=False).indices
    ids = (blocks.unsqueeze(-1) * BLOCK + torch.arange(BLOCK, device=probs.device)).flatten(1)
    ids = torch.cat([ids, torch.arange(blocked, probs.shape[-1], device=probs.device).expand(len(probs), -1)], dim=-1)
    return ids.gather(-1, probs.gather(-1, ids).topk(count, sorted=False).indices)


def _prefix_by_counting(probs: Tensor, budget: float) -> Tensor:
    """The prefix of one row `(V,)` on the CPU, in a number of passes that does not depend on the distribution.

    Floats that are not negative are in the order of their bits. The masses of all tokens with the same upper half of
    the bits say in which of these classes the prefix ends, and within it those of the lower half say at which value.
    """
    half = 15  # the bits of 1.0 are below 2^30
    bits = probs.view(torch.int32).clamp(min=0)  # -0.0 counts as 0, as does what is no probability
    upper = bits >> half
    mass = torch.bincount(upper, weights=probs.double()).cumsum(0)
    high, below = _critical_class(mass, 0.0, budget)
    mass = below + torch.bincount(bits & (1 << half) - 1, weights=zero_outside(upper == high, probs).double()).cumsum(
        0
    )
    low, below = _critical_class(mass, below, budget)
    critical = (high << half) + low
    mask = bits < critical

    # As many tokens of exactly this value are taken as fit. (In a row with NaN, `below` is NaN, and any mask will do.)
    value = float(torch.tensor(critical, dtype=torch.int32, device=bits.device).view(torch.float32))
    count = int((budget - below) / value) + 1 if value > 0 and below <= budget else len(probs)
    while value > 0 and below + count * value > budget:
        count -= 1
    if count:
        same = bits == critical
        place = same.cumsum(0, dtype=torch.int32)
        mask |= same & (place <= min(count, int(place[-1]) - 1))
    return mask


def _critical_class(mass: Tensor, below: float, budget: float) -> tuple[int, float]:
    """The first class that does not fit as a whole, or the last one with any mass, and the mass before that class.

    The cumulated masses of the classes are float64 and include the mass `below` the first class.
    """
    at = min(int(torch.searchsorted(mass, budget, right=True)), int(torch.searchsorted(mass, mass[-1])))
    return at, float(mass[at - 1]) if at else below
