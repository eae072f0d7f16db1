"""Measures the peak memory of a block of code, in addition to the memory that was used before."""

import ctypes
import gc
import sys
from pathlib import Path
from typing import Self

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Context manager that measures peak memory: allocated memory on CUDA, else the resident memory of the process.

    Resident memory needs Linux, which records a peak that a process can reset. Memory that was freed before the block
    is returned to the system first, so that it counts when it is allocated again. Blocks that are freed inside
    may stay with the C library and then still count.

    Args:
        device: the device of the models.

    Attributes:
        bytes: the highest value in the block minus the value at its beginning, in bytes; None if it is not available.
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
            _trim_heap()
            self._before = _status_value("VmRSS") if _reset_peak() else None
        return self

    def __exit__(self, *exception: object) -> None:
        if self._device.type == "cuda":
            peak: int | None = torch.cuda.max_memory_allocated(self._device)
        else:
            peak = _status_value("VmHWM")
        if peak is not None and self._before is not None:
            self.bytes = max(peak - self._before, 0)


def _trim_heap() -> None:
    """Return freed memory to the system, which the GNU C library would otherwise keep."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _reset_peak() -> bool:
    """Reset the peak. Returns False if that is not possible."""
    try:
        _RESET.write_text("5")
    except OSError:
        return False
    return True


def _status_value(name: str) -> int | None:
    """A value in the status of the process, in bytes."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)
