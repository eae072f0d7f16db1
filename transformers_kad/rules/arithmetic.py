"""Operations on tensors that the rules share: sums in float64, and selections by a mask."""

import torch
from torch import Tensor

# On the CPU, at most this many elements are converted to float64 at a time, so that they stay in the cache.
CONVERTED_AT_ONCE = 2**18


def split_for_float64(rows: Tensor) -> tuple[Tensor, ...]:
    """Split rows `(n, V)` into parts to convert to float64 one by one. Outside the CPU there is a single part."""
    if rows.device.type != "cpu" or rows.numel() <= CONVERTED_AT_ONCE:
        return (rows,)
    return torch.split(rows, max(1, CONVERTED_AT_ONCE // rows.shape[1]))


def sum_in_float64(probs: Tensor) -> Tensor:
    """The sums of `(..., V)` over the last dimension, `(...)` float64."""
    parts = split_for_float64(probs.reshape(-1, probs.shape[-1]))
    return torch.cat([part.sum(-1, dtype=torch.float64) for part in parts]).view(probs.shape[:-1])


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
