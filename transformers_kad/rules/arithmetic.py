"""Operations on tensors that the rules share: sums in float64, and selections by a mask.

A device without float64 sums whole numbers of 64 bits instead. A probability is split into limbs of 30 bits: the first
is its multiple of 2^-30, the second what is left of it in multiples of 2^-60, and so on. Five limbs hold every float32
of at least 2^-126 without loss, and their sums are exact. A mask that they decide is the one of exact sums. So is that
of float64, unless a sum is so close to the budget that rounding errors decide.
"""

import torch
from torch import Tensor

# On the CPU, at most this many elements are converted to float64 at a time, so that they stay in the cache.
CONVERTED_AT_ONCE = 2**18

LIMB_BITS = 30  # every device converts floats below 2^31 to whole numbers without loss
LIMB = 2**LIMB_BITS
LIMBS = 5


def has_float64(device: torch.device) -> bool:
    """Whether a device can compute in float64. MPS, the GPU of a Mac, cannot."""
    return device.type != "mps"


def split_for_float64(rows: Tensor) -> tuple[Tensor, ...]:
    """Split rows `(n, V)` into parts to convert to float64 one by one. Outside the CPU there is a single part."""
    if rows.device.type != "cpu" or rows.numel() <= CONVERTED_AT_ONCE:
        return (rows,)
    return torch.split(rows, max(1, CONVERTED_AT_ONCE // rows.shape[1]))


def sum_in_float64(probs: Tensor) -> Tensor:
    """The sums of `(..., V)` over the last dimension, `(...)` float64.

    They are on the CPU if the device of `probs` has no float64, which is then waited for.
    """
    if not has_float64(probs.device):
        return _from_limbs(to_limbs(probs).sum(-1).cpu().double())
    parts = split_for_float64(probs.reshape(-1, probs.shape[-1]))
    return torch.cat([part.sum(-1, dtype=torch.float64) for part in parts]).view(probs.shape[:-1])


def sum_precisely(probs: Tensor) -> Tensor:
    """The sums of :func:`sum_in_float64` as float32, on the device of `probs`, which is not waited for."""
    if not has_float64(probs.device):
        return _from_limbs(to_limbs(probs).sum(-1).float())
    return sum_in_float64(probs).float()


def sums_within(probs: Tensor, budget: float) -> Tensor:
    """Which of the cumulated sums of `(..., V)`, below 2 each, are at most a budget: `(..., V)` boolean."""
    if has_float64(probs.device):
        return probs.cumsum(-1, dtype=torch.float64) <= budget
    sums = list(to_limbs(probs).cumsum(-1))
    for at in reversed(range(1, LIMBS)):
        sums[at - 1] = sums[at - 1] + (sums[at] >> LIMB_BITS)
        sums[at] = sums[at] & LIMB - 1
    # The budget in limbs, from the last to the first. It may be rounded down, since the sums are whole numbers.
    rest, limits = int(budget * LIMB**LIMBS), []
    for _ in range(LIMBS - 1):
        rest, limit = divmod(rest, LIMB)
        limits.append(limit)
    within = torch.ones_like(probs, dtype=torch.bool)
    for own, limit in zip(reversed(sums), [*limits, rest], strict=True):
        within = (own < limit) | ((own == limit) & within)
    return within


def to_limbs(probs: Tensor, count: int = LIMBS) -> Tensor:
    """The first limbs of numbers from 0 to below 2, `(count, ...)` int64."""
    limbs, rest = [], probs
    for _ in range(count):
        rest = rest * LIMB
        whole = rest.floor()
        limbs.append(whole.long())
        rest = rest - whole
    return torch.stack(limbs)


def _from_limbs(limbs: Tensor) -> Tensor:
    """Limbs `(LIMBS, ...)` of a floating dtype as numbers `(...)`."""
    total = torch.zeros_like(limbs[0])
    for limb in limbs.flip(0):
        total = (limb + total) / LIMB
    return total


def zero_outside(mask: Tensor, probs: Tensor) -> Tensor:
    """The probabilities, with zeros where the boolean mask of the same shape is not set."""
    # A product takes the same time for every mask, and bytes convert to floats much faster than booleans.
    return probs * mask.view(torch.uint8)


def may_be_any(flags: Tensor) -> bool:
    """Whether any flag may be set. Only on the CPU are they looked at: elsewhere that would wait for the device."""
    return flags.device.type != "cpu" or bool(flags.any())


def replace_rows(probs: Tensor, flags: Tensor, others: Tensor) -> Tensor:
    """Return `probs` `(..., V)` with the rows that are flagged in `(...)` taken from `others` `(..., V)`."""
    return torch.where(flags.unsqueeze(-1), others, probs) if may_be_any(flags) else probs
