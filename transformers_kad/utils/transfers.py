"""Copies between the host and a device: some for which nobody waits, and one for all that is to be read."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch

Integers: TypeAlias = Sequence[int] | Sequence[Sequence[int]]


def is_synchronous(device: torch.device) -> bool:
    """Whether the host can read values of a device without waiting for it, as on the CPU."""
    return device.type == "cpu"


def send(values: torch.Tensor | Integers, device: torch.device) -> torch.Tensor:
    """Values that the host knows as a tensor on a device, without waiting for what the device still has to do.

    Numbers become int64. A tensor keeps its type; one that is on another device than the host goes to `device` as
    PyTorch sends it.
    """
    tensor = values if isinstance(values, torch.Tensor) else torch.tensor(values, dtype=torch.long, device="cpu")
    if tensor.device.type != "cpu" or device.type in ("cpu", "mps"):
        return tensor.to(device)  # MPS may read from the host's memory after it was given back
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # only from there CUDA copies by itself
    return tensor.to(device, non_blocking=True)


def fetch(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Read tensors from their device, as nested lists, in one copy, for which the host waits.

    Booleans are read as 0 and 1, and numbers with a fraction in float32.
    """
    as_integers = [
        tensor.float().contiguous().view(torch.int32) if tensor.is_floating_point() else tensor
        for tensor in tensors.values()
    ]
    together = torch.cat([part.flatten().long() for part in as_integers]).cpu()
    values = {}
    parts = together.split([tensor.numel() for tensor in as_integers])
    for (name, tensor), part in zip(tensors.items(), parts, strict=True):
        read = part.int().view(torch.float32) if tensor.is_floating_point() else part
        values[name] = read.view(tensor.shape).tolist()
    return values
