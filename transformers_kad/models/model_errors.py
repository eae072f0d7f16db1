"""Errors and hints that name a model: of texts beyond its context, unusable logits, and of `torch.compile`."""

import torch
from transformers import PreTrainedModel


class ContextLengthError(ValueError):
    """A text is longer than a model's context."""


class UnusableLogitsError(ValueError):
    """A model's logits are NaN, +inf or all -inf."""


def describe(model: PreTrainedModel) -> str:
    """A model's class and where it was loaded from, for error messages."""
    return f"{type(model).__name__} ({source_of(model)})"


def source_of(model: PreTrainedModel) -> str:
    """The folder or Hub id that a model was loaded from; of a `PeftModel` that of the model below the adapter."""
    return str(getattr(model.config, "_name_or_path", "") or "unnamed")


def how_to_compile(name: str, model: object) -> str:
    """How a model is compiled and stays one, for the message about what `torch.compile` made of it; else empty."""
    if not hasattr(model, "_orig_mod"):
        return ""
    return f". To compile the {name}, use `{name}.compile()`, not `torch.compile({name})`, and pass the model itself"


def is_unusable(logits: torch.Tensor) -> torch.Tensor:
    """Which rows of logits `(..., V)` have no likeliest token: NaN, +inf, or all -inf. Shape `(...)`, boolean."""
    return ~(logits.amax(-1).abs() < torch.inf)


def unusable_logits_error(
    role: str, model: PreTrainedModel | None, position: int, row: int = 0
) -> UnusableLogitsError:
    """The error for unusable logits of a model at a position of the text (in tokens) of one of the sequences."""
    name = role if model is None else f"{role} {describe(model)}"
    return UnusableLogitsError(
        f"The logits of the {name} for position {position} of sequence {row} are NaN, +inf or all -inf. Check the "
        "weights and the dtype (float16 overflows where bfloat16 does not), and for the base the processors before "
        "KAD, which may have banned every token."
    )
