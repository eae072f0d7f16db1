"""Gives small models the cost of large ones without changing their output."""

import re
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

_UNITS = {"K": 10**3, "M": 10**6, "B": 10**9}


class InertWidth(nn.Module):
    """An MLP with a second, wide gated MLP whose down projection is zero, so that it costs time and changes nothing.

    Args:
        mlp: the MLP of the layer.
        hidden_size: the hidden size of the model.
        intermediate_size: the width of the second MLP.
    """

    def __init__(self, mlp: nn.Module, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.mlp = mlp
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        with torch.no_grad():
            # Written explicitly, since memory that was allocated as zeros and never written to is faster to read.
            self.down_proj.weight.zero_()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(..., hidden_size)` to the same shape."""
        wide = nn.functional.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        return self.mlp(hidden_states) + self.down_proj(wide)


def inflate(model: PreTrainedModel, parameters: int) -> PreTrainedModel:
    """Widen the MLPs of a model in place until it has about `parameters` parameters. Its logits stay bitwise equal.

    A forward pass then costs about as much as one of a model of that size, except for attention and vocabulary, which
    keep their size. Speculative decoding can thus be timed with the acceptance of a small trained pair.

    Args:
        model: a decoder whose layers have an `mlp`, such as Llama, Qwen or Mistral.
        parameters: the target number of parameters, which is met up to half of what one unit of width adds.

    Returns:
        The model itself.

    Raises:
        ValueError: the model is already larger, or its layers have no `mlp`.
    """
    config, own = model.config.get_text_config(decoder=True), model.num_parameters()
    layers = getattr(model.get_decoder(), "layers", None)
    if not layers or not all(isinstance(getattr(layer, "mlp", None), nn.Module) for layer in layers):
        raise ValueError(
            f"`inflate` widens the `mlp` of each decoder layer, and {type(model).__name__} has none: take a model "
            "such as Llama, Qwen or Mistral."
        )
    width = round((parameters - own) / (3 * config.hidden_size * len(layers)))
    if width < 1:
        raise ValueError(f"{type(model).__name__} has {own:,} parameters, and can't be inflated to {parameters:,}.")
    for layer in layers:
        weight = next(layer.mlp.parameters())
        with torch.device(weight.device):
            layer.mlp = InertWidth(layer.mlp, config.hidden_size, width).to(weight.dtype)
        layer.mlp.eval().requires_grad_(False)
    return model


def parse_count(text: str) -> int:
    """Parse a number of parameters: "300M", "1.7B", "30000000".

    >>> parse_count("1.7B")
    1700000000
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB]?)", text.strip(), re.IGNORECASE)
    if match is None:
        raise ValueError(f"A number of parameters is written as 300M, 1.7B or 30000000, got {text!r}.")
    return round(float(match[1]) * _UNITS.get(match[2].upper(), 1))


def parse_by_model(text: str | None, option: str) -> dict[str, str]:
    """Parse an option with values for base and proxy: "base=300M,proxy=30M".

    >>> parse_by_model("base=300M,proxy=30M", "--inflate")
    {'base': '300M', 'proxy': '30M'}
    """
    pairs: Sequence[str] = text.split(",") if text else ()
    found = dict(pair.partition("=")[::2] for pair in pairs)
    if not set(found) <= {"base", "proxy"} or not all(found.values()) or len(found) != len(pairs):
        raise ValueError(f"{option} is written as base=...,proxy=..., got {text!r}.")
    return found
