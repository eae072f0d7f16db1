"""A model, a cache of its own, and the forwards that fill it."""

import functools
import warnings
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from transformers import Cache, PreTrainedModel

from ..utils.transfers import send
from .activated_lora import active_columns
from .adapter_switch import AdapterSwitch
from .adapters import check_adapters
from .cache_rollback import (
    FROM_COPIES,
    Rollback,
    bytes_of,
    can_drop,
    drop_columns,
    forget_past,
    record_past,
    rollback_of,
    select_cached_rows,
    trim_convolutions,
)
from .fingerprint import fingerprint
from .forward_inputs import ForwardInputs
from .model_errors import ContextLengthError, describe
from .model_settings import context_length, longrope_switch, readable_ids, text_setting
from .offloading import check_weights, execution_device
from .padding import PaddedTexts
from .recurrent_states import reads_one_by_one

_Self = TypeVar("_Self", bound="CachedForwards")
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def in_mode_of_cache(
    method: Callable[Concatenate[_Self, _Arguments], _Result],
) -> Callable[Concatenate[_Self, _Arguments], _Result]:
    """Run a method that makes or changes tensors of the cache without gradients, and in the mode that the cache needs.

    A later call, which may run outside of inference mode, could not write to tensors that were made in it.
    """

    @functools.wraps(method)
    def run(self: _Self, /, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        keep_mode = torch.is_inference_mode_enabled() and not self.cache_outlives_call
        with torch.inference_mode(keep_mode), torch.no_grad():
            return method(self, *args, **kwargs)

    return run


class CachedForwards:
    """A causal LM, its cache, and the texts that the cache holds. `CachedModel` decides what is taken back.

    Args:
        model: a causal LM or a `PeftModel`.
        role: what error messages call it ("proxy", "reference").
        without_adapter: forward a `PeftModel` with its adapter switched off.

    Attributes:
        forwards: how many forwards were made, where the chunks of a prompt count as one.
        context_length: the longest text that the model may read, in tokens; None without a limit.
        vocabulary: how many ids the model can read.
        accepted_inputs: names of what the model's `forward` takes.
        state: the model's `fingerprint` when it was last refreshed.
        has_cache: whether the model keeps a cache; known after its first forward.
        longrope_switch: the longest text that is read with the short factors of LongRoPE; None without LongRoPE. A
            round must not go from one side to the other.
    """

    # Whether a later call may continue the cache, see `in_mode_of_cache`.
    cache_outlives_call = True
    # See `ForwardInputs`.
    counts_given_positions_only = False

    def __init__(self, model: PreTrainedModel, role: str = "proxy", *, without_adapter: bool = False) -> None:
        self.model = model
        self.role = role
        self.without_adapter = without_adapter
        self.forwards = 0
        self.context_length = context_length(model)
        self.vocabulary = readable_ids(model)
        self._inputs = ForwardInputs(model, for_base=self.counts_given_positions_only)
        self.accepted_inputs = self._inputs.accepted
        self._switch = AdapterSwitch(model) if without_adapter else None
        candidates = (*(text_setting(model.config, name) for name in ("pad_token_id", "eos_token_id")), 0)
        # What is read in place of an id beyond the vocabulary; None to read it as it is.
        self._stand_in: int | None = next(i for i in candidates if isinstance(i, int) and 0 <= i < self.vocabulary)
        self._tokens_before_activation: torch.Tensor | None = None  # (B,), of an activated LoRA
        self.has_cache = True
        self.longrope_switch = longrope_switch(model)
        self._rollback: Rollback | None = None  # of the model's caches; None until it returned one
        self._reads_one_by_one = reads_one_by_one(model, None)
        self.state: Hashable = None
        self.reset()

    @property
    def device(self) -> torch.device:
        """The device that the model computes on."""
        return execution_device(self.model)

    @property
    def cached_length(self) -> int:
        """How many tokens of each text the cache holds."""
        return 0 if self._texts is None or self._cache is None else self._texts.columns

    @property
    def cache_bytes(self) -> int:
        """The memory of the cache, in bytes."""
        return 0 if self._cache is None else bytes_of(self._cache)

    @property
    def reads_prompt_alone(self) -> bool:
        """Whether the first forward has to be over the prompts alone, as in `generate`, with no draft behind them."""
        if self._inputs.has_token_types or self._reads_one_by_one:
            return True
        if self._rollback is None:  # not known yet: only full attention takes back what it did not record
            return self._inputs.has_prompt_inputs or not self._inputs.masks_by_position
        return self._rollback is not Rollback.BEHIND_MASK  # the first forward records no past and copies no states

    def reset(self) -> None:
        """Drop the cache."""
        self._cache: Cache | None = None
        self._texts: PaddedTexts | None = None  # what the cache holds, or held before it was dropped in a `crop`
        self._filled_by: Hashable = None  # the fingerprint of the model that filled the cache

    def use_prompt_inputs(self, inputs: Mapping[str, torch.Tensor], mask: torch.Tensor | None = None) -> None:
        """See `ForwardInputs.use_prompt_inputs`."""
        self._inputs.use_prompt_inputs(inputs, mask)

    def refresh(self, state: Hashable = None) -> None:
        """Before a call: drop the cache if the model changed since it was filled.

        Args:
            state: the model's `fingerprint`, where it is known already.

        Raises:
            ValueError: the model is in training mode, has weights without values, or its adapters can't serve (any
                longer).
        """
        if self.model.training:
            raise ValueError(
                f"The {self.role} {describe(self.model)} is in training mode, where dropout is active; call `.eval()`."
            )
        check_weights(self.model, self.role)
        check_adapters(self.model, self.role, without_adapter=self.without_adapter)
        self._switch = AdapterSwitch(self.model) if self.without_adapter else None
        self.state = fingerprint(self.model) if state is None else state
        if self._cache is not None and self.state != self._filled_by:
            self.reset()

    @in_mode_of_cache
    def crop(self, length: int) -> None:
        """Take back all but the first `length` columns, and free the states that were kept for taking back more.

        A cache that can't take them back, as one with a sliding window that moved on, is dropped. What is read next
        fills it anew.
        """
        if self._texts is None:
            return
        surplus = max(self._texts.columns - length, 0)
        if self._cache is not None:
            if surplus == 0:
                forget_past(self._cache)
            elif can_drop(self._cache, surplus) and not self._switches_between(length, self._texts.columns):
                drop_columns(self._cache, [surplus] * len(self._texts.ids))
            else:
                self._cache = None
        if surplus:
            self._texts = self._texts.crop(length)

    def _switches_between(self, shorter: int, longer: int) -> bool:
        switch = self.longrope_switch
        return switch is not None and shorter <= switch < longer

    @in_mode_of_cache
    def select_rows(self, rows: list[int]) -> None:
        """Keep only some rows, in this order."""
        if self._texts is not None:
            self._inputs.select_rows(rows, len(self._texts.ids))
        self._select_cached_rows(rows)
        if self._texts is not None and self.longrope_switch is not None:
            self._drop_padding()
        elif self._texts is not None:
            self._keep_texts(self._texts.without_moved(), [0] * len(self._texts.ids))

    def _keep_texts(self, texts: PaddedTexts, counts: list[int]) -> None:
        """Go on with `texts`, which lack the last `counts[b]` columns of each row b, and perhaps some first ones.

        The cache drops the same columns.
        """
        assert self._texts is not None
        first = self._texts.columns - min(counts) - texts.columns
        if self._cache is not None and (first or any(counts)):
            drop_columns(self._cache, counts, first=first)
        self._texts = texts

    def _drop_padding(self) -> None:
        """Drop the columns that are padding in all rows, so that the longest text is as long as it has columns."""
        assert self._texts is not None
        padding = int(self._texts.full_mask.any(dim=0).long().argmax())
        if padding:
            self._cache = None
            self._texts = self._texts.without_first(padding)
            self._inputs.drop_prompt_columns(padding)

    def _select_cached_rows(self, rows: list[int]) -> None:
        if (before := self._tokens_before_activation) is not None:
            self._tokens_before_activation = before[send(rows, before.device)]
        if self._texts is not None:
            self._texts = self._texts.select_rows(rows)
            if self._cache is not None:
                select_cached_rows(self._cache, send(rows, self._texts.ids.device))

    def check_prompt(self, tokens: int) -> None:
        """Raise `ValueError` if there is no token to start from."""
        if tokens == 0:
            raise ValueError(f"The {self.role} needs at least one token to start from, got an empty prompt.")

    def check_length(self, tokens: int) -> None:
        """Raise `ContextLengthError` if the model can't read so many tokens."""
        if self.context_length is not None and tokens > self.context_length:
            raise ContextLengthError(
                f"The text has {tokens} tokens, but the {self.role} {describe(self.model)} ends at "
                f"{self.context_length} (max_position_embeddings). Generate less or take a {self.role} with a "
                "longer context."
            )

    def _forward(self, texts: PaddedTexts, logits_to_keep: int, chunk_size: int | None = None) -> torch.Tensor:
        """Forward what the cache does not hold yet of texts, which it holds then."""
        start = self.cached_length
        step = self._step(texts, start, chunk_size)
        stops = range(start + step, texts.columns - logits_to_keep + 1, step) if step and self.has_cache else ()
        for stop in stops:
            self._call(texts.crop(stop), stop - start, 1)
            start = stop
            if self._cache is not None:
                forget_past(self._cache)
            if self._cache is None or (self._reads_one_by_one and step != 1):
                self._cache, start = None, 0  # the rest can't be read behind the first chunk
                break
        logits = self._call(texts, texts.columns - start, logits_to_keep)
        self.forwards += 1
        self._texts = texts
        return logits[:, -logits_to_keep:]

    def _step(self, texts: PaddedTexts, start: int, chunk_size: int | None) -> int | None:
        """How many columns of texts, of which `start` were read, a forward may read at once; None for all."""
        if self._reads_one_by_one and start:
            return 1  # none of them is padding, since these caches hold whole texts
        # Layers with states ignore the mask of a single column, and would take padding for a token.
        least = 1 if texts.mask is None else 2
        step = None if chunk_size is None else max(chunk_size, least)
        return None if self._reads_one_by_one and step != 1 else step

    def _call(self, texts: PaddedTexts, new: int, logits_to_keep: int) -> torch.Tensor:
        """One forward over the last `new` columns of texts."""
        inputs = self._inputs.build(texts, new, logits_to_keep, is_first=self._cache is None, **self._cache_inputs())
        if self._tokens_before_activation is not None:
            inputs["alora_offsets"] = active_columns(self._tokens_before_activation, texts.full_mask).tolist()
        output: Any = self.model(**inputs) if self._switch is None else self._switch.forward(**inputs)
        self._take_cache(output)
        logits: torch.Tensor = output.logits
        return logits

    def _cache_inputs(self) -> dict[str, Any]:
        """The inputs of a forward that hand it the cache, or tell it to use none."""
        return {self._inputs.cache_name: self._cache, "use_cache": True} if self.has_cache else {"use_cache": False}

    def _take_cache(self, output: object) -> None:
        """Go on with the cache in the output of a forward, which may be another one than it was given."""
        if not self.has_cache:
            return
        cache = getattr(output, self._inputs.cache_name, None)
        if not isinstance(cache, Cache):
            self.has_cache, self._cache = False, None
            warnings.warn(
                f"The {self.role} {describe(self.model)} returned no `Cache` that could be kept between steps (got "
                f"{type(cache).__name__}), so that it reads the whole text again for every token.",
                stacklevel=2,
            )
            return
        if cache is not self._cache or self._rollback is None:
            self._rollback = self._inputs.rollback(rollback_of(cache))
            self._reads_one_by_one = reads_one_by_one(self.model, self._rollback)
            # Only now: a prefill that records its past keeps states that sliding windows could drop.
            record_past(cache)
        if self._rollback in FROM_COPIES:
            trim_convolutions(cache)
        self._cache = cache

    def _readable(self, ids: torch.Tensor) -> torch.Tensor:
        """Replace ids beyond the model's vocabulary, which the base can emit, but the model can't read."""
        return ids if self._stand_in is None else ids.masked_fill(ids >= self.vocabulary, self._stand_in)
