"""A small model beside the base: its cache, its padding.

`CachedModel` answers one question, "what are your logits at the last positions of these texts?", and forwards
only what its cache does not hold yet. It follows texts that grow token by token, drafts that are partly
refused, beams that are reordered, and chats that continue in a later call.
"""

import inspect
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from transformers import Cache, GenerationMixin, PreTrainedModel

from .adapters import (
    columns_since,
    first_difference,
    forward_without_adapter,
    model_below,
    tokens_before_activation,
    why_not_before_alignment,
    why_not_followable,
)
from .cache_rollback import can_crop, can_have_holes, gather_columns, layers_of, record_past, trim
from .fingerprint import fingerprint

# A cache of rows that took back different numbers of tokens is rebuilt without the holes when it could be shorter by
# more than this share.
LARGEST_SHARE_OF_HOLES = 0.05

# What `generate` passes for every token of the text, and goes on with behind the prompt.
PER_TOKEN = ("position_ids", "token_type_ids")


class ContextLengthError(ValueError):
    """A text is longer than a model's context."""


class UnusableLogitsError(ValueError):
    """A model's logits are NaN, +inf or all -inf."""


class CachedModel:
    """A causal LM with a cache of its own that is rolled back or refilled as the texts demand.

    Args:
        model: a causal LM or a `PeftModel`.
        role: what error messages call it ("proxy", "reference").
        without_adapter: forward a `PeftModel` with its adapter switched off.
    """

    def __init__(self, model: PreTrainedModel, role: str = "proxy", *, without_adapter: bool = False) -> None:
        self.model = model
        self.role = role
        self.without_adapter = without_adapter
        self.forwards = 0
        self.context_length = context_length(model)
        self._last_position = None if self.context_length is None else self.context_length - 1
        # The model below an adapter prepares the inputs, as in `generate`.
        self._below: Any = model_below(model)
        self.accepted_inputs = frozenset(inspect.signature(self._below.forward).parameters)
        self._takes_position_ids = "position_ids" in self.accepted_inputs
        self._takes_logits_to_keep = "logits_to_keep" in self.accepted_inputs
        self._positions_of_its_own = (
            type(self._below)._prepare_position_ids_for_generation
            is not GenerationMixin._prepare_position_ids_for_generation
        )
        self.vocabulary = model.get_input_embeddings().weight.shape[0]  # the ids that it can read
        config = model.config.get_text_config(decoder=True)
        candidates = (getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None))
        self._stand_in = next((i for i in candidates if isinstance(i, int) and 0 <= i < self.vocabulary), 0)
        self._inactive: torch.Tensor | None = None  # (B,): tokens before the activated LoRA of each row
        self._now: Hashable = None
        self.use_prompt_inputs({})
        self.reset()

    @property
    def state(self) -> Hashable:
        """The model's `fingerprint` when it was last refreshed."""
        return self._now

    def reset(self) -> None:
        """Drop the cache."""
        self._cache: Cache | None = None
        self._ids: torch.Tensor | None = None  # (B, n): the tokens that the cache holds
        self._mask: torch.Tensor | None = None  # (B, n)
        self._padded = False
        self._tokens: torch.Tensor | None = None  # (B,), on the CPU: how many tokens of each row are no padding
        self._state: Hashable = None

    def use_prompt_inputs(
        self, inputs: Mapping[str, torch.Tensor], attention_mask: torch.Tensor | None = None
    ) -> None:
        """For a call, take inputs that it passes for every token of its prompts; those that the model knows.

        Args:
            inputs: `position_ids` and `token_type_ids` of the prompts, `(..., B, P)` each. Tokens after the prompt are
                counted on from the last position, and have the last type, as in `generate`.
            attention_mask: of the prompts, `(B, P)`; no padding by default.
        """
        device = self.model.device
        self._given = {name: value.to(device) for name, value in inputs.items() if name in self.accepted_inputs}
        self._given_columns = max((value.shape[-1] for value in self._given.values()), default=0)
        self._shift: torch.Tensor | None = None  # a row's next position, less the number of its tokens
        if (positions := self._given.get("position_ids")) is not None:
            count = positions.new_tensor([positions.shape[-1]])
            if attention_mask is not None:
                count = (attention_mask != 0).sum(dim=-1, keepdim=True).to(positions)
            self._shift = positions[..., -1:] - count + 1

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
        self._now = fingerprint(self.model) if state is None else state
        if self._cache is not None and self._now != self._state:
            self.reset()

    def crop(self, length: int) -> None:
        """Take back all but the first `length` tokens, and let go of what only taking back would need.

        Layers with a sliding window can only take back what came since they were last settled.
        """
        if self._ids is None or self._mask is None:
            return
        surplus = max(self._ids.shape[1] - length, 0)
        if self._cache is not None:
            if surplus == 0:
                trim(self._cache)
            elif can_crop(self._cache, surplus):
                self._cache.crop(-surplus)
            else:
                self._cache = None  # what follows fills it anew, with the texts that are noted here
        if surplus:
            self._ids, self._mask, self._tokens = self._ids[:, :length], self._mask[:, :length], None

    def keep_columns(self, kept: torch.Tensor) -> None:
        """Of the last k columns logits_to_keep those that are marked, `(B, k)` boolean, on the CPU; each row its own.

        What no row keeps at the end is cropped. Other holes stay behind the attention mask, until they are so many
        that the cache is rebuilt without them.

        Raises:
            ValueError: several rows, and a cache with layers where holes make a difference.
        """
        assert self._ids is not None and self._mask is not None
        if len(kept) > 1:
            self._check_holes_are_hidden()
        begin = self._ids.shape[1] - kept.shape[1]
        kept = kept[:, : int(kept.any(dim=0).nonzero().max()) + 1] if bool(kept.any()) else kept[:, :0]
        mask, tokens = self._mask, self._tokens
        self.crop(begin + kept.shape[1])
        if len(kept) == 1 and not (self._padded and self._cache is not None and can_have_holes(self._cache)):
            return
        if tokens is None:
            tokens = mask[:, :begin].sum(dim=-1).cpu()
        self._tokens = tokens + kept.sum(dim=-1)
        if not kept.all():
            self._padded = True
            self._mask = torch.cat([mask[:, :begin], kept.to(mask)], dim=-1)
        longest, columns = int(self._tokens.max()), self._ids.shape[1]
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
        """Move every row's tokens to the end of `length` columns, with what is left of the padding before them."""
        assert self._ids is not None and self._mask is not None
        columns = self._mask.argsort(dim=-1, stable=True)[:, self._mask.shape[1] - length :]
        if self._cache is not None:
            gather_columns(self._cache, columns)
        self._given_columns = 0  # the prompt is no longer where it was, and was read
        self._ids, self._mask = self._ids.gather(1, columns), self._mask.gather(1, columns)

    def select_rows(self, rows: list[int]) -> None:
        """Keep only some rows, in this order."""
        if self._inactive is not None:
            self._inactive = self._inactive[rows]
        if self._ids is None or self._mask is None:
            return
        index = torch.tensor(rows, device=self._ids.device)
        before = len(self._ids)
        self._given = {name: repeat_rows(value, before)[..., index, :] for name, value in self._given.items()}
        self._shift = None if self._shift is None else repeat_rows(self._shift, before)[..., index, :]
        if self._cache is not None:
            self._cache.batch_select_indices(index)
        self._ids, self._mask = self._ids[index], self._mask[index]
        self._tokens = None if self._tokens is None else self._tokens[rows]

    def extend(self, ids: torch.Tensor, mask: torch.Tensor | None = None, *, logits_to_keep: int = 1) -> torch.Tensor:
        """`logits` of the texts held, continued by `ids` `(B, n)`; `mask` `(B, n)` has zeros at what is no token."""
        assert self._ids is not None and self._mask is not None
        ids = self._legible(ids.to(self._ids))
        self._note_padding(mask)
        texts = torch.cat([self._ids, ids], dim=-1)
        if not self._padded:
            mask = torch.ones_like(texts)
        else:
            mask = torch.cat([self._mask, torch.ones_like(ids) if mask is None else mask.to(self._mask)], dim=-1)
        try:
            return self._forward(texts, mask, logits_to_keep, None)
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

    @property
    def cached_length(self) -> int:
        """How many tokens of each text the cache holds."""
        return 0 if self._ids is None or self._cache is None else self._ids.shape[1]

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
                at their end that were taken back. Nothing is compared then.
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
            lengths = torch.full((len(input_ids),), length, device=input_ids.device)
            if attention_mask is not None:
                lengths = (attention_mask != 0).sum(dim=-1)
            if ended is not None:
                lengths = lengths.masked_fill(ended.to(lengths.device), 0)
            self.check_length(int(lengths.max()))
        device = self.model.device
        # Copies: the tensors may be the caller's own, to be written to later.
        input_ids = self._legible(input_ids.to(device).clone())
        mask = torch.ones_like(input_ids)
        if attention_mask is not None:
            mask = (attention_mask != 0).to(mask)  # a mask may be of any type
        self._tokens = None  # it was of the texts of the last call
        try:
            self._align(input_ids, mask, upto=length - logits_to_keep, continues=continues)
            self._activate(input_ids[:, :prompt_length], mask)
            self._note_padding(attention_mask)
            return self._forward(input_ids, mask, logits_to_keep, chunk_size)
        except BaseException:
            self.reset()  # some layers of the cache may be ahead of others
            raise

    def _align(self, input_ids: torch.Tensor, mask: torch.Tensor, *, upto: int, continues: bool) -> None:
        """Make the cache hold a prefix of every text, at most `upto` tokens long, as long as can be had."""
        if self._cache is None or upto <= 0:
            common = 0
        elif continues:
            common = min(self.cached_length, upto)
        else:
            common = min(self._match_rows(input_ids, mask), upto)
        if common < self.cached_length:
            self.crop(common)
        if common <= 0 or self._cache is None:
            self._begin_anew()

    def _begin_anew(self) -> None:
        self.reset()
        self._state = fingerprint(self.model) if self._now is None else self._now

    def _activate(self, prompt: torch.Tensor, mask: torch.Tensor) -> None:
        """Find where the prompts `(B, L)` of the texts `(B, S)` activate an aLoRA; drop what was read otherwise."""
        if self.without_adapter:
            return
        before, prompt_mask = self._inactive, mask[:, : prompt.shape[1]]
        self._inactive = tokens_before_activation(self.model, prompt, prompt_mask)
        if self._cache is not None and self._inactive is not None and before is not None:
            common = first_difference(self._inactive, before, mask)
            if common < self.cached_length:
                self.crop(common)
            if self.cached_length == 0:
                self._begin_anew()

    def _match_rows(self, input_ids: torch.Tensor, mask: torch.Tensor) -> int:
        """Give every text the cached row that shares its longest prefix; return the shortest of these."""
        assert self._cache is not None and self._ids is not None and self._mask is not None
        if not all(hasattr(layer, "batch_select_indices") for layer in layers_of(self._cache)):
            return 0  # linear attention has one state for the whole text
        width, rows = min(self.cached_length, input_ids.shape[1]), len(self._ids)
        cached = 2 * self._ids[:, :width] + self._mask[:, :width]
        texts, row_of = (2 * input_ids[:, :width] + mask[:, :width]).unique(dim=0, return_inverse=True)
        order = torch.arange(rows, device=texts.device)
        lengths, first_best = [], []
        for text in texts:  # one by one: all pairs at once would take memory quadratic in the rows
            shared = (cached == text).long().cumprod(-1).sum(-1)
            # The first of equally good rows: argmax leaves open which one it returns.
            first_best.append((shared * rows - order).argmax())
            lengths.append(shared[first_best[-1]])
        common = int(torch.stack(lengths).min())
        parents = torch.stack(first_best)[row_of]
        if common > 0 and parents.tolist() != list(range(rows)):
            self._cache.batch_select_indices(parents)
            self._ids, self._mask = self._ids[parents], self._mask[parents]
            self._inactive = None if self._inactive is None else self._inactive[parents]
        return common

    def _forward(
        self, input_ids: torch.Tensor, mask: torch.Tensor, logits_to_keep: int, chunk_size: int | None
    ) -> torch.Tensor:
        """Forward what the cache does not hold yet of texts `(B, L)`, which it then holds."""
        length, start = input_ids.shape[1], self.cached_length
        stops = list(range(start + chunk_size, length - logits_to_keep, chunk_size)) if chunk_size else []
        # What a call within `torch.inference_mode` leaves in the cache is to be written to by any later call.
        with torch.inference_mode(self._in_inference_mode()), torch.no_grad():
            for stop in stops:
                self._call(input_ids[:, :stop], mask[:, :stop], stop - start, 1)
                start = stop
                if self._cache is not None:
                    trim(self._cache)
            logits = self._call(input_ids, mask, length - start, logits_to_keep)
        self.forwards += 1
        self._ids, self._mask = input_ids, mask
        return logits[:, -logits_to_keep:]

    def _note_padding(self, mask: torch.Tensor | None) -> None:
        """From the first padding or hole on, forwards need the mask."""
        self._padded = self._padded or (mask is not None and not bool(mask.all()))

    def _legible(self, ids: torch.Tensor) -> torch.Tensor:
        """An id beyond the model's vocabulary can be emitted by the base, but not be read here."""
        return ids.masked_fill(ids >= self.vocabulary, self._stand_in)

    def _call(self, ids: torch.Tensor, mask: torch.Tensor, new: int, logits_to_keep: int) -> torch.Tensor:
        """One forward over the last `new` columns of texts `(B, S)`."""
        inputs = self._inputs(ids, mask, new, logits_to_keep, past_key_values=self._cache, use_cache=True)
        if self._inactive is not None:
            inputs["alora_offsets"] = columns_since(self._inactive, mask).tolist()
        output = forward_without_adapter(self.model, **inputs) if self.without_adapter else self.model(**inputs)
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
        if self._padded:
            self._check_holes(mask, cache)
        return output.logits

    def _inputs(
        self, ids: torch.Tensor, mask: torch.Tensor, new: int, logits_to_keep: int, /, **further: Any
    ) -> dict[str, Any]:
        """What `generate` would pass to the model for the last `new` columns of texts `(B, S)`."""
        if self._padded:
            further["attention_mask"] = mask
        positions = self._positions(ids, mask, new) if self._takes_position_ids else None
        if positions is not None:
            further["position_ids"] = positions
        if (types := self._given.get("token_type_ids")) is not None:
            further["token_type_ids"] = self._of_prompt_and_behind(types, types[..., -1:], ids)
        if self._takes_logits_to_keep:
            further["logits_to_keep"] = logits_to_keep
        inputs = self._below.prepare_inputs_for_generation(
            ids, next_sequence_length=new, is_first_iteration=self._is_first_forward(), **further
        )
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = logits_to_keep  # some models set their own
        return inputs

    def _is_first_forward(self) -> bool:
        return self._cache is None

    def _positions(self, ids: torch.Tensor, mask: torch.Tensor, new: int) -> torch.Tensor | None:
        """Positions of texts `(B, S)`, of which the last `new` columns are to be read, as `generate` counts them.

        `(..., B, S)`, which the model itself cuts to what it reads.
        """
        if "position_ids" not in self._given:
            if self._positions_of_its_own:
                return self._below._prepare_position_ids_for_generation(ids, {"attention_mask": mask})
            if not self._padded:
                return torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
        counted = (mask.cumsum(-1) - 1).clamp(min=0)
        before_draft = ids.shape[1] - new  # the first column to be read is no draft
        if self._shift is None:
            return self._within_context(counted, before_draft)
        counted = self._within_context(counted, max(before_draft, self._given_columns - 1))
        behind = counted + repeat_rows(self._shift, len(ids))
        return self._of_prompt_and_behind(self._given["position_ids"], behind, ids)

    def _within_context(self, positions: torch.Tensor, before_draft: int) -> torch.Tensor:
        """Positions `(B, S)`, counted in tokens, within the context: drafts of a row that ends with it may lie beyond.

        Nobody reads what comes of such drafts. `before_draft` is the last column that is no draft.
        """
        if self._last_position is None:
            return positions
        return positions.clamp(max=self._last_position)  # longer texts are refused

    def _of_prompt_and_behind(self, given: torch.Tensor, behind: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Values for texts `(B, S)`: of the prompt's columns those given `(..., B, P)`, then those for behind it.

        `behind` has one value for each column of the texts, or one for all.
        """
        columns = ids.shape[1]
        given = repeat_rows(given[..., : min(self._given_columns, columns)], len(ids))
        behind = repeat_rows(behind, len(ids)) if behind.shape[-1] == 1 else behind
        behind = behind.expand(*behind.shape[:-1], columns)[..., given.shape[-1] :]
        return torch.cat([given.expand(*behind.shape[:-1], -1), behind], dim=-1)

    def _in_inference_mode(self) -> bool:
        return False

    def _check_holes(self, mask: torch.Tensor, cache: Cache) -> None:
        """A sliding window counts columns, so what is masked between tokens would push tokens out of it."""
        windows = [layer.sliding_window for layer in layers_of(cache) if getattr(layer, "is_sliding", False)]
        if windows and mask.shape[1] > min(windows) and bool((mask[:, 1:] < mask[:, :-1]).any()):
            raise ValueError(
                f"The {self.role} {describe(self.model)} has a sliding window of {min(windows)} tokens, and this text "
                "is longer and has gaps: a mask with zeros between tokens, or tokens of the base that it spells in "
                "several of its own in some rows of the batch only. Generate one sequence at a time, without such a "
                "mask."
            )


def check_adapters(model: PreTrainedModel, role: str, *, without_adapter: bool = False) -> None:
    """Raise `ValueError` unless a model with its adapters can serve beside the base, or as it was before alignment."""
    reason = why_not_followable(model)
    if reason is not None:
        raise ValueError(f"The {role} {describe(model)} {reason}; use an adapter that changes weights, such as LoRA.")
    reason = why_not_before_alignment(model) if without_adapter else None
    if reason is not None:
        raise ValueError(
            f"{describe(model)} with its adapter switched off is not the proxy before alignment: {reason}. Pass that "
            "model as `reference=`."
        )


def repeat_rows(values: torch.Tensor, rows: int) -> torch.Tensor:
    """Values of the prompts `(..., B, n)`, each repeated for its beams or return sequences: `(..., rows, n)`."""
    return values if values.shape[-2] == rows else values.repeat_interleave(rows // values.shape[-2], dim=-2)


def context_length(model: PreTrainedModel) -> int | None:
    """The longest text that a model takes, in tokens; None if its configuration does not say."""
    length = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def describe(model: PreTrainedModel) -> str:
    """A model's class and where it was loaded from, for error messages."""
    return f"{type(model).__name__} ({source_of(model)})"


def source_of(model: PreTrainedModel) -> str:
    """The folder or Hub id that a model was loaded from; of a `PeftModel` that of the model below the adapter."""
    return getattr(model.config, "_name_or_path", "") or "unnamed"


def is_unusable(logits: torch.Tensor) -> torch.Tensor:
    """Which rows of logits `(..., V)` have no likeliest token: NaN, +inf, or all -inf. Shape `(...)`, boolean."""
    return ~(logits.amax(-1).abs() < torch.inf)


def unusable_logits_error(
    role: str, model: PreTrainedModel | None, position: int, row: int = 0
) -> UnusableLogitsError:
    """The error for such a row: which model, which position of the text (in tokens), which sequence."""
    name = f"{role} {describe(model)}" if model is not None else role
    return UnusableLogitsError(
        f"The logits of the {name} for position {position} of sequence {row} are NaN, +inf or all -inf. Check the "
        "weights and the dtype (float16 overflows where bfloat16 does not), and for the base the processors before "
        "KAD, which may have banned every token."
    )
