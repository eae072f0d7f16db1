"""Models whose weights are offloaded: accelerate keeps them on the CPU or the disk, and loads them for every forward.

Between forwards, the parameters of such a model are on the meta device, where tensors have a shape and no values.
Hooks of accelerate (`AlignDevicesHook`) know where the weights are kept, and which device they are loaded to.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .adapters import adapter_configs
from .model_errors import describe


def execution_device(model: PreTrainedModel) -> torch.device:
    """The device that a model computes on, to which its inputs are sent.

    This is `model.device`, the device of its first parameter, unless that parameter is offloaded.
    """
    device: torch.device = model.device
    if device.type == "meta":
        named = (getattr(hook, "execution_device", None) for _, hook in _hooks(model))
        device = next((torch.device(place) for place in named if place is not None), device)
    return device


def is_offloaded(model: nn.Module) -> bool:
    """Whether any weights of a model are loaded for every forward."""
    return any(getattr(hook, "offload", False) for _, hook in _hooks(model))


def check_weights(model: PreTrainedModel, role: str) -> None:
    """Raise `ValueError` if a parameter of a model has no values, and no hook loads them before a forward.

    Parameters of classes of their own, such as quantized ones, are not looked at, since they hold their values in
    other tensors.
    """
    empty = {name: weight for name, weight in model.named_parameters() if weight.is_meta}
    if not empty:
        return
    loaded = set[int]()
    for module, hook in _hooks(model):
        if getattr(hook, "offload", False):
            loaded.update(map(id, module.parameters(recurse=hook.place_submodules)))
    for name, weight in empty.items():
        if type(weight) is nn.Parameter and id(weight) not in loaded:
            advice = "Load the model with a `device_map` that names devices that compute, 'cpu' or 'disk'."
            if loaded and adapter_configs(model):
                advice = (
                    "Put the adapter on the model before the model is offloaded, by accelerate's `cpu_offload` or "
                    "`disk_offload`."
                )
            raise ValueError(
                f"The weight {name!r} of the {role} {describe(model)} has no values: it is on the meta device, and "
                f"accelerate does not load it for a forward. {advice}"
            )


def _hooks(model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    """The hooks of accelerate in a model, each with its module."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        if hook is not None:
            for part in getattr(hook, "hooks", (hook,)):  # a `SequentialHook` holds several
                yield module, part
