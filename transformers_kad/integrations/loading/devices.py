"""Where models run, and how they are quantized when they are loaded."""

from typing import Any

import torch


def pick_device(name: str) -> str:
    """The device that "auto" stands for."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def quantization_config(name: str | None) -> Any:
    """The configuration that transformers takes, or None."""
    if name is None:
        return None
    library, _, kind = name.partition("-")
    if library == "bitsandbytes":
        from transformers import BitsAndBytesConfig  # noqa: PLC0415

        return BitsAndBytesConfig(load_in_8bit=kind == "8bit", load_in_4bit=kind == "4bit")
    from torchao.quantization import Int8WeightOnlyConfig  # noqa: PLC0415
    from transformers import TorchAoConfig  # noqa: PLC0415

    # Its settings for the compiler would lower the precision of all other models in float32 as well.
    return TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))
