"""The base in speculative decoding: with the cache and the inputs that `generate` prepared."""

from typing import Any

import torch
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import StaticLayer

from ..utils.transfers import send
from .activated_lora import activated, prompt_activation
from .by_version import BaseQuantizedLayer
from .cache_rollback import Rollback, counts_tokens, layers_of, may_be_recurrent, record_past, rollback_of
from .cached_model import CachedModel
from .forward_inputs import PER_TOKEN, further_inputs
from .model_errors import describe
from .model_settings import text_setting
from .padding import PaddedTexts
from .recurrent_states import reads_one_by_one

# By these settings a model attends to images beside the text: Mllama, Idefics.
CROSS_ATTENTION = ("cross_attention_layers", "cross_layer_interval")


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
        super().__init__(model, "base")
        cache = _checked_cache(model, input_ids, model_kwargs, self._inputs.cache_name)
        self.context_length = None  # `generate` warns of a text that is too long
        self._stand_in = None  # an id that the base can't read is an error of the prompt
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        given = {name: model_kwargs.pop(name) for name in PER_TOKEN if model_kwargs.get(name) is not None}
        self._inputs.use_prompt_inputs(given, mask)
        self._kwargs = model_kwargs
        self._rows_left = False
        # Images, for instance, which the first forward reads as a whole, not in chunks.
        self.has_more_than_text = bool(further_inputs(model_kwargs))
        if self.has_more_than_text and has_cross_attention(model):
            raise ValueError(
                f"Speculative decoding needs images among the tokens of the text, and {describe(model)} attends to "
                "images in layers of their own. Leave out `assistant_model` to decode token by token."
            )
        self._tokens_before_activation = prompt_activation(model, mask)
        self._texts = PaddedTexts(input_ids[:, :0])
        self.has_cache = bool(model_kwargs.pop("use_cache", True))
        if self.has_cache and cache is not None:
            self._cache, held = cache, _held_tokens(cache)
            self._texts = PaddedTexts(input_ids[:, :held])
            record_past(cache)
            if held:
                self._reads_one_by_one = reads_one_by_one(model, rollback_of(cache))

    @property
    def cache(self) -> Cache | None:
        """The cache as it is; None where its length can't be asked, so that nobody could continue it."""
        return self._cache if self._cache is not None and counts_tokens(self._cache) else None

    @property
    def reads_prompt_alone(self) -> bool:
        """See `CachedModel.reads_prompt_alone`; images and their like are read with the prompt too."""
        if self._inputs.has_token_types or self._reads_one_by_one or self.has_more_than_text:
            return True
        cache = self._cache
        return cache is not None and (may_be_recurrent(cache) or rollback_of(cache) is Rollback.BY_COPY)

    @property
    def _needs_closed_gaps(self) -> bool:
        return False  # token by token, the base reads the text as it is

    def select_rows(self, rows: list[int]) -> None:
        """See `CachedModel.select_rows`."""
        assert self._texts is not None
        for name, value in self._kwargs.items():  # such as `encoder_hidden_states`
            if torch.is_tensor(value) and value.dim() > 1 and len(value) == len(self._texts.ids):
                self._kwargs[name] = value[send(rows, value.device)]
        self._rows_left = True
        super().select_rows(rows)

    def _align(self, texts: PaddedTexts, prompt_length: int | None, *, upto: int, continues: bool) -> None:
        # The cache that came with the call holds a beginning of its text, by `generate`'s contract.
        if self._must_read_anew(texts.columns - self.cached_length, texts.columns - upto):
            upto = 0
        if self.cached_length > upto:
            self.crop(upto)

    def _call(self, texts: PaddedTexts, new: int, logits_to_keep: int) -> torch.Tensor:
        """See `CachedModel._call`; the inputs are those that came with the call, continued."""
        is_first = self.forwards == 0 or self._cache is None
        if is_first and self._rows_left and self.has_more_than_text:
            raise ValueError(
                f"The base {describe(self.model)} would have to read prompts with images again after rows of the "
                "batch have ended. Generate one sequence at a time."
            )
        inputs = self._inputs.build(
            texts, new, logits_to_keep, is_first=is_first, **self._kwargs, **self._cache_inputs()
        )
        with activated(self.model, self._tokens_before_activation, texts.full_mask):
            output: Any = self.model(**inputs, return_dict=True)
        self._take_cache(output)
        logits: torch.Tensor = output.logits
        return logits


def has_cross_attention(model: PreTrainedModel) -> bool:
    """Whether a model attends to images in layers of their own, beside the text."""
    return any(text_setting(model.config, name) for name in CROSS_ATTENTION)


def reads_both_directions(model: PreTrainedModel) -> bool:
    """Whether a model's configuration says that a token attends to those behind it as well."""
    return getattr(model.config, "is_decoder", True) is False


def takes_tokens_back(cache: Cache) -> bool:
    """Whether refused draft tokens can be taken back from a cache that a call brought or asked for."""
    return not any(isinstance(layer, StaticLayer | BaseQuantizedLayer) for layer in layers_of(cache))


def _held_tokens(cache: Cache) -> int:
    """How many tokens a cache holds."""
    if counts_tokens(cache):
        return int(cache.get_seq_length())
    if any(any(layer.has_previous_state.values()) for layer in layers_of(cache)):
        raise ValueError(
            "Speculative decoding can't tell how many tokens are in a cache of recurrent states alone. Pass the text "
            "without the cache, or leave out `assistant_model`."
        )
    return 0


def _checked_cache(
    model: PreTrainedModel, input_ids: torch.Tensor, model_kwargs: dict[str, Any], name: str
) -> Cache | None:
    """The cache that `generate` prepared; `ValueError` for a call whose base can't verify drafts."""
    cache = model_kwargs.pop(name, None)
    if model_kwargs.get("inputs_embeds") is not None:
        raise ValueError(
            "Speculative decoding needs `input_ids`, got `inputs_embeds`. Leave out `assistant_model` to "
            "decode token by token."
        )
    if reads_both_directions(model):
        raise ValueError(
            f"Speculative decoding needs a base that reads from left to right, and {describe(model)} reads in "
            "both directions, so that a draft would change what it says before it. Load it with `is_decoder=True` "
            "if it was trained so, or leave out `assistant_model`."
        )
    if not isinstance(cache, Cache):
        return None  # perhaps the model makes one of its own
    if not takes_tokens_back(cache):
        raise ValueError(
            f"Speculative decoding can't take tokens back from a static or quantized cache, got {cache!r}. Leave "
            "out `cache_implementation`, or leave out `assistant_model` to decode token by token."
        )
    held = _held_tokens(cache)
    if held > input_ids.shape[1]:
        raise ValueError(
            f"`{name}` holds {held} tokens, more than the {input_ids.shape[1]} of `input_ids`: pass the "
            "whole text as `input_ids`, also where a cache for its beginning is passed."
        )
    return cache
