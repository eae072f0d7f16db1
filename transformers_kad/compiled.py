"""A model in a static cache, whose short forwards are compiled once for their shape."""

from typing import Any

import torch
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

from .proxy import CachedModel, describe

# Capacities are multiples of this, so that texts of about the same length share a cache, and with it the code.
CAPACITY_STEP = 256


class CompiledModel(CachedModel):
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
        self.width = width
        self.capacity = 0
        self._static: StaticCache | None = None
        self._on_cuda = model.device.type == "cuda"
        self._compiled = torch.compile(model, dynamic=False, mode="reduce-overhead" if self._on_cuda else None)

    def reserve(self, tokens: int) -> None:
        """Make room for a text of so many tokens. A larger cache than before is compiled for anew."""
        needed = -(-(tokens + self.width) // CAPACITY_STEP) * CAPACITY_STEP
        if self._static is not None and self.capacity >= needed:
            return
        config = self.model.config.get_text_config(decoder=True)
        static = StaticCache(config=config, max_cache_len=needed)
        if any(type(layer) is not StaticLayer for layer in static.layers):
            raise ValueError(
                f"`compile=True` needs full attention in all layers, and the {self.role} {describe(self.model)} has "
                "others. Leave out `compile`."
            )
        self.reset()
        self._static, self.capacity = static, needed

    def settle(self, length: int) -> None:
        """See `CachedModel.settle`; nothing is moved."""
        if self._ids is None or self._mask is None:
            return
        self._ids, self._mask = self._ids[:, :length], self._mask[:, :length]
        self._write_length(self.cached_length)

    def _write_length(self, length: int) -> None:
        assert self._static is not None
        for layer in self._static.layers:
            layer.cumulative_length.fill_(length)

    def _call(self, ids: torch.Tensor, mask: torch.Tensor, new: int, keep: int) -> torch.Tensor:
        """See `CachedModel._call`."""
        assert self._static is not None
        if self._padded or len(ids) > 1:
            raise ValueError(
                f"`compile=True` decodes one sequence without padding, got {len(ids)} "
                f"{'with' if self._padded else 'without'} padding. Leave out `compile`."
            )
        length = ids.shape[1]
        self._cache = self._static
        self._write_length(length - new)
        ids = self._legible(ids[:, -new:])
        filled = length - new + self.width
        if new > self.width or length == new or (self.context_length is not None and filled > self.context_length):
            kwargs: dict[str, Any] = {"logits_to_keep": keep} if self._takes_logits_to_keep else {}
            return self.model(input_ids=ids, past_key_values=self._static, use_cache=True, **kwargs).logits
        ids = torch.nn.functional.pad(ids, (0, self.width - new))
        if self._on_cuda:
            torch.compiler.cudagraph_mark_step_begin()
        logits = self._compiled(input_ids=ids, past_key_values=self._static, use_cache=True).logits[:, :new]
        self._write_length(length)
        return logits.clone()  # the next run of a CUDA graph writes to the same place
