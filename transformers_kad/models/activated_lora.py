"""Activated LoRA (aLoRA, arXiv 2504.12397): an adapter that is active from its invocation tokens on.

In a call of `generate`, peft looks for the last invocation tokens of each prompt, and tells every forward in how many
of its last columns the adapter is active (`alora_offsets`; `tuners/lora/variants.py` in peft 0.21). In a forward
outside of `generate` it looks for them in the ids of that forward, which behind a cache are only the new ones. So the
functions here find them as a call of `generate` of the model itself would.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModelForCausalLM
from peft.tuners.lora import LoraLayer
from torch import nn

from .adapters import injected

NEVER = torch.iinfo(torch.long).max  # tokens before an activation that never comes


def invocation_tokens(model: nn.Module) -> list[int] | None:
    """What activates the active adapter of a model, if that is an aLoRA."""
    if not isinstance(model, PeftModelForCausalLM):  # peft looks for the tokens in no other class
        return None
    tokens: list[int] | None = getattr(model.active_peft_config, "alora_invocation_tokens", None)
    return tokens


def tokens_before_activation(
    model: nn.Module, prompt: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor | None:
    """How many tokens of each prompt `(B, L)` come before its activation, `(B,)`, NEVER without an activation.

    None for a model whose active adapter is no aLoRA.
    """
    invocation = invocation_tokens(model)
    if invocation is None:
        return None
    if prompt.shape[1] < len(invocation):
        return torch.full_like(prompt[:, 0], NEVER)
    found = (prompt.unfold(1, len(invocation), 1) == torch.tensor(invocation, device=prompt.device)).all(-1)
    found &= attention_mask.unfold(1, len(invocation), 1).bool().all(-1)
    tokens_before = attention_mask.long().cumsum(-1)[:, : found.shape[1]] - 1
    last = tokens_before.masked_fill(~found, -1).amax(-1)
    return last.masked_fill(last < 0, NEVER)


def prompt_activation(model: nn.Module, attention_mask: torch.Tensor) -> torch.Tensor | None:
    """As `tokens_before_activation`, from what peft found in the prompts `(B, L)` as the call of `generate` began."""
    offsets = injected(model, "alora_offsets")
    if offsets is None:
        return None
    active = torch.tensor([offset or 0 for offset in offsets], device=attention_mask.device)
    active = active.repeat_interleave(len(attention_mask) // len(offsets))
    tokens_before = attention_mask.long().cumsum(-1) - 1
    columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return tokens_before.masked_fill(columns < attention_mask.shape[1] - active[:, None], NEVER).amin(-1)


def active_columns(before: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """How many of the columns `(B, S)` lie behind the first `before` `(B,)` tokens of each text: `(B,)`."""
    return (attention_mask.long().cumsum(-1) > before[:, None]).sum(-1)


def first_difference(before: torch.Tensor, other: torch.Tensor, attention_mask: torch.Tensor) -> int:
    """The first column `(B, S)` that is active in one of two activations and not in the other; S for none."""
    first = torch.minimum(before, other).masked_fill(before == other, NEVER)
    return attention_mask.shape[1] - int(active_columns(first, attention_mask).max())


@contextmanager
def activated(model: nn.Module, before: torch.Tensor | None, attention_mask: torch.Tensor) -> Iterator[None]:
    """For the block, aLoRA is active behind the first `before` tokens of each text, whatever peft found in the prompt.

    None leaves to peft what is active.
    """
    handles = []
    offsets = None if before is None else active_columns(before, attention_mask).tolist()

    def override(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "alora_offsets": offsets}

    try:
        for layer in model.modules() if offsets is not None else ():
            if isinstance(layer, LoraLayer):  # of several hooks the last one decides
                handles.append(layer.register_forward_pre_hook(override, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
