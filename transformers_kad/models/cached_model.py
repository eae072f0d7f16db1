"""A model that follows texts, with a cache of its own.

`CachedModel` answers one question, "what are your logits at the last positions of these texts?", and forwards
only what its cache does not hold yet. It follows texts that grow token by token, drafts that are partly
refused, beams that are reordered, and chats that continue in a later call.
"""

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from .activated_lora import active_columns, first_difference, tokens_before_activation
from .adapter_switch import AdapterSwitch
from .adapters import check_adapters
from .cache_rollback import (
    can_crop,
    can_have_holes,
    forget_past,
    gather_columns,
    layers_of,
    record_past,
    shortest_window,
)
from .fingerprint import fingerprint
from .forward_inputs import ForwardInputs
from .model_errors import ContextLengthError, context_length, describe
from .padding import PaddedTexts, match_rows

# A cache of rows that took back different numbers of tokens is rebuilt without the holes when it could be shorter by
# more than this share.
LARGEST_SHARE_OF_HOLES = 0.05


class CachedModel:
    """A causal LM with a cache of its own that is rolled back or refilled as the texts demand.

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
    """

    # A cache that a later call continues must not hold tensors of inference mode, which that call could not write to.
    cache_outlives_call = True
    # See `ForwardInputs`.
    counts_given_positions_only = False

    def __init__(self, model: PreTrainedModel, role: str = "proxy", *, without_adapter: bool = False) -> None:
        self.model = model
        self.role = role
        self.without_adapter = without_adapter
        self.forwards = 0
        self.context_length = context_length(model)
        self.vocabulary: int = model.get_input_embeddings().weight.shape[0]
        self._inputs = ForwardInputs(model, for_base=self.counts_given_positions_only)
        self.accepted_inputs = self._inputs.accepted
        self._switch = AdapterSwitch(model) if without_adapter else None
        config = model.config.get_text_config(decoder=True)
        candidates = (getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None), 0)
        # What is read in place of an id beyond the vocabulary; None to read it as it is.
        self._stand_in: int | None = next(i for i in candidates if isinstance(i, int) and 0 <= i < self.vocabulary)
        self._tokens_before_activation: torch.Tensor | None = None  # (B,), of an activated LoRA
        self.state: Hashable = None
        self.reset()

    @property
    def cached_length(self) -> int:
        """How many tokens of each text the cache holds."""
        return 0 if self._texts is None or self._cache is None else self._texts.columns

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
            ValueError: the model is in training mode, or its adapters can't serve (any longer).
        """
        if self.model.training:
            raise ValueError(
                f"The {self.role} {describe(self.model)} is in training mode, where dropout is active; call `.eval()`."
            )
        check_adapters(self.model, self.role, without_adapter=self.without_adapter)
        self._switch = AdapterSwitch(self.model) if self.without_adapter else None
        self.state = fingerprint(self.model) if state is None else state
        if self._cache is not None and self.state != self._filled_by:
            self.reset()

    def crop(self, length: int) -> None:
        """Take back all but the first `length` tokens, and free the states that were kept for taking back more.

        A cache that can't take them back, as one with a sliding window that moved on, is dropped. What is read next
        fills it anew.
        """
        if self._texts is None:
            return
        surplus = max(self._texts.columns - length, 0)
        if self._cache is not None:
            if surplus == 0:
                forget_past(self._cache)
            elif can_crop(self._cache, surplus):
                self._cache.crop(-surplus)
            else:
                self._cache = None
        if surplus:
            self._texts = self._texts.crop(length)

    def keep_columns(self, kept: torch.Tensor) -> None:
        """Of the last k columns keep those that are marked, `(B, k)` boolean, on the CPU; each row its own.

        The columns at the end that no row keeps are cropped. Other holes stay behind the attention mask, until they
        are so many that the cache is rebuilt without them.

        Raises:
            ValueError: several rows, and a cache with layers where holes make a difference.
        """
        assert self._texts is not None
        if len(kept) > 1:
            self._check_holes_are_hidden()
        texts, begin = self._texts, self._texts.columns - kept.shape[1]
        kept = kept[:, : int(kept.any(dim=0).nonzero().max()) + 1] if bool(kept.any()) else kept[:, :0]
        self.crop(begin + kept.shape[1])
        if len(kept) == 1 and (texts.mask is None or self._cache is None or not can_have_holes(self._cache)):
            return
        self._texts = texts.keep(begin, kept)
        assert self._texts.lengths is not None
        longest, columns = int(self._texts.lengths.max()), self._texts.columns
        if self._cache is None or columns - longest > LARGEST_SHARE_OF_HOLES * columns:
            self._close_holes(longest)

    def _check_holes_are_hidden(self) -> None:
        if self._cache is not None and not can_have_holes(self._cache):
            raise ValueError(
                "Rows of a batch accept different numbers of draft tokens, and the "
                f"{self.role} {describe(self.model)} has layers whose window or state would count the refused ones. "
                "Leave out `assistant_model`, or generate one sequence at a time."
            )

    def _close_holes(self, length: int) -> None:
        """Rebuild the cache with so many columns, as many as its longest text has tokens."""
        assert self._texts is not None
        self._texts, columns = self._texts.close_holes(length)
        if self._cache is not None:
            gather_columns(self._cache, columns)
        self._inputs.forget_prompt_columns()

    def select_rows(self, rows: list[int]) -> None:
        """Keep only some rows, in this order."""
        if self._texts is not None:
            self._inputs.select_rows(rows, len(self._texts.ids))
        self._select_cached_rows(rows)

    def _select_cached_rows(self, rows: list[int]) -> None:
        if self._tokens_before_activation is not None:
            self._tokens_before_activation = self._tokens_before_activation[rows]
        if self._texts is not None:
            index = torch.tensor(rows, device=self._texts.ids.device)
            self._texts = self._texts.select_rows(index)
            if self._cache is not None:
                self._cache.batch_select_indices(index)

    def extend(self, ids: torch.Tensor, mask: torch.Tensor | None = None, *, logits_to_keep: int = 1) -> torch.Tensor:
        """`logits` of the texts held, continued by `ids` `(B, n)`; `mask` `(B, n)` has zeros at what is no token."""
        assert self._texts is not None
        try:
            return self._forward(self._texts.extend(self._readable(ids.to(self._texts.ids)), mask), logits_to_keep)
        except BaseException:
            self.reset()
            raise

    def check_length(self, tokens: int) -> None:
        """Raise `ContextLengthError` if the model can't read so many tokens."""
        if self.context_length is not None and tokens > self.context_length:
            raise ContextLengthError(
                f"The text has {tokens} tokens, but the {self.role} {describe(self.model)} ends at "
                f"{self.context_length} (max_position_embeddings). Generate less or take a {self.role} with a "
                "longer context."
            )

    def logits(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        logits_to_keep: int = 1,
        continues: bool = False,
        chunk_size: int | None = None,
        prompt_length: int | None = None,
        ended: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The model's logits at the last n = `logits_to_keep` positions of each text, `(B, n, V)`, on its device.

        Args:
            input_ids: texts, `(B, L)`, padded on the left.
            attention_mask: `(B, L)`, zeros at padding; no padding by default.
            logits_to_keep: how many positions.
            continues: promise that the texts continue those of the last call, row by row, apart from tokens
                at their end that were taken back. Then nothing is compared.
            chunk_size: forward at most so many tokens at a time.
            prompt_length: of the L columns, how many are the prompt, in which an activated LoRA (aLoRA) looks for its
                invocation tokens; all by default.
            ended: which rows may be longer than the context, `(B,)` boolean, since nobody reads their logits.

        Raises:
            ValueError: the text is longer than the model's context.
        """
        length = input_ids.shape[1]
        if length == 0:
            raise ValueError(f"The {self.role} needs at least one token to start from, got an empty prompt.")
        if self.context_length is not None and length > self.context_length:
            tokens = torch.ones_like(input_ids) if attention_mask is None else attention_mask != 0
            lengths = tokens.sum(dim=-1)
            if ended is not None:
                lengths = lengths.masked_fill(ended.to(lengths.device), 0)
            self.check_length(int(lengths.max()))
        # Copies: the tensors may be the caller's own, to be written to later.
        ids = self._readable(input_ids.to(self.model.device).clone())
        texts = PaddedTexts(ids, None if attention_mask is None else (attention_mask != 0).to(ids))
        try:
            self._align(texts, prompt_length, upto=length - logits_to_keep, continues=continues)
            if self._texts is not None and self._texts.mask is not None:
                texts = PaddedTexts(ids, texts.full_mask)
            elif texts.mask is not None and bool(texts.mask.all()):
                texts = PaddedTexts(ids)
            return self._forward(texts, logits_to_keep, chunk_size)
        except BaseException:
            self.reset()  # some layers of the cache may be ahead of others
            raise

    def _align(self, texts: PaddedTexts, prompt_length: int | None, *, upto: int, continues: bool) -> None:
        """Make the cache hold the longest prefix of every text that it can, at most `upto` columns long."""
        activation = None
        if self._switch is None:
            prompt_mask = texts.full_mask[:, :prompt_length]
            activation = tokens_before_activation(self.model, texts.ids[:, :prompt_length], prompt_mask)
        common = 0
        if self._cache is not None and upto > 0:
            common = min(self.cached_length if continues else self._match_rows(texts), upto)
        if common > 0 and activation is not None and self._tokens_before_activation is not None:
            # What was read with the adapter active must not be continued where it is not, and vice versa.
            common = min(common, first_difference(activation, self._tokens_before_activation, texts.full_mask))
        self._tokens_before_activation = activation
        if common < self.cached_length:
            self.crop(common)
        if common <= 0 or self._cache is None:
            self.reset()
            self._filled_by = fingerprint(self.model) if self.state is None else self.state

    def _match_rows(self, texts: PaddedTexts) -> int:
        """Give every text the cached row that shares its longest prefix; return the shortest of these."""
        assert self._cache is not None and self._texts is not None
        if not all(hasattr(layer, "batch_select_indices") for layer in layers_of(self._cache)):
            return 0  # linear attention has one state for the whole text
        common, rows = match_rows(self._texts, texts)
        if common > 0 and rows != list(range(len(self._texts.ids))):
            self._select_cached_rows(rows)
        return common

    def _forward(self, texts: PaddedTexts, logits_to_keep: int, chunk_size: int | None = None) -> torch.Tensor:
        """Forward what the cache does not hold yet of texts, which it holds then."""
        start = self.cached_length
        stops = range(start + chunk_size, texts.columns - logits_to_keep, chunk_size) if chunk_size else ()
        keep_mode = torch.is_inference_mode_enabled() and not self.cache_outlives_call
        with torch.inference_mode(keep_mode), torch.no_grad():
            for stop in stops:
                self._call(texts.crop(stop), stop - start, 1)
                start = stop
                if self._cache is not None:
                    forget_past(self._cache)
            logits = self._call(texts, texts.columns - start, logits_to_keep)
        self.forwards += 1
        self._texts = texts
        return logits[:, -logits_to_keep:]

    def _call(self, texts: PaddedTexts, new: int, logits_to_keep: int) -> torch.Tensor:
        """One forward over the last `new` columns of texts."""
        cache = self._cache
        inputs = self._inputs.build(
            texts, new, logits_to_keep, is_first=cache is None, past_key_values=cache, use_cache=True
        )
        if self._tokens_before_activation is not None:
            inputs["alora_offsets"] = active_columns(self._tokens_before_activation, texts.full_mask).tolist()
        output: Any = self.model(**inputs) if self._switch is None else self._switch.forward(**inputs)
        cache = getattr(output, "past_key_values", None)
        if not isinstance(cache, Cache):
            raise ValueError(
                f"The {self.role} {describe(self.model)} returned no `Cache` that could be kept between steps "
                f"(got {type(cache).__name__}); KAD needs an attention model with a key-value cache."
            )
        if self._cache is None:
            # Only now: a prefill that records its past keeps states that sliding windows could drop.
            record_past(cache)
        self._cache = cache
        if texts.mask is not None:
            self._check_window(texts.mask, cache)
        logits: torch.Tensor = output.logits
        return logits

    def _readable(self, ids: torch.Tensor) -> torch.Tensor:
        """Replace ids beyond the model's vocabulary, which the base can emit, but the model can't read."""
        return ids if self._stand_in is None else ids.masked_fill(ids >= self.vocabulary, self._stand_in)

    def _check_window(self, mask: torch.Tensor, cache: Cache) -> None:
        """A sliding window counts columns, so that holes would push tokens out of it."""
        window = shortest_window(cache)
        if window is not None and mask.shape[1] > window and bool((mask[:, 1:] < mask[:, :-1]).any()):
            raise ValueError(
                f"The {self.role} {describe(self.model)} has a sliding window of {window} tokens, and this text "
                "is longer and has gaps: a mask with zeros between tokens, or tokens of the base that it spells in "
                "several of its own in some rows only. Generate one sequence at a time, without such a mask."
            )
