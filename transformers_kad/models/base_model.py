"""The base in speculative decoding: with the cache and the inputs that `generate` prepared."""

from typing import Any

import torch
from peft.tuners.shadow.layers import ShadowCache
from transformers import Cache, PreTrainedModel

from .adapters import activated, columns_since, prompt_activation
from .cache_rollback import can_crop, record_past
from .cached_model import PER_TOKEN, CachedModel, describe


class BaseModel(CachedModel):
    """The base over growing texts, with the cache and the inputs that `generate` prepared."""

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        model_kwargs: dict[str, Any],
    ) -> None:
        cache = model_kwargs.get("past_key_values")
        if not model_kwargs.get("use_cache") or not isinstance(cache, Cache):
            raise ValueError(
                f"Speculative decoding needs a key-value cache, got use_cache={model_kwargs.get('use_cache')!r} and "
                f"a cache of type {type(cache).__name__} for {describe(model)}."
            )
        if not can_crop(cache, 0):
            raise ValueError(
                f"Speculative decoding needs a cache that can take tokens back, got {cache!r}. Leave "
                "`cache_implementation` at its default, or leave out `assistant_model` to decode token by token."
            )
        if model_kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                "Speculative decoding needs `input_ids`, got `inputs_embeds`. Leave out `assistant_model` to "
                "decode token by token."
            )
        if getattr(model.config, "is_decoder", True) is False:
            raise ValueError(
                f"Speculative decoding needs a base that reads from left to right, and {describe(model)} reads in "
                "both directions, so that a draft would change what it says before it. Load it with `is_decoder=True` "
                "if it was trained so, or leave out `assistant_model`."
            )
        held = cache.get_seq_length()
        if held > input_ids.shape[1]:
            raise ValueError(
                f"`past_key_values` holds {held} tokens, more than the {input_ids.shape[1]} of `input_ids`: pass the "
                "whole text as `input_ids`, also where a cache for its beginning is passed."
            )
        super().__init__(model, "base")
        self.context_length = None  # `generate` warns of a text that is too long
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        given = {name: model_kwargs.pop(name) for name in PER_TOKEN if model_kwargs.get(name) is not None}
        self.use_prompt_inputs(given, mask)
        self._kwargs = model_kwargs
        self._inactive = prompt_activation(model, mask)
        cache.activate_past_recording()
        self._cache, self._ids, self._mask = cache, input_ids[:, :held], mask[:, :held]
        if len(input_ids) > 1:
            self._check_holes_are_hidden()

    @property
    def cache(self) -> Cache:
        """The cache as it is."""
        assert self._cache is not None
        return self._cache

    def crop(self, length: int) -> None:
        """See `CachedModel.crop`; the base's cache is not dropped, it came with the call."""
        super().crop(length)
        if self._cache is None:
            raise ValueError(
                f"The cache of {describe(self.model)} can't take back what `past_key_values` held beyond its window. "
                "Pass the text without a cache."
            )

    def select_rows(self, rows: list[int]) -> None:
        """See `CachedModel.select_rows`."""
        assert self._ids is not None
        for name, value in self._kwargs.items():  # such as `encoder_hidden_states`
            if torch.is_tensor(value) and value.dim() > 1 and len(value) == len(self._ids):
                self._kwargs[name] = value[rows]
        super().select_rows(rows)

    def _activate(self, prompt: torch.Tensor, mask: torch.Tensor) -> None:
        """See `CachedModel._activate`; peft looked for the invocation when the call began."""

    def _align(self, input_ids: torch.Tensor, mask: torch.Tensor, *, upto: int, continues: bool) -> None:
        # The cache that came with the call holds a beginning of its text, by `generate`'s contract.
        if self.cached_length > upto:
            self.crop(upto)

    def _call(self, ids: torch.Tensor, mask: torch.Tensor, new: int, logits_to_keep: int) -> torch.Tensor:
        """See `CachedModel._call`; the inputs are those that came with the call, carried on."""
        inputs = self._inputs(ids, mask, new, logits_to_keep, **self._kwargs)
        with activated(self.model, None if self._inactive is None else columns_since(self._inactive, mask)):
            output = self.model(**inputs, return_dict=True)
        cache = getattr(output, "past_key_values", None)
        if isinstance(cache, ShadowCache) and cache is not self._cache:  # the call's cache and the adapter's beside it
            record_past(cache)
            self._cache = self._kwargs["past_key_values"] = cache
        return output.logits

    def _legible(self, ids: torch.Tensor) -> torch.Tensor:
        """See `CachedModel._legible`; what the base can't read is an error of the prompt."""
        return ids

    def _is_first_forward(self) -> bool:
        return self.forwards == 0

    def _in_inference_mode(self) -> bool:
        return torch.is_inference_mode_enabled()  # the cache is the call's own

    def _positions(self, ids: torch.Tensor, mask: torch.Tensor, new: int) -> torch.Tensor | None:
        """See `CachedModel._positions`; none where `generate` passes none."""
        return super()._positions(ids, mask, new) if "position_ids" in self._given else None

    def _within_context(self, positions: torch.Tensor, before_draft: int) -> torch.Tensor:
        """See `CachedModel._within_context`. The prompt and the last token are read where they are, beyond it too."""
        if self._last_position is None:
            return positions
        read, draft = positions[..., : before_draft + 1], positions[..., before_draft + 1 :]
        return torch.cat([read, torch.minimum(draft, read[..., -1:].clamp(min=self._last_position))], dim=-1)
