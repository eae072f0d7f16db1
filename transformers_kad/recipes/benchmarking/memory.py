"""The most memory that a block of code held at once, beside what was there before."""

import ctypes
import gc
import sys
from pathlib import Path
from typing import Self

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Measures a block: on CUDA what the allocator handed out, elsewhere the resident memory of this process.

    The second needs Linux, which keeps the highest value and lets a process reset it. Memory that was freed before is
    given back to the system first, so that it counts again when it is taken again.

    Args:
        device: where the models are.

    Attributes:
        bytes: highest value in the block less the value at its beginning; None where it can't be had.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.bytes: int | None = None

    def __enter__(self) -> Self:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before: int | None = torch.cuda.memory_allocated(self._device)
        else:
            _give_back()
            self._before = _resident("VmRSS") if _reset_peak() else None
        return self

    def __exit__(self, *exception: object) -> None:
        if self._device.type == "cuda":
            peak: int | None = torch.cuda.max_memory_allocated(self._device)
        else:
            peak = _resident("VmHWM")
        if peak is not None and self._before is not None:
            self.bytes = max(peak - self._before, 0)


def _give_back() -> None:
    """Hand freed memory back to the system; the GNU C library keeps it otherwise."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _reset_peak() -> bool:
    """Forget the highest value so far; False where that is not possible."""
    try:
        _RESET.write_text("5")
    except OSError:
        return False
    return True


def _resident(name: str) -> int | None:
    """A value of the process's status, in bytes."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)
