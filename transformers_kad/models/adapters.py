"""Adapters of peft: which of them can follow a text, where aLoRA begins, and a model with its adapter switched off.

Sources, all in peft 0.21: `tuners/*/layer.py` for what a forward depends on and what an initialization does to the
weights below; `tuners/lora/variants.py` for aLoRA (activated LoRA, arXiv 2504.12397); `_enable_peft_forward_hooks` of
the tuners for what reaches the layers by hooks.
"""

import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftModelForCausalLM
from peft.tuners.adaption_prompt.layer import AdaptedAttention, AdaptedAttentionGPT
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

# Types of adapters whose output at a token is no function of the text up to it alone, and why.
NOT_TOKEN_BY_TOKEN = {
    "LILY": "weighs its parts by an average over all tokens of a forward, those of other sequences included",
    "XLORA": "computes its weights in a forward of its own, which writes to the same cache",
    "POLY": "needs `task_ids` in every forward",
}
# Initializations of LoRA that rewrite the weights below: how `LoraConfig.init_lora_weights` begins.
REWRITING_INITIALIZATIONS = ("pissa", "olora", "corda", "loftq", "lora_ga")
# What peft hands to its layers by hooks during a call of `generate`, one value for each row of the batch.
VALUES_BY_ROW = ("adapter_names", "task_ids")
ADAPTED_LAYERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)
ADAPTED_ATTENTION = (AdaptedAttention, AdaptedAttentionGPT)  # of adaption prompts, which are no such layers
# Tokens before an activation that never comes.
NEVER = torch.iinfo(torch.long).max


def model_below(model: Any) -> Any:
    """The model below an adapter of peft; a model without one itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def adapter_configs(model: nn.Module) -> dict[str, PeftConfig]:
    """The configurations of all adapters in a model, by name, whether peft or transformers put them there."""
    # `vars`, since a module without the attribute would look for it through all that it wraps.
    inside = [vars(module).get("peft_config") for module in model.modules()]
    found = [configs for configs in (*inside, getattr(model, "peft_config", None)) if isinstance(configs, dict)]
    return {name: config for configs in found for name, config in configs.items() if isinstance(config, PeftConfig)}


def why_not_followable(model: nn.Module) -> str | None:
    """Why a model with its adapters can't read a text piece by piece behind a cache; None if it can."""
    for name, config in adapter_configs(model).items():
        if config.is_prompt_learning:
            return "has a prompt-learning adapter, whose virtual tokens do not fit the text"
        reason = NOT_TOKEN_BY_TOKEN.get(config.peft_type)
        if reason is not None:
            return f"has the adapter {name!r} of type {config.peft_type.value}, which {reason}"
        if getattr(config, "sample_at_inference", False):
            return f"has the adapter {name!r} with sample_at_inference=True, whose logits differ from call to call"
    return None


def why_not_compilable(model: nn.Module) -> str | None:
    """Why a model with its adapters can't run in compiled code with one static cache; None if it can."""
    for name, config in adapter_configs(model).items():
        if config.peft_type == "SHADOW":
            return f"has the adapter {name!r} of type SHADOW, which keeps a cache of its own"
    for name in (*VALUES_BY_ROW, "alora_offsets"):
        if injected(model, name) is not None or (name == "alora_offsets" and invocation_tokens(model) is not None):
            return f"has adapters that are told `{name}`, which compiled code would keep from the first call"
    return None


def check_speculative_base(model: nn.Module, sequences: int) -> None:
    """Raise `ValueError` unless a base with its adapters can verify drafts in so many sequences.

    Args:
        model: the model that peft calls `generate` of, inside its `PeftModel`.
        sequences: rows of the batch.
    """
    # For prompt learning the `PeftModel` prepares the inputs, and is seen nowhere else.
    owner = getattr(getattr(model, "prepare_inputs_for_generation", None), "__self__", model)
    reason = None if injected(model, "task_ids") is not None else why_not_followable(owner)
    if reason is not None:
        raise ValueError(
            f"The base {type(model).__name__} {reason}, so that it can't verify drafts: leave out `assistant_model`."
        )
    if sequences == 1:
        return
    for name in VALUES_BY_ROW:
        values = injected(model, name)
        if values is not None:
            raise ValueError(
                f"`{name}={values!r}` has a value for each row, and in speculative decoding rows leave the batch when "
                f"they end: generate one sequence at a time, or leave out `assistant_model` (or `{name}`)."
            )


def why_not_before_alignment(model: PeftModel) -> str | None:
    """Why a model with its adapters switched off is not the model that they were put on; None if it is.

    The original weights can't be seen, so the configuration decides, and whether there is anything to be changed.
    """
    for name, config in adapter_configs(model).items():
        initialization = getattr(config, "init_lora_weights", None)
        if isinstance(initialization, str) and initialization.lower().startswith(REWRITING_INITIALIZATIONS):
            return f"init_lora_weights={initialization!r} of the adapter {name!r} rewrote the weights below it"
        if getattr(config, "kasa_config", None) is not None:
            return f"`kasa_config` of the adapter {name!r} truncated the weights below it"
        if getattr(config, "layer_replication", None):
            return f"layer_replication={config.layer_replication!r} of the adapter {name!r} added layers"
        bias = getattr(config, "bias", "none")
        ending = ".bias" if bias == "all" else ".base_layer.bias"
        if bias != "none" and any(parameter.endswith(ending) for parameter, _ in model.named_parameters()):
            return f"bias={bias!r} of the adapter {name!r} trained biases of the model below it"
    merged = sorted({name for layer in _tuner_layers(model) for name in getattr(layer, "merged_adapters", ())})
    if merged:
        return (
            f"merge_adapter() put {merged!r} into the weights, from which an adapter is taken out only up to rounding "
            "(`unmerge_adapter()` does so)"
        )
    return None


def forward_without_adapter(model: PeftModel, **inputs: Any) -> Any:
    """`model(**inputs)` with all adapters switched off, which are left as they were found.

    `model.disable_adapter()` takes longer than the forward of a small model: it surveys the state of all adapters, and
    sets gradients, on every entry and exit. And an interrupt (Ctrl-C) in it can leave the adapters off.
    """
    places: list[tuple[dict[str, Any], str]] = []
    found: list[Any] = []
    off: list[Any] = []
    for module in model.modules():
        if isinstance(module, ADAPTED_LAYERS):
            places.append((vars(module), "_disable_adapters"))
            found.append(module.disable_adapters)
            off.append(True)
        for name, child in module._modules.items():
            if isinstance(child, ADAPTED_ATTENTION):  # stands in for the attention that it holds
                places.append((module._modules, name))
                found.append(child)
                off.append(child.model)
    # An interrupt can arrive anywhere, so also on the way out: what it stops the first time is done the second time.
    try:
        try:
            _put(places, off)
            return model(**inputs)
        finally:
            _put(places, found)
    finally:
        _put(places, found)


def _put(places: list[tuple[dict[str, Any], str]], values: list[Any]) -> None:
    for (holder, name), value in zip(places, values, strict=True):
        holder[name] = value


def _tuner_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, ADAPTED_LAYERS)]


def tokens_before_activation(
    model: nn.Module, prompt: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor | None:
    """How many tokens of each text come before its activated LoRA, `(B,)`, NEVER for none; None without an aLoRA.

    As in a call of `generate` of the model itself: the adapter is active from the last occurrence of its invocation
    tokens in the prompt on. peft looks for them in the ids of each forward, which behind a cache are but the new ones.

    Args:
        model: a model whose active adapter may be an aLoRA.
        prompt: `(B, L)`, padded on the left.
        attention_mask: `(B, L)`.
    """
    invocation = invocation_tokens(model)
    if invocation is None:
        return None
    before = torch.full_like(prompt[:, 0], NEVER)
    sought = torch.tensor(invocation, device=prompt.device)
    if prompt.shape[1] >= len(sought):
        found = (prompt.unfold(1, len(sought), 1) == sought).all(-1)
        found &= attention_mask.unfold(1, len(sought), 1).bool().all(-1)
        places = torch.arange(found.shape[1], device=prompt.device)
        last = torch.where(found, places, -1).amax(-1)
        counted = attention_mask.long().cumsum(-1) - 1
        before = torch.where(last >= 0, counted.gather(1, last.clamp(min=0)[:, None])[:, 0], before)
    return before


def invocation_tokens(model: nn.Module) -> list[int] | None:
    """What activates the active adapter of a model, if that is an aLoRA."""
    if not isinstance(model, PeftModelForCausalLM):  # peft looks for the tokens in no other class
        return None
    return getattr(model.active_peft_config, "alora_invocation_tokens", None)


def columns_since(before: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """How many of the columns `(B, S)` lie behind the first `before` `(B,)` tokens of each text: `(B,)`."""
    return (attention_mask.long().cumsum(-1) > before[:, None]).sum(-1)


def first_difference(before: torch.Tensor, other: torch.Tensor, attention_mask: torch.Tensor) -> int:
    """The first column `(B, S)` that is active in one of two activations and not in the other; S for none."""
    first = torch.minimum(before, other).masked_fill(before == other, NEVER)
    return attention_mask.shape[1] - int(columns_since(first, attention_mask).max())


def prompt_activation(model: nn.Module, attention_mask: torch.Tensor) -> torch.Tensor | None:
    """As `tokens_before_activation`, from what peft found in the prompts `(B, L)` as the call of `generate` began."""
    offsets = injected(model, "alora_offsets")
    if offsets is None:
        return None
    active = torch.tensor([offset or 0 for offset in offsets], device=attention_mask.device)
    active = active.repeat_interleave(len(attention_mask) // len(offsets))
    tokens = attention_mask.long().cumsum(-1)
    first = (attention_mask.shape[1] - active).clamp(max=attention_mask.shape[1] - 1)
    return torch.where(active > 0, tokens.gather(1, first[:, None])[:, 0] - 1, NEVER)


@contextmanager
def activated(model: nn.Module, offsets: torch.Tensor | None) -> Iterator[None]:
    """For the block, aLoRA is active in the last `offsets[b]` columns of row b, whatever the call's prompt said."""
    handles = []

    def override(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "alora_offsets": values}

    try:
        if offsets is not None:
            values = offsets.tolist()
            for layer in model.modules():
                if isinstance(layer, LoraLayer):  # the last hook has the last word
                    handles.append(layer.register_forward_pre_hook(override, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def injected(model: nn.Module, name: str) -> Sequence[Any] | torch.Tensor | None:
    """What peft hands to a model's layers under this name in the running call of `generate`; None for nothing."""
    for _, _, values in _injections(model):
        if values.get(name) is not None:
            return values[name]
    return None


def remove_injections(model: nn.Module) -> None:
    """Remove the hooks that peft leaves on the layers when a call of `generate` ends in an exception.

    They would hand the values of that call, `adapter_names` say, to every later one.
    """
    for module, key, values in list(_injections(model)):
        if values.keys() & {"adapter_names", "alora_offsets"}:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def _injections(model: nn.Module) -> Iterator[tuple[nn.Module, int, dict[str, Any]]]:
    """The hooks before the forwards of adapters' layers: the layer, the hook's key, and what it was made with."""
    for module in _tuner_layers(model):
        for key, hook in module._forward_pre_hooks.items():
            if isinstance(hook, functools.partial):
                yield module, key, hook.keywords
            elif inspect.isfunction(hook):
                yield module, key, dict(inspect.getclosurevars(hook).nonlocals)
