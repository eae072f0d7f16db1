"""The base in speculative decoding: with the cache and the inputs that `generate` prepared."""

from typing import Any

import torch
from peft.tuners.shadow.layers import ShadowCache
from transformers import Cache, PreTrainedModel

from .activated_lora import activated, prompt_activation
from .cache_rollback import can_crop, record_past
from .cached_model import CachedModel
from .forward_inputs import PER_TOKEN
from .model_errors import describe
from .padding import PaddedTexts


class BaseModel(CachedModel):
    """The base over growing texts, with the cache and the inputs that `generate` prepared.

    Raises:
        ValueError: with what `generate` prepared, drafts can't be verified.
    """

    cache_outlives_call = False
    counts_given_positions_only = True

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        model_kwargs: dict[str, Any],
    ) -> None:
        cache = _checked_cache(model, input_ids, model_kwargs)
        super().__init__(model, "base")
        self.context_length = None  # `generate` warns of a text that is too long
        self._stand_in = None  # an id that the base can't read is an error of the prompt
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        given = {name: model_kwargs.pop(name) for name in PER_TOKEN if model_kwargs.get(name) is not None}
        self._inputs.use_prompt_inputs(given, mask)
        self._kwargs = model_kwargs
        self._tokens_before_activation = prompt_activation(model, mask)
        record_past(cache)
        self._cache, self._texts = cache, PaddedTexts(input_ids[:, : cache.get_seq_length()])
        if len(input_ids) > 1:
            self._check_holes_are_hidden()

    @property
    def cache(self) -> Cache:
        """The cache as it is."""
        assert self._cache is not None
        return self._cache

    def crop(self, length: int) -> None:
        """See `CachedModel.crop`; a cache that came with the call can't be dropped, so that `ValueError` is raised."""
        super().crop(length)
        if self._cache is None:
            raise ValueError(
                f"The cache of {describe(self.model)} can't take back what `past_key_values` held beyond its window. "
                "Pass the text without a cache."
            )

    def select_rows(self, rows: list[int]) -> None:
        """See `CachedModel.select_rows`."""
        assert self._texts is not None
        for name, value in self._kwargs.items():  # such as `encoder_hidden_states`
            if torch.is_tensor(value) and value.dim() > 1 and len(value) == len(self._texts.ids):
                self._kwargs[name] = value[rows]
        super().select_rows(rows)

    def _align(self, texts: PaddedTexts, prompt_length: int | None, *, upto: int, continues: bool) -> None:
        # The cache that came with the call holds a beginning of its text, by `generate`'s contract.
        if self.cached_length > upto:
            self.crop(upto)

    def _call(self, texts: PaddedTexts, new: int, logits_to_keep: int) -> torch.Tensor:
        """See `CachedModel._call`; the inputs are those that came with the call, continued."""
        inputs = self._inputs.build(texts, new, logits_to_keep, is_first=self.forwards == 0, **self._kwargs)
        with activated(self.model, self._tokens_before_activation, texts.full_mask):
            output: Any = self.model(**inputs, return_dict=True)
        cache = getattr(output, "past_key_values", None)
        if isinstance(cache, ShadowCache) and cache is not self._cache:
            # peft's Shadow adapter put a cache of its own beside that of the call.
            record_past(cache)
            self._cache = self._kwargs["past_key_values"] = cache
        logits: torch.Tensor = output.logits
        return logits


def _checked_cache(model: PreTrainedModel, input_ids: torch.Tensor, model_kwargs: dict[str, Any]) -> Cache:
    """The cache that `generate` prepared; `ValueError` for a call whose base can't verify drafts."""
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
    return cache
