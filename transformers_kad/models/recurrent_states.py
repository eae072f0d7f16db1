"""Copies of what a cache can't take back: recurrent states, or the cache as a whole."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from .cache_rollback import FROM_COPIES, Rollback, has_recurrent_state, layers_of

# Model types whose forward of several tokens behind a recurrent state is equal to forwards of one token at a time.
# Others ignore the state in a longer forward (Mamba, Jamba, Zamba), clamp the step size in a longer forward alone
# (Nemotron-H, Zamba 2), or are not known.
_READS_SEVERAL_FROM_STATE = frozenset(
    {
        "bailing_hybrid",
        "bamba",
        "falcon_h1",
        "granitemoehybrid",
        "kimi_linear",
        "mamba2",
        "olmo_hybrid",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen3_5_moe_text",
        "qwen3_5_text",
        "qwen3_next",
        "qwen4_exp",
        "qwen4_exp_text",
        "zaya",
    }
)
# Model types in which a token of a forward sees those behind it, though nothing in the configuration says so.
_NOT_CAUSAL = frozenset({"cpmant", "xlm", "xlnet"})


def reads_one_by_one(model: PreTrainedModel, rollback: Rollback | None) -> bool:
    """Whether a model must read one token in each forward, since several in one would change what it says.

    `rollback` is that of its cache; None without a cache.
    """
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "is_decoder", True) is False or config.model_type in _NOT_CAUSAL:
        return True
    return rollback in FROM_COPIES and config.model_type not in _READS_SEVERAL_FROM_STATE


class StateCopy:
    """A copy of what a cache can't take back, which can be put back row by row.

    Args:
        cache: the cache, which goes on to change.
        rollback: `BY_STATE` to copy recurrent states, `BY_COPY` to copy the whole cache.
    """

    def __init__(self, cache: Cache, rollback: Rollback) -> None:
        self._whole = copy.deepcopy(cache) if rollback is Rollback.BY_COPY else None
        # Of each layer with states: its convolution states and its recurrent ones, by their numbers, (B, ...) each.
        self._states: list[list[dict[int, torch.Tensor | None]]] = []
        if rollback is Rollback.BY_STATE:
            self._states = [[_copied(states) for states in _states_of(layer)] for layer in _layers_with_states(cache)]

    @property
    def cache(self) -> Cache:
        """The whole cache, to be used instead of the other; this copy is spent then."""
        assert self._whole is not None
        return self._whole

    @staticmethod
    def restore_rows(cache: Cache, copies: Sequence["StateCopy"]) -> None:
        """Put the states of row b back to those of `copies[b]`."""
        alike = all(other is copies[0] for other in copies)
        for number, layer in enumerate(_layers_with_states(cache)):
            for kind, states in enumerate(_states_of(layer)):
                for index, state in states.items():
                    of_rows = [other._states[number][kind][index] for other in copies]
                    if state is None or of_rows[0] is None:
                        states[index] = None
                    elif alike:
                        states[index] = of_rows[0].clone()
                    else:
                        rows = [values[row] for row, values in enumerate(of_rows) if values is not None]
                        states[index] = torch.stack(rows)


def _layers_with_states(cache: Cache) -> list[Any]:
    return [layer for layer in layers_of(cache) if has_recurrent_state(layer)]


def _states_of(layer: Any) -> tuple[dict[int, torch.Tensor | None], dict[int, torch.Tensor | None]]:
    return layer.conv_states, layer.recurrent_states


def _copied(states: dict[int, torch.Tensor | None]) -> dict[int, torch.Tensor | None]:
    return {index: None if state is None else state.clone() for index, state in states.items()}
