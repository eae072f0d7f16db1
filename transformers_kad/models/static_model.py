"""A model in a static cache, whose short forwards are compiled once for their shape."""

from collections.abc import Hashable
from typing import Any

import torch
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

from .adapters import why_not_compilable
from .cached_model import CachedModel, describe

# Capacities are multiples of this, so that texts of about the same length share a cache, and with it the code.
CAPACITY_STEP = 256


class StaticCacheModel(CachedModel):
    """`CachedModel` of one unpadded text, for forwards of at most `width` tokens behind a prompt.

    These are filled up to `width` tokens and run by `torch.compile`, on CUDA as a CUDA graph; what is longer, the
    prompt, runs as usual. What is taken back stays in the cache behind the length that is written into it.

    Args:
        model: a causal LM whose layers all have full attention.
        role: what error messages call it.
        width: tokens of a compiled forward.

    Raises:
        ValueError: the model has layers that can't be rolled back by their length.
    """

    def __init__(self, model: PreTrainedModel, role: str, *, width: int) -> None:
        super().__init__(model, role)
        if role == "base":
            self.context_length = None  # `generate` warns of a text that is too long
        self.width = width
        self.capacity = 0
        self._static: StaticCache | None = None
        self._on_cuda = model.device.type == "cuda"
        self._compiled = torch.compile(model, dynamic=False, mode="reduce-overhead" if self._on_cuda else None)

    def refresh(self, state: Hashable = None) -> None:
        """See `CachedModel.refresh`."""
        super().refresh(state)
        reason = why_not_compilable(self.model)
        if reason is not None:
            raise ValueError(f"The {self.role} {describe(self.model)} {reason}: leave out `compile`.")

    def reserve(self, tokens: int) -> None:
        """Make room for a text of so many tokens. A larger cache than before is compiled for anew."""
        needed = -(-(tokens + self.width) // CAPACITY_STEP) * CAPACITY_STEP
        if self._static is None or self.capacity < needed:
            self.reset()
            self._allocate(needed)

    def _allocate(self, needed: int) -> None:
        config = self.model.config.get_text_config(decoder=True)
        with torch.inference_mode(False):  # later calls write to it, in whatever mode
            static = StaticCache(config=config, max_cache_len=needed)
        if any(type(layer) is not StaticLayer for layer in static.layers):
            raise ValueError(
                f"`compile=True` needs full attention in all layers, and the {self.role} {describe(self.model)} has "
                "others. Leave out `compile`."
            )
        self._static, self.capacity = static, needed

    def crop(self, length: int) -> None:
        """See `CachedModel.crop`; nothing is moved."""
        if self._ids is None or self._mask is None:
            return
        self._ids, self._mask = self._ids[:, :length], self._mask[:, :length]
        self._write_length(self.cached_length)

    def _legible(self, ids: torch.Tensor) -> torch.Tensor:
        """See `CachedModel._legible`; what the base can't read is an error of the prompt."""
        return ids if self.role == "base" else super()._legible(ids)

    def _write_length(self, length: int) -> None:
        assert self._static is not None
        for layer in self._static.layers:
            layer.cumulative_length.fill_(length)

    def _call(self, ids: torch.Tensor, mask: torch.Tensor, new: int, logits_to_keep: int) -> torch.Tensor:
        """See `CachedModel._call`."""
        assert self._static is not None
        if self._padded or len(ids) > 1:
            raise ValueError(
                f"`compile=True` decodes one sequence without padding, got {len(ids)} "
                f"{'with' if self._padded else 'without'} padding. Leave out `compile`."
            )
        length = ids.shape[1]
        if length + self.width > self.capacity:  # a proxy spells some tokens of the base in several of its own
            self._allocate(self.capacity + CAPACITY_STEP * (1 + length // CAPACITY_STEP))
            new = length
        self._cache = self._static
        self._write_length(length - new)
        filled = length - new + self.width
        if new > self.width or length == new or (self._last_position is not None and filled > self._last_position + 1):
            kept = {"logits_to_keep": logits_to_keep} if self._takes_logits_to_keep else {}
            return self.model(**self._arguments(ids, new), **kept).logits
        if self._on_cuda:
            torch.compiler.cudagraph_mark_step_begin()
        filled_up = torch.nn.functional.pad(ids, (0, self.width - new))
        logits = self._compiled(**self._arguments(filled_up, self.width)).logits[:, :new]
        self._write_length(length)
        return logits.clone()  # the next run of a CUDA graph writes to the same place

    def _arguments(self, ids: torch.Tensor, new: int) -> dict[str, Any]:
        """Of a forward of the last `new` columns of a text `(1, S)`."""
        tensors = {"input_ids": ids[:, -new:]}
        positions = self._positions(ids, torch.ones_like(ids), new) if self._takes_position_ids else None
        if positions is not None:
            tensors["position_ids"] = positions[..., -new:]
        # Copies: compiled code is made for strides, and a view has those of the text that it is a part of.
        copies = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
        return {**copies, "past_key_values": self._static, "use_cache": True}
