"""Attention masks over a static cache, made of the columns that a forward reads, within compiled code."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedModel

from .adapters import model_below
from .attention_masks import TAKING_PREPARED_MASKS, is_made_for_static_caches

# From the columns of queries (B, n, 1) and of keys (C,): which of them a query attends to, (B, n, C).
_Attends: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _full(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return keys <= queries


class ColumnMasks:
    """The masks that a model needs for texts that begin in the first column of a static cache.

    A model with layers of several kinds takes a dictionary with a mask for each, as `generate` makes it
    (`transformers.masking_utils.create_masks_for_generate`), and others take one mask.

    Args:
        model: a causal LM or a `PeftModel`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        below: Any = model_below(model)
        config = below.config.get_text_config(decoder=True)
        self._config = config
        types = getattr(config, "layer_types", None)
        window = getattr(config, "sliding_window", None)
        chunk = getattr(config, "attention_chunk_size", None)
        kinds: dict[str, _Attends] = {"full_attention": _full}
        if window is not None:
            kinds["sliding_attention"] = lambda queries, keys: (keys <= queries) & (keys > queries - window)
        if chunk is not None:
            kinds["chunked_attention"] = lambda queries, keys: (keys <= queries) & (keys // chunk == queries // chunk)
        self._attends: dict[str, _Attends] | _Attends
        if types is None:  # all layers are of the kind that was added last
            self._attends = list(kinds.values())[-1]
        else:
            self._attends = {name: kinds[name] for name in sorted(set(types) & set(kinds))}
        # Without `layer_types` some models know no window, whatever their configuration says.
        known = len(kinds) == 1 or is_made_for_static_caches(below)
        known = known if types is None else set(types) <= set(kinds)
        self._are_known = known and bool(getattr(below, "_supports_attention_backend", False))

    @property
    def are_taken(self) -> bool:
        """Whether the model attends by the masks that it is given, and by nothing else."""
        return self._are_known and self._config._attn_implementation in TAKING_PREPARED_MASKS

    def build(
        self, columns: torch.Tensor, capacity: int, dtype: torch.dtype
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """The masks of a forward that reads these columns `(B, n)`: `(B, 1, n, capacity)` each."""
        keys = torch.arange(capacity, device=columns.device)
        if isinstance(self._attends, dict):
            return {name: self._mask(attends, columns, keys, dtype) for name, attends in self._attends.items()}
        return self._mask(self._attends, columns, keys, dtype)

    def _mask(self, attends: _Attends, columns: torch.Tensor, keys: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        mask = attends(columns[:, :, None], keys)[:, None]
        if self._config._attn_implementation == "sdpa":
            return mask
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
