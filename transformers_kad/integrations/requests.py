"""The settings of a request, in programs that answer many requests with one proxy."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from transformers import PreTrainedModel

from ..configuration import KADConfig
from ..models.model_errors import ContextLengthError
from ..models.model_settings import context_length
from ..rules.registry import unknown_name_message


def config_of_request(default: KADConfig, asked: object, known: Sequence[str]) -> KADConfig | None:
    """The settings that guide a request, by what its field `kad` asks for.

    Args:
        default: the settings of the program.
        asked: None or True for the default, False for the base alone, or an object with any of the fields of a
            `KADConfig` that are known here, in place of the default's. The parameters of the default are kept for the
            same rule only.
        known: the names of the fields that a request may set, `rule` and `parameters` among them.

    Returns:
        The settings; None for the base alone.

    Raises:
        ValueError: an unknown name, or a value out of range.
        TypeError: something that is no object, or a parameter that the rule does not have.

    >>> asked = {"rule": "primal", "parameters": {"budget": 0.9}}
    >>> config_of_request(KADConfig(), asked, ["rule", "parameters"]).make_rule()
    PrimalDeferral(budget=0.9)
    """
    if asked is None or asked is True:
        return default
    if asked is False:
        return None
    if not isinstance(asked, Mapping):
        raise TypeError(
            '`kad` must be false or an object such as {"rule": "dual", "parameters": {"threshold": 0.4}}, got '
            f"{asked!r:.200}."
        )
    for name in asked:
        if name not in known:
            raise ValueError(unknown_name_message("field of `kad`:", name, known))
    parameters = asked.get("parameters", {})
    if not isinstance(parameters, Mapping):
        raise TypeError(f"`parameters` of `kad` must be an object, got {parameters!r:.200}.")
    rule = asked.get("rule", default.rule)
    kept = default.parameters if rule == default.rule else {}
    own = {name: value for name, value in asked.items() if name not in ("rule", "parameters")}
    return replace(default, rule=rule, parameters={**kept, **parameters}, **own)


def tokens_that_fit(max_new_tokens: int, prompt_length: int, *models: PreTrainedModel | None) -> int:
    """How many new tokens an answer may have, so that it ends where the shortest context of some models ends.

    Args:
        max_new_tokens: the most that the request asks for.
        prompt_length: the length of its prompt, in tokens.
        models: the models that read the text; None for one that is not there.

    Raises:
        ContextLengthError: the prompt alone fills the context.
    """
    lengths = [context_length(model) for model in models if model is not None]
    limit = min((length for length in lengths if length is not None), default=None)
    if limit is None:
        return max_new_tokens
    if prompt_length >= limit:
        raise ContextLengthError(f"The prompt has {prompt_length} tokens, and the models read at most {limit}.")
    return min(max_new_tokens, limit - prompt_length)
