"""Positions and other inputs of a forward: what `generate` would pass to a model for the texts that it follows."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedModel

from ..utils.transfers import is_synchronous, send
from .adapters import model_below
from .attention_masks import prepare_masks
from .by_version import CACHE
from .cache_rollback import Rollback
from .model_errors import describe
from .model_settings import context_length
from .offloading import execution_device
from .padding import PaddedTexts

# What `generate` passes for every token of the text, and continues behind the prompt.
PER_TOKEN = ("position_ids", "token_type_ids")
# What `generate` prepares for every call, and a forward can do without.
_PREPARED = frozenset(
    {"cache", "cache_params", "cache_position", "logits_to_keep", "past_key_values", "position_ids", "use_cache"}
)


def further_inputs(model_kwargs: Mapping[str, Any]) -> list[str]:
    """The names of what a call passes to its model besides what `generate` prepares for every call.

    For models of images `generate` also prepares a dictionary, which is empty where there are none.
    """
    given = {name: value for name, value in model_kwargs.items() if name not in _PREPARED and value is not None}
    return sorted(name for name, value in given.items() if not isinstance(value, dict) or value)


def repeat_rows(values: torch.Tensor, rows: int) -> torch.Tensor:
    """Values of the prompts `(..., B, n)`, each repeated for its beams or return sequences: `(..., rows, n)`."""
    return values if values.shape[-2] == rows else values.repeat_interleave(rows // values.shape[-2], dim=-2)


class ForwardInputs:
    """The inputs of a model's forwards, with those that a call of `generate` passes for its prompts.

    Args:
        model: a causal LM or a `PeftModel`.
        for_base: count positions only where the call passes some, since `generate` prepared the rest, and read texts
            that are longer than the context, of which `generate` warns.
    """

    def __init__(self, model: PreTrainedModel, *, for_base: bool = False) -> None:
        # The model below an adapter prepares the inputs, as in `generate`. `Any`: transformers has no types for it.
        self._below: Any = model_below(model)
        self._for_base = for_base
        self.accepted = frozenset(inspect.signature(self._below.forward).parameters)
        self._counts_itself = (
            type(self._below)._prepare_position_ids_for_generation
            is not GenerationMixin._prepare_position_ids_for_generation
        )
        is_linear = CACHE not in self.accepted and "cache_params" in self.accepted  # before transformers 5.24
        self.cache_name = "cache_params" if is_linear else CACHE
        length = context_length(model)
        self.last_position = None if length is None else length - 1
        self.use_prompt_inputs({}, None)

    def use_prompt_inputs(self, inputs: Mapping[str, torch.Tensor], attention_mask: torch.Tensor | None) -> None:
        """For a call, take the inputs that it passes for every token of its prompts and that the model knows.

        Args:
            inputs: `position_ids` and `token_type_ids` of the prompts, `(..., B, P)` each. Positions after the prompt
                are counted on from the last one, and tokens after it have the last type, as in `generate`.
            attention_mask: of the prompts, `(B, P)`; None without padding.
        """
        device = execution_device(self._below)
        self._given = {name: value.to(device) for name, value in inputs.items() if name in self.accepted}
        self._given_columns = max((value.shape[-1] for value in self._given.values()), default=0)
        self._columns_have_moved = False
        if (positions := self._given.get("position_ids")) is not None:
            count = positions.new_tensor([positions.shape[-1]])
            if attention_mask is not None:
                count = (attention_mask != 0).sum(dim=-1, keepdim=True).to(positions)
            # A row's next position, less the number of its tokens: kept with the rest, since it has rows as well.
            self._given["shift"] = positions[..., -1:] - count + 1

    @property
    def has_token_types(self) -> bool:
        """Whether the call passes types of the prompts' tokens, by which some models read them in both directions."""
        return "token_type_ids" in self._given

    @property
    def has_prompt_inputs(self) -> bool:
        """Whether the call passes something for every token of its prompts."""
        return bool(self._given)

    def rollback(self, of_cache: Rollback) -> Rollback:
        """How tokens are taken back, as far as the model decides it, whose cache could do so in this way.

        Without `position_ids`, a model counts columns. With a mask or a bias of its own, or with windows over a cache
        of full attention, it may count those behind holes as well.
        """
        if of_cache not in (Rollback.BEHIND_MASK, Rollback.BY_ROW):
            return of_cache
        if "position_ids" not in self.accepted:
            return Rollback.IN_STEP
        return of_cache if self.masks_by_position else Rollback.BY_ROW

    @property
    def masks_by_position(self) -> bool:
        """Whether all layers have full attention, with a mask that `transformers` makes of the tokens' positions."""
        config = self._below.config.get_text_config(decoder=True)
        types = getattr(config, "layer_types", None)
        if types is None:
            windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
            types = ["other" if any(windows) else "full_attention"]
        return set(types) == {"full_attention"} and bool(getattr(self._below, "_supports_attention_backend", False))

    def select_rows(self, rows: list[int], before: int) -> None:
        """Of the rows of a batch, so many `before`, keep only some, in this order."""
        if self._given:
            index = send(rows, execution_device(self._below))
            self._given = {name: repeat_rows(value, before)[..., index, :] for name, value in self._given.items()}

    def drop_prompt_columns(self, columns: int) -> None:
        """Of what was passed for the prompts, leave out the first columns, which were padding."""
        self._given = {name: value if name == "shift" else value[..., columns:] for name, value in self._given.items()}
        self._given_columns = max(self._given_columns - columns, 0)

    def forget_prompt_columns(self) -> None:
        """From now on, only what follows the prompt is read, whose columns have moved."""
        self._given_columns, self._columns_have_moved = 0, True

    def build(self, texts: PaddedTexts, new: int, kept: int, *, is_first: bool, **further: Any) -> dict[str, Any]:
        """The inputs of a forward over the last `new` columns of texts, for the logits at the last `kept` positions.

        `is_first` says that none of the texts was read before. `further` are other inputs, such as the cache.

        Raises:
            ValueError: the columns of prompts, of which inputs were passed, have moved, and are to be read again.
        """
        if is_first and self._columns_have_moved and self._given:
            raise ValueError(
                f"{describe(self._below)} would have to read a batch again whose rows have moved, and `position_ids` "
                "or `token_type_ids` were passed for its prompts. Leave them out, or generate one sequence at a time."
            )
        if texts.mask is not None:
            further["attention_mask"] = texts.mask
        positions = self.positions(texts, new)
        if positions is not None:
            further["position_ids"] = positions
        if (types := self._given.get("token_type_ids")) is not None:
            last = repeat_rows(types[..., -1:], len(texts.ids))
            further["token_type_ids"] = self._behind_prompt(types, last.expand(*last.shape[:-1], texts.columns))
        if "logits_to_keep" in self.accepted:
            further["logits_to_keep"] = kept
        inputs: dict[str, Any] = self._below.prepare_inputs_for_generation(
            texts.ids, next_sequence_length=new, is_first_iteration=is_first, **further
        )
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = kept  # some models set their own
        if new > 1 and texts.mask is not None and inputs.get("attention_mask", texts.mask) is None:
            inputs["attention_mask"] = texts.mask  # Mamba leaves it out behind a cache, where chunks may have padding
        if not is_synchronous(texts.ids.device):
            prepare_masks(self._below, inputs, None if is_first else inputs.get(self.cache_name))
        return inputs

    def positions(self, texts: PaddedTexts, new: int) -> torch.Tensor | None:
        """The positions of texts `(B, S)` as `generate` counts them, `(..., B, S)`; None where it passes none.

        The model itself cuts them to the last `new` columns, which it reads.
        """
        given = self._given.get("position_ids")
        if given is None and (self._for_base or "position_ids" not in self.accepted):
            return None
        if given is None and self._counts_itself:
            further = {"attention_mask": texts.full_mask}
            own: torch.Tensor = self._below._prepare_position_ids_for_generation(texts.ids, further)
            return own
        if given is None and texts.mask is None:
            return torch.arange(texts.columns, device=texts.ids.device).expand(len(texts.ids), -1)
        counted = (texts.full_mask.cumsum(-1) - 1).clamp(min=0)
        before_draft = texts.columns - new  # the first column to be read is no draft
        if given is None:
            return self._within_context(counted, before_draft)
        counted = self._within_context(counted, max(before_draft, self._given_columns - 1))
        return self._behind_prompt(given, counted + repeat_rows(self._given["shift"], len(texts.ids)))

    def _within_context(self, positions: torch.Tensor, before_draft: int) -> torch.Tensor:
        """Positions `(B, S)` within the context, in which a draft of a row that ends with the context may not lie.

        Nobody reads the logits of such a draft. Up to the column `before_draft`, the base's positions are not changed.
        """
        if self.last_position is None:
            return positions
        if not self._for_base:
            return positions.clamp(max=self.last_position)
        reached = positions[:, : before_draft + 1].amax(dim=-1, keepdim=True)
        return torch.minimum(positions, reached.clamp(min=self.last_position))

    def _behind_prompt(self, given: torch.Tensor, behind: torch.Tensor) -> torch.Tensor:
        """Values for texts `(..., B, S)`: those `given` `(..., B, P)` for the prompt, and `behind` it the others."""
        rows, columns = behind.shape[-2:]
        given = repeat_rows(given[..., : min(self._given_columns, columns)], rows)
        return torch.cat([given, behind[..., given.shape[-1] :]], dim=-1)
