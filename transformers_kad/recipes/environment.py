"""The environment of a measurement: versions, device and threads."""

import os
import platform
from typing import Any

import peft
import torch
import transformers

from .._version import __version__


def describe_environment(device: str = "cpu") -> dict[str, Any]:
    """The versions of the libraries and the kind of machine, to be stored with measurements.

    Args:
        device: where the models ran: "cpu", "cuda", "cuda:1", "mps".
    """
    if device.startswith("cuda") and torch.cuda.is_available():
        name = torch.cuda.get_device_name(device)
    elif device == "cpu":
        name = f"CPU ({platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads)"
    else:
        name = device
    return {
        "device": name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "transformers_kad": __version__,
    }
