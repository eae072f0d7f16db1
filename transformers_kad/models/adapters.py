"""Adapters of peft: what they are, with which of them a model can serve, and what `generate` tells them.

The source of what is known of each type is peft 0.21: `tuners/*/layer.py` for what a forward depends on and what an
initialization does to the weights below; `_enable_peft_forward_hooks` of the tuners for what reaches layers by hooks.
"""

import functools
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from .by_version import PEFT_LOSES_CACHE
from .model_errors import describe

ADAPTED_LAYERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)
# Types of adapters whose output at a token is not a function of the text up to it alone, and why.
NOT_TOKEN_BY_TOKEN = {
    "LILY": "weighs its parts by an average over all tokens of a forward, those of other sequences included",
    "XLORA": "computes its weights in a forward of its own, which writes to the same cache",
    "POLY": "needs `task_ids` in every forward",
}
# Initializations of LoRA that rewrite the weights below: how `LoraConfig.init_lora_weights` begins.
REWRITING_INITIALIZATIONS = ("pissa", "olora", "corda", "loftq", "lora_ga")
# What `generate` hands to the layers with one value for each row of the batch.
VALUES_BY_ROW = ("adapter_names", "task_ids")


def model_below(model: Any) -> Any:
    """The model below an adapter of peft; a model without one itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def adapter_configs(model: nn.Module) -> dict[str, PeftConfig]:
    """The configurations of all adapters in a model, by name, whether peft or transformers put them there."""
    # `vars`, since a module without the attribute would look for it through all that it wraps.
    inside = [vars(module).get("peft_config") for module in model.modules()]
    found = [configs for configs in (*inside, getattr(model, "peft_config", None)) if isinstance(configs, dict)]
    return {name: config for configs in found for name, config in configs.items() if isinstance(config, PeftConfig)}


def adapted_layers(model: nn.Module) -> list[Any]:
    """The layers that adapters were put on. `Any`: peft has no types for what they note."""
    return [module for module in model.modules() if isinstance(module, ADAPTED_LAYERS)]


def check_adapters(model: PreTrainedModel, role: str, *, without_adapter: bool = False) -> None:
    """Raise `ValueError` unless a model with its adapters can serve beside the base, or as it was before alignment."""
    reason = why_not_followable(model)
    if reason is not None:
        raise ValueError(f"The {role} {describe(model)} {reason}; use an adapter that changes weights, such as LoRA.")
    reason = why_not_before_alignment(model) if without_adapter else None
    if reason is not None:
        raise ValueError(
            f"{describe(model)} with its adapter switched off is not the proxy before alignment: {reason}. Pass that "
            "model as `reference=`."
        )


def check_speculative_base(model: nn.Module, sequences: int) -> None:
    """Raise `ValueError` unless a base, of which peft calls `generate`, can verify drafts in so many sequences."""
    # For prompt learning, the `PeftModel` prepares the inputs and can be found only through that method.
    owner = getattr(getattr(model, "prepare_inputs_for_generation", None), "__self__", model)
    reason = None if injected(model, "task_ids") is not None else why_not_followable(owner)
    if reason is not None:
        raise ValueError(
            f"The base {type(model).__name__} {reason}, so that it can't verify drafts: leave out `assistant_model`."
        )
    for name in VALUES_BY_ROW if sequences > 1 else ():
        values = injected(model, name)
        if values is not None:
            raise ValueError(
                f"`{name}={values!r}` has a value for each row, and in speculative decoding rows leave the batch when "
                f"they end: generate one sequence at a time, or leave out `assistant_model` (or `{name}`)."
            )


def why_not_followable(model: nn.Module) -> str | None:
    """Why a model with its adapters can't read a text piece by piece behind a cache; None if it can."""
    for name, config in adapter_configs(model).items():
        if config.is_prompt_learning:
            return "has a prompt-learning adapter, whose virtual tokens do not fit the text"
        if PEFT_LOSES_CACHE and config.peft_type == "SHADOW":
            return f"has the adapter {name!r} of type SHADOW, which needs peft 0.22 or transformers before 5.24"
        reason = NOT_TOKEN_BY_TOKEN.get(config.peft_type)
        if reason is not None:
            return f"has the adapter {name!r} of type {config.peft_type.value}, which {reason}"
        if getattr(config, "sample_at_inference", False):
            return f"has the adapter {name!r} with sample_at_inference=True, whose logits differ from call to call"
    return None


def why_not_before_alignment(model: nn.Module) -> str | None:
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
    merged = {name for layer in adapted_layers(model) for name in getattr(layer, "merged_adapters", ())}
    if merged:
        return (
            f"merge_adapter() put {sorted(merged)!r} into the weights, from which an adapter is taken out only up to "
            "rounding (`unmerge_adapter()` does so)"
        )
    return None


def injected(model: nn.Module, name: str) -> Sequence[Any] | torch.Tensor | None:
    """What peft hands to a model's layers under this name in the running call of `generate`; None for nothing."""
    found = (values[name] for _, _, values in _injections(model) if values.get(name) is not None)
    return next(found, None)


def remove_injections(model: nn.Module) -> None:
    """Remove the hooks that peft leaves on the layers when a call of `generate` ends in an exception.

    They would hand the values of that call, `adapter_names` for instance, to every later one.
    """
    for module, key, values in list(_injections(model)):
        if values.keys() & {"adapter_names", "alora_offsets"}:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def _injections(model: nn.Module) -> Iterator[tuple[nn.Module, int, dict[str, Any]]]:
    """The hooks before the forwards of adapted layers: the layer, the hook's key, and what it was made with."""
    for layer in adapted_layers(model):
        for key, hook in layer._forward_pre_hooks.items():
            if isinstance(hook, functools.partial):
                yield layer, key, hook.keywords
            elif inspect.isfunction(hook):
                yield layer, key, dict(inspect.getclosurevars(hook).nonlocals)
