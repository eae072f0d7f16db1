"""A model with its adapters switched off: the proxy as it was before alignment."""

from typing import Any

from peft import PeftModel
from peft.tuners.adaption_prompt.layer import AdaptedAttention, AdaptedAttentionGPT

from .adapters import ADAPTED_LAYERS

# The attention with adaption prompts is no adapted layer: it stands in for the attention that it holds.
ADAPTED_ATTENTION = (AdaptedAttention, AdaptedAttentionGPT)


class AdapterSwitch:
    """Forwards a model with all its adapters switched off, and leaves them as they were found.

    `model.disable_adapter()` takes longer than the forward of a small model, since it walks through all modules and
    sets gradients on every entry and exit, and an interrupt (Ctrl-C) in it can leave the adapters off. Here the
    modules are searched once. A switch is valid until adapters are added to the model or removed from it.
    """

    def __init__(self, model: PeftModel) -> None:
        self._model = model
        # Where a module notes something, under which name, and its value while the adapters are off.
        self._off: list[tuple[dict[str, Any], str, Any]] = []
        for module in model.modules():
            if isinstance(module, ADAPTED_LAYERS):
                vars(module).setdefault("_disable_adapters", module.disable_adapters)
                self._off.append((vars(module), "_disable_adapters", True))
            for name, child in module._modules.items():
                if isinstance(child, ADAPTED_ATTENTION):
                    self._off.append((module._modules, name, child.model))

    def __reduce__(self) -> tuple[type["AdapterSwitch"], tuple[PeftModel]]:
        # A copy searches the modules of its own model: what is noted here belongs to the original ones.
        return AdapterSwitch, (self._model,)

    def forward(self, **inputs: Any) -> Any:
        """`model(**inputs)` with all adapters switched off."""
        found = [(holder, name, holder[name]) for holder, name, _ in self._off]
        # An interrupt can arrive at any line. If it stops the first restoration, the second one completes it.
        try:
            try:
                _write(self._off)
                return self._model(**inputs)
            finally:
                _write(found)
        finally:
            _write(found)


def _write(values: list[tuple[dict[str, Any], str, Any]]) -> None:
    for holder, name, value in values:
        holder[name] = value
