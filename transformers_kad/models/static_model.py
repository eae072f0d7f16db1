"""A model in a static cache, whose short forwards are compiled once for their shape."""

from collections.abc import Hashable
from typing import Any

import torch
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

from .activated_lora import invocation_tokens
from .adapters import VALUES_BY_ROW, adapter_configs, injected
from .cached_model import CachedModel
from .model_errors import describe
from .padding import PaddedTexts

# Capacities are multiples of this, so that texts of about the same length share a cache and the code compiled for it.
CAPACITY_STEP = 256


class StaticCacheModel(CachedModel):
    """`CachedModel` of one unpadded text, for forwards of at most `width` tokens behind a prompt.

    These are filled up to `width` tokens and run by `torch.compile`, on CUDA as a CUDA graph. What is longer, such as
    the prompt, runs as usual. Tokens that are taken back stay in the cache, behind the length that is written into it.

    Args:
        model: a causal LM whose layers all have full attention.
        role: what error messages call it.
        width: tokens of a compiled forward.
    """

    def __init__(self, model: PreTrainedModel, role: str, *, width: int) -> None:
        super().__init__(model, role)
        if role == "base":
            self.context_length = None  # `generate` warns of a text that is too long
            self._stand_in = None  # an id that the base can't read is an error of the prompt
        self.width = width
        self.capacity = 0
        self._static: StaticCache | None = None
        self._on_cuda = model.device.type == "cuda"
        # `Any`: what `torch.compile` returns of a module has no type.
        self._compiled: Any = torch.compile(model, dynamic=False, mode="reduce-overhead" if self._on_cuda else None)

    def refresh(self, state: Hashable = None) -> None:
        """See `CachedModel.refresh`."""
        super().refresh(state)
        told = [name for name in (*VALUES_BY_ROW, "alora_offsets") if injected(self.model, name) is not None]
        if told or invocation_tokens(self.model) is not None:
            raise ValueError(
                f"The {self.role} {describe(self.model)} has adapters that are told `{(*told, 'alora_offsets')[0]}`, "
                "which compiled code would keep from the first call: leave out `compile`."
            )
        if any(config.peft_type == "SHADOW" for config in adapter_configs(self.model).values()):
            raise ValueError(
                f"The {self.role} {describe(self.model)} has an adapter of type SHADOW, which keeps a cache of its "
                "own: leave out `compile`."
            )

    def reserve(self, tokens: int) -> None:
        """Make room for a text of so many tokens. For a larger cache than before, forwards are compiled anew.

        Raises:
            ValueError: the model has layers that can't be rolled back by their length.
        """
        needed = -(-(tokens + self.width) // CAPACITY_STEP) * CAPACITY_STEP
        if self._static is None or self.capacity < needed:
            self.reset()
            self._allocate(needed)

    def _allocate(self, capacity: int) -> None:
        config = self.model.config.get_text_config(decoder=True)
        with torch.inference_mode(False):  # later calls write to it, in whatever mode
            static = StaticCache(config=config, max_cache_len=capacity)
        takes_cache = "past_key_values" in self.accepted_inputs
        if not takes_cache or any(type(layer) is not StaticLayer for layer in static.layers):
            raise ValueError(
                f"`compile=True` needs full attention in all layers, and the {self.role} {describe(self.model)} has "
                "others. Leave out `compile`."
            )
        self._static, self.capacity = static, capacity

    def crop(self, length: int) -> None:
        """See `CachedModel.crop`; no tokens are moved."""
        if self._texts is not None:
            self._texts = self._texts.crop(length)
            self._write_length(self.cached_length)

    def _write_length(self, length: int) -> None:
        assert self._static is not None
        for layer in self._static.layers:
            layer.cumulative_length.fill_(length)

    def _call(self, texts: PaddedTexts, new: int, logits_to_keep: int) -> torch.Tensor:
        """See `CachedModel._call`."""
        ids = texts.ids
        if texts.mask is not None or len(ids) > 1:
            raise ValueError(
                f"`compile=True` decodes one sequence without padding, got {len(ids)} "
                f"{'without' if texts.mask is None else 'with'} padding. Leave out `compile`."
            )
        length = ids.shape[1]
        if length + self.width > self.capacity:  # a proxy may spell tokens of the base in several of its own
            self._allocate(self.capacity + CAPACITY_STEP * (1 + length // CAPACITY_STEP))
            new = length
        self._cache = self._static
        self._write_length(length - new)
        last_position, filled = self._inputs.last_position, length - new + self.width
        if new > self.width or length == new or (last_position is not None and filled > last_position + 1):
            kept = {"logits_to_keep": logits_to_keep} if "logits_to_keep" in self.accepted_inputs else {}
            logits: torch.Tensor = self.model(**self._arguments(ids, new), **kept).logits
            return logits
        if self._on_cuda:
            torch.compiler.cudagraph_mark_step_begin()
        filled_up = torch.nn.functional.pad(ids, (0, self.width - new))
        logits = self._compiled(**self._arguments(filled_up, self.width)).logits[:, :new]
        self._write_length(length)
        return logits.clone()  # the next run of a CUDA graph writes to the same place

    def _arguments(self, ids: torch.Tensor, new: int) -> dict[str, Any]:
        """The arguments of a forward over the last `new` columns of a text `(1, S)`."""
        tensors = {"input_ids": ids[:, -new:]}
        positions = self._inputs.positions(PaddedTexts(ids), new)
        if positions is not None:
            tensors["position_ids"] = positions[..., -new:]
        # Copies: compiled code is made for strides, and a view has those of the text that it is a part of.
        copies = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
        return {**copies, "past_key_values": self._static, "use_cache": True}
