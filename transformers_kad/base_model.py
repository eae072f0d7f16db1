"""The base in speculative decoding: with the cache and the inputs that `generate` prepared."""

from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from .cache import can_crop
from .proxy import CachedModel, describe


class PreparedBase(CachedModel):
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
        held = cache.get_seq_length()
        if held > input_ids.shape[1]:
            raise ValueError(
                f"`past_key_values` holds {held} tokens, more than the {input_ids.shape[1]} of `input_ids`: pass the "
                "whole text as `input_ids`, also where a cache for its beginning is passed."
            )
        super().__init__(model, "base")
        self.context_length = None  # `generate` warns of a text that is too long
        self._given_positions: torch.Tensor | None = model_kwargs.pop("position_ids", None)
        self._token_types: torch.Tensor | None = model_kwargs.pop("token_type_ids", None)
        self._shift: torch.Tensor | None = None
        self._kwargs = model_kwargs
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if self._given_positions is not None:  # a row's next position, less the number of its tokens
            self._shift = self._given_positions[..., -1:] - mask.sum(dim=-1, keepdim=True) + 1
        cache.activate_past_recording()
        self._cache, self._ids, self._mask = cache, input_ids[:, :held], mask[:, :held]
        if len(input_ids) > 1:
            self._check_holes_are_hidden()

    @property
    def cache(self) -> Cache:
        """The cache as it is."""
        assert self._cache is not None
        return self._cache

    def settle(self, length: int) -> None:
        """See `CachedModel.settle`; the base's cache is not dropped, it came with the call."""
        super().settle(length)
        if self._cache is None:
            raise ValueError(
                f"The cache of {describe(self.model)} can't take back what `past_key_values` held beyond its window. "
                "Pass the text without a cache."
            )

    def select(self, rows: list[int]) -> None:
        """See `CachedModel.select`."""
        super().select(rows)
        for name in ("_given_positions", "_shift", "_token_types"):
            value = getattr(self, name)
            if value is not None and value.shape[-2] > 1:
                setattr(self, name, value[..., rows, :])

    def _align(self, input_ids: torch.Tensor, mask: torch.Tensor, *, upto: int, continues: bool) -> None:
        # The cache that came with the call holds a beginning of its text, by `generate`'s contract.
        if self.cached_length > upto:
            self.settle(upto)

    def _call(self, ids: torch.Tensor, mask: torch.Tensor, new: int, keep: int) -> torch.Tensor:
        """See `CachedModel._call`; the inputs are those that came with the call, carried on."""
        further = dict(self._kwargs)
        if self._token_types is not None:
            given = self._of_prompt(self._token_types, mask, new)
            last = self._token_types[..., -1:].expand(*given.shape[:-1], new - given.shape[-1])
            further["token_type_ids"] = torch.cat([given, last], dim=-1)
        return self.model(**self._inputs(ids, mask, new, keep, **further), return_dict=True).logits

    def _is_first_forward(self) -> bool:
        return self.forwards == 0

    def _in_inference_mode(self) -> bool:
        return torch.is_inference_mode_enabled()  # the cache is the call's own

    def _positions(self, ids: torch.Tensor, mask: torch.Tensor, new: int) -> torch.Tensor | None:
        """See `CachedModel._positions`: what `generate` gave the prompt, and one more for each token after it."""
        if self._given_positions is None or self._shift is None:
            return None
        given = self._of_prompt(self._given_positions, mask, new)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, mask.shape[1] - new + given.shape[-1] :] + self._shift
        if self._last_position is not None and positions.shape[-1]:
            # Drafts of a row may lie beyond the context, and nobody reads what comes of them. What stands before the
            # draft, the prompt or the last token, is read where it is, beyond the context too: as token by token.
            read = given[..., -1:] if given.shape[-1] else positions[..., :1]
            positions = torch.minimum(positions, read.clamp(min=self._last_position))
        return torch.cat([given.expand(*positions.shape[:-1], -1), positions], dim=-1)

    def _of_prompt(self, values: torch.Tensor, mask: torch.Tensor, new: int) -> torch.Tensor:
        """Of values of the prompt's columns those among the last `new` columns; none after the first round."""
        end = mask.shape[1]
        return values[..., end - new : end] if self.forwards == 0 else values[..., :0]
