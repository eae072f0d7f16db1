"""The device that models run on, and how they are quantized when they are loaded."""

import functools
import sys
from typing import Any

import torch

QUANTIZATIONS = ("torchao-int8", "bitsandbytes-8bit", "bitsandbytes-4bit")


def pick_device(name: str) -> str:
    """The device that "auto" stands for: CUDA if it is available, else MPS, else the CPU.

    The first call that picks a device prints it to standard error.
    """
    if name != "auto":
        return name
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    _tell_once(device)
    return device


@functools.cache
def _tell_once(device: str) -> None:
    print(f'Device: {device}, which is the first available one of "cuda", "mps" and "cpu".', file=sys.stderr)


def quantization_config(name: str | None) -> Any:
    """The quantization configuration for `from_pretrained`, by a name from :data:`QUANTIZATIONS`; None for None.

    Raises:
        ImportError: torchao is not installed, or does not run with this version of torch.
    """
    if name is None:
        return None
    library, _, kind = name.partition("-")
    if library == "bitsandbytes":
        from transformers import BitsAndBytesConfig  # noqa: PLC0415

        return BitsAndBytesConfig(load_in_8bit=kind == "8bit", load_in_4bit=kind == "4bit")
    try:
        from torchao.quantization import Int8WeightOnlyConfig  # noqa: PLC0415
    except ImportError as error:
        raise ImportError(
            f'Quantization {name!r} needs torchao: pip install -e ".[quantization]" ({error}).'
        ) from error
    from transformers import TorchAoConfig  # noqa: PLC0415

    # torchao's compiler settings would also lower the precision of all other models in float32.
    return TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))
