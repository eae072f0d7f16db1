"""The arguments of a call of `generate`, with the precedence that `generate` gives them."""

import copy
from typing import Any

import torch
from transformers import EosTokenCriteria, PreTrainedModel, StoppingCriteria, StoppingCriteriaList, StopStringCriteria

from ..models.by_version import CACHE


class CallArguments:
    """What a call passes, and what the generation configurations say where it passes nothing.

    Args:
        model: the model that generates.
        arguments: of `generate`, by name.
    """

    def __init__(self, model: PreTrainedModel, arguments: dict[str, Any]) -> None:
        self.model, self.arguments = model, arguments
        self.config = arguments.get("generation_config")

    def get(self, name: str, default: Any = None) -> Any:
        """A setting: from the arguments, the `generation_config` passed, or the model's own."""
        if name in self.arguments:
            value = self.arguments[name]
        else:
            value = getattr(self.config, name, None)
            if value is None:
                value = getattr(self.model.generation_config, name, None)
        return default if value is None else value

    @property
    def input_ids(self) -> torch.Tensor | None:
        """The prompts `(B, P)`, under either of their names."""
        ids = self.arguments.get("inputs")
        return self.arguments.get("input_ids") if ids is None else ids

    @property
    def cache(self) -> Any:
        """The cache passed, under either of its names; None without one."""
        return self.arguments.get(CACHE, self.arguments.get("past_key_values"))

    @property
    def beams(self) -> int:
        """Beams for each prompt."""
        return int(self.get("num_beams", 1))

    @property
    def stopping_criteria(self) -> list[StoppingCriteria]:
        """The criteria passed."""
        return list(self.arguments.get("stopping_criteria") or [])

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The ids that `generate` ends a text at, unless the criteria passed say otherwise."""
        return frozenset(as_id_list(self.get("eos_token_id")))

    @property
    def ending_ids(self) -> frozenset[int]:
        """The ids that end a text: an `EosTokenCriteria` of the user's takes the place of `generate`'s own."""
        own = [criterion for criterion in self.stopping_criteria if type(criterion) is EosTokenCriteria]
        return frozenset(end for criterion in own for end in as_id_list(criterion.eos_token_id)) or self.eos_token_ids

    @property
    def pad_token_id(self) -> int | None:
        """As `generate` sees it: without one, the first end-of-sequence id fills finished rows."""
        pad = self.get("pad_token_id")
        candidates = as_id_list(self.get("eos_token_id") if pad is None else pad)
        return candidates[0] if candidates else None

    def attention_mask(self) -> torch.Tensor | None:
        """The mask passed, or what `generate` infers from padding in the prompt; None for no padding."""
        mask, ids = self.arguments.get("attention_mask"), self.input_ids
        if mask is None and ids is not None:
            pad = self.get("pad_token_id")
            if pad is not None and int(pad) not in self.eos_token_ids:
                mask = ids.ne(int(pad)).long()
        return None if mask is None or bool((mask != 0).all()) else (mask != 0).long()

    def with_stop_strings_as_criterion(self) -> dict[str, Any]:
        """The arguments of the same call with its stop strings, if it has any, as one of the stopping criteria.

        Raises:
            ValueError: stop strings without the tokenizer that they need.
        """
        arguments = dict(self.arguments)
        stop_strings, tokenizer = self.get("stop_strings"), arguments.get("tokenizer")
        if stop_strings is None:
            return arguments
        if tokenizer is None:
            raise ValueError(f"`stop_strings={stop_strings!r}` needs the `tokenizer` argument of generate as well.")
        criteria = self.stopping_criteria
        if not any(type(criterion) is StopStringCriteria for criterion in criteria):  # the user's would replace it
            criteria = [StopStringCriteria(stop_strings=stop_strings, tokenizer=tokenizer), *criteria]
        arguments["stopping_criteria"] = StoppingCriteriaList(criteria)
        if self.config is not None:
            arguments["generation_config"] = copy.deepcopy(self.config)
            arguments["generation_config"].stop_strings = None
        own = self.model.generation_config.stop_strings  # counts where the config passed names none
        if self.config is None or "stop_strings" in arguments or own is not None:
            arguments["stop_strings"] = None
        return arguments


def as_id_list(value: Any) -> list[int]:
    """Token ids given as nothing, a number, a sequence or a tensor."""
    if value is None:
        return []
    if torch.is_tensor(value):
        return value.reshape(-1).tolist()
    return list(value) if isinstance(value, list | tuple) else [value]
